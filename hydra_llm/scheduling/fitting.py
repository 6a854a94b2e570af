"""Where a model could run, and with how much context, before anybody asks it anything."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from hydra_llm.scheduling.costs import seconds_per_token
from hydra_llm.scheduling.memory import context_of, fit_of, needs_of
from hydra_llm.scheduling.moment import DEFAULT_PRICES, Moment, Prices
from hydra_llm.types import GB, InferenceRequest, InstalledModel, NodeSnapshot, RunnerOptions

__all__ = ["fits_of"]

CONTEXT_STEP = 256
"""Caches hold a multiple of so many tokens."""

LONGEST_CONTEXT = 1 << 20
"""Looked at for a model that does not tell what it was trained with."""

ON_GPU = ("loaded", "loading", "fits", "evicts")


def fits_of(
    model: str,
    nodes: Iterable[NodeSnapshot],
    *,
    num_ctx: int | None = None,
    prices: Prices = DEFAULT_PRICES,
    now: float = 0.0,
) -> list[dict[str, Any]]:
    """
    How one model would find its place on each node, as plain data.

    A node that does not have the model is judged too, by what another one tells of it.

    Args:
        model: its canonical name.
        nodes: to look at.
        num_ctx: tokens of context; what each node would take by itself if None.
        prices: the priors of speed.
        now: the instant.

    Returns:
        A dictionary a node, memory in decimal GB: see :meth:`hydra_llm.Router.fit`.
    """
    nodes = list(nodes)
    told = [node.installed[model] for node in nodes if model in node.installed]
    known = next((one for one in told if one.shape is not None), told[0] if told else None)
    return [_fit(model, node, known, num_ctx, Moment(now=now, prices=prices)) for node in nodes]


def _fit(
    model: str,
    node: NodeSnapshot,
    known: InstalledModel | None,
    num_ctx: int | None,
    moment: Moment,
) -> dict[str, Any]:
    is_installed = model in node.installed
    told: dict[str, Any] = {
        "node": node.id,
        "health": node.health,
        "installed": is_installed,
        "loaded": model in node.loaded,
        "free_gb": _gb(node.free_vram_bytes),
    }
    if node.health != "up" or known is None:
        return told
    if not is_installed:
        node = replace(node, installed={**node.installed, model: known})
    context = context_of(node, model, num_ctx)
    request = _asked(model, context)
    fit = moment.fit(request, node)
    needs = needs_of(request, node, moment)
    need = needs.expected.need
    corrected = needs.bytes - need.total_bytes  # by what was seen of it there
    pace = seconds_per_token(request, node, moment)
    return told | {
        "verdict": fit.verdict,
        "num_ctx": context,
        "need_gb": _gb(fit.need_bytes or needs.bytes),
        "need_low_gb": _gb(need.low_bytes + corrected),
        "need_high_gb": _gb(need.high_bytes + corrected),
        "evicts": [name for name in fit.victims if name != model],
        "cpu_share": round(fit.cpu_share, 4),
        "tokens_per_second": round(1 / pace, 2) if pace else None,
        "largest_num_ctx": _largest(model, node, known.context_length or LONGEST_CONTEXT),
    }


def _asked(model: str, num_ctx: int) -> InferenceRequest:
    return InferenceRequest(model=model, options=RunnerOptions(num_ctx=num_ctx))


def _largest(model: str, node: NodeSnapshot, most: int) -> int | None:
    """The longest context that is on the GPUs as a whole, others pushed out if need be."""
    if node.free_vram_bytes is None or node.total_vram_bytes == 0:
        return None

    def fits(num_ctx: int) -> bool:
        return fit_of(_asked(model, num_ctx), node, Moment()).verdict in ON_GPU

    if fits(most):
        return most
    low, high = 0, most // CONTEXT_STEP
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle * CONTEXT_STEP):
            low = middle
        else:
            high = middle
    return low * CONTEXT_STEP or None


def _gb(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else round(size_bytes / GB, 3)
