"""All that changes about one node, and the snapshot it is published as."""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hydra_llm.cluster.breaker import CircuitBreaker
from hydra_llm.cluster.learning import KINDS, NO_MODEL, Kind, NodeLearner
from hydra_llm.cluster.lease import Lease
from hydra_llm.cluster.rates import Rate, Sample, Seed
from hydra_llm.cluster.rates_file import NEED
from hydra_llm.cluster.room import LearnedRoom
from hydra_llm.cluster.vram import FreeVram
from hydra_llm.cluster.vram import Sample as VramSample
from hydra_llm.types import (
    Device,
    Health,
    HostMemory,
    InstalledModel,
    LoadedModel,
    Node,
    NodeSnapshot,
    Observation,
    RunningRequest,
    faded,
)
from hydra_llm.vram.loading import LEAST_CONTEXT, MODELS_PER_GPU, context_by_memory, loading_rule
from hydra_llm.vram.need import MemoryNeed
from hydra_llm.vram.quick import RATIOS_WITH_SETTINGS, RATIOS_WITHOUT_SETTINGS, expected

if TYPE_CHECKING:
    from hydra_llm.cluster.cluster import Cluster

LOAD_STUCK_RETRY_SECONDS = 60.0
"""After this long a stuck load path is tried again with one load."""

_KINDS: dict[str, Kind] = {kind: kind for kind in KINDS}
"""For a type checker: which texts are kinds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How the cluster judges nodes; seconds unless the name says otherwise."""

    breaker_failures: int = 3
    breaker_failures_of_latest: int = 6
    """Failures among a node's last 20 results that open its circuit, though never in a row."""
    breaker_open_seconds: float = 5.0
    breaker_max_open_seconds: float = 120.0
    slow_start_seconds: float = 30.0
    default_output_tokens: float = 256
    """Expected length of an answer before there was any."""
    retry_ratio: float = 0.2
    retry_floor: int = 100
    lease_ttl: float = 600.0
    max_queue: int = 1000
    queue_timeout: float = 600.0
    """The longest that a request waits for a free slot."""
    error_penalty_seconds: float = 2.0
    """Price of one error: a node that fails fast is not fast."""
    max_penalty_seconds: float = 20.0
    pause_seconds: float = 1.0
    """How long a node that said "busy" is left alone when it did not say how long."""


