"""Keeps failover from becoming a storm: attempts ≤ (1 + ratio) × requests + a floor."""

from __future__ import annotations


class RetryBudget:
    """
    A purse: every request puts a little in, every retry takes one out.

    Args:
        ratio: what a request puts in.
        floor: what is in it to begin with, what it holds at the most, and what a minute of
            rest refills, so that a quiet cluster may always fail over.
    """

    def __init__(self, *, ratio: float, floor: int) -> None:
        self._ratio = ratio
        # Without any room to save in, the ratio could never be used.
        self._floor = float(max(floor, 1)) if ratio else float(floor)
        self._tokens = float(floor)
        self._refilled_at: float | None = None

    def deposit(self, now: float) -> None:
        """A new request has come."""
        self._refill(now)
        self._tokens = min(self._tokens + self._ratio, self._floor)

    def withdraw(self, now: float) -> bool:
        """Whether one retry may be made now; it is then paid for."""
        self._refill(now)
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def _refill(self, now: float) -> None:
        if self._refilled_at is not None:
            earned = (now - self._refilled_at) * self._floor / 60.0
            self._tokens = min(self._tokens + max(0.0, earned), self._floor)
        self._refilled_at = now
