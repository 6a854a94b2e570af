"""How much models may take of a node's GPUs, learned from what Ollama did there.

Of a node without exporter and without ``vram_gb`` only ``/api/ps`` tells anything. But what lay
there together has room, a model that lies partly in system memory has filled the GPUs, and one
that was pushed out for another did not fit beside it (``server/sched.go`` of v0.32.15).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from hydra_llm.types import LoadedModel
from hydra_llm.vram.cards import usual_size
from hydra_llm.vram.loading import DEFAULT_KEEP_ALIVE_SECONDS, LoadingRule

__all__ = ["LearnedRoom"]

_LAYERS = 32
"""Of a usual model: less than one of them is left free where not all found room."""


class LearnedRoom:
    """Bounds of one node's room; the cluster holds the lock."""

    def __init__(self) -> None:
        self._least = 0
        self._most: int | None = None
        """It has less than this; None: nothing has shown it."""
        self._is_known = False
        self._shown: Mapping[str, LoadedModel] | None = None
        """What ``/api/ps`` showed last; None before, and after a silence."""
        self._gone: dict[str, LoadedModel] = {}
        """What was in use and has gone since the load began that is under way."""
        self._used_at: dict[str, float] = {}

    def likely_bytes(self, bytes_per_second: float | None) -> int | None:
        """
        What is most likely: between the bounds, what is usual.

        Args:
            bytes_per_second: at which models are read there: larger cards have faster memory.

        Returns:
            0 for a node without GPUs; None where nothing was seen being loaded.
        """
        if not self._is_known:
            return None
        usual = usual_size(self._least, bytes_per_second)
        if self._most is None or usual < self._most:
            return usual
        usual = usual_size(self._least)
        return usual if usual < self._most else (self._least + self._most) // 2

    @property
    def is_bounded(self) -> bool:
        """Whether it has shown how much it has at most."""
        return self._most is not None

    def used(self, model: str, now: float) -> None:
        """Somebody has used the model: it does not go for want of use."""
        self._used_at[model] = now

    def is_silent(self) -> None:
        """The node was not seen for a while: what is there next may have come at any time."""
        self._shown = None
        self._gone.clear()

    def shows(
        self,
        loaded: Mapping[str, LoadedModel],
        now: float,
        *,
        forecast: Callable[[LoadedModel], int],
        rule: LoadingRule,
        most_models: int,
        is_loading: bool,
    ) -> None:
        """
        What ``/api/ps`` shows now.

        A model that is pushed out has gone long before the other one is there: that one appears
        when it is ready (BEHAVIOUR section 7).

        Args:
            loaded: the models.
            now: the instant.
            forecast: bytes that Ollama expected a model to take.
            rule: how it decides.
            most_models: so many may be loaded, whatever they take.
            is_loading: whether a load is known to be under way there.
        """
        before, self._shown = self._shown, loaded
        if before is None:
            return
        come = [model for name, model in loaded.items() if name not in before]
        for name, model in before.items():
            if name not in loaded and not self._is_idle(model, now):
                self._gone[name] = model
        # One that is only loaded anew made room for nobody else.
        gone = [model for name, model in self._gone.items() if name not in loaded]
        if come or not is_loading:
            self._gone.clear()
        if not come:
            return
        self._is_known = True
        taken = sum(model.size_vram_bytes for model in loaded.values())
        margin = rule.margin_bytes if len(loaded) == 1 else 0
        if any(not model.is_on_gpu and model.options.num_gpu is None for model in come):
            if not taken:  # without GPUs
                self._least = self._most = 0
                return
            layer = max(model.size_bytes for model in come) // _LAYERS
            # How much of the margin is kept there is not known.
            self._is_between(taken, taken + margin + layer)
            return
        least = taken + margin
        if len(come) > 1:
            self._has(least)
            return
        new = come[0]
        stayed = taken - new.size_vram_bytes
        needed = stayed + int(forecast(new) / rule.share)
        if stayed:
            least = max(least, needed)
        if gone and len(loaded) - 1 + len(gone) < most_models:
            # Beside the last one that had to go there was no room.
            self._is_between(least, needed + max(model.size_vram_bytes for model in gone))
        else:
            self._has(least)

    def _is_idle(self, model: LoadedModel, now: float) -> bool:
        """Whether it may have gone because nobody used it."""
        keep = model.keep_alive_seconds
        keep = DEFAULT_KEEP_ALIVE_SECONDS if keep is None else keep
        return now - self._used_at.get(model.name, -math.inf) >= keep

    # What was seen last is true: other programs come and go.

    def _has(self, size_bytes: int) -> None:
        if self._most is not None and size_bytes >= self._most:
            self._most = None
        self._least = max(self._least, size_bytes)

    def _is_between(self, least_bytes: int, most_bytes: int) -> None:
        self._has(least_bytes)
        if self._least >= most_bytes:
            self._least = least_bytes
        self._most = most_bytes if self._most is None else min(self._most, most_bytes)
