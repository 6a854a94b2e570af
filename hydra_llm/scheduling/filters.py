"""Why a node cannot take a request: one function a reason.

A filter is ``(request, node, moment) -> Rejection | None``. The reasons are a closed list,
so that errors, ``router.explain()`` and dashboards can count them.
"""

from __future__ import annotations

import math
from typing import Protocol

from hydra_llm.scheduling.memory import memory_need_bytes
from hydra_llm.scheduling.moment import Moment
from hydra_llm.types import GB, NO_OPTIONS, InferenceRequest, NodeSnapshot, Rejection


class Filter(Protocol):
    """Any callable that answers *why not*."""

    def __call__(
        self, request: InferenceRequest, node: NodeSnapshot, moment: Moment, /
    ) -> Rejection | None:
        """The reason against this node, or None."""
        ...


ALREADY_TRIED = "already tried"
CAPABILITY_MISSING = "without the capability"
CIRCUIT_OPEN = "circuit open"
CORDONED = "cordoned"
DOWN = "down"
EXCLUDED = "excluded by the caller"
LABEL_MISSING = "without the label"
LOAD_CIRCUIT_OPEN = "failed to load it lately"
LOAD_PATH_STUCK = "load path stuck"
MISCONFIGURED = "misconfigured"
MISSES_DEADLINE = "too slow for the deadline"
MODEL_MISSING = "without the model"
NOT_SEEN = "not seen yet"
PAUSED = "busy, asked to wait"
PINNED_ELSEWHERE = "not the pinned node"
SHORT_OF_VRAM = "short of VRAM"
TOO_SMALL = "too small even with system memory"

REASONS = frozenset(
    {
        ALREADY_TRIED,
        CAPABILITY_MISSING,
        CIRCUIT_OPEN,
        CORDONED,
        DOWN,
        EXCLUDED,
        LABEL_MISSING,
        LOAD_CIRCUIT_OPEN,
        LOAD_PATH_STUCK,
        MISCONFIGURED,
        MISSES_DEADLINE,
        MODEL_MISSING,
        NOT_SEEN,
        PAUSED,
        PINNED_ELSEWHERE,
        SHORT_OF_VRAM,
        TOO_SMALL,
    }
)
"""The closed list."""


