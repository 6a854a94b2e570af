"""What is free on a node's GPUs: the last sample, less what has been loaded since it was taken.

A sample is older than the answer it came in: an exporter that looks every 30 seconds may tell
what was free before a load that ``/api/ps`` shows already. Of an unload the opposite is true:
``/api/ps`` forgets a model at once, and its memory comes back later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from hydra_llm.types import LoadedModel

HISTORY_SECONDS = 300.0
"""No sample that is used is older than this."""


@dataclass(slots=True)
class Arrival:
    """A model that has come to lie on the GPU."""

    at: float
    size_bytes: int
    after_sample: int
    """How many samples there had been: at the same instant, the order tells."""


class Sample(NamedTuple):
    """What a source said."""

    free_bytes: int | None
    at: float
    """When the source looked."""
    seen_at: float
    """When it was asked; the source may have looked at any time in between."""
    source: str | None

    @property
    def origin(self) -> str:
        """The source without the remarks on it."""
        return (self.source or "").partition(" ")[0].rstrip(",")

    @property
    def is_measured(self) -> bool:
        """Whether a driver told it; else it was worked out of what ``/api/ps`` shows."""
        return self.origin != "config"


class FreeVram:
    """Free memory of one node; the cluster holds the lock."""

    def __init__(self) -> None:
        self._sample: Sample | None = None
        self._samples = 0
        self._arrivals: dict[str, Arrival] = {}
        self._left_at = float("-inf")
        self._rise: Sample | None = None
        """A first sample that shows memory given back; the next one has to agree."""

    @property
    def free_bytes(self) -> int | None:
        """As sampled, less what has arrived since; None: unknown."""
        sample = self._sample
        if sample is None or sample.free_bytes is None:
            return None
        return max(0, sample.free_bytes - sum(self._since(sample)))

    @property
    def sampled_at(self) -> float | None:
        """When the source looked whose figure counts."""
        return None if self._sample is None else self._sample.at

    def _since(self, sample: Sample) -> list[int]:
        return [
            one.size_bytes
            for one in self._arrivals.values()
            if one.at > sample.at or (one.at == sample.at and one.after_sample >= self._samples)
        ]

    # ------------------------------------------------------------------- news

    def arrived(self, model: str, size_bytes: int, at: float) -> None:
        """A model lies on the GPU from now on, where it did not lie, or took less."""
        self._arrivals[model] = Arrival(at, max(0, size_bytes), self._samples)

    def takes_at_least(self, model: str, size_bytes: int) -> None:
        """What ``/api/ps`` shows of one that has just arrived may be too little."""
        arrival = self._arrivals.get(model)
        if arrival is not None:
            arrival.size_bytes = max(arrival.size_bytes, size_bytes)

    def left(self, at: float) -> None:
        """Some model is no longer shown. Nothing is given back for it until samples show it."""
        self._left_at = max(self._left_at, at)

    def shows(
        self, before: Mapping[str, LoadedModel], after: Mapping[str, LoadedModel], at: float
    ) -> None:
        """``/api/ps`` has changed between two looks, whoever did it."""
        for name, model in after.items():
            old = before.get(name)
            if old is None:
                self.arrived(name, model.size_vram_bytes, at)
            elif old.context_length not in (None, model.context_length):
                # Another runner of the same model, with another context.
                self.arrived(name, model.size_vram_bytes - old.size_vram_bytes, at)
        if before.keys() - after.keys():
            self.left(at)

    def observe(self, sample: Sample) -> None:
        """Take in what a source says now."""
        last = self._sample
        if last is None or not self._is_doubtful(sample, last):
            self._take(sample)
            return
        rise = self._rise
        if rise is None:
            self._rise = sample
        elif sample.at > rise.at and sample.at >= rise.seen_at:
            # Two looks, the second one certainly after the first.
            assert sample.free_bytes is not None
            assert rise.free_bytes is not None
            self._take(sample._replace(free_bytes=min(sample.free_bytes, rise.free_bytes)))

    def _is_doubtful(self, sample: Sample, last: Sample) -> bool:
        """Whether it gives back memory after an unload, for the first time."""
        return (
            sample.is_measured
            and sample.origin == last.origin
            and last.at <= self._left_at
            and sample.free_bytes is not None
            and last.free_bytes is not None
            and sample.free_bytes > last.free_bytes
        )

    def _take(self, sample: Sample) -> None:
        self._sample, self._rise = sample, None
        self._samples += 1
        oldest = sample.at - HISTORY_SECONDS
        for name in [name for name, one in self._arrivals.items() if one.at < oldest]:
            del self._arrivals[name]
