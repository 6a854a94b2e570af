"""What goes into the model of a server and what comes out of it, as records."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

from hydra_llm.simulation.catalog import SimulatedModel

__all__ = [
    "Event",
    "Eviction",
    "Failure",
    "Job",
    "LoadRecord",
    "LoadTrouble",
    "LoadedRunner",
    "Options",
    "Prompt",
    "Ticket",
]

Prompt = tuple[tuple[Hashable, int], ...]
"""A prompt as blocks: what tells a block apart, and how many tokens it has.

Two prompts share in the cache the tokens of the blocks they begin with in common.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of a request that decide whether a loaded runner can serve it."""

    num_ctx: int | None = None
    num_batch: int | None = None
    num_thread: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    use_mmap: bool | None = None
    no_shift: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTrouble:
    """What goes wrong with the load that a request needs, if it needs one."""

    fails: bool = False
    """For want of memory, whatever there is."""
    text: str | None = None
    """Of the failure; ``None`` is Ollama's."""
    gpu_share: float = 1.0
    """The part of the layers that the GPUs may hold at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """
    One request as the scheduler and the runner see it: no text, only amounts.

    Args:
        model: what is to answer.
        kind: ``load`` wants the model loaded and nothing more.
        prompt: what has to be in the cache before the first token.
        answer_tokens: how many tokens the answer has, the end-of-turn token included.
        answer: the same as blocks, so that a later prompt can find them in the cache.
        keep_alive: seconds; negative is for ever; ``None`` keeps what the runner has.
        each_token: whether every token is an event, or only the end.
        trouble: what goes wrong with its load.
    """

    model: SimulatedModel
    kind: Literal["generate", "embed", "load"] = "generate"
    prompt: Prompt = ()
    answer_tokens: int = 0
    answer: Prompt = ()
    options: Options = field(default_factory=Options)
    keep_alive: float | None = None
    each_token: bool = False
    trouble: LoadTrouble = field(default_factory=LoadTrouble)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the whole prompt."""
        return sum(tokens for _, tokens in self.prompt)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request got no answer: the status and the text Ollama gives."""

    status: int
    text: str
    cause: Literal["busy", "memory", "load killed", "runner killed"]


@dataclass(slots=True, eq=False)
class Ticket:
    """
    One submitted request; only the server model writes to it.

    ::

        queued ──▶ loading ──▶ waiting ──▶ prefill ──▶ decode ──▶ done
           └──────────┴───────────┴───────────┴──────────┴─────▶ failed, cancelled

    The last three are final. A request that needs no load goes straight to ``waiting``,
    one that only loads goes from there to ``done``.
    """

    id: int
    job: Job
    submitted_at: float
    state: Literal[
        "queued", "loading", "waiting", "prefill", "decode", "done", "failed", "cancelled"
    ] = "queued"
    handed_at: float | None = None
    """When the scheduler gave it to a runner: all before counts as ``load_duration``."""
    started_at: float | None = None
    decoding_at: float | None = None
    ended_at: float | None = None
    cached_tokens: int = 0
    tokens_out: int = 0
    failure: Failure | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in {"done", "failed", "cancelled"}

    @property
    def load_s(self) -> float:
        """Scheduler time: queue, eviction and load."""
        return (self.handed_at or self.submitted_at) - self.submitted_at

    @property
    def prompt_eval_s(self) -> float:
        """Time for the part of the prompt that was not cached."""
        return (self.decoding_at or 0.0) - (self.started_at or 0.0)

    @property
    def eval_s(self) -> float:
        """Time for the generated tokens."""
        return (self.ended_at or 0.0) - (self.decoding_at or 0.0)

    @property
    def total_s(self) -> float:
        """From arrival to the last token, all waiting included."""
        return (self.ended_at or self.submitted_at) - self.submitted_at


@dataclass(frozen=True, slots=True)
class Event:
    """
    Something that happened in the server at ``at``.

    ``index`` counts tokens from 0; a ``token`` event may be of several, of which it is the first.
    """

    at: float
    kind: Literal["token", "done", "failed", "load started", "load ended", "unloaded"]
    model: str
    ticket: Ticket | None = None
    index: int = 0
    tokens: int = 1


@dataclass(frozen=True, slots=True)
class LoadRecord:
    """One load, whether it worked or not."""

    model: str
    started: float
    ended: float


@dataclass(frozen=True, slots=True)
class Eviction:
    """A runner that was unloaded, and for what."""

    model: str
    at: float
    reason: Literal["expired", "room", "reload", "asked", "memory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRunner:
    """A runner as ``/api/ps`` shows it."""

    model: SimulatedModel
    size: int
    size_vram: int
    context_length: int
    expires_at: float | None
    """On the model's clock; ``None`` is never."""
    keep_alive: float
    in_flight: int
