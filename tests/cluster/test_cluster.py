"""What one event does to the books, by example."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.cluster import Cluster, Lease, PrefixKey
from hydra_llm.cluster.learning import AnswerLengths
from hydra_llm.events import (
    AttemptFailed,
    CircuitClosed,
    CircuitOpened,
    Event,
    LeaseExpired,
    LoadPathStuck,
    NodeHealthChanged,
    PanicBegan,
    PanicEnded,
)
from hydra_llm.exceptions import (
    ModelLoadError,
    ModelNotFoundError,
    NodeAuthError,
    NodeBusyError,
    NodeConnectError,
    NodeError,
    NodeProtocolError,
    NodeResponseError,
    NodeTimeoutError,
    NoEligibleNodeError,
    StreamBrokenError,
)
from hydra_llm.types import (
    DEMAND_MEMORY_SECONDS,
    GB,
    Demand,
    InferenceRequest,
    NodeSnapshot,
    RunnerOptions,
    RunningRequest,
    Usage,
)
from tests.cluster.ledgers import Clock, failure, granted, ledger, node, seen, snapshot_of
from tests.helpers import BIG, LLAMA, request

QWEN = "qwen3:8b"


def timeouts(cluster: Cluster, count: int, *, pin: str = "a") -> None:
    for _ in range(count):
        lease = granted(cluster, request(node_id=pin, strict_pin=True))
        cluster.failed(lease, failure(NodeTimeoutError, pin))


def refusal(cluster: Cluster, asked: InferenceRequest) -> dict[str, str]:
    with pytest.raises(NoEligibleNodeError) as caught:
        cluster.acquire(asked)
    return {r.node_id: r.reason for r in caught.value.rejections}


def test_a_lease_changes_nothing_of_what_is_known_but_who_is_running() -> None:
    cluster = ledger(seen("a"))
    before = snapshot_of(cluster, "a")
    assert before.free_vram_bytes is not None

    lease = granted(cluster, request())

    after = snapshot_of(cluster, "a")
    assert after == replace(before, running=(lease.running,))
    assert after == cluster._records["a"].snapshot()
    assert after.free_vram_bytes != before.free_vram_bytes  # nothing is kept that hangs on them
    assert before.running == ()


# ---------------------------------------------------------------------- each failure


@pytest.mark.parametrize(
    ("kind", "about", "reason"),
    [
        (NodeConnectError, {}, "down"),
        (NodeAuthError, {}, "misconfigured"),
        (NodeBusyError, {"status_code": 503, "retry_after_seconds": 7.0}, "busy, asked to wait"),
        (NodeBusyError, {"status_code": 429, "retry_after_seconds": None}, "busy, asked to wait"),
        (ModelNotFoundError, {"status_code": 404}, "without the model"),
        (ModelLoadError, {"status_code": 500}, "failed to load it lately"),
        (NodeResponseError, {"status_code": 500}, "failed to load it lately"),
    ],
)
def test_some_failures_rule_the_node_out_at_once(
    kind: type[NodeError], about: dict[str, Any], reason: str
) -> None:
    cluster = ledger(seen())
    cluster.failed(granted(cluster, request()), failure(kind, **about))

    assert refusal(cluster, request()) == {"a": reason}
    assert snapshot_of(cluster).circuit == "closed"


@pytest.mark.parametrize(
    ("kind", "about"),
    [
        (NodeTimeoutError, {}),
        (NodeProtocolError, {}),
        (NodeResponseError, {"status_code": 500}),
    ],
)
def test_others_open_the_circuit_when_they_come_in_a_row(
    kind: type[NodeError], about: dict[str, Any]
) -> None:
    clock = Clock()
    cluster = ledger(seen("a", warm=(LLAMA,)), seen("b", warm=(LLAMA,)), clock=clock)
    for _ in range(3):
        assert snapshot_of(cluster).circuit == "closed"
        cluster.failed(granted(cluster, request(node_id="a")), failure(kind, **about))

    assert refusal(cluster, request(node_id="a", strict_pin=True))["a"] == "circuit open"
    assert granted(cluster, request()).node_id == "b"


def test_an_answer_that_only_lacks_its_end_mark_is_the_models_doing() -> None:
    cluster = ledger(seen("a", warm=(LLAMA,)), seen("b", warm=(LLAMA,)))
    for _ in range(5):
        held = granted(cluster, request(node_id="a"))
        cluster.failed(held, failure(StreamBrokenError, parts=3))

    assert snapshot_of(cluster).circuit == "closed"
    assert snapshot_of(cluster).penalty_seconds == 0.0
    assert cluster.in_flight == 0


def test_a_success_in_between_starts_the_row_again() -> None:
    cluster = ledger(seen("a"), seen("b"))
    for _ in range(2):
        timeouts(cluster, 2)
        cluster.succeeded(granted(cluster, request(node_id="a")), None)

    assert snapshot_of(cluster).circuit == "closed"


def test_a_cancelled_request_says_nothing_about_the_node() -> None:
    cluster = ledger(seen("a"), seen("b"))
    timeouts(cluster, 2)
    cluster.release(granted(cluster, request(node_id="a")))
    assert snapshot_of(cluster).circuit == "closed"

    timeouts(cluster, 1)
    assert snapshot_of(cluster).circuit == "open"


def test_each_error_has_a_price_that_halves_in_ten_seconds() -> None:
    cluster = ledger(seen(), error_penalty_seconds=2.0)
    timeouts(cluster, 2)
    snapshot = snapshot_of(cluster)

    assert snapshot.penalty(0.0) == pytest.approx(4.0)
    assert snapshot.penalty(10.0) == pytest.approx(2.0)
    assert snapshot.penalty(30.0) == pytest.approx(0.5)


def test_the_price_of_errors_has_a_limit() -> None:
    cluster = ledger(seen(), error_penalty_seconds=2.0, max_penalty_seconds=5.0)
    timeouts(cluster, 10)

    assert snapshot_of(cluster).penalty(0.0) == 5.0


def test_a_failed_node_is_never_tried_again_for_the_same_request() -> None:
    cluster = ledger(seen("a", warm=(LLAMA,)), seen("b"))
    asked = request()
    first = granted(cluster, asked)
    cluster.failed(first, failure(NodeTimeoutError, first.node_id))
    asked = replace(asked, tried=frozenset({first.node_id}))
    second = granted(cluster, asked)
    cluster.failed(second, failure(NodeTimeoutError, second.node_id))

    assert (first.node_id, second.node_id) == ("a", "b")
    assert refusal(cluster, replace(asked, tried=frozenset("ab"))) == {
        "a": "already tried",
        "b": "already tried",
    }


# --------------------------------------------------------------------- half-open


def test_when_the_time_is_over_one_request_goes_through_and_closes_the_circuit() -> None:
    clock, events = Clock(), list[Event]()
    cluster = ledger(
        seen("a", warm=(LLAMA,)), seen("b", warm=(LLAMA,)), clock=clock, on_event=events.append
    )
    timeouts(cluster, 3)
    clock.now = snapshot_of(cluster).circuit_retry_at or 0.0

    probe = granted(cluster, request(node_id="a", strict_pin=True))
    assert refusal(cluster, request(node_id="a", strict_pin=True))["a"] == "circuit open"
    cluster.succeeded(probe, None)

    assert granted(cluster, request(node_id="a", strict_pin=True)).node_id == "a"
    assert [type(e) for e in events if isinstance(e, (CircuitOpened, CircuitClosed))] == [
        CircuitOpened,
        CircuitClosed,
    ]


@pytest.mark.parametrize("ending", ["cancelled", "expired", "busy"])
def test_a_probe_that_tells_nothing_gives_its_place_to_the_next(ending: str) -> None:
    clock = Clock()
    cluster = ledger(seen("a", warm=(LLAMA,)), seen("b"), clock=clock, lease_ttl=30.0)
    timeouts(cluster, 3)
    clock.now = snapshot_of(cluster).circuit_retry_at or 0.0
    probe = granted(cluster, request(node_id="a", strict_pin=True))

    if ending == "cancelled":
        cluster.release(probe)
    elif ending == "expired":
        clock.now += 30.0
        cluster.tick()
    else:
        busy = failure(NodeBusyError, status_code=503, retry_after_seconds=2.0)
        cluster.failed(probe, busy)
        clock.now += 2.0

    assert granted(cluster, request(node_id="a", strict_pin=True)).node_id == "a"


def test_one_good_answer_is_not_full_trust() -> None:
    clock = Clock()
    cluster = ledger(seen("a", warm=(LLAMA,)), seen("b", warm=(LLAMA,)), clock=clock)
    timeouts(cluster, 3)
    clock.now = (snapshot_of(cluster).circuit_retry_at or 0.0) + 300
    cluster.succeeded(granted(cluster, request(node_id="a", strict_pin=True)), None)

    # What is left of its strikes after five minutes is nothing.
    assert snapshot_of(cluster).penalty(clock.now) == pytest.approx(1.0)
    assert granted(cluster, request()).node_id == "b"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_no_more_than_half_the_nodes_are_ejected_by_inference_alone(count: int) -> None:
    ids = "abcde"[:count]
    cluster = ledger(*(seen(id_, warm=(LLAMA,)) for id_ in ids))
    for id_ in ids:
        for _ in range(5):
            if snapshot_of(cluster, id_).circuit == "closed":
                held = granted(cluster, request(node_id=id_, strict_pin=True))
                cluster.failed(held, failure(NodeTimeoutError, id_))

    opened = [s.id for s in cluster.nodes() if s.circuit == "open"]
    assert opened == list(ids[: count // 2])


@pytest.mark.parametrize("fact", ["down", "cordoned"])
def test_of_the_nodes_that_facts_leave_half_are_kept(fact: str) -> None:
    cluster = ledger(*(seen(id_, warm=(LLAMA,)) for id_ in "abcd"))
    for id_ in "cd":
        if fact == "down":
            held = granted(cluster, request(node_id=id_, strict_pin=True))
            cluster.failed(held, failure(NodeConnectError, id_))
        else:
            cluster.set_cordoned(id_, True)
    for id_ in "ab" * 5:
        if snapshot_of(cluster, id_).circuit == "closed":
            held = granted(cluster, request(node_id=id_, strict_pin=True))
            cluster.failed(held, failure(NodeTimeoutError, id_))

    assert [s.id for s in cluster.nodes() if s.circuit == "open"] == ["a"]
    assert granted(cluster, request()).node_id == "b"


def test_panic_is_told_and_ends_when_the_node_is_well() -> None:
    events: list[Event] = []
    cluster = ledger(seen("a", warm=(LLAMA,)), seen("b", warm=(LLAMA,)), on_event=events.append)

    def ask(id_: str, *, fails: bool) -> None:
        held = granted(cluster, request(node_id=id_, strict_pin=True))
        if fails:
            cluster.failed(held, failure(NodeTimeoutError, id_))
        else:
            cluster.succeeded(held, None)

    for _ in range(3):
        ask("a", fails=True)
    assert not cluster.is_in_panic
    for _ in range(3):
        ask("b", fails=True)
    assert cluster.is_in_panic
    ask("b", fails=False)

    assert not cluster.is_in_panic
    told = [(type(e), e.node_id) for e in events if isinstance(e, (PanicBegan, PanicEnded))]
    assert told == [(PanicBegan, "b"), (PanicEnded, "")]


def test_a_node_that_fails_a_third_of_its_requests_gets_a_pause() -> None:
    rng = random.Random(3)
    cluster = ledger(seen("a", warm=(LLAMA,)), seen("b", warm=(LLAMA,)))

    def pause_after(share: float) -> int | None:
        for number in range(200):
            if snapshot_of(cluster, "a").circuit == "open":
                return number
            held = granted(cluster, request(node_id="a", strict_pin=True))
            # Never three in a row.
            if number % 3 and rng.random() < share:
                cluster.failed(held, failure(NodeTimeoutError, "a"))
            else:
                cluster.succeeded(held, None)
        return None

    assert pause_after(0.04) is None
    assert pause_after(0.5) is not None


def test_hard_facts_may_rule_out_every_node() -> None:
    cluster = ledger(seen("a"), seen("b"))
    for _ in "ab":
        lease = granted(cluster, request())
        cluster.failed(lease, failure(NodeConnectError, lease.node_id))

    assert set(refusal(cluster, request()).values()) == {"down"}


# --------------------------------------------------------------------------- loads


def test_a_load_is_booked_until_the_first_byte_and_then_counts_as_loaded() -> None:
    cluster = ledger(seen(models=(BIG,)))
    before = snapshot_of(cluster)
    lease = granted(cluster, request(BIG))
    during = snapshot_of(cluster)

    assert during.arriving == {BIG}
    assert during.reserved_bytes == lease.placement.reserved_bytes > 14 * GB
    assert during.free_vram_bytes == (before.free_vram_bytes or 0) - during.reserved_bytes

    assert cluster.first_byte(lease)
    assert not cluster.first_byte(lease)

    after = snapshot_of(cluster)
    assert after.reserved_bytes == 0
    assert after.free_vram_bytes == during.free_vram_bytes
    assert set(after.loaded) == {BIG}
    assert cluster.demand()[BIG].warm_nodes == 1


def test_what_a_load_pushes_out_takes_no_new_work_and_is_gone_afterwards() -> None:
    cluster = ledger(seen(models=(LLAMA, BIG), warm=(LLAMA,), total_gb=16.0))
    lease = granted(cluster, request(BIG))
    assert snapshot_of(cluster).leaving == {LLAMA}
    assert not cluster.preview(request()).has_room

    cluster.first_byte(lease)

    assert set(snapshot_of(cluster).loaded) == {BIG}
    assert (snapshot_of(cluster).free_vram_bytes or -1) >= 0


def test_a_second_request_for_a_model_just_loading_joins_the_same_load() -> None:
    cluster = ledger(seen())
    first, second = granted(cluster, request()), granted(cluster, request())

    assert first.placement.causes_load
    assert not second.placement.causes_load
    assert second.placement.reserved_bytes == 0


def test_a_probe_that_was_under_way_during_a_load_does_not_undo_it() -> None:
    clock = Clock()
    cluster = ledger(seen(), clock=clock)
    lease = granted(cluster, request())
    clock.now = 5.0
    cluster.first_byte(lease)

    cluster.observe(seen(at=4.0))
    assert LLAMA in snapshot_of(cluster).loaded
    cluster.observe(seen(at=6.0))
    assert LLAMA not in snapshot_of(cluster).loaded


def test_requests_that_waited_for_one_failed_load_count_as_one_failure() -> None:
    clock = Clock()
    cluster = ledger(seen(models=(LLAMA, QWEN)), clock=clock, breaker_open_seconds=5.0)
    leases = [granted(cluster, request(priority=10)) for _ in range(3)]

    for lease in leases:
        cluster.failed(lease, failure(ModelLoadError, status_code=500))

    (retry_at,) = snapshot_of(cluster).load_retry_at.values()
    assert 8.0 <= retry_at <= 12.0
    assert granted(cluster, request(QWEN)).node_id == "a", "other models load on"


def test_a_load_that_failed_is_tried_again_with_one_request() -> None:
    clock, events = Clock(), list[Event]()
    cluster = ledger(seen(), clock=clock, on_event=events.append)
    cluster.failed(granted(cluster, request()), failure(ModelLoadError, status_code=500))
    clock.now = snapshot_of(cluster).load_retry_at[LLAMA]

    again = granted(cluster, request())
    assert refusal(cluster, request()) == {"a": "failed to load it lately"}
    cluster.first_byte(again)

    assert isinstance(granted(cluster, request()), Lease)
    assert [type(e) for e in events if isinstance(e, (CircuitOpened, CircuitClosed))] == [
        CircuitOpened,
        CircuitClosed,
    ]


def test_the_end_of_an_older_load_does_not_give_away_the_place_of_the_one_that_tries() -> None:
    clock = Clock()
    cluster = ledger(seen(), clock=clock, breaker_open_seconds=5.0)
    old = granted(cluster, request(priority=10))
    failing = granted(cluster, request(priority=10, options=RunnerOptions(num_ctx=8192)))
    assert failing.placement.causes_load
    cluster.failed(failing, failure(ModelLoadError, status_code=500))
    clock.now = snapshot_of(cluster).load_retry_at[LLAMA]
    trying = granted(cluster, request(priority=10, options=RunnerOptions(num_ctx=8192)))

    cluster.release(old)
    assert snapshot_of(cluster).load_retry_at == {LLAMA: float("inf")}
    cluster.release(trying)
    assert snapshot_of(cluster).load_retry_at == {LLAMA: clock.now}


def test_a_load_that_another_one_has_overtaken_is_not_called_stuck() -> None:
    clock, events = Clock(), list[Event]()
    cluster = ledger(seen(models=(LLAMA, BIG)), clock=clock, on_event=events.append)
    small = granted(cluster, request())
    big = granted(cluster, request(BIG))
    alone = 3 * small.placement.load_seconds + 5.0

    clock.now = alone + 1
    cluster.tick()
    assert not snapshot_of(cluster).load_path_stuck, "the node may be loading the big one"

    clock.now = alone + 3 * big.placement.load_seconds + 1
    cluster.tick()
    assert [e.model for e in events if isinstance(e, LoadPathStuck)] == [LLAMA]


def test_while_other_models_come_and_go_a_load_is_not_called_stuck() -> None:
    clock = Clock()
    cluster = ledger(seen(models=(LLAMA, QWEN)), clock=clock)
    lease = granted(cluster, request())
    limit = 3 * lease.placement.load_seconds + 5.0

    for warm in ((QWEN,), ()):
        clock.now += limit
        cluster.observe(seen(models=(LLAMA, QWEN), warm=warm, at=clock.now))
        cluster.tick()
    clock.now += limit
    cluster.tick()
    assert not snapshot_of(cluster).load_path_stuck
    clock.now += 1
    cluster.tick()

    assert snapshot_of(cluster).load_path_stuck


def test_a_first_byte_after_a_load_shows_that_loads_get_on() -> None:
    clock = Clock()
    cluster = ledger(seen(models=(LLAMA, QWEN)), clock=clock)
    first, second = granted(cluster, request()), granted(cluster, request(QWEN))
    clock.now = 3 * second.placement.load_seconds + 5.0
    cluster.first_byte(first)
    clock.now += 1
    cluster.tick()

    assert not snapshot_of(cluster).load_path_stuck


def test_a_model_that_was_pushed_out_before_it_served_is_loaded_again_first() -> None:
    clock = Clock()
    cluster = ledger(seen(models=(LLAMA, BIG), warm=(BIG,)), clock=clock)
    granted(cluster, request(BIG))
    cluster.observe(seen(models=(LLAMA, BIG), at=0.0))
    small = granted(cluster, request())
    alone = small.placement.load_seconds
    snapshot = snapshot_of(cluster)
    times_as_big = snapshot.installed[BIG].size_bytes / snapshot.installed[LLAMA].size_bytes

    clock.now = 3 * (alone + alone * times_as_big) + 5.0
    cluster.tick()
    assert not snapshot_of(cluster).load_path_stuck
    clock.now += 1
    cluster.tick()
    assert snapshot_of(cluster).load_path_stuck


def test_a_load_without_a_first_byte_for_too_long_marks_the_load_path_as_stuck() -> None:
    clock, events = Clock(), list[Event]()
    cluster = ledger(
        seen(models=(LLAMA, QWEN, BIG), warm=(QWEN,)), clock=clock, on_event=events.append
    )
    granted(cluster, request(QWEN))
    lease = granted(cluster, request())
    granted(cluster, request())  # waits for the same load
    limit = 3 * lease.placement.load_seconds + 5.0

    clock.now = limit
    cluster.tick()
    assert not snapshot_of(cluster).load_path_stuck
    clock.now = limit + 1
    cluster.tick()
    cluster.tick()

    assert [e.model for e in events if isinstance(e, LoadPathStuck)] == [LLAMA]
    assert refusal(cluster, request(BIG)) == {"a": "load path stuck"}
    assert granted(cluster, request(QWEN)).node_id == "a"

    clock.now += 60
    cluster.tick()
    assert cluster.preview(request(BIG)).node_id == "a"
    assert len([e for e in events if isinstance(e, LoadPathStuck)]) == 1


# ------------------------------------------------------------------- leases, events


def test_a_lease_expires_once_its_owner_is_silent_for_too_long() -> None:
    clock, events = Clock(), list[Event]()
    cluster = ledger(seen(warm=(LLAMA,)), clock=clock, on_event=events.append, lease_ttl=10.0)
    silent, alive = granted(cluster, request()), granted(cluster, request())

    clock.now = 9.0
    alive.renew(clock.now)
    cluster.tick()
    assert (silent.state, alive.state) == ("held", "held")
    clock.now = 10.0
    cluster.tick()
    cluster.tick()

    assert (silent.state, alive.state) == ("expired", "held")
    assert len([e for e in events if isinstance(e, LeaseExpired)]) == 1
    assert cluster.in_flight == 1
    assert not cluster.release(silent)


def test_a_place_is_given_back_exactly_once() -> None:
    cluster = ledger(seen())
    lease = granted(cluster, request())

    assert cluster.release(lease)
    assert not cluster.release(lease)
    cluster.succeeded(lease, None)

    assert cluster.in_flight == 0
    assert lease.state == "released"


def test_listeners_are_told_outside_the_lock_and_their_errors_cost_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard: list[Event] = []

    def listen(event: Event) -> None:
        heard.append(event)
        cluster.nodes()
        raise ZeroDivisionError

    cluster = ledger(nodes=[node("a")], on_event=listen)
    with caplog.at_level(logging.ERROR, logger="hydra_llm"):
        cluster.observe(seen())
        lease = granted(cluster, request())
        cluster.failed(lease, failure(NodeConnectError))

    assert [type(event) for event in heard] == [
        NodeHealthChanged,
        AttemptFailed,
        NodeHealthChanged,
    ]
    assert cluster.in_flight == 0
    assert "on_event failed" in caplog.text


def test_a_node_that_goes_down_has_nothing_loaded_when_it_comes_back() -> None:
    cluster = ledger(seen(warm=(LLAMA,)))
    cluster.observe(seen(health="down", health_reason="refused"))
    assert snapshot_of(cluster).loaded == {}
    assert cluster.demand()[LLAMA].warm_nodes == 0

    cluster.observe(seen(loaded=None))

    assert snapshot_of(cluster).health == "up"
    assert snapshot_of(cluster).loaded == {}


def test_an_unknown_node_is_no_news() -> None:
    cluster = ledger(seen())
    before = cluster.nodes()
    cluster.observe(seen("elsewhere"))

    assert cluster.nodes() == before


def test_a_pause_ends_by_itself_and_wakes_who_waited() -> None:
    clock = Clock()
    cluster = ledger(seen("a", warm=(LLAMA,)), clock=clock)
    busy = failure(NodeBusyError, status_code=503, retry_after_seconds=3.0)
    cluster.failed(granted(cluster, request()), busy)
    clock.now = 3.0
    cluster.tick()

    assert snapshot_of(cluster).is_available
    assert granted(cluster, request()).node_id == "a"


def test_snapshots_never_change_afterwards() -> None:
    cluster = ledger(seen())
    before = cluster.nodes()
    copy: list[NodeSnapshot] = [replace(snapshot) for snapshot in before]
    lease = granted(cluster, request())
    cluster.first_byte(lease)
    cluster.failed(lease, failure(ModelNotFoundError, status_code=404))

    assert list(before) == copy
    assert cluster.nodes() != before


def test_the_repr_counts_nodes_and_requests() -> None:
    cluster = ledger(seen("a"), seen("b", health="down"))
    lease = granted(cluster, request())

    assert repr(cluster) == "<Cluster 1/2 nodes up, 1 in flight>"
    assert repr(lease) == "<Lease 1 llama3.2:3b on a, held>"


def test_the_budget_for_retries_is_asked_of_the_cluster() -> None:
    cluster = ledger(seen(), retry_floor=2, retry_ratio=0.0)

    assert [cluster.may_retry() for _ in range(3)] == [True, True, False]


# --------------------------------------------------------------------------- demand


@given(st.integers(0, 1000), st.integers(0, 3000))
def test_demand_decays_and_never_goes_below_zero(start: int, later: int) -> None:
    demand = Demand(per_second=2.0, seen_at=float(start))

    assert demand.rate(start) == 2.0
    assert 0.0 <= demand.rate(start + later) <= demand.rate(start)
    assert demand.rate(start + DEMAND_MEMORY_SECONDS) == pytest.approx(2.0 / 2.718281828, rel=1e-6)


def test_a_steady_stream_of_requests_is_counted_at_its_rate() -> None:
    clock = Clock()
    cluster = ledger(seen(warm=(LLAMA,)), clock=clock)
    for _ in range(4000):
        clock.now += 0.5
        cluster.release(granted(cluster, request()))

    assert cluster.demand()[LLAMA].rate(clock.now) == pytest.approx(2.0, rel=0.05)


def test_a_young_router_judges_by_the_time_that_it_has_counted() -> None:
    clock = Clock()
    cluster = ledger(seen(warm=(LLAMA,)), clock=clock)
    for _ in range(40):
        clock.now += 0.5
        cluster.release(granted(cluster, request()))

    assert cluster.demand()[LLAMA].rate(clock.now) == pytest.approx(2.0, rel=0.1)

    cluster = ledger(seen(warm=(LLAMA,)), clock=clock)
    cluster.release(granted(cluster, request()))
    assert cluster.demand()[LLAMA].rate(clock.now) == pytest.approx(0.1, rel=0.05), "not endless"


def test_a_retry_is_no_further_arrival() -> None:
    cluster = ledger(seen("a"), seen("b"))
    cluster.acquire(request())
    once = cluster.demand()[LLAMA].per_second
    cluster.acquire(request(tried=frozenset({"a"})))

    assert cluster.demand()[LLAMA].per_second == once


# ------------------------------------------------------------------------- learning

ANSWER = Usage(
    total_seconds=3.0,
    prefill_seconds=1.0,
    decode_seconds=2.0,
    prompt_tokens=1000,
    output_tokens=100,
)
CHAIN = (PrefixKey(1, 400), PrefixKey(2, 1000))


def with_a_new_runner(**about: Any) -> Cluster:
    """A node on which the model has just been loaded."""
    cluster = ledger(seen(**about))
    cluster.observe(seen(at=1.0, warm=(LLAMA,), **about))
    return cluster


def prefill_rate(cluster: Cluster) -> float | None:
    return snapshot_of(cluster).speeds[LLAMA].prefill_seconds_per_token


def test_an_answer_teaches_rates_and_remembers_the_prompt() -> None:
    cluster = with_a_new_runner()
    cluster.succeeded(granted(cluster, request()), ANSWER, CHAIN)

    speed = snapshot_of(cluster).speeds[LLAMA]
    assert speed.decode_seconds_per_token == pytest.approx(0.02)
    assert speed.prefill_seconds_per_token == pytest.approx(0.001)
    assert cluster.cached_tokens(LLAMA, CHAIN) == {"a": 1000}
    expected = cluster.demand()[LLAMA].output_tokens
    assert expected is not None
    assert 100 < expected < 256, "one answer is one of several"


def test_answers_of_one_model_say_a_little_of_all() -> None:
    cluster = with_a_new_runner(models=(LLAMA, BIG))
    cluster.acquire(request(BIG, priority=1))
    for _ in range(100):
        cluster.succeeded(granted(cluster, request()), ANSWER, CHAIN)

    assert cluster.demand()[LLAMA].output_tokens == pytest.approx(100, rel=0.1)
    assert cluster.demand()[BIG].output_tokens == pytest.approx(100, rel=0.2)


def test_lengths_of_answers_follow_when_they_change() -> None:
    lengths = AnswerLengths(256)
    assert lengths.expected("m") == 256
    for _ in range(1000):
        lengths.add("m", 50)
    assert lengths.expected("m") == pytest.approx(50, rel=0.1)
    for _ in range(100):
        lengths.add("m", 500)
    assert lengths.expected("m") == pytest.approx(500, rel=0.1)


def serving(cluster: Cluster) -> list[float | None]:
    return [one.serving_since for one in snapshot_of(cluster).running]


def test_who_came_first_is_served_and_the_next_when_it_has_gone() -> None:
    clock = Clock()
    cluster = ledger(seen(warm=(LLAMA,)), clock=clock)
    first = granted(cluster, request())
    clock.now = 3.0
    second = granted(cluster, request())
    assert serving(cluster) == [0.0, None]

    clock.now = 7.0
    cluster.release(first)
    assert serving(cluster) == [7.0]
    cluster.release(second)


def test_nobody_is_served_before_the_model_is_loaded() -> None:
    clock = Clock()
    cluster = ledger(seen(models=(LLAMA,)), clock=clock)
    lease = granted(cluster, request())
    assert serving(cluster) == [None]

    clock.now = 5.0
    cluster.first_byte(lease)
    assert serving(cluster) == [5.0]


def test_nothing_is_learned_of_prefill_from_a_prompt_that_nobody_looked_up() -> None:
    """Ollama says how many tokens it had, not how many were cached."""
    cluster = with_a_new_runner()
    cluster.succeeded(granted(cluster, request()), ANSWER)

    assert snapshot_of(cluster).speeds[LLAMA].prefill_seconds_per_token is None
    assert snapshot_of(cluster).speeds[LLAMA].decode_seconds_per_token is not None


@pytest.mark.parametrize(("version", "kept"), [("0.24.0", 1), ("0.32.15", 8)])
def test_nor_from_a_runner_that_others_have_used_until_their_prompts_are_pushed_out(
    version: str, kept: int
) -> None:
    """The conversation may have begun there before we did."""
    cluster = ledger(seen(warm=(LLAMA,), version=version))
    for number in range(kept):
        cluster.succeeded(granted(cluster, request()), ANSWER, (PrefixKey(number, 1000),))
        assert prefill_rate(cluster) is None

    cluster.succeeded(granted(cluster, request()), ANSWER, (PrefixKey(kept, 1000),))
    assert prefill_rate(cluster) == pytest.approx(0.001)


def test_nor_from_a_runner_that_was_out_of_sight_for_a_while() -> None:
    cluster = with_a_new_runner()
    cluster.observe(seen(at=2.0, health="down"))
    cluster.observe(seen(at=3.0, warm=(LLAMA,)))
    cluster.succeeded(granted(cluster, request()), ANSWER, CHAIN)

    assert prefill_rate(cluster) is None


def test_what_is_new_in_a_conversation_of_ours_teaches_wherever_it_is_read() -> None:
    cluster = ledger(seen(warm=(LLAMA,)))
    cluster.succeeded(granted(cluster, request(cached_tokens={"a": 100})), ANSWER, CHAIN)
    assert prefill_rate(cluster) is None, "a system prompt of ours alone says nothing of the rest"

    cluster.succeeded(granted(cluster, request(cached_tokens={"a": 500})), ANSWER, CHAIN)
    assert prefill_rate(cluster) == pytest.approx(0.002)


def test_an_embedding_teaches_how_fast_texts_are_read() -> None:
    """Nobody looks it up in a prompt cache, but nothing of it is ever there."""
    cluster = ledger(seen(warm=(LLAMA,)))
    usage = Usage(total_seconds=1.0, prefill_seconds=1.0, prompt_tokens=1000)
    cluster.succeeded(granted(cluster, request(output_tokens=0)), usage)

    speed = snapshot_of(cluster).speeds[LLAMA]
    assert speed.prefill_seconds_per_token == pytest.approx(0.001)


def test_the_tokens_expected_in_the_cache_are_not_counted_as_evaluated() -> None:
    cluster = ledger(seen(warm=(LLAMA,)))
    asked = request(cached_tokens={"a": 500})
    cluster.succeeded(granted(cluster, asked), ANSWER, CHAIN)

    speed = snapshot_of(cluster).speeds[LLAMA]
    assert speed.prefill_seconds_per_token == pytest.approx(0.002)


@pytest.mark.parametrize("first_to_end", [0, 1])
@pytest.mark.parametrize("models", [(LLAMA, LLAMA), (LLAMA, BIG)])
def test_no_rate_is_learned_of_two_that_met_on_a_node_whoever_ends_first(
    models: tuple[str, str], first_to_end: int
) -> None:
    cluster = ledger(seen(models=(LLAMA, BIG), warm=(LLAMA, BIG)), nodes=[node("a", slots=2)])
    leases = [granted(cluster, request(model)) for model in models]
    for lease in (leases[first_to_end], leases[1 - first_to_end]):
        cluster.succeeded(lease, ANSWER, CHAIN)

    speeds = snapshot_of(cluster).speeds.values()
    assert [s.decode_seconds_per_token for s in speeds] == [None] * len(set(models))
    assert [s.prefill_seconds_per_token for s in speeds] == [None] * len(set(models))


@pytest.mark.parametrize(("slots", "learns"), [(1, True), (2, False), (None, False)])
def test_who_waits_behind_it_in_the_only_slot_disturbs_nobody(
    slots: int | None, learns: bool
) -> None:
    """Or nothing would be learned of a node that is never idle."""
    cluster = ledger(seen(warm=(LLAMA,)), nodes=[node("a", slots=slots)])
    leases = [granted(cluster, request()) for _ in range(2)]
    for lease in leases:
        cluster.succeeded(lease, ANSWER, CHAIN)

    speed = snapshot_of(cluster).speeds[LLAMA]
    assert (speed.decode_seconds_per_token is not None) == learns


def test_that_there_is_one_slot_shows_in_the_wait_of_the_second() -> None:
    cluster = ledger(seen(warm=(LLAMA,)), nodes=[node("a", slots=None)])
    waited = replace(ANSWER, total_seconds=(ANSWER.total_seconds or 0.0) + 5.0)
    for _ in range(2):
        first, second = granted(cluster, request()), granted(cluster, request())
        cluster.succeeded(first, ANSWER, CHAIN)
        cluster.succeeded(second, waited, CHAIN)

    speed = snapshot_of(cluster).speeds[LLAMA]
    assert speed.slots == 1
    assert speed.decode_seconds_per_token is not None


def test_no_rate_is_learned_of_a_request_that_met_another_routers() -> None:
    cluster = ledger(seen(warm=(LLAMA,)), nodes=[node("a", slots=2)])
    cluster.share(lambda: None)
    lease = granted(cluster, request())
    other = RunningRequest(lease_id=0, model=LLAMA, started_at=0.0, expected_seconds=1.0)
    cluster.see_others({"a": {"theirs": other}}, {})
    cluster.see_others({"a": {}}, {})
    cluster.succeeded(lease, ANSWER, CHAIN)

    assert snapshot_of(cluster).speeds[LLAMA].decode_seconds_per_token is None


def test_a_reload_empties_the_prompt_cache_in_the_books_too() -> None:
    cluster = ledger(seen(warm=(LLAMA,)))
    cluster.succeeded(granted(cluster, request()), ANSWER, CHAIN)
    reload = granted(cluster, request(options=RunnerOptions(num_ctx=8192)))
    cluster.first_byte(reload)

    assert cluster.cached_tokens(LLAMA, CHAIN) == {}


@pytest.mark.parametrize(("version", "kept"), [("0.24.0", 1), ("0.32.15", 8), (None, 1), ("x", 1)])
def test_how_many_prompts_are_kept_depends_on_the_version(version: str | None, kept: int) -> None:
    cluster = ledger(seen(warm=(LLAMA,), version=version))
    for number in range(10):
        chain = (PrefixKey(number, 100),)
        cluster.succeeded(granted(cluster, request()), None, chain)

    found = [n for n in range(10) if cluster.cached_tokens(LLAMA, (PrefixKey(n, 100),))]
    assert found == list(range(10 - kept, 10))


def test_a_model_whose_file_changed_is_learned_anew() -> None:
    cluster = ledger(seen(warm=(LLAMA,)))
    cluster.succeeded(granted(cluster, request()), ANSWER, CHAIN)
    before = snapshot_of(cluster).installed[LLAMA]

    cluster.observe(seen(warm=(LLAMA,), installed={LLAMA: replace(before, digest="another")}))

    assert LLAMA not in snapshot_of(cluster).speeds
