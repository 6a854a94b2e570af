"""
The tests, tested: with a mechanism switched off, the rows that are there for it fail.

Each row is run as it is first; then with the switch, and has to notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from hydra_llm import HydraTransport, StreamBrokenError
from hydra_llm.cluster import Cluster
from hydra_llm.cluster.breaker import CircuitBreaker
from hydra_llm.cluster.record import NodeRecord
from hydra_llm.cluster.retries import RetryBudget
from hydra_llm.dispatch import Dispatch
from hydra_llm.exceptions import (
    HydraError,
    ModelNotFoundError,
    NodeAuthError,
    NodeConnectError,
    NodeError,
)
from hydra_llm.patience import Patience
from hydra_llm.router import Router
from hydra_llm.scheduling import costs
from hydra_llm.streams import RoutedStream
from hydra_llm.transport import AsyncHydraTransport
from hydra_llm.types import NodeSnapshot
from tests.cluster import test_breaker, test_cluster
from tests.faults import books
from tests.faults.callers import PlainCaller
from tests.faults.matrix import cases, play
from tests.faults.stage import ample_time

__all__ = ["ample_time"]

Row = Callable[[], object]
Patch = pytest.MonkeyPatch

UNFINISHED_SECONDS = 1.0
"""A row that hangs without its limit is given up."""


def of_the_matrix(name: str) -> Row:
    """A case by its id, with the plain client."""
    [case] = [case for case in cases() if str(case) == name]
    return lambda: play(case, PlainCaller, unfinished=UNFINISHED_SECONDS)


# --------------------------------------------------------------------------- switches


def no_failover(patch: Patch) -> None:
    def once(self: HydraTransport, request: httpx.Request, dispatch: Dispatch) -> httpx.Response:
        self._lease(dispatch)
        return self._once(request, dispatch)

    async def aonce(
        self: AsyncHydraTransport, request: httpx.Request, dispatch: Dispatch
    ) -> httpx.Response:
        await self._lease(dispatch)
        return await self._once(request, dispatch)

    patch.setattr(HydraTransport, "_dispatch", once)
    patch.setattr(AsyncHydraTransport, "_dispatch", aonce)


def no_node_breaker(patch: Patch) -> None:
    patch.setattr(Cluster, "_strike", lambda self, record, lease, error, now: _price(record, now))


def _price(record: NodeRecord, now: float) -> None:
    record.add_penalty(now)


def no_load_breaker(patch: Patch) -> None:
    patch.setattr(Cluster, "_load_failed", lambda *about: None)


def more_than_one_probe(patch: Patch) -> None:
    patch.setattr(CircuitBreaker, "retry_at", property(lambda self: self._retry_at))


def the_same_pause_each_time(patch: Patch) -> None:
    _after_opening(patch, lambda self, now: now + self._open_seconds)


def no_jitter(patch: Patch) -> None:
    class Steady:
        def uniform(self, a: float, b: float) -> float:
            return (a + b) / 2

    made = CircuitBreaker.__init__

    def init(self: CircuitBreaker, **about: Any) -> None:
        made(self, **{**about, "rng": Steady()})

    patch.setattr(CircuitBreaker, "__init__", init)


def _after_opening(patch: Patch, retry_at: Callable[[Any, float], float]) -> None:
    opened = CircuitBreaker._open

    def open_(self: CircuitBreaker, now: float, reason: str) -> None:
        opened(self, now, reason)
        self._retry_at = retry_at(self, now)

    patch.setattr(CircuitBreaker, "_open", open_)


def no_slow_start(patch: Patch) -> None:
    patch.setattr(Cluster, "_slow_start", lambda *about: None)


def no_panic_rule(patch: Patch) -> None:
    patch.setattr(Cluster, "_may_open_one_more", lambda self: True)


def no_retry_budget(patch: Patch) -> None:
    patch.setattr(RetryBudget, "withdraw", lambda self, now: True)


def deaf_to_retry_after(patch: Patch) -> None:
    patch.setattr("hydra_llm.ollama.errors._retry_after", lambda headers: None)


def _unjudged(patch: Patch, kind: type[NodeError]) -> None:
    """Such an error changes nothing, and no probe corrects that soon."""
    judge = Cluster._judge

    def judge_others(self: Cluster, record: Any, lease: Any, error: NodeError, now: float) -> None:
        if not isinstance(error, kind):
            judge(self, record, lease, error, now)

    patch.setattr(Cluster, "_judge", judge_others)
    patch.setattr(Router, "_refresh", lambda self, node_id: None)


def no_refresh_of_the_catalogue(patch: Patch) -> None:
    _unjudged(patch, ModelNotFoundError)


def no_configuration_error(patch: Patch) -> None:
    _unjudged(patch, NodeAuthError)


def no_health_from_requests(patch: Patch) -> None:
    _unjudged(patch, NodeConnectError)


def no_stuck_load_path(patch: Patch) -> None:
    patch.setattr(Cluster, "_watch_loads", lambda self, record, now: False)


def no_fence(patch: Patch) -> None:
    patch.setattr(NodeSnapshot, "leaving", frozenset())


def no_price_of_errors(patch: Patch) -> None:
    patch.setattr(NodeRecord, "add_penalty", lambda self, now: None)


def no_idle_limit(patch: Patch) -> None:
    patch.setattr(Dispatch, "patience", lambda self, incoming: Patience(1e6, self.clock))


def silence_only(patch: Patch) -> None:
    patch.setattr(Patience, "begin", lambda self, seconds: None)


def no_first_byte_limit(patch: Patch) -> None:
    timeouts = Dispatch.timeouts

    def without(self: Dispatch, incoming: httpx.Request) -> dict[str, float | None]:
        return {**timeouts(self, incoming), "read": 1e6}

    patch.setattr(Dispatch, "timeouts", without)


def no_limit_of_bodies(patch: Patch) -> None:
    patch.setattr(Dispatch, "max_body_bytes", 10**12)


def no_limit_of_lines(patch: Patch) -> None:
    no_limit_of_bodies(patch)
    for reader in ("ollama.answers", "client"):
        patch.setattr(f"hydra_llm.{reader}.MAX_LINE_BYTES", 10**12)


def no_expiry(patch: Patch) -> None:
    patch.setattr(Cluster, "_expire_leases", lambda self, record, now: False)


def cancelled_without_release(patch: Patch) -> None:
    patch.setattr(Dispatch, "cancelled", lambda self: None)


def left_without_closing(patch: Patch) -> None:
    # Held, or the garbage collector would close them.
    patch.setattr(RoutedStream, "close", lambda self: left_open.append(self._response))
    patch.setattr(RoutedStream, "let_go", lambda self: None)


left_open: list[httpx.Response] = []


def a_second_answer(patch: Patch) -> None:
    parts = RoutedStream.__iter__

    def once_more(self: RoutedStream) -> Iterator[bytes]:
        try:
            yield from parts(self)
        except StreamBrokenError as broken:
            dispatch = self._dispatch
            transport = HydraTransport(router=dispatch._router)
            with httpx.Client(transport=transport) as client:
                again = client.build_request(
                    "POST",
                    f"http://any{dispatch.call.path}",
                    content=dispatch._body,
                    extensions={"hydra_restart_of": broken},
                )
                yield from client.send(again, stream=True).iter_raw()

    patch.setattr(RoutedStream, "__iter__", once_more)


def no_early_deadline(patch: Patch) -> None:
    patch.setattr(costs, "misses_deadline", lambda request, node, moment: None)


def probes_always_believed(patch: Patch) -> None:
    observe = NodeRecord.observe

    def believe(self: NodeRecord, seen: Any) -> None:
        self.failed_at = float("-inf")
        observe(self, seen)

    patch.setattr(NodeRecord, "observe", believe)


# ------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Switch:
    mechanism: str
    off: Callable[[Patch], None]
    rows: tuple[Row, ...]


def _rejected(kind: type[NodeError], reason: str) -> Row:
    return lambda: test_cluster.test_some_failures_rule_the_node_out_at_once(kind, {}, reason)


SWITCHES = [
    Switch(
        "failover before the first byte",
        no_failover,
        (
            of_the_matrix("refused-2 nodes-whole-sync"),
            of_the_matrix("instant 503-4 nodes-stream-async"),
            of_the_matrix("error line first-2 nodes-stream-sync"),
            of_the_matrix("reset before headers-2 nodes-whole-async"),
        ),
    ),
    Switch(
        "circuit of a node",
        no_node_breaker,
        (
            of_the_matrix("500 always-2 nodes-whole-sync"),
            test_cluster.test_a_node_that_fails_a_third_of_its_requests_gets_a_pause,
        ),
    ),
    Switch(
        "circuit of loads",
        no_load_breaker,
        (
            of_the_matrix("load out of memory-2 nodes-whole-sync"),
            of_the_matrix("load out of memory-1 node-stream-async"),
        ),
    ),
    Switch(
        "one probe when half-open",
        more_than_one_probe,
        (test_cluster.test_when_the_time_is_over_one_request_goes_through_and_closes_the_circuit,),
    ),
    Switch("pauses that grow", the_same_pause_each_time, (books.a_node_that_never_gets_well,)),
    Switch(
        "pauses with jitter",
        no_jitter,
        (
            books.a_node_that_never_gets_well,
            test_breaker.test_two_routers_do_not_return_at_the_same_moment,
        ),
    ),
    Switch("slow start", no_slow_start, (test_cluster.test_one_good_answer_is_not_full_trust,)),
    Switch(
        "panic rule",
        no_panic_rule,
        (
            of_the_matrix("500 always-1 node-whole-sync"),
            lambda: test_cluster.test_no_more_than_half_the_nodes_are_ejected_by_inference_alone(4),
        ),
    ),
    Switch("retry budget", no_retry_budget, (books.nothing_but_errors,)),
    Switch(
        "Retry-After",
        deaf_to_retry_after,
        (of_the_matrix("429 with Retry-After-2 nodes-whole-sync"),),
    ),
    Switch(
        "404 refreshes the catalogue",
        no_refresh_of_the_catalogue,
        (of_the_matrix("404 model-2 nodes-whole-sync"),),
    ),
    Switch(
        "401 and 403 are the configuration's",
        no_configuration_error,
        (
            of_the_matrix("401-2 nodes-whole-sync"),
            of_the_matrix("403-1 node-stream-async"),
            _rejected(NodeAuthError, "misconfigured"),
        ),
    ),
    Switch(
        "down by a request",
        no_health_from_requests,
        (
            of_the_matrix("refused-2 nodes-whole-sync"),
            of_the_matrix("black hole-4 nodes-stream-async"),
            _rejected(NodeConnectError, "down"),
        ),
    ),
    Switch(
        "load path stuck",
        no_stuck_load_path,
        (test_cluster.test_a_load_without_a_first_byte_for_too_long_marks_the_load_path_as_stuck,),
    ),
    Switch(
        "fence of an eviction",
        no_fence,
        (test_cluster.test_what_a_load_pushes_out_takes_no_new_work_and_is_gone_afterwards,),
    ),
    Switch(
        "price of errors",
        no_price_of_errors,
        (
            of_the_matrix("500 once-2 nodes-whole-sync"),
            of_the_matrix("instant 503-2 nodes-whole-sync"),
            test_cluster.test_each_error_has_a_price_that_halves_in_ten_seconds,
        ),
    ),
    Switch(
        "idle time-out",
        no_idle_limit,
        (of_the_matrix("stalled at token k-2 nodes-stream-async"),),
    ),
    Switch(
        "time-out of the first byte",
        no_first_byte_limit,
        (of_the_matrix("hung before the first byte-2 nodes-stream-async"),),
    ),
    Switch(
        "time for a part as a whole",
        silence_only,
        (
            of_the_matrix("slow-loris in the headers-2 nodes-stream-async"),
            of_the_matrix("slow-loris in the middle-2 nodes-stream-async"),
        ),
    ),
    Switch(
        "limit of a body",
        no_limit_of_bodies,
        (of_the_matrix("endless stream-2 nodes-stream-async"),),
    ),
    Switch(
        "limit of a line",
        no_limit_of_lines,
        (of_the_matrix("endless line-2 nodes-stream-async"),),
    ),
    Switch(
        "leases expire",
        no_expiry,
        (test_cluster.test_a_lease_expires_once_its_owner_is_silent_for_too_long,),
    ),
    Switch(
        "a cancelled call gives its place back",
        cancelled_without_release,
        (books.a_call_that_is_cancelled,),
    ),
    Switch(
        "who leaves a stream closes it upstream",
        left_without_closing,
        (books.a_stream_that_is_left,),
    ),
    Switch(
        "never a second answer after the first byte",
        a_second_answer,
        (of_the_matrix("reset mid-stream-2 nodes-stream-sync"),),
    ),
    Switch(
        "deadlines that fail early", no_early_deadline, (books.a_deadline_that_nobody_can_make,)
    ),
    Switch("old news of probes", probes_always_believed, (books.a_late_probe,)),
]


@pytest.mark.usefixtures("ample_time")
@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.mechanism)
def test_without_it_its_rows_fail(switch: Switch, monkeypatch: pytest.MonkeyPatch) -> None:
    for row in switch.rows:
        row()

        with monkeypatch.context() as patch:
            switch.off(patch)
            # What a row says with pytest.raises is a failure of pytest's own, and no Exception.
            with pytest.raises((AssertionError, HydraError, pytest.fail.Exception)):
                row()
        while left_open:
            left_open.pop().close()
