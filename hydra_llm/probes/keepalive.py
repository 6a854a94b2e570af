"""How long models stay when idle, from when ``/api/ps`` says that they will go.

Ollama counts anew after each answer, and shows only the time at which the count ends. What is
left of it is the keep-alive less what has passed since the last answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from hydra_llm.types import LoadedModel

__all__ = ["with_keep_alive"]

FOR_EVER_SECONDS = 10 * 365 * 86_400.0
"""A model that is never to go is shown to go in some hundred years (recorded scenario
``keep-alive``)."""

USUAL_STEPS = ((60.0, 5.0), (300.0, 30.0), (3600.0, 60.0), (math.inf, 3600.0))
"""Durations that people set are whole multiples: up to a minute of five seconds, and so on."""

COMMON = (60.0, 300.0, 600.0, 900.0, 1800.0, 3600.0, 7200.0, 14_400.0, 43_200.0, 86_400.0)
"""What is taken for a model whose last answer nobody saw; Ollama's own is five minutes."""

CLOCKS_SECONDS = 1.0
"""How far the clock of a node may be off, and how long an answer takes."""


def with_keep_alive(
    loaded: Mapping[str, LoadedModel],
    before: Mapping[str, LoadedModel] | None,
    *,
    now: float,
    since: float | None,
) -> dict[str, LoadedModel]:
    """
    The models, each with the keep-alive that its time of expiry shows.

    Args:
        loaded: what ``/api/ps`` lists.
        before: what it listed the last time.
        now: Unix time at which it did.
        since: seconds since the last time; None for the first.
    """
    return {
        name: replace(
            model, keep_alive_seconds=_keep_alive(model, (before or {}).get(name), now, since)
        )
        for name, model in loaded.items()
    }


def _keep_alive(
    model: LoadedModel, before: LoadedModel | None, now: float, since: float | None
) -> float | None:
    if model.expires_at is None:
        return None
    left = model.expires_at - now
    if left > FOR_EVER_SECONDS:
        return math.inf
    known = None if before is None else before.keep_alive_seconds
    if before is not None and before.expires_at == model.expires_at:
        return known
    if since is None:
        return _next_common(left)
    # It was used since the last look: what is left is short of the whole by that much at most.
    if known is not None and left <= known <= left + since + CLOCKS_SECONDS:
        return known
    usual = _next_usual(left - CLOCKS_SECONDS)
    return usual if usual <= left + since else left


def _next_usual(seconds: float) -> float:
    step = next(step for below, step in USUAL_STEPS if seconds < below)
    return max(step, math.ceil(seconds / step) * step)


def _next_common(seconds: float) -> float:
    return next((one for one in COMMON if one >= seconds - CLOCKS_SECONDS), seconds)
