"""How a model finds its place on a node, by Ollama's own rules."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.exceptions import NoEligibleNodeError
from hydra_llm.scheduling import Fit, Moment, Scheduler
from hydra_llm.scheduling.memory import (
    fit_of,
    memory_need_bytes,
    needs_of,
)
from hydra_llm.types import (
    GB,
    Device,
    HostMemory,
    InferenceRequest,
    InstalledModel,
    LoadedModel,
    NodeSnapshot,
    RunnerOptions,
)
from hydra_llm.vram import estimate
from hydra_llm.vram.loading import FIRST_MODEL_MARGIN_BYTES, default_context
from tests.helpers import BIG, LLAMA, installed, loaded, request, running, snapshot

MODEL = "model:10gb"


def fit(node: NodeSnapshot, asked: InferenceRequest | None = None, **moment: Any) -> Fit:
    return fit_of(asked or request(MODEL), node, Moment(**moment))


def disk(**sizes_gb: float) -> dict[str, InstalledModel]:
    """Models of which nobody has told more than the size."""
    found = {f"{name}:latest": gigabytes for name, gigabytes in sizes_gb.items()}
    return {
        name: InstalledModel(name=name, size_bytes=int(size * GB))
        for name, size in (found | {MODEL: 9.0}).items()
    }


NEEDS = needs_of(request(MODEL), snapshot(installed=disk()), Moment())
NEED, FORECAST = NEEDS.bytes, NEEDS.forecast_bytes
"""Of that model with 4096 tokens of context: what it takes, and what Ollama expects."""
NEED_GB, FORECAST_GB = NEED / GB, FORECAST / GB


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


def test_the_need_is_what_the_estimator_says_of_the_nodes_settings() -> None:
    model = installed(LLAMA)[LLAMA]
    node = snapshot(slots=2, version="0.32.15")
    node = replace(node, node=replace(node.node, kv_cache_type="q8_0"))
    asked = request(options=RunnerOptions(num_ctx=8192, num_batch=256))

    need = memory_need_bytes(asked, node, Moment())

    said = estimate(model.shape, model.size_bytes, 8192, 2, "q8_0", 1, "0.32.15", num_batch=256)
    assert need == said.total_bytes
    assert said.kv_bytes() < 2 * 8192 * 65_536


def test_the_context_is_cut_at_what_the_model_was_trained_with() -> None:
    node = snapshot(installed=installed(LLAMA, context_length=2048))
    small = memory_need_bytes(request(options=RunnerOptions(num_ctx=2048)), node, Moment())

    assert (
        memory_need_bytes(request(options=RunnerOptions(num_ctx=99_999)), node, Moment()) == small
    )


def test_what_was_seen_of_it_there_corrects_what_was_expected() -> None:
    plain = needs_of(request(), snapshot(), Moment())
    seen = needs_of(request(), snapshot(need_ratios={LLAMA: 1.25}), Moment())

    reported = plain.expected.need.reported_bytes
    assert seen.bytes - plain.bytes == pytest.approx(0.25 * reported, abs=1)


def test_ollama_itself_expects_more_where_what_it_took_may_be_due_to_its_settings() -> None:
    """It knows its slots, and does not learn: where we are told them, nothing is corrected."""
    ratios = {LLAMA: 1.25}
    plain = needs_of(request(), snapshot(), Moment())
    untold = needs_of(request(), snapshot(need_ratios=ratios), Moment())
    told = needs_of(request(), snapshot(need_ratios=ratios, slots=1), Moment())

    assert untold.forecast_bytes - plain.forecast_bytes == untold.bytes - plain.bytes
    assert told.forecast_bytes == plain.forecast_bytes
    assert told.bytes == untold.bytes


@pytest.mark.parametrize(
    ("total_gib", "context"),
    [(None, 4096), (22.9, 4096), (23, 32_768), (46.9, 32_768), (47, 262_144)],
)
def test_the_default_context_depends_on_the_gpus_memory(
    total_gib: float | None, context: int
) -> None:
    total = None if total_gib is None else int(total_gib * (1 << 30))

    assert default_context(total) == context


@pytest.mark.parametrize(
    ("version", "context"),
    [
        ("0.5.13", 2048),
        ("0.6.6", 2048),
        ("0.6.7", 4096),
        ("0.15.4", 4096),
        ("0.15.5", 262_144),
        ("0.32.15", 262_144),
        ("a branch", 262_144),
        (None, 262_144),
    ],
)
def test_before_0_15_5_it_does_not(version: str | None, context: int) -> None:
    assert default_context(80 * GB, version) == context

    need = memory_need_bytes(
        request(), snapshot(total_vram_gb=80.0, free_vram_gb=70.0, version=version), Moment()
    )
    model = installed(LLAMA)[LLAMA]
    said = estimate(model.shape, model.size_bytes, min(context, 32_768), ollama_version=version)
    assert need == said.total_bytes


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
    exactly = (NEED + FIRST_MODEL_MARGIN_BYTES + 1) / GB

    assert fit(with_memory(exactly)).verdict == "fits"
    assert fit(with_memory(exactly - 0.01)).verdict == "offloads"


def test_before_0_30_there_is_no_margin() -> None:
    old = with_memory(100.0, version="0.24.0")
    exactly = (memory_need_bytes(request(MODEL), old, Moment()) + 1) / GB

    assert fit(with_memory(exactly, version="0.24.0")).verdict == "fits"
    assert fit(with_memory(exactly - 0.01, version="0.24.0")).verdict == "offloads"


def test_a_further_model_may_be_expected_to_take_80_percent_of_what_is_free() -> None:
    other: dict[str, Any] = {"loaded": runners(other=4.0), "installed": disk(other=4.0)}
    exactly = FORECAST_GB / 0.8 + 1e-6

    assert fit(with_memory(exactly, **other)) == Fit("fits", NEED, gpu_bytes=NEED)
    evicts = Fit("evicts", NEED, ("other:latest",), gpu_bytes=NEED)
    assert fit(with_memory(exactly - 0.01, **other)) == evicts


def test_a_further_model_that_takes_more_than_ollama_expects_ends_partly_on_the_cpu() -> None:
    """Ollama lets it in beside the other one, and it then does not find the room."""
    node = with_memory(
        FORECAST_GB / 0.8 + 0.01, loaded=runners(other=4.0), need_ratios={MODEL: 1.5}, slots=1
    )

    found = fit(node)

    assert found.verdict == "offloads"
    assert not found.victims


def test_before_0_30_it_may_take_all_that_is_free() -> None:
    other: dict[str, Any] = {"loaded": runners(other=4.0), "version": "0.24.0"}
    need = memory_need_bytes(request(MODEL), with_memory(100.0, **other), Moment()) / GB

    assert fit(with_memory(need + 1e-6, **other)).verdict == "fits"
    assert fit(with_memory(need - 0.01, **other)).victims == ("other:latest",)


def test_no_more_is_pushed_out_than_must_be_and_idle_ones_go_first() -> None:
    state: dict[str, Any] = {
        "installed": disk(a=3.0, b=3.0),
        "loaded": runners(a=3.0, b=3.0),
        "running": (running("a"),),
    }

    assert fit(with_memory(FORECAST_GB / 0.8 - 2.0, **state)).victims == ("b:latest",)
    assert fit(with_memory(FORECAST_GB / 0.8 - 4.0, **state)).victims == ("b:latest", "a:latest")


def victim_of(*models: LoadedModel, files: dict[str, str] | None = None) -> str:
    there = {
        model.name: InstalledModel(
            name=model.name, size_bytes=GB, weights_file=(files or {}).get(model.name, "")
        )
        for model in models
    }
    node = with_memory(
        FORECAST_GB / 0.8 - 1.0,
        loaded={model.name: model for model in models},
        installed=there | disk(),
    )
    [victim] = fit(node).victims
    return victim


def runner(name: str, **about: Any) -> LoadedModel:
    return LoadedModel(name=name, size_bytes=5 * GB, size_vram_bytes=5 * GB, **about)


def test_the_one_with_the_shortest_keep_alive_goes_first_whenever_its_time_is_up() -> None:
    later = runner("a:latest", keep_alive_seconds=60.0, expires_at=900.0)
    sooner = runner("b:latest", keep_alive_seconds=600.0, expires_at=100.0)

    assert victim_of(sooner, later) == "a:latest"


def test_among_equal_ones_the_path_of_the_weights_decides() -> None:
    models = [runner(name, keep_alive_seconds=300.0) for name in ("a:latest", "b:latest")]

    assert victim_of(*models, files={"a:latest": "sha256-2", "b:latest": "sha256-1"}) == "b:latest"
    assert victim_of(*models, files={"a:latest": "sha256-1", "b:latest": "sha256-2"}) == "a:latest"


def test_one_that_was_never_seen_to_be_used_is_taken_to_stay_for_five_minutes() -> None:
    unseen = runner("a:latest")

    assert victim_of(unseen, runner("b:latest", keep_alive_seconds=299.0)) == "b:latest"
    assert victim_of(unseen, runner("b:latest", keep_alive_seconds=301.0)) == "a:latest"


@pytest.mark.parametrize(("gpus", "victims"), [(0, 1), (1, 1), (2, 0)])
def test_three_models_a_gpu_is_the_limit_however_much_is_free(gpus: int, victims: int) -> None:
    node = with_memory(
        100.0,
        total_gb=128.0,
        loaded=runners(a=1.0, b=1.0, c=1.0),
        devices=tuple(Device(key=str(n), vendor="nvidia") for n in range(gpus)),
    )

    assert len(fit(node).victims) == victims


def test_a_node_may_say_how_many_it_keeps_loaded() -> None:
    state: dict[str, Any] = {"total_gb": 128.0, "loaded": runners(a=1.0, b=1.0)}
    node = with_memory(100.0, **state)

    one = replace(node, node=replace(node.node, max_loaded_models=1))

    assert fit(node).victims == ()
    assert len(fit(one).victims) == 2


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
    node = with_memory(14.0, running=(pending,), host=HostMemory(total_bytes=4 * GB))

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


def test_what_is_leaving_cannot_be_pushed_out_once_more() -> None:
    pending = running("new", loading=True, reserved_bytes=9 * GB, evicts=frozenset({"old:latest"}))
    node = with_memory(2.0, running=(pending,), loaded=runners(old=10.0))

    assert fit(node).victims == ("new:latest",)


def test_what_does_not_fit_is_shared_with_system_memory() -> None:
    found = fit(with_memory(6.0))

    assert found.verdict == "offloads"
    missing = NEED - (6 * GB - FIRST_MODEL_MARGIN_BYTES)
    assert found.cpu_share == pytest.approx(missing / NEED)
    assert found.gpu_bytes == found.reserved_bytes == 6 * GB - FIRST_MODEL_MARGIN_BYTES


def test_it_is_shared_by_whole_layers_where_they_are_known() -> None:
    node = snapshot(models=(BIG,), free_vram_gb=8.0)

    found = fit(node, request(BIG))

    need = needs_of(request(BIG), node, Moment()).expected.need
    sizes = [need.gpu_bytes(count) for count in range(34)]
    room = 8 * GB - FIRST_MODEL_MARGIN_BYTES
    assert found.gpu_bytes == max(size for size in sizes if size <= room)
    assert found.cpu_share == pytest.approx(1 - found.reserved_bytes / need.total_bytes)


def gpus(*free_gb: float) -> tuple[Device, ...]:
    return tuple(
        Device(key=str(n), vendor="nvidia", total_bytes=24 * GB, free_bytes=int(free * GB))
        for n, free in enumerate(free_gb)
    )


def on_gpus(*free_gb: float, total_free_gb: float | None = None, **state: Any) -> NodeSnapshot:
    free = sum(free_gb) if total_free_gb is None else total_free_gb
    return with_memory(free, total_gb=24.0 * len(free_gb), devices=gpus(*free_gb), **state)


def test_a_model_that_fits_on_one_gpu_needs_no_more_for_being_on_two() -> None:
    asked = request(BIG, options=RunnerOptions(num_ctx=4096))
    state: dict[str, Any] = {"installed": installed(BIG)}
    whole, split = (needs_of(asked, on_gpus(20.0, 20.0, **state), Moment(), n) for n in (1, 2))
    assert split.bytes > whole.bytes

    assert fit(on_gpus(20.0, 4.0, **state), asked).need_bytes == whole.bytes
    assert fit(on_gpus(10.0, 12.0, **state), asked).need_bytes == split.bytes


def test_of_two_gpus_each_keeps_its_margin() -> None:
    asked = request(BIG, options=RunnerOptions(num_ctx=4096))
    state: dict[str, Any] = {"installed": installed(BIG)}
    split = needs_of(asked, on_gpus(9.0, 9.0, **state), Moment(), 2).bytes / GB
    half = (split + 2 * FIRST_MODEL_MARGIN_BYTES / GB) / 2

    assert fit(on_gpus(half + 0.01, half + 0.01, **state), asked).verdict == "fits"
    assert fit(on_gpus(half - 0.01, half - 0.01, **state), asked).verdict == "offloads"


def test_what_has_been_loaded_since_the_sample_is_taken_from_the_gpu_with_most_room() -> None:
    asked = request(BIG, options=RunnerOptions(num_ctx=4096))
    state: dict[str, Any] = {"installed": installed(BIG)}

    together = fit(on_gpus(20.0, 4.0, total_free_gb=24.0, **state), asked)
    since = fit(on_gpus(20.0, 4.0, total_free_gb=14.0, **state), asked)

    assert together.verdict == "fits"
    assert since.verdict == "offloads"
    assert since.gpu_bytes is not None
    assert since.gpu_bytes <= 14 * GB - 2 * FIRST_MODEL_MARGIN_BYTES


def test_a_gpu_that_tells_nothing_leaves_the_sum() -> None:
    devices = (*gpus(20.0), Device(key="lost", vendor="nvidia"))

    assert fit(with_memory(20.0, devices=devices)).verdict == "fits"


def test_a_node_cannot_only_if_its_system_memory_is_known_to_be_too_small() -> None:
    missing = (NEED - (6 * GB - FIRST_MODEL_MARGIN_BYTES)) / GB
    enough, little = (HostMemory(total_bytes=int((missing + more) * GB)) for more in (0.01, -0.01))

    assert fit(with_memory(6.0)).verdict == "offloads"
    assert fit(with_memory(6.0, host=enough)).verdict == "offloads"
    assert fit(with_memory(6.0, host=little)).verdict == "cannot"
    assert fit(with_memory(None, host=little)).verdict == "unknown"


@pytest.mark.parametrize("told", [{"default_context": 262_144}, {}])
def test_nobody_is_turned_away_for_a_context_that_is_only_guessed(told: dict[str, Any]) -> None:
    """As with eight slots on 48 GB, where Ollama's own choice takes more than there is."""
    node = snapshot(total_vram_gb=80.0, free_vram_gb=1.5, slots=64, **told)
    node = replace(node, host=HostMemory(total_bytes=1 * GB))

    assert fit_of(request(), node, Moment()).verdict == ("cannot" if told else "offloads")


