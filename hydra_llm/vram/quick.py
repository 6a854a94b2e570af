"""Estimates for whoever asks the same again and again, as a scheduler does for each request."""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from hydra_llm.vram.estimator import estimate
from hydra_llm.vram.need import MemoryNeed
from hydra_llm.vram.shape import ModelShape

__all__ = ["RATIOS_WITHOUT_SETTINGS", "RATIOS_WITH_SETTINGS", "Expected", "expected"]

RATIOS_WITH_SETTINGS = (0.8, 1.3)
"""How far what was seen of a model may correct what was expected."""
RATIOS_WITHOUT_SETTINGS = (0.5, 4.0)
"""The same on a node of which ``slots`` or ``kv_cache_type`` is not told: with four slots a long
context takes nearly four times the memory."""


class Expected(NamedTuple):
    """An estimate, and what of it is on GPUs that have no room for all."""

    need: MemoryNeed
    by_layers: tuple[int, ...]
    """Bytes on GPUs with so many layers there; empty if the layers are not known."""

    def on_gpus(self, room_bytes: float) -> int:
        """What lies on GPUs that have so much room: as many whole layers as go in."""
        if not self.by_layers:
            return max(0, min(self.need.total_bytes, int(room_bytes)))
        return self.by_layers[max(0, bisect_right(self.by_layers, room_bytes) - 1)]


def expected(
    shape: ModelShape | None,
    size_bytes: int,
    num_ctx: int,
    *,
    slots: int | None = None,
    kv_type: str | None = None,
    gpus: int = 1,
    ollama_version: str | None = None,
    num_batch: int | None = None,
) -> Expected:
    """
    As :func:`~hydra_llm.vram.estimate`, remembered.

    Args:
        shape: of the model; None where only its size is known.
        size_bytes: as in ``/api/tags``.
        num_ctx: tokens of context a slot.
        slots: ``OLLAMA_NUM_PARALLEL`` of the node; 1 if not known.
        kv_type: ``OLLAMA_KV_CACHE_TYPE`` of the node; ``f16`` if not known.
        gpus: that it is split over; 0 for a node without any.
        ollama_version: of the node.
        num_batch: what the caller asks for.
    """
    if shape is None:
        shape = _shape_of_size(size_bytes)
    return _expected(
        shape,
        num_ctx,
        slots=shape.slots(slots or 1),
        kv_type=kv_type or "f16",
        gpus=gpus,
        ollama_version=ollama_version,
        num_batch=num_batch,
    )


@lru_cache(maxsize=256)
def _shape_of_size(size_bytes: int) -> ModelShape:
    return ModelShape.from_show(None, size_bytes)


@lru_cache(maxsize=4096)
def _expected(
    shape: ModelShape,
    num_ctx: int,
    *,
    slots: int,
    kv_type: str,
    gpus: int,
    ollama_version: str | None,
    num_batch: int | None,
) -> Expected:
    need = estimate(shape, None, num_ctx, slots, kv_type, gpus, ollama_version, num_batch=num_batch)
    each = need.bytes_per_layer if gpus else ()
    if not each:
        return Expected(need, ())
    # The last layers are the first to be on a GPU, and with them what is not of a layer.
    sizes = accumulate(reversed(each), initial=need.total_bytes - sum(each))
    return Expected(need, (0, *list(sizes)[1:]))