class NodeRecord:
    """The one owner of a node's state; the cluster holds the lock."""

    def __init__(self, node: Node, rules: Rules, rng: random.Random) -> None:
        self.node = node
        self._rules = rules
        self._rng = rng
        self.observed_at: float | None = None
        self.health: Health = "unknown"
        self.health_reason = ""
        self.failed_at = float("-inf")
        """When a request last found it down or misconfigured."""
        self.version: str | None = None
        self.installed: dict[str, InstalledModel] = {}
        self.loaded: dict[str, LoadedModel] = {}
        self.loaded_changed_at = float("-inf")
        self.devices: tuple[Device, ...] = ()
        self.host: HostMemory | None = None
        self.total_vram_bytes: int | None = None
        self.free_vram = FreeVram()
        self.vram_source: str | None = None
        self.vram_observed_at: float | None = None
        self.vram_reasons: tuple[str, ...] = ()
        self.leases: dict[int, Lease] = {}
        self.neighbours: weakref.WeakKeyDictionary[NodeRecord, weakref.ref[Cluster]] = (
            weakref.WeakKeyDictionary()
        )
        """The same node in the ledgers of this process's other routers, and whose it is there."""
        self.others_served_at = float("-inf")
        """When a request of this router that is not urgent was last begun or ended here."""
        self.is_shared = False
        """Whether the others hear of its requests through Redis."""
        self.foreign: Mapping[str, RunningRequest] = {}
        """What other routers have in flight here, by the lease's name among all."""
        self.cordoned_by: set[str] = set()
        """Who keeps new requests away: this router, the file, Redis."""
        self.breaker = self._new_breaker()
        self.load_breakers: dict[str, CircuitBreaker] = {}
        self.paused_until: float | None = None
        self.load_stuck_at: float | None = None
        self.loads_moved_at = float("-inf")
        """When a model was last seen to have come or gone."""
        self.penalty_seconds = 0.0
        self.penalty_at = 0.0
        self.learner = NodeLearner()
        self.need_ratios: dict[str, float] = {}
        self.default_context: int | None = None
        self.assumed_context: int | None = None
        """``num_ctx`` that another node of the cluster was seen to take by itself."""
        self._cache_ratios: dict[str, float] = {}
        """By model: what its key/value cache takes, as a part of what was expected of it."""
        self.room = LearnedRoom()
        self.kept: Mapping[str, Mapping[str, Rate]] = {}
        """What earlier routers have learned of the node, by digest; see :mod:`.rates_file`."""

    def _new_breaker(self) -> CircuitBreaker:
        return CircuitBreaker(
            failures=self._rules.breaker_failures,
            open_seconds=self._rules.breaker_open_seconds,
            max_open_seconds=self._rules.breaker_max_open_seconds,
            rng=self._rng,
            failures_of_latest=self._rules.breaker_failures_of_latest,
        )

    def load_breaker(self, model: str) -> CircuitBreaker:
        """The circuit of loading one model here; the first failure opens it."""
        breaker = self.load_breakers.get(model)
        if breaker is None:
            breaker = self.load_breakers[model] = CircuitBreaker(
                failures=1,
                open_seconds=2 * self._rules.breaker_open_seconds,
                max_open_seconds=4 * self._rules.breaker_max_open_seconds,
                rng=self._rng,
            )
        return breaker

    # ------------------------------------------------------------ observations

    def observe(self, seen: Observation) -> None:
        """Take in what a round of probes has seen; None leaves what was known."""
        if seen.observed_at < self.failed_at:
            # The probe was under way when a request found out better.
            return
        was_up = self.health == "up"
        self.observed_at = seen.observed_at
        self.health, self.health_reason = seen.health, seen.health_reason
        if seen.health != "up":
            self.room.is_silent()
            return
        if seen.version != self.version and seen.version is not None:
            # A restart, and perhaps with other settings.
            self.version, self.default_context = seen.version, None
        if seen.installed is not None:
            self._observe_installed(dict(seen.installed))
        # What a load has just changed is newer than a probe that was under way then.
        is_newer = seen.observed_at >= self.loaded_changed_at
        if seen.loaded is not None and is_newer:
            if was_up:
                # At first sight, and after a silence, they may have been there for hours.
                self.free_vram.shows(self.loaded, seen.loaded, seen.observed_at)
            if self.loaded.keys() != seen.loaded.keys():
                self.loads_moved_at = seen.observed_at
            self.loaded = {
                name: self._with_known_options(model) for name, model in seen.loaded.items()
            }
            self._compare_needs()
        if seen.loaded is not None:
            for running in self.running:
                self.room.used(running.model, seen.observed_at)
            self.room.shows(
                seen.loaded,
                seen.observed_at,
                forecast=self._forecast_of,
                rule=loading_rule(self.version),
                most_models=self.node.max_loaded_models or MODELS_PER_GPU,
                is_loading=any(running.loading for running in self.running),
            )
        if seen.devices is not None:
            self.devices = seen.devices
        self.host = seen.host or self.host
        self.total_vram_bytes = seen.total_vram_bytes
        self.vram_source = seen.vram_source
        self.vram_reasons = seen.vram_reasons
        if is_newer:
            self._observe_vram(seen)

    def _observe_vram(self, seen: Observation) -> None:
        at = seen.observed_at if seen.vram_observed_at is None else seen.vram_observed_at
        self.free_vram.observe(
            VramSample(seen.free_vram_bytes, at, seen.observed_at, seen.vram_source)
        )
        # The figure may still be that of an older sample, and is as old as that.
        is_dated = seen.vram_observed_at is not None
        self.vram_observed_at = self.free_vram.sampled_at if is_dated else None

    def _observe_installed(self, installed: dict[str, InstalledModel]) -> None:
        for name, model in installed.items():
            before = self.installed.get(name)
            if before is not None and before.digest != model.digest:
                self.learner.forget(name)
                self.load_breakers.pop(name, None)
                self.need_ratios.pop(name, None)
                self._cache_ratios.pop(name, None)
        fresh = [n for n, m in installed.items() if not _is_same(self.installed.get(n), m)]
        self.installed = installed
        self._take_up(fresh)

    def _forecast_of(self, model: LoadedModel) -> int:
        """What its Ollama expected a model to take when it loaded that."""
        if model.name not in self.installed:
            return model.size_bytes
        ratio = self.need_ratios.get(model.name, 1.0)
        return round(self._need_of(model).forecast_bytes * ratio)

    def _need_of(self, model: LoadedModel) -> MemoryNeed:
        """What was to be expected of a model that is loaded."""
        installed = self.installed[model.name]
        return expected(
            installed.shape,
            installed.size_bytes,
            model.context_length or LEAST_CONTEXT,
            slots=self.node.slots,
            kv_type=self.node.kv_cache_type,
            gpus=0 if self.total_vram_bytes == 0 else 1,
            ollama_version=self.version,
            num_batch=model.options.num_batch,
        ).need

    def _compare_needs(self) -> None:
        """Learn by how much the models that are loaded differ from what was expected of them."""
        ratios = dict(self.need_ratios)
        for name, model in self.loaded.items():
            installed = self.installed.get(name)
            if installed is None or installed.shape is None or not model.context_length:
                continue
            need = self._need_of(model)
            if not model.size_bytes or not need.reported_bytes:
                continue
            ratios[name] = self._within_bounds(model.size_bytes / need.reported_bytes)
            cache = need.kv_bytes()
            if cache and self.node.slots is None:
                more = (model.size_bytes - need.reported_bytes) / cache
                self._cache_ratios[name] = 1.0 + more
        if ratios != self.need_ratios:
            self.need_ratios = ratios

    @property
    def _cache_ratio(self) -> float | None:
        """What caches take here, in the mean of the models that were seen."""
        found = self._cache_ratios.values()
        return sum(found) / len(found) if found else None

    def _within_bounds(self, ratio: float) -> float:
        told = self.node.slots is not None and self.node.kv_cache_type is not None
        least, most = RATIOS_WITH_SETTINGS if told else RATIOS_WITHOUT_SETTINGS
        return min(max(ratio, least), most)

    def _with_known_options(self, model: LoadedModel) -> LoadedModel:
        before = self.loaded.get(model.name)
        if before is None:
            return model
        if before.context_length is None and before.options.num_ctx is None:
            # We had it loaded, and left the context to the node.
            self._learn_default_context(model)
        if before.context_length != model.context_length:
            return model
        return replace(model, options=before.options)

    def _learn_default_context(self, model: LoadedModel) -> None:
        """What the node takes by itself shows, unless the model was trained for no more."""
        installed = self.installed.get(model.name)
        most = installed.context_length if installed is not None else None
        if model.context_length and most and model.context_length < most:
            self.default_context = model.context_length

    @property
    def told_context(self) -> int | None:
        """The context that it takes by itself, where it is not Ollama's own choice."""
        found = self.default_context
        if self.total_vram_bytes is None:  # and so its own choice is not known
            return None
        own = context_by_memory(self.total_vram_bytes, self.vram_source, self.version)
        return None if found == own else found

    def assume_loaded(self, lease: Lease, now: float) -> None:
        """A load has just finished for ``lease``: what it changed, until a probe looks."""
        model = lease.request.model
        placement = lease.placement
        evicted = [self.loaded.pop(name) for name in placement.evicts if name in self.loaded]
        seen = self.loaded.get(model)
        if seen is not None:
            # A probe saw it between its load and its first byte, and has counted it already.
            self.loaded[model] = replace(seen, options=placement.options)
            self.free_vram.takes_at_least(model, placement.reserved_bytes)
            return
        given_up = sum(gone.size_vram_bytes for gone in evicted)
        free = self.free_vram.free_bytes
        in_vram = (
            placement.reserved_bytes
            if free is None
            else min(free + given_up, placement.reserved_bytes)
        )
        # What the victims held is this model's now; more than that is free once a sample says so.
        self.free_vram.arrived(model, in_vram - given_up, now)
        if evicted:
            self.free_vram.left(now)
        self.loaded[model] = LoadedModel(
            name=model,
            size_bytes=max(placement.size_bytes, in_vram),
            size_vram_bytes=in_vram,
            context_length=placement.context_length,
            options=placement.options,
        )
        self.loaded_changed_at = self.loads_moved_at = now

    def load_may_take(self, lease: Lease) -> float:
        """
        Seconds until a load is done that is under way, as far as one can tell.

        With its own go those begun after it, and of models that were there when a request for
        them was sent, and have been pushed out before it was served: Ollama loads these again.
        """
        own = lease.running
        gone = {running.model for running in self.running if not running.loading}
        gone -= self.loaded.keys() | {own.model}
        sizes = [one.size_bytes for name, one in self.installed.items() if name in gone]
        again = 0.0
        if sizes and own.model in self.installed:
            again = own.load_seconds * sum(sizes) / max(1, self.installed[own.model].size_bytes)
        return own.load_seconds + lease.later_loads_seconds + again

    def slots_of(self, model: str) -> int | None:
        """As configured, else as its runner has shown; None where nothing tells."""
        return self.node.slots or self.learner.slots_of(model)

    def fill_slots(self, model: str, now: float) -> None:
        """As its runner does: those that came first get the slots, once the model is there."""
        mine = [lease for lease in self.leases.values() if lease.request.model == model]
        waiting = [lease for lease in mine if lease.running.serving_since is None]
        if not waiting or any(lease.running.loading for lease in mine):
            return
        here = [running for running in self.running if running.model == model]
        served = sum(running.serving_since is not None for running in here)
        slots = self.slots_of(model) or 1
        for lease in waiting[: max(0, slots - served)]:
            lease.running = replace(lease.running, serving_since=now)

    # ------------------------------------------------------------ other routers

    def requests_for(self, model: str) -> int:
        """Requests for a model in flight here, whoever sent them."""
        return sum(1 for running in self.running if running.model == model)

    def _nearby(self) -> list[RunningRequest]:
        """What the neighbours have in flight here and Redis does not tell."""
        return [
            lease.running
            for other in self.neighbours
            if not (self.is_shared and other.is_shared)
            for lease in other.leases.values()
        ]

    def note_company(self) -> None:
        """Whoever is here with others shares the node's speed, even if they go before it does."""
        here = self.running
        if len(here) < 2:
            return
        models = {running.model for running in here}
        for lease in self.leases.values():
            if len(models) > 1:
                lease.company = "of others"
            elif lease.company == "none":
                lease.company = "of its model"

    def had_it_alone(self, lease: Lease) -> bool:
        """
        Whether nothing of ours shared the node's speed with it.

        Who asks for the same model waits behind it where the runner has one slot.
        """
        if lease.company == "of its model":
            return self.slots_of(lease.request.model) == 1
        return lease.company == "none"

    def samples(self) -> list[Sample]:
        """What other routers are to be told of its rates; each is given once."""
        return [
            Sample(
                self.node.id, self._rate_name(one.model, one.kind), one.value, one.kind == "slots"
            )
            for one in self.learner.take_unsent()
        ]

    def adopt(self, rates: Mapping[str, Rate]) -> list[Seed]:
        """Go on from what all routers have measured; what they know less of is given back."""
        seeds: list[Seed] = []
        for model, kind in self._rated():
            name = self._rate_name(model, kind)
            theirs = rates.get(name)
            known = self.learner.known(model, kind)
            if known is not None and (theirs is None or theirs.samples < known[1]):
                seeds.append(Seed(self.node.id, name, Rate(*known)))
            elif theirs is not None:
                self.learner.adopt(model, kind, theirs.value, theirs.samples)
        self.learner.adopted(self.installed)
        return seeds

    def _rated(self) -> Iterator[tuple[str, Kind]]:
        for kind, is_of_a_model in KINDS.items():
            if is_of_a_model:
                for model in self.installed:
                    yield model, kind
            else:
                yield NO_MODEL, kind

    def _rate_name(self, model: str, kind: Kind) -> str:
        """A changed file is another model."""
        installed = self.installed.get(model)
        digest = installed.digest if installed is not None else ""
        return f"{kind} {digest or '-'} {model or '-'}"

    # -------------------------------------------------------- from start to start

    def recall(self, kept: Mapping[str, Mapping[str, Rate]]) -> None:
        """Begin with what earlier routers have learned, by digest; NO_MODEL is the node."""
        self.kept = kept
        for kind, rate in kept.get(NO_MODEL, {}).items():
            if (known := _KINDS.get(kind)) is not None and not KINDS[known]:
                self.learner.recall(NO_MODEL, known, *rate)
        self._take_up(self.installed)

    def _take_up(self, models: Iterable[str]) -> None:
        """These models have come into sight: earlier routers may have met them."""
        if not self.kept:
            return
        for model in models:
            for kind, rate in self.kept.get(self._file_of(model), {}).items():
                if kind == NEED:
                    self.need_ratios = {model: self._within_bounds(rate.value), **self.need_ratios}
                elif (known := _KINDS.get(kind)) is not None and KINDS[known]:
                    self.learner.recall(model, known, *rate)
        self.learner.adopted(models)

    def learned(self) -> dict[str, dict[str, Rate]]:
        """What is worth keeping, by digest; NO_MODEL is the node."""
        found: dict[str, dict[str, Rate]] = {}
        for model in (NO_MODEL, *self.installed):
            rates: dict[str, Rate] = {}
            for measured, value, samples in self.learner.learned(model):
                rates[measured] = Rate(value, samples)
            of_file = found.setdefault(self._file_of(model) if model else NO_MODEL, {})
            if model in self.need_ratios:
                rates[NEED] = Rate(self.need_ratios[model], 1)
            for kind, rate in rates.items():
                # A file may have two names.
                if kind not in of_file or of_file[kind].samples < rate.samples:
                    of_file[kind] = rate
        return {key: rates for key, rates in found.items() if rates}

    def _file_of(self, model: str) -> str:
        return self.installed[model].digest or model

    # ---------------------------------------------------------------- judging

    def add_penalty(self, now: float) -> None:
        """Price in one more error."""
        left = faded(self.penalty_seconds, now - self.penalty_at)
        more = left + self._rules.error_penalty_seconds
        self.penalty_seconds = min(more, self._rules.max_penalty_seconds)
        self.penalty_at = now

    @property
    def running(self) -> tuple[RunningRequest, ...]:
        """The requests in flight here, whoever sent them."""
        own = [lease.running for lease in self.leases.values()]
        if self.neighbours:
            own += self._nearby()
        return (*own, *self.foreign.values())

    def snapshot(self) -> NodeSnapshot:
        """The state as it is now, never to change."""
        closed = self.breaker.is_closed
        return NodeSnapshot(
            node=self.node,
            observed_at=self.observed_at,
            health=self.health,
            health_reason=self.health_reason,
            version=self.version,
            installed=self.installed,
            loaded=dict(self.loaded),
            devices=self.devices,
            host=self.host,
            total_vram_bytes=self.total_vram_bytes,
            measured_free_vram_bytes=self.free_vram.free_bytes,
            vram_source=self.vram_source,
            vram_observed_at=self.vram_observed_at,
            vram_reasons=self.vram_reasons,
            running=self.running,
            cordoned=bool(self.cordoned_by),
            circuit="closed" if closed else "open",
            circuit_reason=self.breaker.reason,
            circuit_retry_at=None if closed else self.breaker.retry_at,
            paused_until=self.paused_until,
            load_retry_at={
                model: float("inf") if breaker.retry_at is None else breaker.retry_at
                for model, breaker in self.load_breakers.items()
                if not breaker.is_closed
            },
            load_path_stuck=self.load_stuck_at is not None,
            penalty_seconds=self.penalty_seconds,
            penalty_at=self.penalty_at,
            speeds=self.learner.speeds,
            load_bytes_per_second=self.learner.load_bytes_per_second,
            bytes_per_second=self.learner.bytes_per_second,
            need_ratios=self.need_ratios,
            default_context=self.default_context or self.assumed_context,
            cache_ratio=self._cache_ratio,
            learned_room_bytes=self.room.likely_bytes(self.learner.bytes_per_second)
            if self.total_vram_bytes is None
            else None,
            has_shown_room=self.room.is_bounded,
        )


def _is_same(before: InstalledModel | None, model: InstalledModel) -> bool:
    return before is not None and before.digest == model.digest
