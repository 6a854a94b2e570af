"""
Finds requests that somebody has dropped without a word.

A stream that is dropped gives its place back when Python forgets it. Where it lies in a cycle of
references, as LiteLLM's do at times, only the garbage collector finds it; and that comes by as a
program makes new objects, so hardly ever in one that waits for the very place.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

from hydra_llm.cluster.cluster import Cluster

__all__ = ["DroppedRequests"]

WHILE_ONE_WAITS_SECONDS = 2.0
"""Nothing has moved for so long although a request waits: the collector is called."""
WHILE_NONE_WAITS_SECONDS = 10.0
"""The same where requests are only in flight: their nodes may compute for nobody."""
LONGEST_SECONDS = 300.0
"""It is called half as often each time in vain, but this often."""


class DroppedRequests:
    """
    Has the garbage collector come by when requests are held and nothing moves.

    Args:
        collect: the collector.
    """

    def __init__(self, collect: Callable[[], object] = gc.collect) -> None:
        self._collect = collect
        self._moves = -1
        self._since = 0.0
        self._calls = 0

    def look(self, cluster: Cluster, now: float) -> None:
        """Look, about once a second."""
        waits = cluster.waiting
        if cluster.moves != self._moves or not (waits or cluster.in_flight):
            self._moves, self._since, self._calls = cluster.moves, now, 0
            return
        first = WHILE_ONE_WAITS_SECONDS if waits else WHILE_NONE_WAITS_SECONDS
        if now - self._since >= min(first * 2**self._calls, LONGEST_SECONDS):
            self._since = now
            self._calls = min(self._calls + 1, 10)
            self._collect()
