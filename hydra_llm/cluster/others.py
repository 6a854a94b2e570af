"""Taking turns with other routers.

Each router has a waiting line of its own, and a place that it gives back would always go to its
own line, however long somebody waits elsewhere. So for a moment after giving a place back it
lets those go first who are more urgent. The moment is over before a slot has run dry: while it
lasts the runner's headroom keeps it busy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from hydra_llm.cluster.waiting import Wish

TURN_SECONDS = 0.05
"""As long as it takes the others to see the place and to claim it."""


class Others:
    """
    What other routers want, as last heard; the owner holds the lock.

    Args:
        tell: has the others told at once what has changed; it must not wait for that.
    """

    def __init__(self, tell: Callable[[], object]) -> None:
        self._tell = tell
        self.wishes: Mapping[str, Wish] = {}
        """The most urgent one that waits elsewhere, by model."""
        self._began: dict[str, float] = {}
        """When the last turn of the others began, by model."""

    def released(self, model: str, now: float) -> None:
        """This router has given a place back: a turn begins, if the last one is long over."""
        if model not in self.wishes:
            return
        self._tell()
        # Whoever waits elsewhere may be unable to use the place: half of the time is ours.
        if now - self._began.get(model, -math.inf) >= 2 * TURN_SECONDS:
            self._began[model] = now

    def go_first(self, own: Wish, model: str, now: float) -> bool:
        """Whether ``own`` has to leave what is free to somebody more urgent elsewhere."""
        other = self.wishes.get(model)
        if other is None or now - self._began.get(model, -math.inf) >= TURN_SECONDS:
            return False
        return other.urgency(now) > own.urgency(now)
