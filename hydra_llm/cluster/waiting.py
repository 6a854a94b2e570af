"""Requests that wait in the router for a free slot.

They wait here and not in Ollama, whose queue knows no priority and cannot be left (a
request that waits for a load there goes on blocking others after its client has gone).

::

    waiting ──granted──▶ granted
       ├─────refused──▶ refused     no node may take it any more, it has waited too long, or the
       │                            line is full of more urgent ones
       └───withdrawn──▶ withdrawn   the caller has gone, or its time is over

Waiting makes up for priority, but not for the highest: in a line that grows for ever everybody
has waited long. So the highest goes first whatever the others have waited, only not more than
`TURNS_OF_HIGHEST` times in a row past somebody who would otherwise be before it.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from hydra_llm.cluster.lease import Lease
from hydra_llm.types import Demand, InferenceRequest, NodeSnapshot

AGEING_SECONDS = 15.0
"""Waiting this long counts as one step of priority."""

HIGHEST_PRIORITY = 10

URGENT_PRIORITY = 8
"""From this priority on, others leave runners and GPUs freer for `URGENT_SECONDS` after one."""
URGENT_SECONDS = 300.0

OTHERS_TURN_SECONDS = 15.0
"""Others wait so long for urgent requests that are at work on the GPU, and then run beside them."""

TURNS_OF_HIGHEST = 9
"""So often in a row the highest priority passes those who have waited longer: nobody starves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """How much some request that waits in a router wants its model."""

    priority: int
    since: float

    def urgency(self, now: float) -> float:
        """
        Its priority, raised by how long it has waited.

        Below the highest it comes ever closer to that and does not reach it.
        """
        urgency = self.priority + (now - self.since) / AGEING_SECONDS
        if self.priority == HIGHEST_PRIORITY or urgency <= HIGHEST_PRIORITY - 1:
            return urgency
        return HIGHEST_PRIORITY - 1 / (urgency - HIGHEST_PRIORITY + 2)

    @property
    def from_then(self) -> float:
        """When somebody of priority 0 must have come to be as urgent: all age alike."""
        return self.since - AGEING_SECONDS * self.priority

    def is_overdue(self, now: float) -> bool:
        """Whether it would be before a new one of the highest priority if that aged as it does."""
        return now - self.from_then > AGEING_SECONDS * HIGHEST_PRIORITY

    def before(self, other: Wish) -> float:
        """By how many seconds of waiting it is more urgent; negative if it is less so."""
        if self.priority == HIGHEST_PRIORITY > other.priority:
            return math.inf
        return other.from_then - self.from_then


class Arrivals:
    """When each model was last asked for by urgent and by other requests."""

    def __init__(self) -> None:
        self._urgent: dict[str, float] = {}
        self._other: dict[str, float] = {}

    def note(self, request: InferenceRequest, now: float) -> None:
        """Take in a new one."""
        is_urgent = request.priority >= URGENT_PRIORITY
        (self._urgent if is_urgent else self._other)[request.model] = now

    def are_urgent(self, models: Iterable[str], now: float) -> bool:
        """Whether urgent ones have come for any of these models lately."""
        return _lately(self._urgent, models, now)

    def are_mixed(self, models: Iterable[str], now: float) -> bool:
        """Whether others have, too."""
        return self.are_urgent(models, now) and _lately(self._other, models, now)


def _lately(asked_at: Mapping[str, float], models: Iterable[str], now: float) -> bool:
    return bool(asked_at) and any(
        now - asked_at.get(model, -math.inf) <= URGENT_SECONDS for model in models
    )


class Seen(NamedTuple):
    """How things stood when a request joined the line, for what could be foreseen of it then."""

    now: float
    nodes: Sequence[NodeSnapshot]
    demand: Mapping[str, Demand]
    queue_ahead: int


class Waiter:
    """One waiting request. ``on_ready`` callbacks run without any lock held."""

    __slots__ = (
        "_callbacks",
        "error",
        "kind",
        "lease",
        "place",
        "request",
        "seen",
        "state",
        "wish",
    )

    def __init__(self, request: InferenceRequest, since: float) -> None:
        self.request = request
        self.wish = Wish(priority=request.priority, since=since)
        """How much it wants its model."""
        self.place = (request.priority < HIGHEST_PRIORITY, self.wish.from_then, since)
        """Where it stands in the line: the least is first."""
        self.seen: Seen | None = None
        """Put down when the line is first gone through, which is in the step of joining it."""
        self.kind = hash(
            (
                request.model,
                request.options,
                request.priority,
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
        )
        """Requests of one kind mostly find room on the same nodes."""
        self.state: Literal["waiting", "granted", "refused", "withdrawn"] = "waiting"
        self.lease: Lease | None = None
        self.error: Exception | None = None
        self._callbacks: list[Callable[[], None]] = []

    @property
    def since(self) -> float:
        """When it began to wait."""
        return self.wish.since

    def refuse(self, error: Exception) -> None:
        """It gets nothing."""
        self.error, self.state = error, "refused"

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
        self._turns: dict[str, int] = {}
        """How often in a row the highest priority went before somebody overdue, by model."""

    def __len__(self) -> int:
        return len(self._waiters)

    def __iter__(self) -> Iterator[Waiter]:
        return iter(self._waiters)

    def add(self, waiter: Waiter) -> None:
        """Join the line."""
        insort(self._waiters, waiter, key=_place)

    def remove(self, waiter: Waiter) -> None:
        """Leave the line."""
        self._waiters.remove(waiter)

    def granted(self, waiter: Waiter, now: float) -> None:
        """Leave the line with a lease: whose turn it is next may change."""
        self.remove(waiter)
        model = waiter.request.model
        if waiter.request.priority == HIGHEST_PRIORITY and self._overdue(model, now):
            self._turns[model] = self._turns.get(model, 0) + 1
        else:
            self._turns.pop(model, None)

    def in_order(self, now: float) -> list[Waiter]:
        """Most urgent first; who came first, first."""
        order = list(self._waiters)
        for model, turns in self._turns.items():
            if turns >= TURNS_OF_HIGHEST and (overdue := self._overdue(model, now)):
                order.remove(overdue)
                order.insert(0, overdue)
        return order

    def _overdue(self, model: str, now: float) -> Waiter | None:
        """The first for a model that has waited for longer than its priority makes up for."""
        for waiter in self._waiters:
            if waiter.request.priority < HIGHEST_PRIORITY:
                if not waiter.wish.is_overdue(now):
                    return None
                if waiter.request.model == model:
                    return waiter
        return None

    @property
    def last(self) -> Waiter:
        """The least urgent. Raises IndexError if nobody waits."""
        return self._waiters[-1]

    def ahead_of(self, request: InferenceRequest, now: float) -> int:
        """Waiting requests for the same model that go before a new one."""
        return sum(
            1
            for waiter in self._waiters
            if waiter.request.model == request.model
            and waiter.wish.urgency(now) >= request.priority
        )

    def wishes(self) -> dict[str, Wish]:
        """The most urgent request for each model."""
        wishes: dict[str, Wish] = {}
        for waiter in self._waiters:
            wishes.setdefault(waiter.request.model, waiter.wish)
        return wishes

    def counts(self) -> dict[str, int]:
        """Waiting requests by model."""
        counts: dict[str, int] = {}
        for waiter in self._waiters:
            counts[waiter.request.model] = counts.get(waiter.request.model, 0) + 1
        return counts


def _place(waiter: Waiter) -> tuple[bool, float, float]:
    return waiter.place
