"""
Routers of one process that have nodes in common.

Their ledgers are changed under one lock, and each counts what the others have in flight on a node
both know: so choosing and counting stay one step over all of them. Nobody has to be told of
anything; a ledger that is gone is not seen any more. Routers that share through Redis both see each
other there already.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hydra_llm.cluster.cluster import Cluster
    from hydra_llm.cluster.record import NodeRecord
    from hydra_llm.cluster.waiting import Waiter

__all__ = ["LEDGER_LOCK", "link", "serve_lines"]

LEDGER_LOCK = threading.Lock()
"""Of all ledgers of this process; held for microseconds."""

_ledgers: weakref.WeakSet[Cluster] = weakref.WeakSet()


def link(ledger: Cluster, record: NodeRecord) -> None:
    """Have ledgers with the same clock see each other's requests on a node; under the lock."""
    _ledgers.add(ledger)
    for other in _ledgers:
        if other is ledger or other._clock is not ledger._clock:
            continue
        for theirs in other._records.values():
            if theirs.node.url == record.node.url:
                theirs.neighbours[record] = weakref.ref(ledger)
                record.neighbours[theirs] = weakref.ref(other)
                other._near.add(ledger)
                ledger._near.add(other)


def serve_lines(first: Cluster) -> list[Waiter]:
    """
    Grant what can be granted in a ledger and those near it; those that wait no longer.

    The line with the most urgent request is served first; under the lock.
    """
    resolved: list[Waiter] = []
    pending = {ledger for ledger in (first, *first._near) if len(ledger._line)}
    while pending:
        ledger = max(pending, key=_urgency)
        pending.discard(ledger)
        found = ledger._serve_line(ledger._clock())
        resolved += found
        if found:
            # What was granted may have changed what is best for those passed over.
            pending |= {near for near in ledger._near if len(near._line)}
    return resolved


def _urgency(ledger: Cluster) -> float:
    now = ledger._clock()
    return max(wish.urgency(now) for wish in ledger._line.wishes().values())


if hasattr(os, "register_at_fork"):
    # A child is to find the ledgers whole, and the lock free.
    os.register_at_fork(
        before=LEDGER_LOCK.acquire,
        after_in_parent=LEDGER_LOCK.release,
        after_in_child=LEDGER_LOCK.release,
    )
