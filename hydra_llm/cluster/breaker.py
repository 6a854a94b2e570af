"""Stops sending to a node that keeps failing, and finds out when it is well again.

::

       too many failures, or too large a share      the time is over
    closed ─────────────────────▶ open ◀─────────┐ ────────────────▶ half-open
      ▲                            ▲  failure,   │                      │
      │                            │  longer now │   one request goes   │
      │                            └─────────────┴───── through ◀───────┤
      └────────────────────────────── success ──────────────────────────┘

Every transition starts a new *generation*. A result is counted only if its request was
begun in the present one: a late failure cannot open a circuit that has just closed, and a
late success cannot close one.
"""

from __future__ import annotations

import random
from collections import deque
from typing import Literal

State = Literal["closed", "open", "half-open"]

LATEST_RESULTS = 20
"""Results of which too large a share may be failures, although never many in a row."""


class CircuitBreaker:
    """
    One circuit. Time comes in as an argument; the owner holds the lock.

    Args:
        failures: failures in a row that open it.
        failures_of_latest: failures among the last 20 results that open it; None: no number does.
        open_seconds: how long it stays open the first time; it doubles each time after, and
            each success while it is closed takes one doubling back.
        max_open_seconds: the longest it stays open.
        rng: for the jitter of ±20 %, so that several routers do not return at once.
    """

    def __init__(
        self,
        *,
        failures: int,
        open_seconds: float,
        max_open_seconds: float,
        rng: random.Random,
        failures_of_latest: int | None = None,
    ) -> None:
        self._threshold = failures
        self._most_of_latest = failures_of_latest
        self._latest: deque[bool] = deque(maxlen=LATEST_RESULTS)
        """Whether each of the last results was a failure."""
        self._open_seconds = open_seconds
        self._max_open_seconds = max_open_seconds
        self._rng = rng
        self._failures = 0
        self._times_opened = 0
        self._retry_at: float | None = None
        self._probe_out = False
        self.generation = 0
        self.reason = ""

    def state(self, now: float) -> State:
        """Closed, open, or half-open once the time is over."""
        if self._retry_at is None:
            return "closed"
        return "half-open" if self._probe_out or now >= self._retry_at else "open"

    @property
    def is_closed(self) -> bool:
        """Whether requests pass freely."""
        return self._retry_at is None

    @property
    def retry_at(self) -> float | None:
        """When one request may pass; None while it is out, and when the circuit is closed."""
        return None if self._probe_out else self._retry_at

    def allows(self, now: float) -> bool:
        """Whether a request may pass now."""
        if self._retry_at is None:
            return True
        return not self._probe_out and now >= self._retry_at

    def begin(self, now: float) -> int:
        """A request passes; in half-open it is the one probe. Returns its generation."""
        if self._retry_at is not None and not self._probe_out and now >= self._retry_at:
            self._probe_out = True
            self.generation += 1
        return self.generation

    def succeed(self, generation: int) -> bool:
        """A request of that generation ended well. True if this closed the circuit."""
        if generation != self.generation:
            return False
        self._failures = 0
        self._latest.append(False)
        if self._retry_at is None:
            self._times_opened = max(0, self._times_opened - 1)
            return False
        self._close()
        return True

    def fail(self, generation: int, now: float, reason: str, *, may_open: bool = True) -> bool:
        """A request of that generation failed. True if this opened the circuit."""
        if generation != self.generation:
            return False
        self._failures += 1
        self._latest.append(True)
        if self._retry_at is None and not (may_open and self.is_suspect):
            return False
        self._open(now, reason)
        return True

    @property
    def is_suspect(self) -> bool:
        """Whether it has failed so often that it would be open, if nothing held it closed."""
        if self._failures >= self._threshold:
            return True
        return self._most_of_latest is not None and sum(self._latest) >= self._most_of_latest

    def abandon(self, generation: int) -> None:
        """A request of that generation ended without telling anything (cancelled)."""
        if generation == self.generation and self._probe_out:
            # The probe's place is free again; its generation is over.
            self._probe_out = False
            self.generation += 1

    def reset(self) -> None:
        """Close it: something better than inference says that the node is well."""
        if self._retry_at is not None or any(self._latest):
            self._close()
        self._times_opened = 0

    def _open(self, now: float, reason: str) -> None:
        # A node can be away for weeks: 2 ** 1024 would be no float any more.
        doubled = self._open_seconds * 2 ** min(self._times_opened, 60)
        base = min(doubled, self._max_open_seconds)
        self._retry_at = now + base * self._rng.uniform(0.8, 1.2)
        self._times_opened += 1
        self._probe_out = False
        self._forget()
        self.generation += 1
        self.reason = reason

    def _close(self) -> None:
        self._retry_at = None
        self._probe_out = False
        self._forget()
        self.generation += 1
        self.reason = ""

    def _forget(self) -> None:
        self._failures = 0
        self._latest.clear()

    def __repr__(self) -> str:
        if self._retry_at is None:
            return f"<CircuitBreaker closed, {self._failures} failures>"
        return f"<CircuitBreaker open until {self._retry_at:.1f}, {self.reason}>"