def test_a_context_that_leaves_no_room_was_mostly_made_smaller() -> None:
    def need(**about: Any) -> float:
        node = snapshot(**{"total_vram_gb": 50.0, "free_vram_gb": 50.0, **about})
        return needs_of(request(), node, Moment()).bytes / GB

    usual = need()
    assert 2 < usual < 5, "32,768 tokens, which it was trained with"
    assert need(slots=8) > 5 * usual - 10, "still goes in"
    least = need(slots=64)
    assert least < 64 * usual / 2
    assert least == need(slots=64, default_context=4096)
    assert need(slots=64, default_context=32_768) > 50, "but what was seen is so"


def test_what_caches_took_of_others_tells_of_a_model_that_was_not_seen() -> None:
    one = needs_of(request(), snapshot(slots=None), Moment())
    cache = one.expected.need.kv_bytes()

    four = needs_of(request(), snapshot(cache_ratio=4.0), Moment())
    assert four.bytes - one.bytes == pytest.approx(3 * cache, abs=2)
    assert four.forecast_bytes - one.forecast_bytes == four.bytes - one.bytes
    seen = snapshot(cache_ratio=4.0, need_ratios={LLAMA: 1.0})
    assert needs_of(request(), seen, Moment()).bytes == one.bytes, "it was seen itself"
    much = needs_of(request(), snapshot(cache_ratio=1000.0), Moment())
    assert much.bytes <= 4 * one.bytes


