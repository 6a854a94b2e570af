"""What a model will need, and whether a node can give it.

The rules mirror Ollama's own (``server/sched.go`` of v0.32.15), or the models that it
will push out would be predicted wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from hydra_llm.types import NO_OPTIONS
from hydra_llm.vram.loading import (
    LEAST_CONTEXT,
    MODELS_PER_GPU,
    context_by_memory,
    loading_rule,
)
from hydra_llm.vram.quick import RATIOS_WITHOUT_SETTINGS, Expected, expected

if TYPE_CHECKING:
    from hydra_llm.scheduling.moment import Moment
    from hydra_llm.types import (
        InferenceRequest,
        InstalledModel,
        LoadedModel,
        NodeSnapshot,
        RunnerOptions,
    )
    from hydra_llm.vram.need import MemoryNeed


@dataclass(frozen=True, slots=True)
class Fit:
    """How a model would find its place on a node."""

    verdict: Literal["loaded", "loading", "fits", "evicts", "offloads", "cannot", "unknown"]
    need_bytes: int = 0
    victims: tuple[str, ...] = ()
    """Models Ollama would unload for it, first to last."""
    cpu_share: float = 0.0
    """The part that would end in system memory."""
    gpu_bytes: int | None = None
    """What would lie on GPUs, where that can be told."""

    @property
    def reserved_bytes(self) -> int:
        """What a load takes from the GPUs' memory, all that it needs if that is not known."""
        return self.need_bytes if self.gpu_bytes is None else self.gpu_bytes


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


def context_of_a_load(node: NodeSnapshot, model: InstalledModel, num_ctx: int | None) -> int:
    """Tokens of context that a runner loaded now would have."""
    context = (
        num_ctx
        or node.default_context
        or context_by_memory(node.total_vram_bytes, node.vram_source, node.version)
    )
    return min(context, model.context_length) if model.context_length else context


def context_of(node: NodeSnapshot, model: str, num_ctx: int | None) -> int:
    """Tokens of context that a request for an installed model would have on ``node``."""
    runner = node.loaded.get(model)
    if num_ctx is None and runner is not None and runner.context_length is not None:
        return runner.context_length  # a loaded runner serves whoever names no context
    return context_of_a_load(node, node.installed[model], num_ctx)


