"""A loaded model: slots, the prompt cache in each, and how fast it goes."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from hydra_llm.simulation.catalog import MIB, SimulatedModel
from hydra_llm.simulation.memory import Need, Placement
from hydra_llm.simulation.records import Job, Options, Prompt, Ticket
from hydra_llm.simulation.settings import NodeSettings

__all__ = ["Runner", "Slot", "Work", "common_tokens", "slots_for"]

# What one more stream in the same batch costs the others.
_BATCH_PENALTY = 0.3


@dataclass(slots=True, eq=False)
class Work:
    """What a slot is computing: so many seconds left if it had the device for itself."""

    ticket: Ticket
    left_s: float
    since: float
    slowdown: float = 1.0

    def ends_at(self) -> float:
        """When it is through, if nothing changes."""
        return self.since + self.left_s * self.slowdown

    def progress(self, now: float) -> None:
        """Account for the time until ``now``."""
        self.left_s = max(0.0, self.left_s - (now - self.since) / self.slowdown)
        self.since = now


@dataclass(slots=True, eq=False)
class Slot:
    """One of ``OLLAMA_NUM_PARALLEL`` places, and the prompt it computed last."""

    cached: Prompt = ()
    work: Work | None = None


@dataclass(slots=True, eq=False)
class Runner:
    """
    The process that holds one model.

    ::

        ready ⇄ busy ──(expired, evicted, asked to go)──▶ gone
          └─────┴───killed──▶ dead ──(next request, expiry)──▶ gone

    It leaves only when nothing refers to it any more: a busy runner is never ended for
    another model. ``keep_alive`` 0 marks it to go.
    """

    model: SimulatedModel
    node: NodeSettings
    options: Options
    num_ctx: int
    need: Need
    placement: Placement
    keep_alive: float
    slots: list[Slot]
    refs: int = 0
    is_dead: bool = False
    expires_at: float | None = None
    waiting: deque[Ticket] = field(default_factory=deque)
    _host_cache: OrderedDict[Prompt, None] = field(default_factory=OrderedDict)

    @property
    def key(self) -> str:
        """The weights file: one runner for each."""
        return self.model.weights_digest

    @property
    def active(self) -> list[Work]:
        """What its slots are computing."""
        return [slot.work for slot in self.slots if slot.work is not None]

    @property
    def devices(self) -> frozenset[int]:
        """The GPUs it lies on by number; -1 is the CPU."""
        on = {index for index, amount in enumerate(self.placement.gpu_bytes) if amount}
        return frozenset(on | ({-1} if self.placement.cpu_bytes else set()))

    @property
    def token_s(self) -> float:
        """Seconds to decode one token alone: every weight is read once."""
        share = self.placement.gpu_share
        return self.need.weights * (
            share / self.node.gpu_bandwidth + (1 - share) / self.node.cpu_bandwidth
        )

    @property
    def prompt_token_s(self) -> float:
        """Seconds to read one token of a prompt alone."""
        return self.token_s / self.node.prefill_ratio

    def slowdown(self, others: int) -> float:
        """Give the factor for each of its streams, with ``others`` of other runners beside."""
        return 1.0 + _BATCH_PENALTY * max(0, len(self.active) - 1) + others

    def free_slot_for(self, job: Job) -> Slot | None:
        """Give the idle slot whose cache helps most, or ``None`` when all are busy."""
        idle = [slot for slot in self.slots if slot.work is None]
        return max(idle, key=lambda slot: common_tokens(slot.cached, job.prompt), default=None)

    def cached_tokens(self, slot: Slot, job: Job) -> int:
        """Say how much of the prompt need not be computed; the last token always is."""
        best = common_tokens(slot.cached, job.prompt)
        for earlier in self._host_cache:
            best = max(best, common_tokens(earlier, job.prompt))
        return min(best, max(0, job.prompt_tokens - 1))

    def remember(self, slot: Slot, prompt: Prompt) -> None:
        """Keep what a slot holds now; 0.30 and later also keep what it held before."""
        if self.node.is_modern and slot.cached:
            self._host_cache[slot.cached] = None
            self._host_cache.move_to_end(slot.cached)
            limit = 8192 * MIB / max(1, self.model.kv_bytes_per_token)
            while sum(_tokens(prompt) for prompt in self._host_cache) > limit:
                self._host_cache.popitem(last=False)
        slot.cached = prompt

    def needs_reload(self, wanted: Options) -> bool:
        """Whether a request's options need another runner (table in BEHAVIOUR section 6)."""
        if self.is_dead:
            return True
        have, train = self.options, self.model.context_length
        automatic = self.node.automatic_num_ctx(train)
        if wanted.num_gpu is not None and wanted.num_gpu != have.num_gpu:
            return True
        differs = wanted.num_thread != have.num_thread
        if self.node.is_modern:
            asked = (
                self.num_ctx
                if wanted.num_ctx is None and have.num_ctx is None
                else (automatic if wanted.num_ctx is None else min(wanted.num_ctx, train))
            )
            return (
                differs
                # Nothing said is the same as false.
                or bool(wanted.use_mmap) != bool(have.use_mmap)
                or asked != self.num_ctx
                or wanted.num_batch != have.num_batch
                or wanted.main_gpu != have.main_gpu
                or wanted.no_shift != have.no_shift
            )
        return (
            differs
            or wanted.use_mmap != have.use_mmap
            # Compared before it is cut to the train context.
            or (wanted.num_ctx or automatic) != (have.num_ctx or automatic)
            or (wanted.num_batch or 512) != (have.num_batch or 512)
            or (wanted.main_gpu or 0) != (have.main_gpu or 0)
        )


def slots_for(model: SimulatedModel, node: NodeSettings) -> int:
    """``OLLAMA_NUM_PARALLEL``, but one for an embedding model."""
    return 1 if model.is_embedding else node.num_parallel


def common_tokens(one: Prompt, other: Prompt) -> int:
    """Count the tokens of the blocks two prompts begin with in common."""
    total = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        total += left[1]
    return total


def _tokens(prompt: Prompt) -> int:
    return sum(tokens for _, tokens in prompt)


def sort_key(runner: Runner) -> tuple[bool, float, str]:
    """Order of eviction: idle first, then the shortest keep-alive, then the file's path."""
    keep_alive = math.inf if runner.keep_alive < 0 else runner.keep_alive
    return runner.refs > 0, keep_alive, runner.key
