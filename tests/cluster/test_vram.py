"""A sample of free memory is as old as it is: what has been loaded since is not free."""

from __future__ import annotations

from typing import Any

import pytest

from hydra_llm.cluster import Cluster
from hydra_llm.types import GB, Observation
from tests.cluster.ledgers import Clock, granted, ledger, seen, snapshot_of
from tests.helpers import BIG, LLAMA, loaded, request

REFRESH = 30.0


def sampled(
    at: float,
    free_gb: float,
    *warm: str,
    age: float = REFRESH,
    source: str = "dcgm-exporter",
    **about: Any,
) -> Observation:
    """A round of probes at some time, whose exporter had looked before."""
    return seen(
        at=at,
        free_gb=free_gb,
        models=(LLAMA, BIG),
        warm=warm,
        vram_source=source,
        vram_observed_at=at - age,
        **about,
    )


def free(cluster: Cluster) -> float | None:
    found = snapshot_of(cluster).free_vram_bytes
    return None if found is None else found / GB


def gb_of(model: str) -> float:
    return loaded(model)[model].size_vram_bytes / GB


def a_load(cluster: Cluster, clock: Clock, *, until: float, model: str = BIG) -> float:
    """Load a model by a request that then ends; the GB that were reserved for it."""
    lease = granted(cluster, request(model))
    clock.now = until
    cluster.first_byte(lease)
    cluster.succeeded(lease, None)
    return lease.placement.reserved_bytes / GB


# ------------------------------------------------------------------------ our own loads


def test_a_load_of_ours_counts_until_a_sample_is_younger_than_it() -> None:
    clock = Clock()
    cluster = ledger(sampled(100, 24.0), clock=clock)
    clock.now = 101.0
    reserved = a_load(cluster, clock, until=110.0)
    assert free(cluster) == pytest.approx(24.0 - reserved)

    # Seen after the load, sampled before it, three times over.
    for at in (111.0, 120.0, 139.9):
        cluster.observe(sampled(at, 24.0, BIG))
        assert free(cluster) == pytest.approx(24.0 - reserved)
        assert snapshot_of(cluster).vram_observed_at == at - REFRESH

    cluster.observe(sampled(140.0, 9.0, BIG))
    assert free(cluster) == 9.0


def test_a_load_under_way_counts_whatever_the_sample_says() -> None:
    clock = Clock()
    cluster = ledger(sampled(100, 24.0), clock=clock)
    lease = granted(cluster, request(BIG))
    reserved = lease.placement.reserved_bytes / GB

    cluster.observe(sampled(105, 24.0))

    assert free(cluster) == pytest.approx(24.0 - reserved)


def test_a_load_that_was_given_up_takes_nothing() -> None:
    cluster = ledger(sampled(100, 24.0))
    cluster.release(granted(cluster, request(BIG)))

    assert free(cluster) == 24.0


def test_a_sample_taken_at_the_very_end_of_a_load_has_it() -> None:
    clock = Clock()
    cluster = ledger(sampled(0, 24.0, age=0.0), clock=clock)
    reserved = a_load(cluster, clock, until=0.0)
    assert free(cluster) == pytest.approx(24.0 - reserved)

    cluster.observe(sampled(0, 9.0, BIG, age=0.0))

    assert free(cluster) == 9.0


def test_a_load_of_ours_counts_while_nobody_shows_what_is_loaded() -> None:
    clock = Clock()
    cluster = ledger(sampled(100, 24.0), clock=clock)
    clock.now = 101.0
    reserved = a_load(cluster, clock, until=110.0)

    cluster.observe(sampled(111, 24.0, loaded=None))

    assert free(cluster) == pytest.approx(24.0 - reserved)


def test_what_a_load_pushed_out_is_taken_over_by_it_and_the_rest_is_not_free_yet() -> None:
    clock = Clock()
    cluster = ledger(sampled(100, 2.5, BIG), clock=clock)
    clock.now = 101.0
    lease = granted(cluster, request(LLAMA))
    assert lease.placement.evicts == {BIG}
    clock.now = 110.0

    cluster.first_byte(lease)

    # BIG held much more than LLAMA takes, and no sample has said that it is free.
    assert free(cluster) == 2.5
    assert set(snapshot_of(cluster).loaded) == {LLAMA}

    cluster.observe(sampled(145, 15.0, LLAMA))
    assert free(cluster) == 2.5
    cluster.observe(sampled(180, 15.0, LLAMA))
    assert free(cluster) == 15.0


def test_of_a_load_that_a_probe_saw_before_we_did_the_greater_figure_counts() -> None:
    clock = Clock()
    cluster = ledger(sampled(100, 24.0), clock=clock)
    clock.now = 101.0
    lease = granted(cluster, request(BIG))
    # Of some models /api/ps shows only a part.
    cluster.observe(sampled(109, 24.0, loaded=loaded(BIG, size_vram_bytes=GB)))
    clock.now = 110.0

    cluster.first_byte(lease)

    assert free(cluster) == pytest.approx(24.0 - lease.placement.reserved_bytes / GB)


# ------------------------------------------------------------------- loads of others


def test_a_load_of_somebody_else_counts_until_a_sample_is_younger_than_it() -> None:
    cluster = ledger(sampled(100, 24.0))

    cluster.observe(sampled(105, 24.0, BIG))
    assert free(cluster) == pytest.approx(24.0 - gb_of(BIG))

    cluster.observe(sampled(134, 24.0, BIG))
    assert free(cluster) == pytest.approx(24.0 - gb_of(BIG))

    cluster.observe(sampled(135, 8.0, BIG))
    assert free(cluster) == 8.0


