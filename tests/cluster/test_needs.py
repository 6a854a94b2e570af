"""What was seen of loaded models corrects what the next load of them is expected to take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hydra_llm.cluster import Cluster
from hydra_llm.scheduling import Moment
from hydra_llm.scheduling.memory import memory_need_bytes
from hydra_llm.types import InstalledModel, NodeSnapshot, RunnerOptions
from hydra_llm.vram import estimate
from tests.cluster.ledgers import granted, ledger, node, seen, snapshot_of
from tests.helpers import LLAMA, installed, loaded, request, snapshot

MODEL = installed(LLAMA)[LLAMA]


def expected(context: int, **settings: Any) -> int:
    return estimate(MODEL.shape, MODEL.size_bytes, context, **settings).reported_bytes


def after(
    size: float, context: int | None = 4096, model: InstalledModel = MODEL, **settings: Any
) -> NodeSnapshot:
    cluster = ledger(nodes=[node("a", **{"slots": None, **settings})])
    runner = loaded(LLAMA, size_bytes=int(size), size_vram_bytes=int(size))
    runner = {LLAMA: replace(runner[LLAMA], context_length=context)}
    cluster.observe(seen("a", installed={LLAMA: model}, loaded=runner))
    return snapshot_of(cluster)


def test_the_ratio_is_what_it_takes_to_what_was_expected_of_that_context() -> None:
    for context in (4096, 16_384):
        assert after(1.1 * expected(context), context).need_ratios[LLAMA] == pytest.approx(1.1)


def test_it_stays_when_the_model_has_gone() -> None:
    cluster = ledger(nodes=[node("a", slots=None)])
    size = int(1.2 * expected(4096))
    runner = loaded(LLAMA, size_bytes=size, size_vram_bytes=size)
    cluster.observe(seen("a", installed={LLAMA: MODEL}, loaded=runner))
    cluster.observe(seen("a", at=1.0, installed={LLAMA: MODEL}, loaded={}))

    assert snapshot_of(cluster).need_ratios[LLAMA] == pytest.approx(1.2)


def test_another_file_of_that_name_is_another_model() -> None:
    cluster = ledger(nodes=[node("a", slots=None)])
    size = int(1.2 * expected(4096))
    runner = loaded(LLAMA, size_bytes=size, size_vram_bytes=size)
    cluster.observe(seen("a", installed={LLAMA: MODEL}, loaded=runner))
    pulled = replace(MODEL, digest="another")
    cluster.observe(seen("a", at=1.0, installed={LLAMA: pulled}, loaded={}))

    assert snapshot_of(cluster).need_ratios == {}


def test_a_node_whose_settings_are_told_is_corrected_within_bounds() -> None:
    told: dict[str, Any] = {"slots": 1, "kv_cache_type": "f16"}
    fair = expected(4096)

    assert after(2.5 * fair, **told).need_ratios[LLAMA] == 1.3
    assert after(0.3 * fair, **told).need_ratios[LLAMA] == 0.8


def test_a_node_with_more_slots_than_anybody_told_is_corrected_further() -> None:
    four = expected(16_384, num_parallel=4)

    ratio = after(four, 16_384).need_ratios[LLAMA]

    assert ratio == pytest.approx(four / expected(16_384))
    assert ratio > 1.5


@pytest.mark.parametrize(
    ("size", "context", "model"),
    [(0, 4096, MODEL), (3e9, None, MODEL), (3e9, 4096, replace(MODEL, shape=None))],
)
def test_what_cannot_be_compared_teaches_nothing(
    size: float, context: int | None, model: InstalledModel
) -> None:
    assert after(size, context, model).need_ratios == {}


# ------------------------------------------------------------------ default context


def after_a_load(
    shown: int | None, *, num_ctx: int | None = None, train: int = 32_768
) -> int | None:
    """What is known of the node's own context once `/api/ps` shows what we had it load."""
    model = replace(MODEL, context_length=train)
    cluster = ledger(seen("a", installed={LLAMA: model}), nodes=[node("a")])
    lease = granted(cluster, request(options=RunnerOptions(num_ctx=num_ctx)))
    cluster.first_byte(lease)
    runner = {LLAMA: replace(loaded(LLAMA)[LLAMA], context_length=shown)}
    cluster.observe(seen("a", at=1.0, installed={LLAMA: model}, loaded=runner))
    return snapshot_of(cluster).default_context


def test_the_context_that_a_node_takes_by_itself_shows_in_what_we_had_it_load() -> None:
    assert after_a_load(8192) == 8192


