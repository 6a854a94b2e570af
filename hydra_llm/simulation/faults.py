"""
What can go wrong on a node, as records to `SimulatedNode.inject`.

::

    node.inject(StatusFault(503, retry_after=2), times=1)
    node.inject(ResetFault(after=3), models=("qwen3:8b",))
    node.inject(TokenFault(after=5, action=SimulatedNode.kill))

A fault strikes requests to a model and leaves the control plane alone, unless its ``paths`` name
it. Several may strike one request: an answer in its place comes first, then the rest apply to
the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from hydra_llm.simulation.node import SimulatedNode

__all__ = [
    "CutFault",
    "EndlessFault",
    "ErrorBodyFault",
    "ErrorLineFault",
    "Fault",
    "HangFault",
    "HtmlFault",
    "HugeFault",
    "LoadFault",
    "LoopFault",
    "MissingModelFault",
    "OffloadFault",
    "PsFault",
    "ResetFault",
    "SlowFault",
    "SlowLorisFault",
    "StallFault",
    "StatusFault",
    "TokenFault",
]

_TEXTS = {
    400: "invalid request",
    401: "unauthorized",
    403: "forbidden",
    404: "model not found",
    429: "too many requests",
    500: "an error was encountered while running the model: unexpected EOF",
    503: "server busy, please try again.  maximum pending requests exceeded",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """
    Which requests a fault strikes.

    Args:
        paths: only these; ``("*",)`` is all, the control plane included.
        models: only requests for these, as the request spells them.
        times: only the first so many.
        probability: of each, from the node's seed.
    """

    paths: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    times: int | None = None
    probability: float = 1.0


@dataclass(frozen=True, slots=True)
class StatusFault(Fault):
    """An error status with Ollama's error body; also 401, 403, 429 and 503."""

    status: int = 500
    text: str | None = None
    retry_after: float | None = None

    @property
    def message(self) -> str:
        """The text in the body."""
        return self.text or _TEXTS.get(self.status, f"status {self.status}")


@dataclass(frozen=True, slots=True)
class ErrorBodyFault(Fault):
    """Status 200, and an error where the answer should be."""

    text: str = "an error was encountered while running the model: unexpected EOF"


@dataclass(frozen=True, slots=True)
class ErrorLineFault(Fault):
    """A stream that turns into an error after so many tokens; 0 makes it the first line."""

    after: int = 0
    text: str = "an error was encountered while running the model: unexpected EOF"


@dataclass(frozen=True, slots=True)
class ResetFault(Fault):
    """
    The connection is reset.

    Args:
        after: so many tokens; 0 is after the headers, ``None`` before any answer.
    """

    after: int | None = None


@dataclass(frozen=True, slots=True)
class CutFault(Fault):
    """The answer ends properly after so many tokens, but without ``done``."""

    after: int = 1


@dataclass(frozen=True, slots=True)
class LoopFault(Fault):
    """
    The model says one token again and again, and Ollama stops it without a word.

    A stream ends properly after some thirty of them but without ``done``; an answer that is not
    streamed is a 200 with ``"done": false``. Where the runner's own template is used, Ollama 0.30
    and later do not notice, and the answer is as long as ``num_predict`` lets it be.
    """

    text: str = " again"


@dataclass(frozen=True, slots=True)
class EndlessFault(Fault):
    """
    The answer has no end: the client has to leave.

    Args:
        after: so many tokens of the real answer come first.
        in_one_line: bytes without a line break, instead of token after token. An answer that is
            not streamed is one document, so it is always of this kind.
        pause_s: real seconds between two of them; a client that does not read stops them.
    """

    after: int = 1
    in_one_line: bool = False
    pause_s: float = 0.01


@dataclass(frozen=True, slots=True)
class SlowLorisFault(Fault):
    """
    The answer comes byte by byte.

    Args:
        after: so many tokens; 0 is after the headers, ``None`` has the headers drip as well.
        pause_s: real seconds between two bytes.
    """

    after: int | None = None
    pause_s: float = 1.0


@dataclass(frozen=True, slots=True)
class StallFault(Fault):
    """After so many tokens nothing more comes, and the connection stays open."""

    after: int = 1


@dataclass(frozen=True, slots=True)
class HangFault(Fault):
    """Not a byte comes; with ``loads_only`` just where the model is not loaded."""

    loads_only: bool = False


@dataclass(frozen=True, slots=True)
class LoadFault(Fault):
    """
    Requests that need a load fail for want of memory, in the time and with the text of Ollama.

    As a real one, a node from 0.30 on unloads everything else and tries once more before it gives
    up, and an older one knows at once. Requests for a loaded model are not struck.

    Args:
        text: another text than that of a load on a CPU.
    """

    text: str | None = None


@dataclass(frozen=True, slots=True)
class OffloadFault(Fault):
    """
    Loads land in system memory, as after the driver was lost, and nothing says so.

    ``/api/ps`` has ``size_vram`` below ``size``, and tokens come at the CPU's pace. What is
    loaded so stays so until it is loaded anew.

    Args:
        gpu_share: the part of the model's layers that still goes to the GPU, 0 to 1.
    """

    gpu_share: float = 0.0


@dataclass(frozen=True, slots=True)
class HtmlFault(Fault):
    """A web page, as a proxy or a router in the way sends it."""

    status: int = 200


@dataclass(frozen=True, slots=True)
class HugeFault(Fault):
    """A JSON document of this size."""

    size_bytes: int = 10_000_000


@dataclass(frozen=True, slots=True)
class MissingModelFault(Fault):
    """404 for the model, as if it had been deleted; the listings still show it."""


@dataclass(frozen=True, slots=True)
class SlowFault(Fault):
    """Everything computed takes ``factor`` times as long, for ``for_s`` simulated seconds."""

    factor: float = 10.0
    for_s: float | None = None


@dataclass(frozen=True, slots=True)
class PsFault(Fault):
    """
    ``/api/ps`` says something wrong, or says it late.

    Args:
        shows: ``stale`` is what was so when the fault was injected; ``given`` is ``entries``.
        block_s: real seconds until it answers at all.
    """

    shows: Literal["truth", "stale", "empty", "given"] = "truth"
    entries: Sequence[Mapping[str, Any]] = field(default=())
    block_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenFault(Fault):
    """Something that happens to the node at a token, such as ``SimulatedNode.kill``."""

    after: int = 1
    action: Callable[[SimulatedNode], object] = field(default=lambda node: node.kill())
