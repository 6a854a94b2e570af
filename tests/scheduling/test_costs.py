"""What a node costs a request, in seconds: each term by example and by property."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hydra_llm.scheduling import COST_TERMS, Moment, Prices
from hydra_llm.scheduling.costs import (
    COPY_ELSEWHERE_SHARE,
    LEAST_LOAD_SHARE,
    QUEUE_DURING_RELOAD,
    SHARING_SLOWDOWN,
    alone_seconds,
    at_least,
    load_seconds_of,
    of_idle_runner,
    own_seconds,
    seconds_per_token,
    slots_of,
    still_at_work,
)
from hydra_llm.scheduling.memory import fit_of
from hydra_llm.types import (
    GB,
    RESIDUAL_SHARE,
    Demand,
    Device,
    InferenceRequest,
    NodeSnapshot,
    RunnerOptions,
    RunningRequest,
    Speed,
)
from tests.helpers import BIG, LLAMA, loaded, request, running, snapshot
from tests.scheduling.worlds import NODES, QWEN, REQUESTS, again, moments

FAST = Speed(prefill_seconds_per_token=0.001, decode_seconds_per_token=0.01, load_seconds=4.0)


def cost(term: str, asked: InferenceRequest, node: NodeSnapshot, **moment: Any) -> float:
    return COST_TERMS[term](asked, node, Moment(**moment))


def total(asked: InferenceRequest, node: NodeSnapshot, moment: Moment) -> float:
    return sum(term(asked, node, moment) for term in COST_TERMS.values())


def measured(node_id: str = "a", *, model: str = LLAMA, **state: Any) -> NodeSnapshot:
    """A node that has shown: 1 ms a prompt token, 10 ms a token, 4 s a load."""
    return snapshot(node_id, **{"speeds": {model: FAST}, **state})


# ------------------------------------------------------------------- every term


@given(REQUESTS, NODES, moments())
def test_no_term_is_negative_or_endless(
    asked: InferenceRequest, node: NodeSnapshot, moment: Moment
) -> None:
    moment.local_matters = True
    for name, term in COST_TERMS.items():
        seconds = term(asked, node, moment)
        assert seconds >= 0.0, name
        assert math.isfinite(seconds), name


@given(REQUESTS, NODES, moments())
def test_the_cheap_bound_is_never_above_the_sum(
    asked: InferenceRequest, node: NodeSnapshot, moment: Moment
) -> None:
    bound = at_least(asked, node, moment)

    assert 0.0 <= bound <= total(asked, node, moment) * (1 + 1e-9)


@given(REQUESTS, NODES, moments())
def test_the_short_way_to_the_sum_is_the_sum(
    asked: InferenceRequest, node: NodeSnapshot, moment: Moment
) -> None:
    short = of_idle_runner(asked, node, moment)

    if short is not None:
        assert short == pytest.approx(total(asked, node, again(moment)))


def test_the_short_way_is_for_idle_nodes_whose_runner_serves() -> None:
    warm = measured(warm=(LLAMA,))

    assert of_idle_runner(request(), warm, Moment()) == pytest.approx(
        total(request(), warm, Moment())
    )
    assert of_idle_runner(request(), measured(), Moment()) is None
    assert of_idle_runner(request(options=RunnerOptions(num_ctx=999)), warm, Moment()) is None
    assert of_idle_runner(request(), warm, Moment(queue_ahead=1)) is None
    assert of_idle_runner(request(), replace(warm, penalty_seconds=2.0), Moment()) is None
    assert of_idle_runner(request(), replace(warm, running=(running(QWEN),)), Moment()) is None


def test_other_prices_are_not_answered_from_memory() -> None:
    node = snapshot(warm=(LLAMA,), total_vram_gb=None, free_vram_gb=None, bytes_per_second=None)
    slow = Moment(prices=Prices(gpu_bytes_per_second=1e9))

    first = total(request(), node, Moment())

    assert total(request(), node, slow) > first
    assert total(request(), node, Moment()) == first


@given(REQUESTS, NODES, moments())
def test_a_term_costs_the_same_in_whatever_order_they_are_worked_out(
    asked: InferenceRequest, node: NodeSnapshot, moment: Moment
) -> None:
    forwards = {name: term(asked, node, moment) for name, term in COST_TERMS.items()}
    other = again(moment)
    backwards = {name: COST_TERMS[name](asked, node, other) for name in reversed(COST_TERMS)}

    assert forwards == backwards


# -------------------------------------------------------------------------- wait


def test_nobody_waits_at_an_idle_runner() -> None:
    assert cost("wait", request(), measured(warm=(LLAMA,))) == 0.0
    assert cost("wait", request(), measured(warm=(LLAMA,), running=(running(QWEN),))) == 0.0


def test_all_slots_taken_means_waiting_for_the_work_ahead_shared_by_them() -> None:
    ahead = (running(seconds=4.0, lease_id=1), running(seconds=8.0, lease_id=2))

    assert cost("wait", request(), measured(warm=(LLAMA,), running=ahead)) == 12.0
    assert cost("wait", request(), measured(warm=(LLAMA,), running=ahead, slots=2)) == 6.0
    assert cost("wait", request(), measured(warm=(LLAMA,), running=ahead, slots=3)) == 0.0


def test_what_has_run_past_its_time_is_expected_to_go_on() -> None:
    long_ago = running(seconds=8.0, started_at=-100.0)

    node = measured(warm=(LLAMA,), running=(long_ago,))
    assert cost("wait", request(), node) == RESIDUAL_SHARE * 8.0


def test_what_waits_for_a_slot_does_not_get_on() -> None:
    served = running(seconds=8.0, started_at=0.0)
    behind = running(seconds=8.0, started_at=0.0, serving_since=None)
    node = measured(warm=(LLAMA,), running=(served, behind))

    assert cost("wait", request(), node, now=1.0) == 7.0 + 8.0
    assert cost("wait", request(), node, now=90.0) == RESIDUAL_SHARE * 8.0 + 8.0


def test_a_request_that_joins_a_load_waits_for_its_end() -> None:
    pending = running(seconds=1.0, loading=True, load_seconds=5.0)
    node = measured(running=(pending,), slots=4)

    assert cost("load", request(), node, now=2.0) == 0.0
    assert cost("wait", request(), node, now=2.0) == 3.0
    assert cost("wait", request(), node, now=100.0) == pytest.approx(1.0)


def test_those_before_it_in_the_routers_line_count_too() -> None:
    asked = request(output_tokens=100)
    node = measured(warm=(LLAMA,), running=(running(seconds=1.0),))

    assert cost("wait", asked, node, queue_ahead=3) == pytest.approx(1.0 + 3 * 1.0)
    assert cost("wait", asked, measured(), queue_ahead=3) == 0.0, "nobody waits for a cold node"


def test_the_slots_are_configured_or_learned_or_one() -> None:
    learned = {LLAMA: Speed(slots=4)}

    assert slots_of(snapshot(), LLAMA) == 1
    assert slots_of(snapshot(speeds=learned), LLAMA) == 4
    assert slots_of(snapshot(speeds=learned, slots=2), LLAMA) == 2


AHEAD = st.builds(
    running,
    seconds=st.sampled_from([0.0, 1.0, 30.0]),
    started_at=st.integers(-30, 0),
    loading=st.booleans(),
    load_seconds=st.sampled_from([0.0, 5.0]),
)


@given(REQUESTS, NODES, AHEAD, moments())
def test_more_work_ahead_never_makes_the_wait_shorter(
    asked: InferenceRequest, node: NodeSnapshot, more: RunningRequest, moment: Moment
) -> None:
    asked = replace(asked, model=LLAMA, options=RunnerOptions())
    wait = COST_TERMS["wait"]
    busier = replace(node, running=(*node.running, more))
    # The verdict may become "loading", which changes what a token is expected to take.
    queue_free = again(moment, queue_ahead=0)

    assert wait(asked, busier, queue_free) >= wait(asked, node, again(queue_free))


@given(REQUESTS, NODES, moments())
def test_more_requests_in_the_line_never_make_the_wait_shorter(
    asked: InferenceRequest, node: NodeSnapshot, moment: Moment
) -> None:
    longer = again(moment, queue_ahead=moment.queue_ahead + 1)

    assert COST_TERMS["wait"](asked, node, longer) >= COST_TERMS["wait"](asked, node, moment)


# -------------------------------------------------------------------------- load


def test_a_load_costs_what_it_took_there_before() -> None:
    assert cost("load", request(), measured()) == 4.0
    assert cost("load", request(), measured(warm=(LLAMA,))) == 0.0


def test_a_load_never_seen_costs_its_bytes_at_the_rate_of_the_node() -> None:
    assert cost("load", request(), snapshot()) == pytest.approx(1.0 + 2.0 / 1.5)
    # Measured of whole loads, their fixed part included, and no load is without one.
    assert cost("load", request(), snapshot(load_bytes_per_second=1e9)) == pytest.approx(2.0)
    assert cost("load", request(), snapshot(load_bytes_per_second=1e10)) == pytest.approx(1.0)


def test_another_context_prices_a_reload() -> None:
    node = measured(warm=(LLAMA,))
    other = request(options=RunnerOptions(num_ctx=8192))
    same = request(options=RunnerOptions(num_ctx=4096))

    assert cost("load", same, node) == 0.0
    assert cost("load", other, node) == 4.0 + Prices().evict_seconds


def test_loads_wait_for_loads_and_for_busy_victims() -> None:
    pending = running(QWEN, loading=True, load_seconds=6.0, reserved_bytes=0)
    assert cost("load", request(), measured(running=(pending,)), now=1.0) == 5.0 + 4.0

    busy = measured(
        model=BIG,
        models=(LLAMA, BIG),
        warm=(LLAMA,),
        free_vram_gb=13.0,
        running=(running(seconds=9.0),),
    )
    assert cost("load", request(BIG), busy) == 9.0 + 1.0 + 4.0


def test_what_is_still_being_loaded_must_answer_before_it_can_be_pushed_out() -> None:
    pending = running(LLAMA, seconds=7.0, loading=True, load_seconds=3.0, reserved_bytes=3 * GB)
    node = measured(model=BIG, models=(LLAMA, BIG), free_vram_gb=16.0, running=(pending,))

    assert cost("load", request(BIG), node) == 3.0 + 7.0 + 1.0 + 4.0


@given(NODES, moments(), st.integers(1, 8192))
def test_a_warm_node_with_matching_options_beats_the_same_node_cold(
    node: NodeSnapshot, moment: Moment, tokens: int
) -> None:
    asked = request(input_tokens=tokens, output_tokens=100)
    # But for a GPU slower than a CPU is taken to be.
    assume(node.bytes_per_second != 5e9)
    node = replace(node, running=(), loaded={k: v for k, v in node.loaded.items() if k != LLAMA})
    warm = replace(node, loaded={**node.loaded, **loaded(LLAMA)})

    assert total(asked, warm, again(moment, queue_ahead=0)) < total(
        asked, node, again(moment, queue_ahead=0)
    )


# ----------------------------------------------------------------- prefill, decode


def test_prefill_is_paid_for_what_is_not_cached() -> None:
    asked = request(input_tokens=1000, cached_tokens={"a": 900, "b": 5000})

    assert cost("prefill", asked, measured("a", warm=(LLAMA,))) == pytest.approx(0.1)
    assert cost("prefill", asked, measured("b", warm=(LLAMA,))) == 0.0
    assert cost("prefill", asked, measured("c", warm=(LLAMA,))) == pytest.approx(1.0)
    assert cost("prefill", asked, measured("a")) == pytest.approx(1.0), "a load empties the cache"


@given(REQUESTS, NODES, moments(), st.integers(0, 50_000))
def test_more_input_never_costs_less(
    asked: InferenceRequest, node: NodeSnapshot, moment: Moment, more: int
) -> None:
    longer = replace(asked, input_tokens=asked.input_tokens + more)

    for term in ("prefill", "wait", "slowdown"):
        before = COST_TERMS[term](asked, node, again(moment))
        assert COST_TERMS[term](longer, node, again(moment)) >= before


@given(REQUESTS, NODES, moments())
def test_what_is_cached_never_costs_more(
    asked: InferenceRequest, node: NodeSnapshot, moment: Moment
) -> None:
    cached = replace(asked, cached_tokens={"a": 60})
    fresh = replace(asked, cached_tokens={})
    prefill = COST_TERMS["prefill"]

    assert prefill(cached, node, moment) <= prefill(fresh, node, again(moment))


def test_decode_is_the_expected_answer_at_the_nodes_speed() -> None:
    node = measured(warm=(LLAMA,))
    known = {LLAMA: Demand(output_tokens=400.0)}

    assert cost("decode", request(), node) == pytest.approx(2.56)
    assert cost("decode", request(), node, demand=known) == pytest.approx(4.0)
    assert cost("decode", request(output_tokens=50), node, demand=known) == pytest.approx(0.5)
    assert cost("decode", request(output_tokens=0), node) == 0.0


def test_who_reads_along_weighs_decoding_less() -> None:
    node = measured(warm=(LLAMA,))
    share = Prices().interactive_decode_share

    assert cost("decode", request(interactive=True), node) == pytest.approx(share * 2.56)
    assert own_seconds(request(interactive=True), node, Moment())["decode"] == pytest.approx(2.56)


def test_a_pair_never_seen_is_priced_by_bytes_over_bandwidth() -> None:
    def per_token(**state: Any) -> float:
        return cost("decode", request(output_tokens=1), snapshot(**state))

    assert per_token(warm=(LLAMA,)) == pytest.approx(2 / 300)
    assert per_token(warm=(LLAMA,), bytes_per_second=100e9) == pytest.approx(2 / 100)
    assert per_token(total_vram_gb=0.0, free_vram_gb=0.0) == pytest.approx(2 / 40)
    half = loaded(LLAMA, size_bytes=4 * GB, size_vram_bytes=2 * GB)
    assert per_token(loaded=half) == pytest.approx(1 / 300 + 1 / 40)


def test_other_models_on_the_same_gpu_slow_it_down_and_are_slowed_down() -> None:
    asked = request(output_tokens=100)
    alone = measured(warm=(LLAMA, QWEN))
    shared = replace(alone, running=(running(QWEN, seconds=3.0),))

    assert cost("decode", asked, shared) == (1 + SHARING_SLOWDOWN) * cost("decode", asked, alone)
    assert cost("prefill", asked, shared) == (1 + SHARING_SLOWDOWN) * cost("prefill", asked, alone)
    before = running(seconds=4.0)
    behind_one = replace(shared, running=(before, *shared.running))
    assert cost("wait", asked, behind_one) == (1 + SHARING_SLOWDOWN) * 4.0
    waits = replace(alone, running=(running(QWEN, serving_since=None),))
    assert cost("decode", asked, waits) == cost("decode", asked, alone)
    assert cost("slowdown", asked, waits) == 0.0
    assert cost("slowdown", asked, alone) == 0.0
    assert cost("slowdown", asked, shared) == SHARING_SLOWDOWN * 1.0
    talks = {LLAMA: Demand(output_tokens=9999.0)}
    assert cost("slowdown", request(), shared, demand=talks) == SHARING_SLOWDOWN * 3.0


# ------------------------------------------------------------------------ eviction


def only_loads(**words: Any) -> InferenceRequest:
    """It is at work for no time at all once it is there."""
    return request(BIG, input_tokens=0, output_tokens=0, **words)


def evicting(asked: InferenceRequest | None = None, **moment: Any) -> float:
    node = measured(models=(LLAMA, BIG), warm=(LLAMA,), free_vram_gb=13.0, speeds={LLAMA: FAST})
    return cost("eviction", asked or only_loads(), node, **moment)


def test_pushing_out_what_nobody_wants_is_free() -> None:
    assert evicting() == 0.0
    assert evicting(demand={LLAMA: Demand(per_second=0.0)}) == 0.0


def test_pushing_out_what_is_wanted_costs_its_reload() -> None:
    once_a_minute = 4.0 * (1 - math.exp(-1))
    queue = QUEUE_DURING_RELOAD * (1 / 60) * 4.0 / 2
    assert evicting(demand={LLAMA: Demand(per_second=1 / 60)}) == pytest.approx(
        once_a_minute * (1 + queue)
    )


def test_what_pushed_it_out_is_at_work_before_it_can_come_back() -> None:
    asked = request(BIG, input_tokens=0, output_tokens=90)
    at_work = 90 * 14 / 300  # 14 GB at 300 GB/s

    # Somebody comes every 10 ms: the next one waits for nearly all of it.
    price = evicting(asked, demand={LLAMA: Demand(per_second=100.0)})
    reload = 4.0 + at_work - 0.01
    assert price == pytest.approx(reload * (1 + QUEUE_DURING_RELOAD * 100.0 * reload / 2))

    # Once an hour: whoever comes within the minute that counts finds it done, but for 1 in 14.
    price = evicting(asked, demand={LLAMA: Demand(per_second=1 / 3600)})
    assert price * 3600 / 60 == pytest.approx(4.0 + at_work**2 / 2 / 60, rel=0.01)


def test_where_perhaps_nothing_has_to_go_only_the_reload_counts() -> None:
    told = measured(models=(LLAMA, BIG), warm=(LLAMA,), free_vram_gb=13.0, speeds={LLAMA: FAST})
    unknown = replace(told, total_vram_bytes=None, measured_free_vram_bytes=None)
    guessed = replace(unknown, learned_room_bytes=16 * GB)
    shown = replace(guessed, has_shown_room=True)
    demand = {LLAMA: Demand(per_second=1.0)}

    def at_work_counts(node: NodeSnapshot) -> bool:
        answers = (request(BIG, output_tokens=tokens) for tokens in (0, 1000))
        prices = [cost("eviction", asked, node, demand=demand) for asked in answers]
        assert prices[0] > 0.0
        return prices[1] > 2 * prices[0]

    assert [at_work_counts(node) for node in (told, guessed, shown)] == [True, False, True]


@given(seconds=st.floats(0.0, 1e3), rate=st.floats(1e-9, 1e3))
def test_what_is_still_at_work_when_the_next_one_comes(seconds: float, rate: float) -> None:
    steps = 2000
    # The mean of max(0, seconds − T) is the integral of P(T < t) from 0 to seconds.
    parts = (-math.expm1(-rate * seconds * (n + 0.5) / steps) for n in range(steps))
    mean = math.fsum(parts) * seconds / steps

    assert still_at_work(seconds, rate) == pytest.approx(mean, rel=1e-2, abs=1e-6)


def test_those_that_come_during_the_reload_wait_too() -> None:
    price = evicting(demand={LLAMA: Demand(per_second=10.0)})
    assert price == pytest.approx(4.0 * (1 + QUEUE_DURING_RELOAD * 10.0 * 4.0 / 2))


def test_another_warm_copy_takes_most_of_the_pain_away() -> None:
    demand = Demand(per_second=100.0, warm_nodes=1)

    alone = evicting(demand={LLAMA: demand})
    with_another = evicting(demand={LLAMA: replace(demand, warm_nodes=2)})
    assert alone > 4.0
    assert with_another == pytest.approx(COPY_ELSEWHERE_SHARE * alone)


def test_a_high_priority_minds_others_less_and_a_low_one_more() -> None:
    node = measured(models=(LLAMA, BIG), warm=(LLAMA,), free_vram_gb=13.0, speeds={LLAMA: FAST})
    shared = measured(warm=(LLAMA, QWEN), running=(running(QWEN, seconds=3.0),))
    demand = {LLAMA: Demand(per_second=0.1)}

    def prices(priority: int) -> tuple[float, float]:
        return (
            cost("eviction", only_loads(priority=priority), node, demand=demand),
            cost("slowdown", request(output_tokens=100, priority=priority), shared),
        )

    usual = prices(5)
    assert usual[0] == evicting(demand=demand)
    for priority, factor in ((1, 2.0), (3, math.sqrt(2)), (7, math.sqrt(0.5)), (9, 0.5)):
        assert prices(priority) == pytest.approx((usual[0] * factor, usual[1] * factor))


@given(st.floats(0, 10), st.floats(0, 10), st.integers(0, 1000))
def test_the_more_a_model_is_wanted_the_more_its_eviction_costs(
    one: float, other: float, age: int
) -> None:
    less, more = sorted((one, other))
    prices = [
        evicting(now=float(age), demand={LLAMA: Demand(per_second=rate)}) for rate in (less, more)
    ]

    assert prices[0] <= prices[1] < math.inf


# ------------------------------------------------------------------ a further copy


def another_copy(rate: float, *, warm_nodes: int = 1, free_vram_gb: float = 20.0) -> float:
    demand = {LLAMA: Demand(per_second=rate, warm_nodes=warm_nodes, output_tokens=100.0)}
    node = measured(models=(LLAMA, BIG), free_vram_gb=free_vram_gb)
    return cost("load", request(), node, demand=demand)


def test_a_further_copy_of_a_model_that_is_much_asked_for_is_paid_in_part_by_the_others() -> None:
    assert another_copy(0.0) == 4.0
    # rate × horizon × own × busy / (1 - busy), with a busy of 0.1 × 1
    assert another_copy(0.1) == pytest.approx(4.0 - 0.1 * 60 * 1.0 * 0.1 / 0.9)
    assert another_copy(0.1, warm_nodes=4) > another_copy(0.1), "four have room"
    assert another_copy(5.0) == pytest.approx(LEAST_LOAD_SHARE * 4.0), "but never for nothing"
    assert another_copy(5.0, warm_nodes=0) == 4.0, "the first one serves itself"


def test_what_is_foreseen_of_a_further_copy_is_the_whole_load() -> None:
    moment = Moment(demand={LLAMA: Demand(per_second=5.0, warm_nodes=1, output_tokens=100.0)})
    node = measured(models=(LLAMA, BIG), free_vram_gb=20.0)

    assert own_seconds(request(), node, moment)["load"] == 4.0


def test_a_further_copy_that_pushes_out_another_model_pays_all() -> None:
    demand = {BIG: Demand(per_second=5.0, warm_nodes=1, output_tokens=100.0)}
    free = measured(models=(LLAMA, BIG), model=BIG, free_vram_gb=24.0)
    full = replace(free, loaded=loaded(LLAMA), measured_free_vram_bytes=13 * GB)

    assert cost("load", request(BIG), free, demand=demand) < 4.0
    assert cost("load", request(BIG), full, demand=demand) > 4.0


def test_a_further_copy_pays_in_part_where_memory_may_be_free_that_nothing_has_shown() -> None:
    demand = {BIG: Demand(per_second=5.0, warm_nodes=1, output_tokens=100.0)}
    known = measured(models=(LLAMA, BIG), model=BIG, free_vram_gb=None)
    untold = replace(known, loaded=loaded(LLAMA), total_vram_bytes=None, learned_room_bytes=16 * GB)

    assert cost("load", request(BIG), untold, demand=demand) < 4.0
    assert cost("load", request(BIG), replace(untold, has_shown_room=True), demand=demand) > 4.0


def test_a_copy_that_runs_in_system_memory_is_not_worth_its_reload() -> None:
    """Whoever wants it next would rather have it loaded where it is fast."""
    demand = {LLAMA: Demand(per_second=100.0, warm_nodes=1, output_tokens=100.0)}
    whole = measured(models=(LLAMA, BIG), warm=(LLAMA,), free_vram_gb=13.0)

    def price(seconds_per_token: float) -> float:
        speed = replace(FAST, decode_seconds_per_token=seconds_per_token)
        on_cpu = loaded(LLAMA, size_vram_bytes=GB)
        node = replace(whole, loaded=on_cpu, speeds={LLAMA: speed})
        return cost("eviction", only_loads(), node, demand=demand)

    # 2 GB at 300 GB/s are 6.7 ms a token; a reload takes 4 s.
    assert price(0.0067) == pytest.approx(
        cost("eviction", only_loads(), whole, demand=demand), rel=0.01
    )
    assert 0.0 < price(0.03) < price(0.02) < price(0.01)
    assert price(0.0467) == pytest.approx(0.0, abs=0.1), "100 tokens take 4 s longer there"
    assert price(1.0) == 0.0


def test_a_copy_that_is_only_coming_here_is_elsewhere_already() -> None:
    demand = {LLAMA: Demand(per_second=100.0, warm_nodes=1)}
    here = measured(models=(LLAMA, BIG), warm=(LLAMA,), free_vram_gb=13.0)
    coming = running(LLAMA, loading=True, reserved_bytes=3 * GB)
    there = replace(here, loaded={}, running=(coming,), measured_free_vram_bytes=16 * GB)
    assert fit_of(request(BIG), there, Moment()).victims == (LLAMA,)

    only = cost("eviction", request(BIG), here, demand=demand)
    assert cost("eviction", request(BIG), there, demand=demand) == COPY_ELSEWHERE_SHARE * only


def test_whoever_reads_along_minds_an_answer_that_is_slower_than_reading() -> None:
    def minded(seconds_per_token: float, **words: Any) -> float:
        speed = replace(FAST, decode_seconds_per_token=seconds_per_token)
        node = snapshot(warm=(LLAMA,), speeds={LLAMA: speed})
        return cost("decode", request(output_tokens=100, **words), node)

    assert minded(0.05, interactive=True) == pytest.approx(0.3 * 5.0)
    assert minded(0.1, interactive=True) == pytest.approx(0.3 * 10.0)
    assert minded(0.4, interactive=True) == pytest.approx(0.3 * 10.0 + 30.0)
    assert minded(0.4) == pytest.approx(40.0)


def test_the_memory_of_a_large_card_is_taken_to_be_fast_until_it_is_measured() -> None:
    def rate(total_gb: float | None, **about: Any) -> float:
        node = snapshot(total_vram_gb=total_gb, free_vram_gb=total_gb, **about)
        return 2.0 * GB / seconds_per_token(request(), node, Moment())

    unmeasured: dict[str, Any] = {"bytes_per_second": None}
    assert rate(24.0, **unmeasured) == pytest.approx(650e9)
    assert rate(8.0, **unmeasured) == pytest.approx(250e9)
    assert rate(24.0) == pytest.approx(300e9), "what was measured is so"
    assert rate(None, **unmeasured) == pytest.approx(300e9)
    pool = Device(key="m", vendor="apple", kind="unified", total_bytes=24 * GB)
    assert rate(24.0, devices=(pool,), **unmeasured) == pytest.approx(300e9), "an Apple is no card"
    two = tuple(Device(key=key, vendor="nvidia", total_bytes=12 * GB) for key in "ab")
    assert rate(24.0, devices=two, **unmeasured) == pytest.approx(350e9), "two small ones"


def test_a_reload_is_no_eviction_of_the_model_itself() -> None:
    asked = request(options=RunnerOptions(num_ctx=8192))
    demand = {LLAMA: Demand(per_second=100.0)}

    assert cost("eviction", asked, measured(warm=(LLAMA,)), demand=demand) == 0.0


# ------------------------------------------------------------------ preference, risk


@pytest.mark.parametrize("seconds", [0.0, 1.5, 3.0])
def test_prefer_local_is_worth_exactly_its_seconds(seconds: float) -> None:
    prices = Prices(prefer_local_seconds=seconds)
    here, there = snapshot("a", local=True), snapshot("b")

    for node, price in ((here, 0.0), (there, seconds)):
        assert cost("preference", request(), node, prices=prices, local_matters=True) == price
        asked = request(prefer_local=False)
        assert cost("preference", asked, node, prices=prices, local_matters=True) == 0.0
        assert cost("preference", request(), node, prices=prices, local_matters=False) == 0.0


def test_each_preferred_label_that_is_missing_has_its_price() -> None:
    asked = request(prefer_labels=frozenset({"fast", "eu"}))
    price = Prices().prefer_label_seconds

    assert cost("preference", asked, snapshot(labels=("fast", "eu", "other"))) == 0.0
    assert cost("preference", asked, snapshot(labels=("eu",))) == price
    assert cost("preference", asked, snapshot()) == 2 * price


def test_each_gb_short_of_what_was_asked_for_has_its_price() -> None:
    asked = request(min_vram_bytes=25 * GB)

    assert cost("preference", asked, snapshot(free_vram_gb=20.0)) == pytest.approx(5.0)
    assert cost("preference", asked, snapshot(free_vram_gb=None)) == pytest.approx(25.0)
    assert cost("preference", asked, snapshot(free_vram_gb=30.0)) == 0.0


def test_the_price_of_errors_halves_in_ten_seconds() -> None:
    node = snapshot(warm=(LLAMA,), penalty_seconds=8.0, penalty_at=5.0)

    for now, price in ((5.0, 8.0), (15.0, 4.0), (25.0, 2.0), (0.0, 8.0)):
        assert cost("risk", request(), node, now=now) == pytest.approx(price)


def test_unknown_memory_is_neither_banned_nor_free() -> None:
    known, unknown = measured(), measured(free_vram_gb=None, total_vram_gb=None)

    assert cost("risk", request(), known) == 0.0
    assert cost("risk", request(), unknown) == 0.1 * 4.0
    assert cost("risk", request(), replace(unknown, loaded=loaded(LLAMA))) == 0.0


# --------------------------------------------------------------------------- bound


def test_the_bound_says_nothing_of_a_node_that_has_or_gets_the_model() -> None:
    moment = Moment()
    pending = running(loading=True, load_seconds=5.0)

    assert at_least(request(), measured(warm=(LLAMA,)), moment) == 0.0
    assert at_least(request(), measured(running=(pending,)), moment) == 0.0
    least = LEAST_LOAD_SHARE * 4.0 + 1.0
    assert at_least(request(output_tokens=100), measured(), Moment()) == pytest.approx(least)


def test_a_gpu_slower_than_a_cpu_does_not_lift_the_bound_over_the_cost() -> None:
    node = snapshot(bytes_per_second=5e9, free_vram_gb=0.5)
    asked = request(output_tokens=1000)

    assert at_least(asked, node, Moment()) <= total(asked, node, Moment())


def test_the_own_seconds_are_what_a_prediction_is_made_of() -> None:
    asked = request(input_tokens=1000, output_tokens=100)
    node = measured(running=(running(QWEN, loading=True, load_seconds=2.0),))
    own = own_seconds(asked, node, Moment())

    assert own == {"wait": 0.0, "load": 6.0, "prefill": 1.0, "decode": 1.0}
    assert alone_seconds(asked, node, Moment()) == pytest.approx(2.0)
    assert load_seconds_of(LLAMA, node, Moment()) == 4.0