def test_a_model_that_is_being_loaded_in_part_is_not_taken_to_be_fast() -> None:
    coming = running(MODEL, loading=True, cpu_share=0.4)

    assert fit(with_memory(6.0, running=(coming,))) == Fit("loading", cpu_share=0.4)


def test_a_node_that_cannot_is_rejected_with_the_figures() -> None:
    node = with_memory(6.0, host=HostMemory(total_bytes=3 * GB))

    with pytest.raises(NoEligibleNodeError) as caught:
        Scheduler().schedule(request(MODEL), [node], Moment(), random.Random(0))

    (rejection,) = caught.value.rejections
    assert rejection == ("a", "short of VRAM", f"needs {NEED_GB:.1f} GB, 6.0 GB free")


def test_unknown_memory_is_neither_too_little_nor_enough() -> None:
    found = fit(with_memory(None, total_gb=None))

    assert found == Fit("unknown", NEED)
    assert found.reserved_bytes == NEED


def test_a_node_without_gpu_counts_models_and_asks_for_no_memory() -> None:
    """Ollama >= 0.30 (BEHAVIOUR section 6, rule 5)."""
    two = with_memory(0.0, total_gb=0.0, loaded=runners(a=4.0, b=4.0))
    three = with_memory(0.0, total_gb=0.0, loaded=runners(a=4.0, b=4.0, c=4.0))

    found = fit(two)

    assert (found.verdict, found.victims, found.cpu_share) == ("offloads", (), 1.0)
    assert found.reserved_bytes == 0
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
    # Of a node of which nothing is told, what is there sets a bound.
    is_guessed = total is None and bool(warm or loads or own)
    assert (found.verdict == "unknown") == (free is None and not is_guessed)
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

    model = installed(LLAMA)[LLAMA]
    assert need == estimate(model.shape, model.size_bytes, context).total_bytes
