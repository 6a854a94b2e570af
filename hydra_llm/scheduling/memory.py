"""What a model will need, and whether a node can give it.

The rules mirror Ollama's own (``server/sched.go`` of v0.32.15), or the models that it
will push out would be predicted wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hydra_llm.types import GB, NO_OPTIONS

if TYPE_CHECKING:
    from hydra_llm.scheduling.moment import Moment
    from hydra_llm.types import (
        InferenceRequest,
        InstalledModel,
        LoadedModel,
        NodeSnapshot,
        RunnerOptions,
    )

MIB = 1 << 20
GIB = 1 << 30

GPU_OVERHEAD_BYTES = 457 * MIB
"""CUDA context and the like, per model and GPU: Ollama's own minimum up to 0.24."""

FIRST_MODEL_MARGIN_BYTES = GIB
"""What llama.cpp's ``--fit`` leaves free per device (Ollama >= 0.30)."""

FURTHER_MODEL_SHARE = 0.8
"""Ollama >= 0.30 loads a further model only into 80 % of what is free."""

MODELS_PER_GPU = 3
"""``OLLAMA_MAX_LOADED_MODELS`` by default, per GPU."""

UNKNOWN_KV_BYTES_PER_TOKEN = 131_072
"""Key/value cache per token of an 8B Llama at 16 bits, where ``/api/show`` has not told."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How a model would find its place on a node."""

    verdict: Literal["loaded", "loading", "fits", "evicts", "offloads", "cannot", "unknown"]
    need_bytes: int = 0
    victims: tuple[str, ...] = ()
    """Models Ollama would unload for it, first to last."""
    cpu_share: float = 0.0
    """The part that would end in system memory."""


LOADED = Fit("loaded")
LOADING = Fit("loading")


def runner_serves(
    request: InferenceRequest, loaded: LoadedModel, train_context: int | None
) -> bool:
    """
    Whether a loaded runner serves the request without a restart.

    Source: recorded scenario ``reload-triggers``. A ``num_ctx`` that the caller left out is
    sent as the runner's own, so only an explicit one can differ. Options that ``/api/ps``
    does not show are compared with what this router last sent.
    """
    asked = request.options
    if asked is NO_OPTIONS:
        return True
    if asked.num_ctx is not None and loaded.context_length is not None:
        wanted = asked.num_ctx if train_context is None else min(asked.num_ctx, train_context)
        if wanted != loaded.context_length:
            return False
    known = loaded.options
    for mine, theirs in (
        (asked.num_batch, known.num_batch),
        (asked.num_gpu, known.num_gpu),
        (asked.main_gpu, known.main_gpu),
        (asked.num_thread, known.num_thread),
        (asked.use_mmap, known.use_mmap),
    ):
        if mine is not None and theirs is not None and mine != theirs:
            return False
    return True


def default_context(total_vram_bytes: int | None) -> int:
    """``num_ctx`` that Ollama >= 0.15.5 takes by itself, by total VRAM (envconfig)."""
    if total_vram_bytes is None or total_vram_bytes < 23 * GIB:
        return 4096
    return 32_768 if total_vram_bytes < 47 * GIB else 262_144


def _total_as_ollama_sees_it(node: NodeSnapshot) -> int | None:
    """A card sold as 24 GB has 24 GiB: who configures 24 means that card."""
    total = node.total_vram_bytes
    if total is None or not (node.vram_source or "").startswith("config"):
        return total
    return total * GIB // GB


def context_of_a_load(node: NodeSnapshot, model: InstalledModel, num_ctx: int | None) -> int:
    """Tokens of context that a runner loaded now would have."""
    context = num_ctx or default_context(_total_as_ollama_sees_it(node))
    return min(context, model.context_length) if model.context_length else context


def context_of(node: NodeSnapshot, model: str, num_ctx: int | None) -> int:
    """Tokens of context that a request for an installed model would have on ``node``."""
    runner = node.loaded.get(model)
    if num_ctx is None and runner is not None and runner.context_length is not None:
        return runner.context_length  # a loaded runner serves whoever names no context
    return context_of_a_load(node, node.installed[model], num_ctx)


