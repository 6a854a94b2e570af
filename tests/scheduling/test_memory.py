"""How a model finds its place on a node, by Ollama's own rules."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.exceptions import NoEligibleNodeError
from hydra_llm.scheduling import Fit, Moment, Scheduler
from hydra_llm.scheduling.memory import (
    FIRST_MODEL_MARGIN_BYTES,
    GPU_OVERHEAD_BYTES,
    default_context,
    fit_of,
    memory_need_bytes,
)
from hydra_llm.types import (
    GB,
    Demand,
    Device,
    HostMemory,
    InferenceRequest,
    InstalledModel,
    LoadedModel,
    NodeSnapshot,
    RunnerOptions,
)
from tests.helpers import LLAMA, installed, loaded, request, running, snapshot

MODEL = "model:10gb"
NEED_GB = 10.0


def fit(node: NodeSnapshot, asked: InferenceRequest | None = None, **moment: Any) -> Fit:
    return fit_of(asked or request(MODEL), node, Moment(**moment))


def disk(**sizes_gb: float) -> dict[str, InstalledModel]:
    """Models without any key/value cache, so that the need is what the test says."""
    found = {f"{name}:latest": gigabytes for name, gigabytes in sizes_gb.items()}
    return {
        name: InstalledModel(
            name=name,
            size_bytes=int(size * GB) - GPU_OVERHEAD_BYTES,
            kv_bytes_per_token=0,
        )
        for name, size in (found | {MODEL: NEED_GB}).items()
    }


def runners(**sizes_gb: float) -> dict[str, LoadedModel]:
    return {
        f"{name}:latest": LoadedModel(
            name=f"{name}:latest",
            size_bytes=int(size * GB),
            size_vram_bytes=int(size * GB),
            context_length=4096,
        )
        for name, size in sizes_gb.items()
    }


def with_memory(
    free_gb: float | None, *, total_gb: float | None = 24.0, **state: Any
) -> NodeSnapshot:
    return snapshot(free_vram_gb=free_gb, total_vram_gb=total_gb, **{"installed": disk(), **state})


# ----------------------------------------------------------------------------- need


def test_the_need_is_the_file_and_the_cache_of_every_slot() -> None:
    node = snapshot(slots=2)
    asked = request(options=RunnerOptions(num_ctx=8192))

    need = memory_need_bytes(asked, node, Moment())

    assert need == 2 * GB + 2 * 8192 * 65_536 + GPU_OVERHEAD_BYTES


def test_the_context_is_cut_at_what_the_model_was_trained_with() -> None:
    node = snapshot(installed=installed(LLAMA, context_length=2048))
    small = memory_need_bytes(request(options=RunnerOptions(num_ctx=2048)), node, Moment())

    assert (
        memory_need_bytes(request(options=RunnerOptions(num_ctx=99_999)), node, Moment()) == small
    )


def test_what_was_seen_anywhere_counts_more_than_what_was_computed() -> None:
    demand = {LLAMA: Demand(seen_bytes=5 * GB, seen_context=4096)}
    asked = request(options=RunnerOptions(num_ctx=4096 + 1000))

    need = memory_need_bytes(asked, snapshot(), Moment(demand=demand))

    assert need == 5 * GB + 1000 * 65_536


@pytest.mark.parametrize(
    ("total_gib", "context"),
    [(None, 4096), (22.9, 4096), (23, 32_768), (46.9, 32_768), (47, 262_144)],
)
def test_the_default_context_depends_on_the_gpus_memory(
    total_gib: float | None, context: int
) -> None:
    total = None if total_gib is None else int(total_gib * (1 << 30))

    assert default_context(total) == context


@given(st.integers(1, 300_000), st.integers(1, 300_000), st.sampled_from([None, 1, 4]))
def test_a_longer_context_never_needs_less(short: int, long: int, slots: int | None) -> None:
    short, long = sorted((short, long))
    needs = [
        memory_need_bytes(
            request(options=RunnerOptions(num_ctx=context)), snapshot(slots=slots), Moment()
        )
        for context in (short, long)
    ]

    assert needs[0] <= needs[1]


# -------------------------------------------------------------------------- verdicts


def test_a_loaded_runner_needs_no_memory() -> None:
    assert fit(snapshot(warm=(LLAMA,), free_vram_gb=0.0), request()).verdict == "loaded"


@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        (RunnerOptions(), "loaded"),
        (RunnerOptions(num_ctx=4096), "loaded"),
        (RunnerOptions(num_ctx=8192), "evicts"),
        (RunnerOptions(num_gpu=0), "loaded"),
    ],
)
def test_only_an_option_known_to_differ_restarts_a_runner(
    options: RunnerOptions, verdict: str
) -> None:
    found = fit(snapshot(warm=(LLAMA,)), request(options=options))

    assert found.verdict == verdict
    assert found.victims == ((LLAMA,) if verdict == "evicts" else ())


def test_an_option_that_we_sent_last_time_is_known() -> None:
    node = snapshot(loaded=loaded(LLAMA, options=RunnerOptions(num_gpu=10)))

    assert fit(node, request(options=RunnerOptions(num_gpu=10))).verdict == "loaded"
    assert fit(node, request(options=RunnerOptions(num_gpu=0))).verdict == "evicts"


def test_the_first_model_needs_a_margin() -> None:
    exactly = NEED_GB + FIRST_MODEL_MARGIN_BYTES / GB

    assert fit(with_memory(exactly)).verdict == "fits"
    assert fit(with_memory(exactly - 0.01)).verdict == "offloads"


def test_a_further_model_may_take_80_percent_of_what_is_free() -> None:
    other: dict[str, Any] = {"loaded": runners(other=4.0), "installed": disk(other=4.0)}

    assert fit(with_memory(12.5, **other)).verdict == "fits"
    assert fit(with_memory(12.4, **other)) == Fit("evicts", int(NEED_GB * GB), ("other:latest",))


def test_no_more_is_pushed_out_than_must_be_and_idle_ones_go_first() -> None:
    state: dict[str, Any] = {
        "installed": disk(a=3.0, b=3.0),
        "loaded": runners(a=3.0, b=3.0),
        "running": (running("a"),),
    }

    assert fit(with_memory(10.0, **state)).victims == ("b:latest",)
    assert fit(with_memory(8.0, **state)).victims == ("b:latest", "a:latest")


def test_the_one_whose_time_is_up_first_goes_first() -> None:
    late = LoadedModel(name="a:latest", size_vram_bytes=5 * GB, expires_at=900.0)
    soon = LoadedModel(name="b:latest", size_vram_bytes=5 * GB, expires_at=100.0)
    node = with_memory(9.0, loaded={m.name: m for m in (late, soon)})

    assert fit(node).victims == ("b:latest",)


@pytest.mark.parametrize(("gpus", "victims"), [(0, 1), (1, 1), (2, 0)])
def test_three_models_a_gpu_is_the_limit_however_much_is_free(gpus: int, victims: int) -> None:
    node = with_memory(
        100.0,
        total_gb=128.0,
        loaded=runners(a=1.0, b=1.0, c=1.0),
        devices=tuple(Device(key=str(n), vendor="nvidia") for n in range(gpus)),
    )

    assert len(fit(node).victims) == victims


def test_its_own_runner_goes_first_and_gives_back_what_it_held() -> None:
    state: dict[str, Any] = {
        "loaded": loaded(LLAMA) | runners(other=2.0),
        "installed": installed(LLAMA),
    }

    found = fit(with_memory(1.0, **state), request(options=RunnerOptions(num_ctx=8192)))

    assert found.verdict == "evicts"
    assert found.victims[0] == LLAMA


def test_a_model_under_way_counts_as_loading_for_the_same_options_only() -> None:
    pending = running(loading=True, options=RunnerOptions(num_ctx=8192), reserved_bytes=3 * GB)
    node = snapshot(running=(pending,))

    assert fit(node, request()).verdict == "loading"
    assert fit(node, request(options=RunnerOptions(num_ctx=8192))).verdict == "loading"
    other = fit(node, request(options=RunnerOptions(num_ctx=4096)))
    assert other.verdict == "evicts"
    assert other.victims == (LLAMA,)


def test_a_reload_of_what_is_still_being_loaded_gets_its_memory() -> None:
    pending = running(MODEL, loading=True, reserved_bytes=10 * GB)
    node = with_memory(12.0, running=(pending,), host=HostMemory(total_bytes=4 * GB))

    assert fit(node, request(MODEL, options=RunnerOptions(num_ctx=8192))).verdict == "evicts"


def test_pending_loads_have_their_memory_already() -> None:
    pending = running("other", loading=True, reserved_bytes=9 * GB)
    node = with_memory(20.0, running=(pending,))

    found = fit(node)

    assert node.free_vram_bytes == 11 * GB
    assert found.verdict == "evicts"
    assert found.victims == ("other:latest",)


def test_what_is_leaving_is_free_already_and_counted_once() -> None:
    pending = running("other", loading=True, reserved_bytes=9 * GB, evicts=frozenset({MODEL}))
    node = with_memory(
        2.0,
        running=(pending,),
        loaded={MODEL: LoadedModel(name=MODEL, size_vram_bytes=10 * GB, size_bytes=10 * GB)},
    )

    assert node.free_vram_bytes == 3 * GB
    # Only with what the pending load will hold: 3 + 9 GB.
    assert fit(node).victims == ("other:latest",)


def test_what_does_not_fit_is_shared_with_system_memory() -> None:
    found = fit(with_memory(6.0))

    assert found.verdict == "offloads"
    assert found.cpu_share == pytest.approx((4.0 + FIRST_MODEL_MARGIN_BYTES / GB) / 10.0)


def test_a_node_cannot_only_if_its_system_memory_is_known_to_be_too_small() -> None:
    assert fit(with_memory(6.0)).verdict == "offloads"
    assert fit(with_memory(6.0, host=HostMemory(total_bytes=4 * GB))).verdict == "offloads"
    assert fit(with_memory(6.0, host=HostMemory(total_bytes=3 * GB))).verdict == "cannot"
    assert fit(with_memory(None, host=HostMemory(total_bytes=3 * GB))).verdict == "unknown"


def test_a_node_that_cannot_is_rejected_with_the_figures() -> None:
    node = with_memory(6.0, host=HostMemory(total_bytes=3 * GB))

    with pytest.raises(NoEligibleNodeError) as caught:
        Scheduler().schedule(request(MODEL), [node], Moment(), random.Random(0))

    (rejection,) = caught.value.rejections
    assert rejection == ("a", "short of VRAM", "needs 10.0 GB, 6.0 GB free")


def test_unknown_memory_is_neither_too_little_nor_enough() -> None:
    assert fit(with_memory(None, total_gb=None)) == Fit("unknown", int(NEED_GB * GB))


def test_a_node_without_gpu_counts_models_and_asks_for_no_memory() -> None:
    """Ollama >= 0.30 (BEHAVIOUR section 6, rule 5)."""
    two = with_memory(0.0, total_gb=0.0, loaded=runners(a=4.0, b=4.0))
    three = with_memory(0.0, total_gb=0.0, loaded=runners(a=4.0, b=4.0, c=4.0))

    assert fit(two) == Fit("offloads", int(NEED_GB * GB), (), 1.0)
    assert fit(three).victims == ("a:latest",)


# ------------------------------------------------------------------------ properties


@given(
    free=st.sampled_from([None, 0.0, 5.0, 12.0, 24.0, 80.0]),
    total=st.sampled_from([None, 0.0, 24.0, 80.0]),
    ram=st.sampled_from([None, 2, 64]),
    sizes=st.lists(st.floats(0.5, 12.0), max_size=5),
    busy=st.sets(st.integers(0, 4)),
    pending=st.sets(st.integers(0, 4), max_size=2),
    own=st.booleans(),
)
def test_a_verdict_is_never_contradictory(
    *,
    free: float | None,
    total: float | None,
    ram: int | None,
    sizes: list[float],
    busy: set[int],
    pending: set[int],
    own: bool,
) -> None:
    warm = {f"m{n}": size for n, size in enumerate(sizes) if n not in pending}
    loads = [running(f"m{n}", loading=True, reserved_bytes=2 * GB, lease_id=n) for n in pending]
    works = [running(f"m{n}", lease_id=10 + n) for n in busy if f"m{n}" in warm]
    node = with_memory(
        free,
        total_gb=total,
        loaded=runners(**warm)
        | (
            {MODEL: LoadedModel(name=MODEL, size_vram_bytes=GB, context_length=4096)} if own else {}
        ),
        running=tuple(loads + works),
        host=None if ram is None else HostMemory(total_bytes=ram * GB),
    )

    found = fit(node, request(MODEL, options=RunnerOptions(num_ctx=8192)))

    assert found.need_bytes > 0
    assert 0.0 <= found.cpu_share <= 1.0
    assert len(set(found.victims)) == len(found.victims)
    assert (MODEL in found.victims) == own
    assert (found.verdict == "unknown") == (free is None)
    if found.verdict == "cannot":
        assert ram is not None
    if found.verdict == "fits":
        assert not found.victims
    if found.verdict in ("fits", "evicts"):
        assert found.cpu_share == 0.0
    if free is not None and len(warm) + len(loads) >= 3:
        assert found.victims
    # Whoever is working goes after all that are idle.
    order = [name in {r.model for r in works} for name in found.victims if name in node.loaded]
    assert order[own:] == sorted(order[own:])


@given(st.floats(0.0, 60.0), st.floats(0.0, 60.0), st.lists(st.floats(0.5, 12.0), max_size=3))
def test_more_free_memory_never_pushes_more_models_out(
    one: float, other: float, sizes: list[float]
) -> None:
    less, more = sorted((one, other))
    warm: dict[str, Any] = {"loaded": runners(**{f"m{n}": size for n, size in enumerate(sizes)})}

    assert len(fit(with_memory(more, **warm)).victims) <= len(
        fit(with_memory(less, **warm)).victims
    )


@pytest.mark.parametrize(
    ("total_gb", "source", "context"),
    [(24.0, "config - /api/ps", 32_768), (24.0, "nvml", 4096), (16.0, "config", 4096)],
)
def test_a_configured_24_gb_card_is_one_of_24_gib_to_ollama(
    total_gb: float, source: str, context: int
) -> None:
    node = snapshot(total_vram_gb=total_gb, vram_source=source)

    need = memory_need_bytes(request(), node, Moment())

    assert need == 2 * GB + context * 65_536 + GPU_OVERHEAD_BYTES