def is_excluded(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> Rejection | None:
    """Reject a node that failed this very request, or that the caller named."""
    if node.node.id in request.tried:
        return Rejection(node.node.id, ALREADY_TRIED)
    if request.among is not None and node.node.id not in request.among:
        return Rejection(node.node.id, EXCLUDED, "not among the nodes of this group")
    excluded = request.exclude_nodes
    if node.node.id in excluded or any(node.node.answers_to(name) for name in excluded):
        return Rejection(node.node.id, EXCLUDED)
    return None


def is_unusable(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> Rejection | None:
    """Reject a node that is down, cordoned, behind an open circuit, or that said "later"."""
    if node.is_available:
        return None
    if node.cordoned:
        return Rejection(node.id, CORDONED)
    if node.health == "down":
        return Rejection(node.id, DOWN, node.health_reason)
    if node.health == "misconfigured":
        return Rejection(node.id, MISCONFIGURED, node.health_reason)
    if node.health == "unknown":
        return Rejection(node.id, NOT_SEEN, "no probe has come back yet")
    if node.circuit != "closed" and (
        node.circuit_retry_at is None or moment.now < node.circuit_retry_at
    ):
        return Rejection(node.id, CIRCUIT_OPEN, node.circuit_reason)
    if node.paused_until is not None and moment.now < node.paused_until:
        return Rejection(node.id, PAUSED, f"for {node.paused_until - moment.now:.1f} s more")
    return None


def lacks_model(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> Rejection | None:
    """Reject a node that does not have the model on its disk."""
    if request.model in node.installed:
        return None
    return Rejection(node.id, MODEL_MISSING, f"ollama pull {request.model}")


def lacks_capability(
    request: InferenceRequest, node: NodeSnapshot, moment: Moment
) -> Rejection | None:
    """Reject a node whose build of the model cannot do what the request needs."""
    capabilities = node.installed[request.model].capabilities
    # Servers before 0.6.4 say nothing about capabilities: unknown is not "cannot".
    if capabilities is None or request.capabilities <= capabilities:
        return None
    missing = ", ".join(sorted(request.capabilities - capabilities))
    return Rejection(node.id, CAPABILITY_MISSING, missing)


def lacks_label(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> Rejection | None:
    """Reject a node without a label that the caller requires."""
    missing = request.require_labels.difference(node.node.labels)
    if not missing:
        return None
    return Rejection(node.id, LABEL_MISSING, ", ".join(sorted(missing)))


def is_pinned_elsewhere(
    request: InferenceRequest, node: NodeSnapshot, moment: Moment
) -> Rejection | None:
    """Reject every node but the one that ``node_id`` names."""
    if request.node_id is None or node.node.answers_to(request.node_id):
        return None
    return Rejection(node.node.id, PINNED_ELSEWHERE)


def vram_available_to(request: InferenceRequest, node: NodeSnapshot) -> int | None:
    """Free VRAM, counting what is loaded for this very model as available; None: unknown."""
    free = node.free_vram_bytes
    if free is None:
        return None
    own = node.loaded.get(request.model)
    # What a pending load is about to push out counts as free already.
    if own is None or request.model in node.leaving:
        return free
    return free + own.size_vram_bytes


def figure(size_bytes: int | None) -> str:
    """``20.0 GB``, or ``unknown``."""
    return "unknown" if size_bytes is None else f"{size_bytes / GB:.1f} GB"


def is_short_of_vram(
    request: InferenceRequest, node: NodeSnapshot, moment: Moment
) -> Rejection | None:
    """Reject a node that is not known to have ``min_vram_gb`` available."""
    if request.min_vram_bytes is None:
        return None
    available = vram_available_to(request, node)
    if available is not None and available >= request.min_vram_bytes:
        return None
    return Rejection(node.id, SHORT_OF_VRAM, f"{figure(available)} VRAM available")


def is_too_small_altogether(
    request: InferenceRequest, node: NodeSnapshot, moment: Moment
) -> Rejection | None:
    """
    Reject a node that could not give ``min_vram_gb`` even with its system memory.

    Stands in for :func:`is_short_of_vram` when no node has that much free. What nothing
    tells is taken generously, since the request would then run somewhere.
    """
    if request.min_vram_bytes is None:
        return None
    vram = node.total_vram_bytes
    ram = node.ram_bytes
    most = (vram or 0) + (moment.prices.assumed_ram_bytes if ram is None else ram)
    if most >= request.min_vram_bytes:
        return None
    ram_text = (
        f"unknown RAM (at most {figure(moment.prices.assumed_ram_bytes)} assumed)"
        if ram is None
        else f"{figure(ram)} RAM"
    )
    available = figure(vram_available_to(request, node))
    return Rejection(node.id, TOO_SMALL, f"{available} VRAM available, {ram_text}")


def cannot_load(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> Rejection | None:
    """Reject a node that would have to load the model and cannot, or lately could not."""
    model = request.model
    ram = node.ram_bytes
    if request.options is NO_OPTIONS and model in node.loaded and not node.running:
        return None
    # Ollama puts into system memory what the GPU cannot hold: mostly there is nothing to ask.
    may_be_too_big = ram is not None and memory_need_bytes(request, node, moment) > ram
    if not (node.load_retry_at or node.load_path_stuck or may_be_too_big):
        return None
    if moment.fit(request, node).verdict == "loaded":
        return None
    retry_at = node.load_retry_at.get(model)
    if retry_at is not None and moment.now < retry_at:
        left = retry_at - moment.now
        when = f"next try in {left:.0f} s" if math.isfinite(left) else "a try is under way"
        return Rejection(node.id, LOAD_CIRCUIT_OPEN, when)
    if node.load_path_stuck:
        return Rejection(node.id, LOAD_PATH_STUCK, "loads hang there; what is loaded still works")
    fit = moment.fit(request, node)
    if fit.verdict == "cannot":
        free = figure(node.free_vram_bytes)
        return Rejection(node.id, SHORT_OF_VRAM, f"needs {figure(fit.need_bytes)}, {free} free")
    return None


def filters_for(request: InferenceRequest) -> list[Filter]:
    """The filters that can say anything about this request, cheapest first."""
    filters: list[Filter] = []
    if request.tried or request.exclude_nodes or request.among is not None:
        filters.append(is_excluded)
    if request.node_id is not None:
        filters.append(is_pinned_elsewhere)
    if request.require_labels:
        filters.append(lacks_label)
    filters += (is_unusable, lacks_model)
    if request.capabilities:
        filters.append(lacks_capability)
    if request.min_vram_bytes is not None:
        filters.append(is_short_of_vram)
    filters.append(cannot_load)
    return filters