def memory_need_bytes(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> int:
    """
    GPU memory that loading the request's model would take on ``node``.

    From what was seen of the model on any node, scaled to the context by its key/value
    cache; else computed as file size + key/value cache. (BEHAVIOUR section 11.)
    """
    model = node.installed[request.model]
    # The same for all nodes with this file, tier and setting: worked out once a choice.
    key = (
        model.size_bytes,
        model.digest,
        node.total_vram_bytes,
        node.vram_source,
        node.node.slots,
    )
    need = moment.needs.get(key)
    if need is None:
        need = moment.needs[key] = _need_bytes(request, node, moment, model)
    return need


def _need_bytes(
    request: InferenceRequest, node: NodeSnapshot, moment: Moment, model: InstalledModel
) -> int:
    context = context_of_a_load(node, model, request.options.num_ctx)
    per_token = model.kv_bytes_per_token
    if per_token is None:
        per_token = UNKNOWN_KV_BYTES_PER_TOKEN
    slots = node.node.slots or 1
    demand = moment.demand.get(request.model)
    if demand is not None and demand.seen_bytes and demand.seen_context:
        seen = demand.seen_bytes + (context - demand.seen_context) * per_token * slots
        return max(seen, model.size_bytes)
    return model.size_bytes + context * per_token * slots + GPU_OVERHEAD_BYTES


def fit_of(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> Fit:
    """The verdict for one request on one node, by Ollama's own rules."""
    model = request.model
    if node.running:
        for other in node.running:
            if other.loading and other.model == model and _same_runner(request, other.options):
                return LOADING
    runner = node.loaded.get(model)
    if runner is not None and (not node.running or model not in node.leaving):
        installed = node.installed.get(model)
        if runner_serves(request, runner, installed.context_length if installed else None):
            return LOADED
    return _fit_of_a_load(request, node, moment, runner)


def _same_runner(request: InferenceRequest, options: RunnerOptions) -> bool:
    """Whether a pending load asked for no other runner than the request does."""
    return request.options in (options, NO_OPTIONS)


def _fit_of_a_load(
    request: InferenceRequest, node: NodeSnapshot, moment: Moment, runner: LoadedModel | None
) -> Fit:
    need = memory_need_bytes(request, node, moment)
    free = node.free_vram_bytes
    # Its own old runner goes first, or the one just being loaded with other options: a
    # reload gives back what that one held. What is leaving anyway counts as free already.
    old = [r.reserved_bytes for r in node.running if r.loading and r.model == request.model]
    if runner is not None and runner.name not in node.leaving:
        old.append(runner.size_vram_bytes)
    own = (request.model,) if old else ()
    if free is None:
        return Fit("unknown", need, own)
    free += sum(old)
    pending = [r for r in node.running if r.loading and r.model != request.model]
    others = [m for m in node.loaded.values() if m.name != request.model]
    others = [m for m in others if m.name not in node.leaving]
    busy = {r.model for r in node.running}
    others.sort(key=lambda m: (m.name in busy, m.expires_at or 0.0, m.name))
    limit = MODELS_PER_GPU * max(1, len(node.devices))
    victims = list(own)
    # A model that is still being loaded here stands in line as the last possible victim.
    coming = [(r.model, r.reserved_bytes) for r in pending]
    line = [(m.name, m.size_vram_bytes) for m in others] + coming
    # Without a GPU Ollama >= 0.30 asks for no memory, only counts models.
    has_gpu = node.total_vram_bytes != 0
    while line and (len(line) >= limit or (has_gpu and need > FURTHER_MODEL_SHARE * free)):
        name, size = line.pop(0)
        victims.append(name)
        free += size
    margin = 0 if line else FIRST_MODEL_MARGIN_BYTES
    if has_gpu and (line or need + margin <= free):
        return Fit("evicts" if victims else "fits", need, tuple(victims))
    cpu_share = min(1.0, max(0.0, (need + margin - free) / need)) if need else 0.0
    if node.ram_bytes is not None and need - free > node.ram_bytes:
        return Fit("cannot", need, tuple(victims), cpu_share)
    return Fit("offloads", need, tuple(victims), cpu_share)
