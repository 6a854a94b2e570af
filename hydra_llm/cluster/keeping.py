"""What a router has learned, kept for the next one: when it is read and when written.

A kept rate is worth a few samples, so that a node which has changed is known anew after a few
answers; an old one is worth less.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Mapping

from hydra_llm.cluster.cluster import Cluster
from hydra_llm.cluster.rates import Rate
from hydra_llm.cluster.rates_file import Entries, Entry, RatesFile, RatesFileError

__all__ = ["Keeping"]

log = logging.getLogger("hydra_llm")

WRITE_SECONDS = 300.0
"""Between two writes of what has changed; the last one is when the router is closed."""
KEPT_SAMPLES = 2
"""As many samples as a kept rate counts for, at most."""
OLD_SECONDS = 30 * 24 * 3600.0
"""A rate that has not been measured for so long counts as a single sample."""
PATIENCE_SECONDS = 1.0
"""A finalizer may come in anywhere, in a thread that holds the ledger's lock too."""

Shown = dict[tuple[str, str], Mapping[str, Rate]]
"""Rates by node URL and digest."""


class Keeping:
    """
    Hands a ledger what is kept of its nodes, and writes what it has learned.

    There is no lock: two threads that write at once do no more harm than two processes.

    Args:
        file: where it is kept.
        cluster: the ledger; no strong reference is kept.
        clock: the ledger's.
        wall_clock: seconds since 1970.
    """

    def __init__(
        self,
        file: RatesFile,
        cluster: Cluster,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._file = file
        self._cluster = weakref.ref(cluster)
        self._clock = clock
        self._wall_clock = wall_clock
        self._recalled: set[str] = set()
        """Ids of nodes that the ledger has been told of."""
        self._shown: Shown = {}
        """As last read or written: whatever differs from it is news."""
        self._dates: dict[tuple[str, str], float] = {}
        self._write_at: float | None = None

    def __repr__(self) -> str:
        return f"<Keeping {self._file.path}>"

    def recall(self, node_id: str) -> None:
        """A node is about to be observed: the first time, hand over what is kept of it."""
        cluster = self._cluster()
        if node_id in self._recalled or cluster is None:
            return
        now = self._wall_clock()
        kept = self._file.read(now)
        for snapshot in cluster.nodes():
            if snapshot.id not in self._recalled:
                self._recalled.add(snapshot.id)
                self._hand_over(cluster, snapshot.id, snapshot.node.url, kept, now)

    def _hand_over(
        self, cluster: Cluster, node_id: str, url: str, kept: Entries, now: float
    ) -> None:
        of_node = {key: entry for key, entry in kept.items() if key[0] == url}
        worth = {key: _worth(entry, now) for key, entry in of_node.items()}
        self._shown.update(worth)
        self._dates.update({key: entry.at for key, entry in of_node.items()})
        cluster.recall(node_id, {digest: rates for (_, digest), rates in worth.items()})

    def tick(self) -> None:
        """Write, if it is time to."""
        now = self._clock()
        if self._write_at is None:
            self._write_at = now + WRITE_SECONDS
        elif now >= self._write_at:
            self._write_at = now + WRITE_SECONDS
            self.write()

    def write(self) -> None:
        """Write what has been learned since the last time, if anything was."""
        cluster = self._cluster()
        learned = None if cluster is None else cluster.learned(PATIENCE_SECONDS)
        if learned is None:
            return
        learned = {key: _rounded(rates) for key, rates in learned.items()}
        now = self._wall_clock()
        own = {key: self._entry(key, rates, now) for key, rates in learned.items()}
        if not any(entry.changed for entry in own.values()):
            return
        try:
            self._file.merge(own, now)
        except RatesFileError as error:
            self._file.complain(logging.DEBUG, str(error))
            return
        self._shown.update(learned)
        self._dates.update({key: entry.at for key, entry in own.items()})

    def _entry(self, key: tuple[str, str], rates: Mapping[str, Rate], now: float) -> Entry:
        shown = self._shown.get(key, {})
        changed = frozenset(kind for kind, rate in rates.items() if rate != shown.get(kind))
        return Entry(now if changed else self._dates.get(key, now), rates, changed)


def _worth(entry: Entry, now: float) -> dict[str, Rate]:
    """The rates with as many samples as they still count for."""
    most = KEPT_SAMPLES if now - entry.at < OLD_SECONDS else 1
    return {kind: Rate(rate.value, min(rate.samples, most)) for kind, rate in entry.rates.items()}


def _rounded(rates: Mapping[str, Rate]) -> dict[str, Rate]:
    """As they are written: what has only been read must not look like news."""
    return {kind: Rate(float(f"{rate.value:.6g}"), rate.samples) for kind, rate in rates.items()}
