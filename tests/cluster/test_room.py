"""What nobody tells of a node's memory shows in what its Ollama does with models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from hydra_llm.cluster import Cluster
from hydra_llm.cluster.room import LearnedRoom
from hydra_llm.scheduling import Moment
from hydra_llm.scheduling.memory import fit_of
from hydra_llm.types import (
    GB,
    HostMemory,
    LoadedModel,
    NodeSnapshot,
    Observation,
    RunnerOptions,
    RunningRequest,
    Usage,
)
from hydra_llm.vram.loading import loading_rule
from tests.cluster.ledgers import Clock, granted, ledger, node, seen, snapshot_of
from tests.helpers import BIG, LLAMA, loaded, request, running

QWEN = "qwen3:8b"


def runners(**sizes_gb: float) -> dict[str, LoadedModel]:
    """Models by their size, all of it on GPUs."""
    return {
        name: LoadedModel(
            name=name,
            size_bytes=int(gb * GB),
            size_vram_bytes=int(gb * GB),
            context_length=4096,
        )
        for name, gb in sizes_gb.items()
    }


def partly(name: str, size_gb: float, vram_gb: float, **about: Any) -> dict[str, LoadedModel]:
    size, vram = int(size_gb * GB), int(vram_gb * GB)
    return {name: LoadedModel(name=name, size_bytes=size, size_vram_bytes=vram, **about)}


def learned(
    *shown: Mapping[str, LoadedModel],
    used: tuple[str, ...] = ("a", "b", "c"),
    version: str | None = None,
    most_models: int = 3,
    speed: float | None = None,
    is_loading: bool = False,
) -> float | None:
    """GB, after `/api/ps` has shown this, a minute apart each."""
    room = LearnedRoom()
    for name in used:
        room.used(name, 0.0)
    for minute, models in enumerate(shown):
        room.shows(
            models,
            60.0 * minute,
            forecast=lambda model: model.size_bytes,
            rule=loading_rule(version),
            most_models=most_models,
            is_loading=is_loading,
        )
    found = room.likely_bytes(speed)
    return None if found is None else found / GB


def test_what_was_there_before_anybody_looked_tells_nothing() -> None:
    assert learned() is None
    assert learned(runners(a=5.0)) is None
    assert learned(runners(a=5.0), runners(a=5.0)) is None


def test_a_model_that_lies_there_as_a_whole_has_room_and_the_margin() -> None:
    assert learned({}, runners(a=8.9)) == 10
    assert learned({}, runners(a=9.8)) == 12, "1 GiB is left free beside it"
    assert learned({}, runners(a=9.8), version="0.24.0") == 10


def test_models_that_lie_there_together_have_room_by_the_rule_that_let_the_second_in() -> None:
    one, two = runners(a=5.0), runners(a=5.0, b=10.0)

    # 10 GB are at most 80 % of what was free beside the 5.
    assert learned({}, one, two) == 20
    assert learned({}, one, two, version="0.24.0") == 16
    assert learned({}, two) == 16, "two at once: nothing tells which was first"


def test_a_model_that_is_partly_in_system_memory_has_filled_the_gpus() -> None:
    # 1 GiB and not quite a layer may be left free.
    most = 1.074 + 20 / 32

    assert learned({}, partly("a", 20.0, 6.7)) == 8, "a usual size lies between"
    assert learned({}, partly("a", 20.0, 5.0)) == pytest.approx(5.0 + most / 2, abs=0.01)


def test_a_model_that_is_all_in_system_memory_is_on_a_node_without_gpus() -> None:
    assert learned({}, partly("a", 5.0, 0.0)) == 0


@pytest.mark.parametrize("vram_gb", [0.0, 2.0])
def test_whoever_asked_for_few_layers_on_the_gpu_tells_nothing_of_what_it_holds(
    vram_gb: float,
) -> None:
    asked = partly("a", 5.0, vram_gb, options=RunnerOptions(num_gpu=3))

    assert learned({}, asked, speed=700e9) == 24


def test_beside_what_was_pushed_out_there_was_no_room() -> None:
    # 8.5 GB need 10.6 free, which there are not beside 5; and there are 8.5 and the margin.
    swap = [{}, runners(a=5.0), runners(b=8.5)]

    assert learned(*swap) == 10
    assert learned(*swap, speed=400e9) == 12, "as cards are that are so fast"
    assert learned(*swap, speed=700e9) == 10, "a bound beats a guess"


def test_what_goes_while_a_load_is_under_way_is_pushed_out_by_it() -> None:
    # The other one appears when it is ready only.
    swap = [{}, runners(a=5.0), {}, {}, runners(b=8.5)]

    assert learned(*swap, speed=700e9, is_loading=True) == 10
    assert learned(*swap, speed=700e9) == 24, "somebody has unloaded it"


def test_after_a_load_that_has_come_what_goes_goes_for_the_next_one() -> None:
    swaps = [{}, runners(a=0.1), {}, runners(b=0.1), runners(b=0.1, c=12.0)]

    assert learned(*swaps, is_loading=True) == 16


def test_a_model_that_is_loaded_anew_has_made_room_for_none_but_itself() -> None:
    assert learned({}, runners(a=5.0), {}, runners(a=6.0), speed=700e9, is_loading=True) == 24


def test_of_several_that_went_the_last_one_had_to() -> None:
    # With one of the two still there, 12 GB would have needed 15.1 in all: less than 16.
    steps = [{}, runners(a=0.1), runners(a=0.1, b=0.1), runners(c=12.0)]
    one_by_one = [*steps[:3], runners(b=0.1), {}, steps[-1]]

    for shown in (steps, one_by_one):
        found = learned(*shown, is_loading=True)
        assert found == pytest.approx((13.074 + 15.1) / 2, abs=0.01)


def test_of_two_that_came_at_once_nothing_tells_which_pushed_out_another() -> None:
    assert learned({}, runners(a=5.0), runners(b=4.0, c=5.0), speed=700e9) == 24


@pytest.mark.parametrize(
    ("why", "about"),
    [
        ("it may have gone because nobody used it", {"used": ("b",)}),
        ("it had to go whatever there was", {"most_models": 1}),
    ],
)
def test_what_went_for_another_reason_sets_no_bound(why: str, about: dict[str, Any]) -> None:
    assert learned({}, runners(a=5.0), runners(b=9.0), speed=700e9, **about) == 24, why


def test_a_model_counts_as_used_for_its_own_keep_alive() -> None:
    def after(keep_alive: float) -> float | None:
        stays = partly("a", 5.0, 5.0, keep_alive_seconds=keep_alive)
        return learned({}, stays, runners(b=8.5), speed=700e9)

    assert after(30.0) == 24
    assert after(600.0) == 10


def test_where_nothing_bounds_it_the_speed_of_its_memory_tells() -> None:
    assert learned({}, runners(a=5.0), speed=700e9) == 24
    assert learned({}, runners(a=5.0), speed=250e9) == 8
    assert learned({}, runners(a=30.0), speed=250e9) == 32, "what lies there has room"


def test_what_was_seen_last_is_true_as_other_programs_come_and_go() -> None:
    tight = [{}, runners(a=5.0), runners(b=9.0)]

    assert learned(*tight, runners(b=9.0, c=10.0)) == 24
    assert learned(
        {}, runners(a=5.0), runners(a=5.0, b=9.0), partly("c", 9.0, 3.0)
    ) == pytest.approx(4.0, abs=0.5)


def test_after_a_silence_nothing_is_made_of_what_is_there() -> None:
    room = LearnedRoom()
    rule: dict[str, Any] = {
        "forecast": lambda model: model.size_bytes,
        "rule": loading_rule(None),
        "most_models": 3,
        "is_loading": True,
    }
    room.used("a", 0.0)
    room.shows({}, 0.0, **rule)
    room.is_silent()
    room.shows(runners(a=5.0), 1.0, **rule)
    assert room.likely_bytes(None) is None

    room.shows({}, 2.0, **rule)
    room.is_silent()
    room.shows({}, 3.0, **rule)
    room.shows(runners(b=8.5), 4.0, **rule)
    assert not room.is_bounded, "nor of what had gone before"


# --------------------------------------------------------------------- in the ledger


def untold(at: float, *warm: str, **about: Any) -> Observation:
    """A probe of a node of whose memory nothing tells."""
    return seen(
        at=at, models=(LLAMA, QWEN, BIG), warm=warm, total_gb=None, free_vram_bytes=None, **about
    )


def after(*observations: Observation) -> NodeSnapshot:
    cluster = ledger(nodes=[node("a")])
    for observation in observations:
        cluster.observe(observation)
    return snapshot_of(cluster)


def test_only_of_a_node_that_nobody_tells_of_it_is_learned() -> None:
    assert after(untold(0.0), untold(1.0, LLAMA)).learned_room_bytes == 8 * GB
    assert after(seen(), seen(at=1.0, warm=(LLAMA,))).learned_room_bytes is None


def test_it_is_what_placements_are_judged_by_and_not_what_is_shown() -> None:
    unknown = after(untold(0.0))
    known = after(untold(0.0), untold(1.0, LLAMA))

    assert fit_of(request(QWEN), unknown, Moment()).verdict == "unknown"
    found = fit_of(request(QWEN), known, Moment())
    assert (found.verdict, found.victims) == ("evicts", (LLAMA,))
    assert known.free_vram_bytes is None
    assert known.room_bytes == 8 * GB - loaded(LLAMA)[LLAMA].size_vram_bytes


def test_a_node_that_loads_into_system_memory_is_taken_for_one_without_gpus() -> None:
    on_cpu = {LLAMA: loaded(LLAMA, size_vram_bytes=0)[LLAMA]}
    found = after(untold(0.0), untold(1.0, loaded=on_cpu))

    assert found.learned_room_bytes == 0
    assert not found.has_gpu
    assert fit_of(request(QWEN), found, Moment()).victims == (), "it asks for no memory"


FAST_ANSWER = Usage(total_seconds=0.5, decode_seconds=0.3, output_tokens=105)
"""Of a model of 2 GB: 700 GB/s."""


def swapped(clock: Clock, cluster: Cluster) -> int | None:
    """GB that are likely after another model has come, with the first one gone."""
    cluster.observe(untold(clock.now, BIG))
    room = snapshot_of(cluster).learned_room_bytes
    return None if room is None else room // GB


def test_our_own_requests_keep_a_model_from_going_for_want_of_use() -> None:
    def after(last_used: float) -> int | None:
        clock = Clock()
        cluster = ledger(untold(0.0), untold(1.0, LLAMA), clock=clock)
        lease = granted(cluster, request(LLAMA))
        clock.now = last_used
        cluster.succeeded(lease, FAST_ANSWER)
        clock.now = 400.0
        return swapped(clock, cluster)

    assert after(50.0) == 24, "it may have gone for want of use: the speed tells"
    assert after(250.0) == 16, "there was no room for both"


def test_other_routers_requests_do_too() -> None:
    clock = Clock()
    cluster = ledger(untold(0.0), untold(1.0, LLAMA), clock=clock)
    cluster.succeeded(granted(cluster, request(LLAMA)), FAST_ANSWER)
    cluster.see_others({"a": {"theirs": running(LLAMA)}}, {})
    clock.now = 400.0
    cluster.observe(untold(400.0, LLAMA))
    cluster.see_others({"a": {}}, {})
    clock.now = 405.0

    assert swapped(clock, cluster) == 16


def test_after_it_was_down_nothing_is_made_of_what_is_there() -> None:
    down = untold(1.0, health="down")

    assert after(untold(0.0), down, untold(2.0, LLAMA)).learned_room_bytes is None


def test_a_pending_load_and_what_it_pushes_out_count() -> None:
    cluster = ledger(untold(0.0), untold(1.0, LLAMA))
    lease = granted(cluster, request(QWEN))
    found = snapshot_of(cluster)

    assert lease.placement.evicts == {LLAMA}
    assert found.room_bytes == 8 * GB - lease.placement.reserved_bytes


def test_what_a_pending_load_has_pushed_out_shows_the_room_once_it_is_done() -> None:
    clock = Clock()
    cluster = ledger(untold(0.0), untold(1.0, LLAMA), clock=clock)
    cluster.succeeded(granted(cluster, request(LLAMA)), FAST_ANSWER)
    clock.now = 2.0
    lease = granted(cluster, request(QWEN))
    cluster.observe(untold(3.0))
    clock.now = 8.0
    cluster.first_byte(lease)

    cluster.observe(untold(8.0, QWEN))

    assert snapshot_of(cluster).has_shown_room


# ------------------------------------------------------- before anything has shown


def loading(model: str, reserved_gb: float) -> RunningRequest:
    return running(model, loading=True, reserved_bytes=round(reserved_gb * GB))


@pytest.mark.parametrize(("reserved", "speed", "room"), [(5.0, None, 3.0), (5.0, 700e9, 19.0)])
def test_a_node_that_nothing_has_shown_is_taken_for_the_least_that_holds_what_comes(
    reserved: float, speed: float | None, room: float
) -> None:
    found = after(untold(0.0)).with_running((loading(LLAMA, reserved),))

    assert replace(found, bytes_per_second=speed).room_bytes == round(room * GB)
    assert found.free_vram_bytes is None, "it is not shown"


def test_a_load_on_its_way_keeps_others_from_coming_after_it() -> None:
    empty = after(untold(0.0))
    found = empty.with_running((loading(LLAMA, 5.0),))

    assert fit_of(request(QWEN), empty, Moment()).verdict == "unknown"
    assert fit_of(request(QWEN), found, Moment()).victims == (LLAMA,)


def test_nothing_is_guessed_where_the_memory_is_told_and_only_its_use_is_not() -> None:
    told = replace(after(untold(0.0)), total_vram_bytes=24 * GB)

    assert told.with_running((loading(LLAMA, 5.0),)).room_bytes is None
    assert not told.may_have_more_room


def test_it_may_have_more_until_ollama_has_shown_that_it_has_not() -> None:
    filled = {BIG: loaded(BIG, size_vram_bytes=5 * GB)[BIG]}

    assert after(untold(0.0), untold(1.0, LLAMA)).may_have_more_room
    assert not after(untold(0.0), untold(1.0, loaded=filled)).may_have_more_room
    assert not after(seen()).may_have_more_room


def test_nobody_is_turned_away_for_memory_that_is_only_guessed() -> None:
    little = HostMemory(total_bytes=2 * GB, available_bytes=2 * GB)
    found = replace(
        after(untold(0.0)).with_running((loading(LLAMA, 5.0),)), host=little, default_context=4096
    )

    assert fit_of(request(BIG), found, Moment()).verdict == "offloads"
    assert fit_of(request(BIG), replace(found, has_shown_room=True), Moment()).verdict == "cannot"
