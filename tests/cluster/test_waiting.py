"""Who goes first, and that everybody goes at some time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.cluster import Cluster, Lease, Waiter
from hydra_llm.cluster.cluster import SWAP_PATIENCE
from hydra_llm.cluster.waiting import (
    AGEING_SECONDS,
    OTHERS_TURN_SECONDS,
    TURNS_OF_HIGHEST,
    URGENT_SECONDS,
    WaitingLine,
    Wish,
)
from hydra_llm.exceptions import NoEligibleNodeError, QueueFullError
from hydra_llm.types import InferenceRequest, Placement
from tests.cluster.ledgers import Clock, granted, ledger, node, seen
from tests.helpers import BIG, LLAMA, request

QWEN = "qwen3:8b"


def in_line(cluster: Cluster, asked: InferenceRequest) -> Waiter:
    held = cluster.acquire(asked)
    assert isinstance(held, Waiter)
    return held


def one_node(clock: Clock | None = None, **rules: Any) -> Cluster:
    return ledger(seen(warm=(LLAMA,)), clock=clock or Clock(), **rules)


def full(clock: Clock | None = None, **rules: Any) -> tuple[Cluster, list[Lease]]:
    """One slot and one place of headroom, both taken."""
    cluster = one_node(clock, **rules)
    return cluster, [granted(cluster, request()) for _ in range(2)]


@given(st.lists(st.tuples(st.integers(1, 10), st.integers(0, 60)), max_size=12))
def test_the_line_is_ordered_by_priority_and_age(waiting: list[tuple[int, int]]) -> None:
    line = WaitingLine()
    for priority, since in waiting:
        line.add(Waiter(request(priority=priority), float(since)))

    found = [(w.request.priority, w.since) for w in line.in_order(60.0)]

    assert found == sorted(waiting, key=lambda w: (w[0] < 10, w[1] - w[0] * AGEING_SECONDS, w[1]))


@given(
    st.lists(st.tuples(st.integers(1, 10), st.integers(0, 200)), max_size=6), st.floats(200, 1e6)
)
def test_who_is_ahead_has_waited_up_to_the_urgency_of_those_behind(
    waiting: list[tuple[int, int]], now: float
) -> None:
    """All age alike, so the order of two that wait never changes."""
    line = WaitingLine()
    for priority, since in waiting:
        line.add(Waiter(request(priority=priority), float(since)))

    urgencies = [waiter.wish.urgency(now) for waiter in line.in_order(now)]

    assert urgencies == pytest.approx(sorted(urgencies, reverse=True))


@pytest.mark.parametrize("low", [1, 5, 8])
def test_waiting_makes_up_for_any_priority_but_the_highest(low: int) -> None:
    line = WaitingLine()
    patient = Waiter(request(priority=low), 0.0)
    line.add(patient)
    now = (9 - low) * AGEING_SECONDS
    line.add(Waiter(request(priority=9), now))
    highest = Waiter(request(priority=10), 100 * now)
    line.add(highest)

    assert line.in_order(100 * now)[:2] == [highest, patient]


@given(st.integers(1, 9), st.floats(0, 1e6), st.floats(0, 1e3))
def test_urgency_rises_all_the_time_and_never_to_the_highest(
    priority: int, waited: float, more: float
) -> None:
    wish = Wish(priority=priority, since=0.0)

    assert priority <= wish.urgency(waited) <= wish.urgency(waited + more) < 10
    assert Wish(priority=10, since=waited).urgency(waited) == 10


def test_the_highest_priority_gives_way_after_so_many_turns() -> None:
    """One slot that the highest priority alone could keep busy for ever."""
    clock = Clock()
    cluster, leases = full(clock)
    patient, young = in_line(cluster, request(priority=2)), in_line(cluster, request(priority=1))
    clock.now = 1000.0
    late = in_line(cluster, request(priority=1))
    urgent, turns = patient, 0
    while patient.state == "waiting":
        urgent = in_line(cluster, request(priority=10))
        cluster.release(leases.pop(0))
        while urgent.state == patient.state == "waiting":
            cluster.release(leases.pop(0))
        leases += [w.lease for w in (urgent, patient) if w.lease is not None]
        turns += urgent.state == "granted"

    assert turns == TURNS_OF_HIGHEST
    assert (young.state, late.state, urgent.state) == ("waiting", "waiting", "waiting")


def test_a_new_request_goes_behind_those_as_urgent_and_before_the_others() -> None:
    line = WaitingLine()
    for priority in (1, 5, 5, 9):
        line.add(Waiter(request(priority=priority), 0.0))
    line.add(Waiter(request(QWEN, priority=9), 0.0))

    assert line.ahead_of(request(priority=5), 0.0) == 3
    assert line.ahead_of(request(priority=10), 0.0) == 0
    assert line.counts() == {LLAMA: 4, QWEN: 1}


def test_the_most_urgent_gets_the_free_place() -> None:
    cluster, leases = full()
    low, high = in_line(cluster, request(priority=4)), in_line(cluster, request(priority=7))

    cluster.release(leases[0])

    assert (low.state, high.state) == ("waiting", "granted")


def test_low_priorities_leave_headroom_and_high_ones_get_more() -> None:
    for priority, places in ((1, 1), (3, 1), (4, 2), (7, 2), (8, 3), (10, 3)):
        cluster = one_node()
        held = [cluster.acquire(request(priority=priority)) for _ in range(5)]
        assert sum(isinstance(h, Lease) for h in held) == places


def test_the_lowest_priority_does_not_starve_beside_a_runner_that_is_never_idle() -> None:
    clock = Clock()
    cluster, leases = full(clock)
    patient = in_line(cluster, request(priority=1))
    others: list[Waiter] = []

    while patient.state == "waiting" and clock.now < 300:
        clock.now += 10
        others.append(in_line(cluster, request(priority=5)))
        cluster.succeeded(leases.pop(0), None)
        leases += [waiter.lease for waiter in others if waiter.lease is not None]
        others = [waiter for waiter in others if waiter.state == "waiting"]

    assert patient.state == "granted"
    assert clock.now <= 6 * AGEING_SECONDS


def test_a_long_line_spills_over_to_a_node_that_must_load_first() -> None:
    cluster = ledger(seen("warm", warm=(LLAMA,)), seen("cold"))

    held = [cluster.acquire(request(output_tokens=100)) for _ in range(20)]

    assert isinstance(held[2], Waiter), "at first it is sooner to wait"
    leases = [one if isinstance(one, Lease) else one.lease for one in held]
    assert {lease.node_id for lease in leases if lease} == {"warm", "cold"}


def test_a_grant_that_makes_room_for_one_passed_over_is_noticed_at_once() -> None:
    """As when it changes which node is best for the other."""
    is_open = False

    def choose(asked: InferenceRequest, nodes: Any, *_: Any) -> Placement:
        others = len(nodes[0].running)
        return Placement(node_id="a", has_room=is_open and (asked.model == LLAMA or others > 0))

    cluster = ledger(seen(), choose=choose)
    first, second = in_line(cluster, request(QWEN, priority=9)), in_line(cluster, request())
    is_open = True
    cluster.tick()

    assert (first.state, second.state) == ("granted", "granted")


def test_who_needs_more_room_is_not_passed_by_those_behind_for_ever() -> None:
    """Priority 1 takes nothing beyond the slots, 5 does."""
    clock = Clock()
    cluster, leases = full(clock)
    patient = in_line(cluster, request(priority=1))
    clock.now = 200.0
    late = in_line(cluster, request())

    cluster.release(leases[0])
    assert (patient.state, late.state) == ("waiting", "waiting")
    cluster.release(leases[1])

    assert (patient.state, late.state) == ("granted", "granted")


# ------------------------------------------------------------- beside urgent requests


def places_after(cluster: Cluster, clock: Clock, *before: InferenceRequest) -> int:
    """How many requests for LLAMA are handed over where these have come a while ago."""
    for asked in before:
        cluster.release(granted(cluster, asked))
    clock.now = URGENT_SECONDS
    return sum(isinstance(cluster.acquire(request()), Lease) for _ in range(4))


@pytest.mark.parametrize(("urgent", "places"), [(7, 2), (8, 1), (10, 1)])
def test_nothing_beyond_the_slots_is_handed_over_where_urgent_requests_come_too(
    urgent: int, places: int
) -> None:
    clock = Clock()

    assert places_after(one_node(clock), clock, request(priority=urgent)) == places


@pytest.mark.parametrize(("at", "places"), [("a", 1), ("b", 2)])
def test_nor_where_they_come_for_another_model_that_the_node_has(at: str, places: int) -> None:
    """Its load begins when the runner that is pushed out has answered all that it was handed."""
    clock = Clock()
    models = {"a": {LLAMA}, "b": set[str]()}
    models[at].add(QWEN)
    cluster = ledger(
        seen("a", models=models["a"], warm=(LLAMA,)), seen("b", models=models["b"]), clock=clock
    )

    assert places_after(cluster, clock, request(QWEN, priority=10)) == places


def test_an_urgent_request_that_others_come_beside_waits_at_the_head_of_the_line() -> None:
    """From there it takes whichever place is free first."""
    clock = Clock()
    cluster = ledger(seen(models=(LLAMA, QWEN), warm=(LLAMA, QWEN)), clock=clock)
    cluster.release(granted(cluster, request(QWEN, priority=7)))
    granted(cluster, request(priority=8))

    in_line(cluster, request(priority=8))
    clock.now = URGENT_SECONDS + 1
    assert isinstance(cluster.acquire(request(priority=8)), Lease), "nobody else has come for long"


def test_where_none_has_come_for_long_there_is_headroom_again() -> None:
    clock = Clock()
    cluster = one_node(clock)
    cluster.release(granted(cluster, request(priority=10)))
    clock.now = URGENT_SECONDS + 1

    held = [cluster.acquire(request()) for _ in range(4)]

    assert sum(isinstance(h, Lease) for h in held) == 2


def test_slots_that_nobody_knows_can_still_show() -> None:
    cluster = ledger(seen(warm=(LLAMA,)), clock=Clock(), nodes=[node("a", slots=None)])
    cluster.release(granted(cluster, request(priority=10)))

    held = [cluster.acquire(request()) for _ in range(4)]

    assert sum(isinstance(h, Lease) for h in held) == 2


def test_a_gpu_that_urgent_requests_use_works_for_one_other_model_at_a_time() -> None:
    cluster = ledger(seen(models=(LLAMA, QWEN), warm=(LLAMA, QWEN)), clock=Clock())
    cluster.release(granted(cluster, request(priority=10)))
    first = granted(cluster, request())

    other, third = in_line(cluster, request(QWEN)), in_line(cluster, request())
    urgent = cluster.acquire(request(QWEN, priority=8))
    assert isinstance(urgent, Lease), "it runs beside the other"

    cluster.release(urgent)
    assert (other.state, third.state) == ("waiting", "waiting")
    cluster.release(first)
    assert (other.state, third.state) == ("granted", "waiting")


def test_where_no_urgent_ones_come_it_works_for_as_many_as_there_are() -> None:
    cluster = ledger(seen(models=(LLAMA, QWEN), warm=(LLAMA, QWEN)), clock=Clock())

    assert [granted(cluster, request(model)).is_held for model in (LLAMA, QWEN)] == [True, True]


def test_it_does_so_too_when_the_model_that_they_want_has_been_pushed_out() -> None:
    cluster = ledger(seen(models=(LLAMA, QWEN, BIG), warm=(LLAMA, QWEN)), clock=Clock())
    cluster.release(granted(cluster, request(BIG, priority=10)))
    granted(cluster, request())

    in_line(cluster, request(QWEN))


def beside_an_urgent_one(clock: Clock) -> tuple[Cluster, Lease]:
    """Two models are loaded; an urgent request is served by one of them."""
    cluster = ledger(seen(models=(LLAMA, QWEN), warm=(LLAMA, QWEN)), clock=clock)
    return cluster, granted(cluster, request(priority=8))


def test_another_model_waits_until_the_urgent_request_is_done() -> None:
    cluster, _ = beside_an_urgent_one(Clock())
    other = in_line(cluster, request(QWEN))
    assert isinstance(cluster.acquire(request(QWEN, priority=8)), Lease), "this one does not"

    states = []
    for lease in cluster.held():
        cluster.release(lease)
        states.append(other.state)

    assert states == ["waiting", "granted"]


def test_others_have_their_turn_at_times_however_many_urgent_requests_come() -> None:
    clock = Clock()
    cluster, urgent = beside_an_urgent_one(clock)
    waiting = [in_line(cluster, request(QWEN)) for _ in range(2)]
    turns: dict[Waiter, float] = {}

    while len(turns) < 2:
        clock.now += 1.0
        following = in_line(cluster, request(priority=8))
        cluster.release(urgent)
        assert following.lease is not None, "it goes before the others"
        urgent = following.lease
        for waiter in waiting:
            if waiter.lease is not None and waiter not in turns:
                turns[waiter] = clock.now
            elif waiter.lease is not None and clock.now == turns[waiter] + 4.0:
                cluster.release(waiter.lease)

    assert list(turns.values()) == [OTHERS_TURN_SECONDS + 1, 2 * (OTHERS_TURN_SECONDS + 1) + 4.0]


def test_a_model_with_several_slots_does_not_keep_the_others_turn() -> None:
    cluster = ledger(
        seen(models=(LLAMA, QWEN), warm=(LLAMA, QWEN)), clock=Clock(), nodes=[node("a", slots=2)]
    )
    cluster.release(granted(cluster, request(priority=10)))
    first = granted(cluster, request())

    other, third = in_line(cluster, request(QWEN)), in_line(cluster, request())
    assert third.state == "waiting", "there is a slot, but it is the other model's turn"
    cluster.release(first)

    assert (other.state, third.state) == ("granted", "waiting")


# ------------------------------------------------------------------------------ swaps


def swapping(clock: Clock) -> tuple[Cluster, Lease]:
    """Room for one model at a time; LLAMA is loaded and has a request."""
    cluster = ledger(
        seen(models=(LLAMA, QWEN), warm=(LLAMA,), total_gb=8.0),
        clock=clock,
        nodes=[node("a", max_loaded_models=1)],
    )
    return cluster, granted(cluster, request(priority=3))


def test_a_loaded_model_serves_those_who_wait_for_it_before_it_is_pushed_out() -> None:
    cluster, lease = swapping(Clock())
    mine = [in_line(cluster, request(priority=3))]
    swap = in_line(cluster, request(QWEN, priority=3))
    mine += [in_line(cluster, request(priority=3)) for _ in range(2)]
    order: list[str] = []
    waiting = [*mine, swap]

    while waiting:
        cluster.release(lease)
        (done,) = (w for w in waiting if w.lease is not None)
        waiting.remove(done)
        assert done.lease is not None
        lease = done.lease
        order.append(lease.request.model)

    assert order == [LLAMA, LLAMA, LLAMA, QWEN]


def test_a_swap_is_not_put_off_for_ever() -> None:
    clock = Clock()
    cluster, lease = swapping(clock)
    swap = in_line(cluster, request(QWEN, priority=3))
    assert swap.state == "waiting"
    while swap.state == "waiting" and clock.now < 1000:
        clock.now += 5.0
        young = in_line(cluster, request(priority=3))
        cluster.release(lease)
        held = young.lease or swap.lease
        assert held is not None
        lease = held

    assert swap.lease is not None
    load = swap.lease.placement.load_seconds
    assert load <= clock.now <= SWAP_PATIENCE * load + 10.0


def test_the_highest_priority_does_not_wait_for_others_to_be_served() -> None:
    cluster, _ = swapping(Clock())
    in_line(cluster, request(priority=3))

    assert isinstance(cluster.acquire(request(QWEN, priority=10)), Lease)


# ------------------------------------------------------------------- how it can end


def test_a_waiter_is_woken_once_without_the_lock_and_finds_its_lease() -> None:
    cluster, leases = full()
    waiter = in_line(cluster, request())
    found: list[int] = []
    waiter.on_ready(lambda: found.append(cluster.in_flight))

    cluster.release(leases[0])
    cluster.tick()

    assert found == [2]
    waiter.on_ready(lambda: found.append(-1))
    assert found == [2, -1], "too late to wait: called at once"


def test_a_withdrawn_waiter_gets_nothing_and_takes_nothing() -> None:
    cluster, leases = full()
    waiter, next_one = in_line(cluster, request()), in_line(cluster, request())

    cluster.withdraw(waiter)
    cluster.withdraw(waiter)
    cluster.release(leases[0])

    assert (waiter.state, next_one.state) == ("withdrawn", "granted")
    assert cluster.in_flight == 2


def test_a_lease_granted_to_someone_just_leaving_is_given_back() -> None:
    cluster, leases = full()
    waiter = in_line(cluster, request())
    cluster.release(leases[0])
    assert waiter.lease is not None

    cluster.withdraw(waiter)

    assert not waiter.lease.is_held
    assert cluster.in_flight == 1


def test_a_waiter_is_refused_as_soon_as_nobody_can_take_it_any_more() -> None:
    cluster, _ = full()
    waiter = in_line(cluster, request())

    cluster.set_cordoned("a", True)

    assert waiter.state == "refused"
    assert isinstance(waiter.error, NoEligibleNodeError)
    assert cluster.waiting == 0


def test_a_waiter_whose_deadline_cannot_be_met_any_more_is_refused() -> None:
    clock = Clock()
    cluster, _ = full(clock)
    waiter = in_line(cluster, request(deadline_seconds=20.0))
    patient = in_line(cluster, request())
    clock.now = 25.0

    cluster.tick()

    assert waiter.state == "refused"
    assert patient.state == "waiting"


def test_a_full_line_refuses_and_says_how_many_wait() -> None:
    cluster, _ = full(max_queue=1)
    in_line(cluster, request())

    with pytest.raises(QueueFullError, match="max_queue") as caught:
        cluster.acquire(request())

    assert caught.value.waiting == 1
    assert cluster.waiting == 1


@pytest.mark.parametrize(("waits", "comes"), [(4, 5), (9, 10), (1, 2)])
def test_a_full_line_refuses_the_least_urgent(waits: int, comes: int) -> None:
    cluster, _ = full(max_queue=2)
    first, last = in_line(cluster, request(priority=10)), in_line(cluster, request(priority=waits))
    woken: list[bool] = []
    last.on_ready(lambda: woken.append(True))

    new = in_line(cluster, request(priority=comes))

    assert (first.state, last.state, new.state) == ("waiting", "refused", "waiting")
    assert woken == [True]
    assert isinstance(last.error, QueueFullError)
    assert str(last.error).startswith("2 more urgent requests wait")
    assert (last.error.waiting, cluster.waiting) == (2, 2)


def test_a_full_line_refuses_the_new_one_if_those_before_have_waited_for_as_much() -> None:
    clock = Clock()
    cluster, _ = full(clock, max_queue=1)
    patient = in_line(cluster, request(priority=4))
    clock.now = AGEING_SECONDS

    with pytest.raises(QueueFullError):
        cluster.acquire(request(priority=5))

    assert patient.state == "waiting"


def test_nobody_waits_longer_than_the_limit() -> None:
    clock = Clock()
    cluster, leases = full(clock, queue_timeout=60.0)
    first = in_line(cluster, request())
    clock.now = 30.0
    second = in_line(cluster, request())
    woken: list[int] = []
    first.on_ready(lambda: woken.append(cluster.waiting))
    clock.now = 59.9
    cluster.tick()
    assert first.state == "waiting"

    clock.now = 60.0
    cluster.tick()

    assert woken == [1]
    assert isinstance(first.error, QueueFullError)
    assert str(first.error) == (
        "no slot was free for 60 s (queue_timeout), and 1 more requests wait; "
        "add a node or raise queue_timeout"
    )
    cluster.release(leases[0])
    assert second.state == "granted"


def test_no_line_at_all_still_lets_a_free_node_be_used() -> None:
    cluster, leases = full(max_queue=0)
    with pytest.raises(QueueFullError):
        cluster.acquire(request())

    cluster.release(leases[0])

    assert isinstance(cluster.acquire(request()), Lease)


def test_whoever_comes_next_wakes_those_whose_turn_it_is_and_takes_their_place_in_line() -> None:
    """Time alone can make room: the moment is noticed by whoever comes next."""
    clock = Clock()
    has_room_for: set[int] = set()

    def choose(asked: InferenceRequest, *_: Any) -> Placement:
        return Placement(node_id="a", has_room=asked.priority in has_room_for)

    cluster = ledger(seen(), clock=clock, choose=choose, max_queue=1)
    waiter = in_line(cluster, request(priority=7))
    woken: list[bool] = []
    waiter.on_ready(lambda: woken.append(True))
    has_room_for.add(7)

    assert isinstance(cluster.acquire(request(priority=5)), Waiter)

    assert waiter.state == "granted"
    assert woken == [True]


def test_a_plug_in_that_raises_fails_its_own_request_and_nobody_elses() -> None:
    def choose(asked: InferenceRequest, *_: Any) -> Placement:
        if asked.priority == 9 and is_broken:
            raise ZeroDivisionError
        return Placement(node_id="a", has_room=has_room)

    has_room = is_broken = False
    cluster = ledger(seen(), choose=choose)
    first, second = in_line(cluster, request(priority=9)), in_line(cluster, request())

    has_room = is_broken = True
    cluster.tick()

    assert isinstance(first.error, ZeroDivisionError)
    assert second.state == "granted"


def test_a_pinned_request_waits_for_its_node_and_lets_others_pass() -> None:
    cluster = ledger(
        seen("a", warm=(LLAMA,)), seen("b", warm=(LLAMA,)), nodes=[node("a"), node("b")]
    )
    for _ in range(3):
        granted(cluster, request(node_id="a", priority=10))
    pinned = in_line(cluster, request(node_id="a", priority=10))

    free = cluster.acquire(request())

    assert isinstance(free, Lease)
    assert free.node_id == "b"
    assert pinned.state == "waiting"


def test_a_full_line_for_one_model_keeps_no_request_from_an_idle_node() -> None:
    def choose(asked: InferenceRequest, *_: Any) -> Placement:
        return Placement(node_id="a", has_room=asked.model != LLAMA)

    cluster = ledger(seen(), clock=Clock(), choose=choose, max_queue=1)
    in_line(cluster, request())

    assert isinstance(cluster.acquire(request(QWEN)), Lease)
    with pytest.raises(QueueFullError, match="1 requests wait"):
        cluster.acquire(request())
    assert cluster.waiting == 1
