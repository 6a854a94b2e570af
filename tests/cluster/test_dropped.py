"""The garbage collector is called where a request may lie dropped in a cycle, and only there."""

from __future__ import annotations

from hydra_llm.cluster import DroppedRequests, Waiter
from hydra_llm.cluster.dropped import (
    LONGEST_SECONDS,
    WHILE_NONE_WAITS_SECONDS,
    WHILE_ONE_WAITS_SECONDS,
)
from tests.cluster.ledgers import Clock, granted, ledger, seen
from tests.helpers import LLAMA, request


class Calls:
    def __init__(self) -> None:
        self.clock = Clock()
        self.cluster = ledger(seen("a", warm=(LLAMA,)), clock=self.clock)
        self.at: list[float] = []
        self.dropped = DroppedRequests(lambda: self.at.append(self.clock.now))

    def ticks(self, seconds: int) -> list[float]:
        """When it was called, in so many seconds from now."""
        began, self.at = self.clock.now, []
        for _ in range(seconds):
            self.dropped.look(self.cluster, self.clock.now)
            self.clock.now += 1.0
        return [at - began for at in self.at]


def test_where_nothing_is_held_it_is_never_called() -> None:
    assert Calls().ticks(1000) == []


def test_where_one_waits_it_is_called_soon_and_then_less_and_less() -> None:
    calls = Calls()
    for _ in range(2):
        granted(calls.cluster, request())
    assert isinstance(calls.cluster.acquire(request()), Waiter)

    first, second, third, *_, before, last = calls.ticks(4000)
    assert first == WHILE_ONE_WAITS_SECONDS
    assert second - first == 2 * WHILE_ONE_WAITS_SECONDS
    assert third - second == 4 * WHILE_ONE_WAITS_SECONDS
    assert last - before == LONGEST_SECONDS


def test_where_none_waits_it_is_called_later() -> None:
    calls = Calls()
    held = granted(calls.cluster, request())
    assert calls.ticks(15) == [WHILE_NONE_WAITS_SECONDS]

    calls.cluster.release(held)
    assert calls.ticks(100) == []


def test_while_requests_come_and_go_it_is_not() -> None:
    calls = Calls()
    granted(calls.cluster, request())
    for _ in range(100):
        calls.cluster.release(granted(calls.cluster, request()))
        assert calls.ticks(1) == []