def memory_need_bytes(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> int:
    """GPU memory that loading the request's model would take on ``node``, on one GPU."""
    return needs_of(request, node, moment).bytes


def needs_of(request: InferenceRequest, node: NodeSnapshot, moment: Moment, gpus: int = 1) -> Needs:
    """
    What loading the request's model would take on ``node``, split over so many GPUs.

    :func:`hydra_llm.vram.estimate` says it, corrected by what the model took when it was last
    seen loaded there.
    """
    model = node.installed[request.model]
    # The same for all nodes with this file, tier and settings: worked out once a choice.
    key = (
        model.shape or model.size_bytes,
        node.total_vram_bytes,
        node.vram_source,
        node.node.slots,
        node.node.kv_cache_type,
        node.version,
        node.default_context,
        node.need_ratios.get(request.model),
        node.cache_ratio,
        gpus,
    )
    needs = moment.needs.get(key)
    if needs is None:
        context = context_of_a_load(node, model, request.options.num_ctx)
        needs = _needs(request, node, context, gpus)
        total = node.total_vram_bytes
        if total and needs.bytes > total and _may_have_less_context(request, node):
            # Where Ollama's own choice leaves no room, somebody mostly has chosen another.
            needs = _needs(request, node, LEAST_CONTEXT, gpus)
        moment.needs[key] = needs
    return needs


def _may_have_less_context(request: InferenceRequest, node: NodeSnapshot) -> bool:
    """Whether the context is Ollama's own choice, which somebody may have made otherwise."""
    if request.options.num_ctx is not None or node.default_context is not None:
        return False
    return context_of_a_load(node, node.installed[request.model], None) > LEAST_CONTEXT


def _needs(request: InferenceRequest, node: NodeSnapshot, context: int, gpus: int) -> Needs:
    model = node.installed[request.model]
    found = expected(
        model.shape,
        model.size_bytes,
        context,
        slots=node.node.slots,
        kv_type=node.node.kv_cache_type,
        gpus=gpus if node.has_gpu else 0,
        ollama_version=node.version,
        num_batch=request.options.num_batch,
    )
    need = found.need
    ratio = _ratio(request.model, node, need)
    more = round(need.reported_bytes * (ratio - 1.0))
    forecast = need.forecast_bytes + (0 if node.node.slots else more)
    return Needs(need.total_bytes + more, forecast, found, ratio)


def _ratio(model: str, node: NodeSnapshot, need: MemoryNeed) -> float:
    """What it took when it was seen there; else by what the caches of others took."""
    seen = node.need_ratios.get(model)
    if seen is not None:
        return seen
    if node.cache_ratio is None or not need.reported_bytes:
        return 1.0
    more = (node.cache_ratio - 1.0) * need.kv_bytes() / need.reported_bytes
    least, most = RATIOS_WITHOUT_SETTINGS
    return min(max(1.0 + more, least), most)


class Needs(NamedTuple):
    """What one runner would take, corrected by what was seen."""

    bytes: int
    """With all layers on GPUs."""
    forecast_bytes: int
    """What Ollama itself expects, by which it evicts."""
    expected: Expected
    ratio: float

    def on_gpus(self, room_bytes: int) -> int:
        """What of it lies on GPUs that have so much room."""
        return min(self.bytes, round(self.expected.on_gpus(room_bytes / self.ratio) * self.ratio))


def fit_of(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> Fit:
    """The verdict for one request on one node, by Ollama's own rules."""
    model = request.model
    if node.running:
        for other in node.running:
            if other.loading and other.model == model and _same_runner(request, other.options):
                return Fit("loading", cpu_share=other.cpu_share) if other.cpu_share else LOADING
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
    model = request.model
    needs = needs_of(request, node, moment)
    free = node.room_bytes
    # Its own old runner goes first, or the one just being loaded with other options: a
    # reload gives back what that one held. What is leaving anyway counts as free already.
    old = [r.reserved_bytes for r in node.running if r.loading and r.model == model]
    if runner is not None and runner.name not in node.leaving:
        old.append(runner.size_vram_bytes)
    victims = [model] if old else []
    if free is None:
        return Fit("unknown", needs.bytes, tuple(victims))
    rooms = _rooms(node, free + sum(old))
    line = [one for one in node.eviction_order if one[0] != model]
    limit = node.node.max_loaded_models or MODELS_PER_GPU * len(rooms)
    # Without a GPU Ollama >= 0.30 asks for no memory, only counts models.
    has_gpu = node.has_gpu
    rule = loading_rule(node.version)
    while line and (
        len(line) >= limit or (has_gpu and needs.forecast_bytes > rule.share * sum(rooms))
    ):
        name, size = line.pop(0)
        victims.append(name)
        _give_back(rooms, size)
    if not has_gpu:
        return _shared_with_cpu(request, node, needs, 0, victims)
    margin = 0 if line else rule.margin_bytes
    if len(rooms) > 1 and needs.bytes > max(rooms) - margin:
        needs = needs_of(request, node, moment, len(rooms))
    room = sum([max(0, one - margin) for one in rooms])
    if needs.bytes <= room:
        return Fit(
            "evicts" if victims else "fits", needs.bytes, tuple(victims), gpu_bytes=needs.bytes
        )
    return _shared_with_cpu(request, node, needs, room, victims)


def _shared_with_cpu(
    request: InferenceRequest,
    node: NodeSnapshot,
    needs: Needs,
    room_bytes: int,
    victims: Sequence[str],
) -> Fit:
    """What the GPUs have no room for goes into system memory."""
    on_gpus = needs.on_gpus(room_bytes) if room_bytes else 0
    cpu_share = 1.0 - on_gpus / needs.bytes if needs.bytes else 0.0
    # The least that has to be there, as nothing else is.
    too_big = node.ram_bytes is not None and needs.bytes - on_gpus > node.ram_bytes
    # Nobody is turned away for what is only guessed.
    is_guessed = node.may_have_more_room or _may_have_less_context(request, node)
    cannot = too_big and not is_guessed
    return Fit(
        "cannot" if cannot else "offloads",
        needs.bytes,
        tuple(victims),
        cpu_share=cpu_share,
        gpu_bytes=on_gpus,
    )


def _rooms(node: NodeSnapshot, free_bytes: int) -> list[int]:
    """
    What is free on each GPU, together ``free_bytes``.

    A source tells it apart as it was when it looked; what has changed since is taken from
    where most was free, which Ollama prefers, or given back to where least is.
    """
    told = [device.free_bytes for device in node.devices if device.total_bytes != 0]
    if len(told) < 2 or None in told:
        return [free_bytes] + [0] * (len(told) - 1)
    rooms = [one for one in told if one is not None]
    changed = free_bytes - sum(rooms)
    if changed >= 0:
        _give_back(rooms, changed)
    while changed < 0:
        most = rooms.index(max(rooms))
        taken = min(rooms[most], -changed)
        if not taken:
            break
        rooms[most] -= taken
        changed += taken
    return rooms


def _give_back(rooms: list[int], size_bytes: int) -> None:
    rooms[rooms.index(min(rooms))] += size_bytes
