"""What ``/api/show`` told of models, for the whole fleet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hydra_llm.types import InstalledModel

__all__ = ["ShowCache"]

SHOW_RETRY_SECONDS = 60.0

MOST_ENTRIES = 10_000
"""A node that tells of other models each time it is asked must not fill the memory."""


@dataclass(slots=True)
class _Entry:
    told: InstalledModel | None = None
    retry_at: float = float("-inf")


class ShowCache:
    """
    What ``/api/show`` said of each model, by digest: a model is the same on every node.

    A model that is being asked about, or that could not be, is left alone for a minute.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def claim(self, installed: Mapping[str, InstalledModel], now: float) -> InstalledModel | None:
        """A model to ask about next; nobody else is given it for now."""
        for model in installed.values():
            if not model.digest:
                continue
            entry = self._entry(model.digest)
            if entry.told is None and entry.retry_at <= now:
                entry.retry_at = now + SHOW_RETRY_SECONDS
                return model
        return None

    def _entry(self, digest: str) -> _Entry:
        entry = self._entries.get(digest)
        if entry is None:
            while len(self._entries) >= MOST_ENTRIES:
                del self._entries[next(iter(self._entries))]  # the oldest
            entry = self._entries[digest] = _Entry()
        return entry

    def put(self, model: InstalledModel) -> None:
        """Keep what was learned."""
        self._entry(model.digest).told = model

    def completed(self, installed: Mapping[str, InstalledModel]) -> dict[str, InstalledModel]:
        """The models with all that is known of them."""
        return {name: self._completed(model) for name, model in installed.items()}

    def _completed(self, model: InstalledModel) -> InstalledModel:
        entry = self._entries.get(model.digest)
        if entry is None or entry.told is None:
            return model
        told = entry.told
        return replace(
            model,
            capabilities=told.capabilities or model.capabilities,
            context_length=told.context_length or model.context_length,
            shape=told.shape,
            weights_file=told.weights_file,
        )
