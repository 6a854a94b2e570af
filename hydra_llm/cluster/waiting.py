"""Requests that wait in the router for a free slot.

They wait here and not in Ollama, whose queue knows no priority and cannot be left (a
request that waits for a load there goes on blocking others after its client has gone).

::

    waiting ──granted──▶ granted
       ├─────refused──▶ refused     no node may take it any more
       └───withdrawn──▶ withdrawn   the caller has gone, or its time is over
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from hydra_llm.cluster.lease import Lease
from hydra_llm.types import Demand, InferenceRequest, NodeSnapshot

AGEING_SECONDS = 15.0
"""Waiting this long counts as one step of priority: nobody starves."""

HIGHEST_PRIORITY = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """How much some request that waits in a router wants its model."""

    priority: int
    since: float

    def urgency(self, now: float) -> float:
        """Its priority, raised by how long it has waited."""
        return self.priority + (now - self.since) / AGEING_SECONDS


class Seen(NamedTuple):
    """How things stood when a request joined the line, for what could be foreseen of it then."""

    now: float
    nodes: Sequence[NodeSnapshot]
    demand: Mapping[str, Demand]
    queue_ahead: int


class Waiter:
    """One waiting request. ``on_ready`` callbacks run without any lock held."""

    __slots__ = ("_callbacks", "error", "kind", "lease", "request", "seen", "since", "state")

    def __init__(self, request: InferenceRequest, since: float) -> None:
        self.request = request
        self.since = since
        self.seen: Seen | None = None
        """Put down when the line is first gone through, which is in the step of joining it."""
        self.kind = (
            request.model,
            request.options,
            request.node_id,
            request.min_vram_bytes,
            request.exclude_nodes,
            request.among,
            request.require_labels,
            request.prefer_labels,
            request.capabilities,
            request.deadline_seconds and request.submitted_at + request.deadline_seconds,
            request.tried,
        )
        """Requests of one kind and priority mostly find room on the same nodes."""
        self.state: Literal["waiting", "granted", "refused", "withdrawn"] = "waiting"
        self.lease: Lease | None = None
        self.error: Exception | None = None
        self._callbacks: list[Callable[[], None]] = []

    @property
    def wish(self) -> Wish:
        """How much it wants its model."""
        return Wish(priority=self.request.priority, since=self.since)

    def urgency(self, now: float) -> float:
        """Its priority, raised by how long it has waited."""
        return self.request.priority + (now - self.since) / AGEING_SECONDS

    def request_at(self, now: float) -> InferenceRequest:
        """
        The request with the priority that it has by now.

        Being first is not enough: a low priority finds no room on a runner that higher
        ones keep just above its slots.
        """
        priority = min(HIGHEST_PRIORITY, int(self.urgency(now)))
        if priority <= self.request.priority:
            return self.request
        return replace(self.request, priority=priority)

    def on_ready(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called once it no longer waits; at once if that is so already."""
        self._callbacks.append(callback)
        if self.state != "waiting":
            self.notify()

    def notify(self) -> None:
        """Call the callbacks, each once."""
        while self._callbacks:
            try:
                callback = self._callbacks.pop()
            except IndexError:  # another thread took the last one
                return
            callback()


class WaitingLine:
    """Who waits, the most urgent first; the owner holds the lock."""

    def __init__(self) -> None:
        self._waiters: list[Waiter] = []

    def __len__(self) -> int:
        return len(self._waiters)

    def add(self, waiter: Waiter) -> None:
        """Join the line."""
        self._waiters.append(waiter)

    def remove(self, waiter: Waiter) -> None:
        """Leave the line."""
        self._waiters.remove(waiter)

    def in_order(self) -> list[Waiter]:
        """Most urgent first; who came first, first. All age alike, so it does not change."""
        return sorted(
            self._waiters, key=lambda w: (w.since - AGEING_SECONDS * w.request.priority, w.since)
        )

    def ahead_of(self, request: InferenceRequest, now: float) -> int:
        """Waiting requests for the same model that go before a new one."""
        return sum(
            1
            for waiter in self._waiters
            if waiter.request.model == request.model and waiter.urgency(now) >= request.priority
        )

    def wishes(self, now: float) -> dict[str, Wish]:
        """The most urgent request for each model."""
        wishes: dict[str, Wish] = {}
        for waiter in self.in_order():
            wishes.setdefault(waiter.request.model, waiter.wish)
        return wishes

    def counts(self) -> dict[str, int]:
        """Waiting requests by model."""
        counts: dict[str, int] = {}
        for waiter in self._waiters:
            counts[waiter.request.model] = counts.get(waiter.request.model, 0) + 1
        return counts
