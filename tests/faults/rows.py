"""
What has to be so when something fails: one record a fault.

The matrix plays each of them (``tests/faults/matrix.py``), and ``docs/reliability.md`` shows them
(``tests/faults/table.py``): what the page says is what is asserted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra_llm.exceptions import (
    AllNodesFailedError,
    NoEligibleNodeError,
    NoNodeUpError,
    StreamBrokenError,
)
from hydra_llm.testing import (
    CutFault,
    ErrorBodyFault,
    ErrorLineFault,
    Fault,
    HangFault,
    HtmlFault,
    HugeFault,
    PsFault,
    ResetFault,
    SlowFault,
    StallFault,
    StatusFault,
    TokenFault,
)
from hydra_llm.types import NodeSnapshot
from tests.faults.callers import Seen
from tests.faults.stage import MODEL, PREFERRED, Stage

BEFORE = 3
"""Tokens before a stream breaks."""


# ------------------------------------------------------------------------------ blame


@dataclass(frozen=True, kw_only=True)
class Blame:
    """
    What a node looks like afterwards; what is not named is as in a node that nothing is wrong with.

    Attributes:
        told: the same in the words of the page.
    """

    told: str
    health: str = "up"
    circuit: str = "closed"
    is_struck: bool = False
    is_paused: bool = False
    has_model: bool = True
    may_load: bool = True

    def check(self, node: NodeSnapshot, now: float) -> None:
        found = {
            "health": node.health,
            "circuit": node.circuit,
            "is_struck": node.penalty_seconds > 0.0,
            "is_paused": node.paused_until is not None and now < node.paused_until,
            "has_model": MODEL in node.installed or node.health != "up",
            "may_load": MODEL not in node.load_retry_at,
        }
        assert found == {name: getattr(self, name) for name in found}
        assert not node.load_path_stuck


NOBODY = Blame(told="nobody")
STRIKE = Blame(told="the node: a strike", is_struck=True)
CIRCUIT = Blame(told="the node: its circuit opens at the third", is_struck=True, circuit="open")
DOWN = Blame(told="the node: `down` until a probe reaches it", health="down")
STRUCK_AND_DOWN = Blame(
    told="the node: a strike, and `down` as a probe finds", health="down", is_struck=True
)
ASKS_FOR_KEY = Blame(
    told="the configuration: `misconfigured` until a probe is let in", health="misconfigured"
)
PAUSED = Blame(told="the node: a pause and its price", is_paused=True, is_struck=True)
WITHOUT = Blame(told="nobody: the node is without the model", has_model=False)
LOADS_NOT = Blame(told="the node's loads of this model: their circuit opens", may_load=False)


# ---------------------------------------------------------------------------- endings


@dataclass(frozen=True)
class Ending:
    """
    What a caller sees.

    Attributes:
        kind: the exception; None is an answer.
        litellm: its name in LiteLLM.
        says: a part of the message; ``{why}`` is the row's.
    """

    kind: type[Exception] | None
    litellm: str = ""
    says: str = ""

    @property
    def told(self) -> str:
        if self.kind is None:
            return "the answer"
        return f"`{self.kind.__name__}` ({self.litellm})"


ANSWER = Ending(None)
FAILED = Ending(AllNodesFailedError, "ServiceUnavailableError", "1 node tried for")
TIMED_OUT = Ending(AllNodesFailedError, "Timeout", "1 node tried for")
NOT_FOUND = Ending(AllNodesFailedError, "NotFoundError", "ollama pull")
HAS_IT_NOT = Ending(NoEligibleNodeError, "NotFoundError", "1 without the model")
NOBODY_UP = Ending(NoNodeUpError, "ServiceUnavailableError", "0/1 nodes can take")
NOT_NOW = Ending(NoEligibleNodeError, "ServiceUnavailableError", "0/1 nodes can take")
BROKEN = Ending(StreamBrokenError, "APIConnectionError", "the answer of a ")


# ------------------------------------------------------------------------------- rows


@dataclass(frozen=True, kw_only=True)
class Row:
    """
    One fault, which strikes the node that requests prefer.

    Attributes:
        name: of the fault.
        happens: what it is, for the page.
        strike: has it happen, once the router has seen the nodes well.
        cause: of the attempt that fails; None if none does.
        blame: who is blamed.
        cause_in_one_piece, blame_in_one_piece, blame_alone: the same where it is another for an
            answer that the node sends in one piece, and for a lone node.
        is_mid_stream: whether a stream has begun when it strikes.
        asks: how many requests are made, one after the other.
        failing: how many of them fail on the node while others are there; of the rest it has
            none, unless it answers them.
        alone: what the caller of a lone node sees, request by request; the last one goes on.
        why: what the error says of the node.
        limit: the setting whose time is waited for, once an attempt.
        holds: what else is so; gets the stage and what was seen.
        claim: the same in the words of the page.
    """

    name: str
    happens: str
    strike: Callable[[Stage], object]
    cause: str | None = None
    cause_in_one_piece: str | None = None
    blame: Blame = NOBODY
    blame_alone: Blame | None = None
    blame_in_one_piece: Blame | None = None
    is_mid_stream: bool = False
    asks: int = 1
    failing: int = 1
    failing_alone: int | None = None
    alone: tuple[Ending, ...] = (ANSWER,)
    why: str = ""
    limit: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    stage: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, Any] = field(default_factory=lambda: PREFERRED)
    holds: Callable[[Stage, list[Seen]], object] | None = None
    claim: str = ""


def inject(fault: Fault, **limits: Any) -> Callable[[Stage], object]:
    return lambda stage: stage.first.inject(fault, **limits)


EVERYTHING = {"paths": ("*",)}
SHORT = 0.06
"""Seconds that the failing node is given where a limit has to be waited for."""


def before_the_first_byte() -> list[Row]:
    return [
        Row(
            name="refused",
            happens="the port is closed: Ollama or the machine is off",
            strike=lambda stage: stage.first.kill(),
            cause="connect",
            blame=DOWN,
            asks=3,
            alone=(FAILED, NOBODY_UP),
            why="connection refused",
        ),
        Row(
            name="401",
            happens="the node wants other credentials",
            strike=inject(StatusFault(401), **EVERYTHING),
            cause="auth",
            blame=ASKS_FOR_KEY,
            asks=3,
            alone=(FAILED, NOT_NOW),
            why="refuses access (401)",
        ),
        Row(
            name="403",
            happens="the node, or a proxy before it, lets nobody in",
            strike=inject(StatusFault(403), **EVERYTHING),
            cause="auth",
            blame=ASKS_FOR_KEY,
            asks=3,
            alone=(FAILED, NOT_NOW),
            why="refuses access (403)",
        ),
        Row(
            name="404 model",
            happens="somebody has deleted the model",
            strike=lambda stage: stage.first.remove_model(MODEL),
            cause="model_not_found",
            blame=WITHOUT,
            asks=3,
            alone=(NOT_FOUND, HAS_IT_NOT),
            why="does not have",
        ),
        Row(
            name="429",
            happens="too many requests, with `Retry-After`",
            strike=inject(StatusFault(429, retry_after=7.0)),
            cause="busy",
            blame=PAUSED,
            asks=3,
            alone=(FAILED, NOT_NOW),
            why="is busy (429)",
        ),
        Row(
            name="503 busy",
            happens="its queue is full, which it says at once and without `Retry-After`",
            strike=inject(StatusFault(503)),
            cause="busy",
            blame=PAUSED,
            asks=3,
            alone=(FAILED, NOT_NOW),
            why="is busy (503)",
        ),
        Row(
            name="500 once",
            happens="one request fails",
            strike=inject(StatusFault(500), times=1),
            cause="error_response",
            blame=STRIKE,
            asks=2,
            alone=(FAILED, ANSWER),
            why="answered with status 500",
        ),
        Row(
            name="500 always",
            happens="every request fails",
            strike=inject(StatusFault(500)),
            cause="error_response",
            blame=CIRCUIT,
            blame_alone=STRIKE,
            asks=5,
            failing=3,
            failing_alone=5,
            alone=(FAILED,),
            why="answered with status 500",
        ),
        Row(
            name="error body",
            happens="status 200, and an error where the answer should be",
            strike=inject(ErrorBodyFault()),
            cause="error_response",
            blame=STRIKE,
            alone=(FAILED,),
            why="answered with an error inside its answer",
        ),
        Row(
            name="error line first",
            happens="a stream whose first line is an error",
            strike=inject(ErrorLineFault(after=0)),
            cause="error_response",
            blame=STRIKE,
            alone=(FAILED,),
            why="answered with",
        ),
        Row(
            name="reset before the answer",
            happens="the connection breaks without a word",
            strike=inject(ResetFault()),
            cause="reset",
            blame=STRIKE,
            alone=(FAILED,),
            why="broke the connection",
        ),
        Row(
            name="reset after the headers",
            happens="the connection breaks when the answer should begin",
            strike=inject(ResetFault(after=0)),
            cause="reset",
            blame=STRIKE,
            alone=(FAILED,),
            why="broke the connection",
        ),
        Row(
            name="hung before the first byte",
            happens="it accepts the request and stays silent",
            strike=inject(HangFault()),
            cause="timeout",
            blame=STRIKE,
            alone=(TIMED_OUT,),
            why="stayed silent for too long",
            limit="first_byte_timeout",
        ),
        Row(
            name="hung load",
            happens="it answers, but never ends to load a model",
            strike=inject(HangFault(loads_only=True)),
            cause="timeout",
            blame=STRIKE,
            alone=(TIMED_OUT,),
            why="stayed silent for too long",
            limit="first_byte_timeout",
            stage={"warm": False},
        ),
        Row(
            name="load out of memory",
            happens="the runner dies for want of memory while it loads",
            strike=inject(
                StatusFault(500, text="llama-server process has terminated: cudaMalloc failed")
            ),
            cause="load_failed",
            blame=LOADS_NOT,
            asks=3,
            alone=(FAILED, NOT_NOW),
            why="could not load",
            stage={"warm": False},
        ),
        Row(
            name="HTML",
            happens="a web page, as of a router or proxy in the way",
            strike=inject(HtmlFault()),
            cause="protocol",
            blame=STRIKE,
            alone=(FAILED,),
            why="not with JSON",
        ),
        Row(
            name="huge JSON",
            happens="one document without end, larger than `max_body_bytes`",
            strike=inject(HugeFault(size_bytes=300_000)),
            cause="protocol",
            blame=STRIKE,
            alone=(FAILED,),
            why="sent more than 100000 bytes",
            settings={"max_body_bytes": 100_000},
        ),
    ]


def mid_stream() -> list[Row]:
    return [
        Row(
            name="error line",
            happens="the runner dies: a line with an error, in the middle",
            strike=inject(ErrorLineFault(after=BEFORE)),
            cause="error_response",
            blame=STRIKE,
            is_mid_stream=True,
            alone=(FAILED,),
            why="answered with",
        ),
        Row(
            name="reset",
            happens="the connection breaks in the middle",
            strike=inject(ResetFault(after=BEFORE)),
            cause="reset",
            blame=STRIKE,
            is_mid_stream=True,
            alone=(FAILED,),
            why="broke the connection",
        ),
        Row(
            name="killed",
            happens="the server dies in the middle",
            strike=inject(TokenFault(after=BEFORE)),
            cause="reset",
            blame=STRUCK_AND_DOWN,
            is_mid_stream=True,
            alone=(FAILED,),
            why="broke the connection",
        ),
        Row(
            name="end without done",
            happens="the stream ends properly, and never said that it was complete",
            strike=inject(CutFault(after=BEFORE)),
            cause="stream_broken",
            cause_in_one_piece="reset",
            blame_in_one_piece=STRIKE,
            is_mid_stream=True,
            alone=(FAILED,),
            why="",
        ),
        Row(
            name="stalled",
            happens="nothing more comes, and the connection stays open",
            strike=inject(StallFault(after=BEFORE)),
            cause="timeout",
            blame=STRIKE,
            is_mid_stream=True,
            alone=(TIMED_OUT,),
            why="stayed silent for too long",
            limit="stream_idle_timeout",
        ),
    ]


ROWS = [*before_the_first_byte(), *mid_stream()]