def test_what_is_loaded_when_a_node_is_first_seen_is_in_its_sample() -> None:
    cluster = ledger(sampled(100, 8.0, BIG))

    assert free(cluster) == 8.0


def test_what_is_loaded_when_a_node_comes_back_is_in_its_sample() -> None:
    cluster = ledger(sampled(100, 8.0, BIG))
    cluster.observe(
        Observation(node_id="a", observed_at=105, health="down", health_reason="no connection")
    )

    cluster.observe(sampled(110, 8.0, BIG))

    assert free(cluster) == 8.0


def test_a_runner_that_somebody_restarts_with_more_context_counts_with_what_it_grew_by() -> None:
    cluster = ledger(sampled(100, 10.0, BIG))
    grown = loaded(BIG, context_length=32_768, size_vram_bytes=int((gb_of(BIG) + 3) * GB))

    cluster.observe(sampled(105, 10.0, loaded=grown))

    assert free(cluster) == pytest.approx(7.0)


def test_what_is_worked_out_of_ps_itself_has_every_model_already() -> None:
    source = "config - /api/ps"
    cluster = ledger(sampled(100, 24.0, age=0.0, source=source))

    cluster.observe(sampled(105, 9.0, BIG, age=0.0, source=source))

    assert free(cluster) == 9.0


def test_more_than_there_is_cannot_be_taken() -> None:
    cluster = ledger(sampled(100, 2.0))

    cluster.observe(sampled(105, 2.0, BIG))

    assert free(cluster) == 0.0


def test_unknown_stays_unknown() -> None:
    cluster = ledger(sampled(100, 2.0, free_vram_bytes=None))

    cluster.observe(sampled(105, 2.0, BIG, free_vram_bytes=None))

    assert free(cluster) is None


# ----------------------------------------------------------------------------- unloads


def test_memory_of_an_unload_is_given_back_once_two_samples_agree() -> None:
    cluster = ledger(sampled(100, 8.0, BIG, age=0.0))

    cluster.observe(sampled(105, 22.0, age=0.0))
    assert free(cluster) == 8.0
    assert snapshot_of(cluster).vram_observed_at == 100.0

    cluster.observe(sampled(110, 22.5, age=0.0))
    # The less of the two: the second may have caught another load half way.
    assert free(cluster) == 22.0

    cluster.observe(sampled(115, 22.5, age=0.0))
    assert free(cluster) == 22.5


def test_the_same_sample_seen_twice_does_not_agree_with_itself() -> None:
    cluster = ledger(sampled(100, 8.0, BIG))
    cluster.observe(sampled(105, 8.0))

    for at in (115.0, 120.0, 144.9):
        cluster.observe(sampled(at, 22.0))
        assert free(cluster) == 8.0

    cluster.observe(sampled(145.0, 22.0))
    assert free(cluster) == 22.0


def test_one_reading_that_serves_two_rounds_does_not_agree_with_itself() -> None:
    cluster = ledger(sampled(100, 8.0, BIG, age=0.0))
    cluster.observe(sampled(105, 22.0, age=0.0))

    cluster.observe(sampled(105.5, 22.0, age=0.5))

    assert free(cluster) == 8.0


def test_a_sample_between_an_unload_and_the_next_load_does_not_count() -> None:
    cluster = ledger(sampled(100, 8.0, BIG, age=0.0))
    cluster.observe(sampled(105, 22.0, age=0.0))

    cluster.observe(sampled(110, 8.0, BIG, age=0.0))

    assert free(cluster) == 8.0

    # Nor does it stand by for the next unload.
    cluster.observe(sampled(115, 22.0, age=0.0))
    assert free(cluster) == 8.0


def test_what_other_programs_give_back_counts_at_once() -> None:
    cluster = ledger(sampled(100, 8.0, BIG, age=0.0))

    cluster.observe(sampled(105, 9.5, BIG, age=0.0))

    assert free(cluster) == 9.5


def test_less_than_before_counts_at_once_even_after_an_unload() -> None:
    cluster = ledger(sampled(100, 8.0, BIG, age=0.0))

    cluster.observe(sampled(105, 6.0, age=0.0))

    assert free(cluster) == 6.0


@pytest.mark.parametrize("source", ["config - /api/ps", "nvml"])
def test_figures_of_another_source_are_not_compared(source: str) -> None:
    cluster = ledger(sampled(100, 8.0, BIG, age=0.0))

    cluster.observe(sampled(105, 22.0, age=0.0, source=source))

    assert free(cluster) == 22.0


@pytest.mark.parametrize(
    "remark", ["dcgm-exporter, capped by config", "dcgm-exporter (exporter: no answer)"]
)
def test_a_remark_on_a_source_makes_no_other_source_of_it(remark: str) -> None:
    cluster = ledger(sampled(100, 8.0, BIG, age=0.0))

    cluster.observe(sampled(105, 22.0, age=0.0, source=remark))

    assert free(cluster) == 8.0


def test_what_ps_alone_tells_of_an_unload_counts_at_once() -> None:
    source = "config - /api/ps"
    cluster = ledger(sampled(100, 8.0, BIG, age=0.0, source=source))

    cluster.observe(sampled(105, 24.0, age=0.0, source=source))

    assert free(cluster) == 24.0