@pytest.mark.parametrize(
    ("shown", "about"), [(8192, {"num_ctx": 8192}), (4096, {"train": 4096}), (None, {})]
)
def test_it_does_not_show_where_something_else_set_it(
    shown: int | None, about: dict[str, Any]
) -> None:
    assert after_a_load(shown, **about) is None


def test_what_others_had_loaded_tells_nothing_of_it() -> None:
    cluster = ledger(seen("a"), nodes=[node("a")])
    cluster.observe(seen("a", at=1.0, warm=(LLAMA,)))

    assert snapshot_of(cluster).default_context is None


def test_it_is_what_a_request_without_a_context_is_judged_by() -> None:
    plain, known = snapshot(total_vram_gb=24.0), snapshot(default_context=4096)
    explicit = request(options=RunnerOptions(num_ctx=4096))

    assert memory_need_bytes(request(), known, Moment()) == memory_need_bytes(
        explicit, plain, Moment()
    )
    larger = snapshot(default_context=16_384)
    assert memory_need_bytes(request(), larger, Moment()) > memory_need_bytes(
        explicit, plain, Moment()
    )


def test_another_version_may_take_another() -> None:
    cluster = ledger(seen("a"), nodes=[node("a")])
    lease = granted(cluster, request())
    cluster.first_byte(lease)
    cluster.observe(
        seen("a", at=1.0, loaded={LLAMA: replace(loaded(LLAMA)[LLAMA], context_length=8192)})
    )
    assert snapshot_of(cluster).default_context == 8192

    cluster.observe(seen("a", at=2.0, version="0.33.0"))

    assert snapshot_of(cluster).default_context is None


def two_nodes(first: dict[str, Any], second: dict[str, Any]) -> Cluster:
    """The first has loaded a model by itself, with 8192 tokens."""
    nodes = [node("a"), node("b")]
    cluster = ledger(seen("a", **first), seen("b", **second), nodes=nodes)
    lease = granted(cluster, request(node_id="a"))
    cluster.first_byte(lease)
    runner = {LLAMA: replace(loaded(LLAMA)[LLAMA], context_length=8192)}
    cluster.observe(seen("a", at=1.0, loaded=runner, **first))
    return cluster


def test_what_one_node_was_told_others_were_told_too_mostly() -> None:
    cluster = two_nodes({}, {})

    assert snapshot_of(cluster, "b").default_context == 8192
    later = replace(loaded(LLAMA)[LLAMA], context_length=16_384)
    cluster.first_byte(granted(cluster, request(node_id="b")))
    cluster.observe(seen("b", at=2.0, loaded={LLAMA: later}))
    assert snapshot_of(cluster, "b").default_context == 16_384, "until it shows its own"
    assert snapshot_of(cluster, "a").default_context == 8192


@pytest.mark.parametrize(
    "first", [{"total_gb": None, "free_vram_bytes": None}, {"total_gb": 30.0, "version": "0.24.0"}]
)
def test_what_may_be_ollamas_own_choice_says_nothing_of_other_nodes(first: dict[str, Any]) -> None:
    """By the memory of a node that nobody tells of; 0.24 takes 32,768 of 30 GB."""
    cluster = two_nodes(first, {})
    if first["total_gb"]:
        runner = {LLAMA: replace(loaded(LLAMA)[LLAMA], context_length=32_768)}
        model = {LLAMA: replace(MODEL, context_length=131_072)}
        cluster = ledger(seen("a", installed=model, **first), seen("b"))
        cluster.first_byte(granted(cluster, request(node_id="a")))
        cluster.observe(seen("a", at=1.0, installed=model, loaded=runner, **first))
        assert snapshot_of(cluster, "a").default_context == 32_768

    assert snapshot_of(cluster, "b").default_context is None


def test_a_models_size_tells_what_caches_take_there() -> None:
    slots = {count: expected(4096, num_parallel=count) for count in (1, 4)}

    assert after(slots[1]).cache_ratio == pytest.approx(1.0)
    # The compute buffer of four slots is a little larger, too.
    assert after(slots[4]).cache_ratio == pytest.approx(4.0, abs=0.3)
    assert after(slots[4], slots=4).cache_ratio is None, "who tells the slots needs no guess"


def test_another_file_of_that_name_tells_nothing_of_caches_either() -> None:
    cluster = ledger(nodes=[node("a", slots=None)])
    size = expected(4096, num_parallel=4)
    runner = loaded(LLAMA, size_bytes=size, size_vram_bytes=size)
    cluster.observe(seen("a", installed={LLAMA: MODEL}, loaded=runner))
    assert snapshot_of(cluster).cache_ratio is not None

    cluster.observe(
        seen("a", at=1.0, installed={LLAMA: replace(MODEL, digest="another")}, loaded={})
    )

    assert snapshot_of(cluster).cache_ratio is None
