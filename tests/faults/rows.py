"""
What has to be so when something fails: one record a fault.

The matrix plays each of them (``tests/faults/matrix.py``), and ``docs/reliability.md`` shows them
(``tests/faults/table.py``): what the page says is what is asserted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from hydra_llm import Client
from hydra_llm.exceptions import (
    AllNodesFailedError,
    NoEligibleNodeError,
    NoNodeUpError,
    StreamBrokenError,
)
from hydra_llm.testing import (
    EndlessFault,
    Fault,
    HugeFault,
    OffloadFault,
    PsFault,
    SlowFault,
    SlowLorisFault,
    StatusFault,
)
from hydra_llm.types import NodeSnapshot
from tests.faults.callers import Seen
from tests.faults.catalogue import MODEL, K
from tests.faults.stage import MESSAGES, PREFERRED, Stage, until

BEFORE = K
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
        parts: of a stream that come before; None: some.
        is_probed: whether probes come to an end, so that the node is looked at once more before
            it is judged.
        asks: how many requests are made, one after the other.
        failing: how many of them fail on the node while others are there; of the rest it has
            none, unless it answers them.
        alone: what the caller of a lone node sees, request by request; the last one goes on.
        why: what the error says of the node.
        limit: the setting whose time is waited for, once an attempt.
        settings: of the router.
        stage: further arguments of :func:`stage_of`.
        words: of each request.
        holds: what else is so; gets the stage and what was seen.
        claim: the same in the words of the page.
    """

    name: str
    happens: str
    strike: Callable[[Stage], object] | None = None
    before_each: Callable[[Stage, int], object] | None = None
    cause: str | None = None
    cause_in_one_piece: str | None = None
    blame: Blame = NOBODY
    blame_alone: Blame | None = None
    blame_in_one_piece: Blame | None = None
    is_mid_stream: bool = False
    parts: int | None = BEFORE
    is_probed: bool = True
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


# ------------------------------------------------------------------------- particulars


def _flap(stage: Stage, number: int) -> None:
    """Down for requests 0, 2, 4; up, and seen to be, for those between."""
    if number % 2 == 0:
        stage.router.refresh()  # or a probe that is under way might see it die before we do
        stage.first.kill()
        until(lambda: not stage.first.open_connections, "connections outlive their node")
        return
    stage.first.revive()
    stage.router.refresh()
    assert stage.seen().health == "up"


def _is_paused_for(stage: Stage, seconds: float) -> None:
    until = stage.seen().paused_until
    assert until is not None
    assert seconds * 0.9 < until - stage.clock() <= seconds


def _has_loaded(stage: Stage, times: int) -> None:
    assert stage.first.load_count == times


def _known_first(fault: Fault) -> Callable[[Stage], object]:
    """Injected when the others' speeds are known."""

    def strike(stage: Stage) -> None:
        with Client(router=stage.router) as client:
            for node in stage.others:
                client.chat(MODEL, MESSAGES, node_id=node.id)
        stage.forget_requests()
        stage.first.inject(fault)

    return strike


def _is_known_as_slow(stage: Stage) -> None:
    decode = {one.node_id: one.costs["decode"] for one in stage.router.explain(MODEL).candidates}
    slow = decode.pop("a")
    assert all(slow > 5 * seconds for seconds in decode.values())


def _unload_unseen(stage: Stage) -> None:
    stage.first.inject(PsFault(shows="stale"))
    with httpx.Client(trust_env=False) as client:
        body = {"model": MODEL, "keep_alive": 0}
        client.post(f"{stage.first.url}/api/generate", json=body).raise_for_status()
    assert MODEL not in stage.first.loaded
    stage.router.refresh()
    assert MODEL in stage.seen().loaded


def inject(fault: Fault, **limits: Any) -> Callable[[Stage], object]:
    return lambda stage: stage.first.inject(fault, **limits)


EVERYTHING = {"paths": ("*",)}
SHORT = 0.06
"""Seconds that the failing node is given where a limit has to be waited for."""
DRIP = SHORT / 6
"""Between two bytes of a node that drips: well within every limit of silence."""


# --------------------------------------------------------------------- no connection

NO_CONNECTION = [
    Row(
        name="refused",
        happens="the port is closed: Ollama is not running",
        cause="connect",
        blame=DOWN,
        asks=3,
        alone=(FAILED, NOBODY_UP),
        why="connection refused",
    ),
    Row(
        name="black hole",
        happens="nothing answers: the machine is off, or a firewall drops packets",
        cause="connect",
        blame=DOWN,
        asks=3,
        alone=(FAILED, NOBODY_UP),
        why="timed out",
        limit="connect_timeout",
        is_probed=False,
    ),
    Row(
        name="DNS: no such name",
        happens="the host name does not resolve",
        cause="connect",
        blame=DOWN,
        asks=3,
        alone=(FAILED, NOBODY_UP),
        why="unknown host name",
    ),
    Row(
        name="DNS: the name has moved",
        happens="the host name leads to another machine, where nobody listens",
        cause="connect",
        blame=DOWN,
        asks=3,
        alone=(FAILED, NOBODY_UP),
        why="connection refused",
    ),
    Row(
        name="TLS: certificate of a stranger",
        happens="its certificate is not trusted",
        cause="connect",
        blame=DOWN,
        asks=3,
        alone=(FAILED, NOBODY_UP),
        why="its TLS certificate is not trusted",
    ),
    Row(
        name="TLS: plain HTTP on the port",
        happens="`https://` is configured, and plain HTTP is spoken",
        cause="connect",
        blame=DOWN,
        asks=3,
        alone=(FAILED, NOBODY_UP),
        why="TLS failed",
    ),
    Row(
        name="TLS: hung in the handshake",
        happens="it accepts the connection and says nothing",
        cause="connect",
        blame=DOWN,
        asks=3,
        alone=(FAILED, NOBODY_UP),
        why="timed out",
        limit="connect_timeout",
        is_probed=False,
    ),
    Row(
        name="flapping",
        happens="it dies and comes back, again and again",
        strike=lambda stage: None,
        before_each=_flap,
        cause="connect",
        blame=DOWN,
        asks=5,
        failing=3,
        alone=(FAILED, ANSWER, FAILED, ANSWER, FAILED),
        why="connection refused",
    ),
]

# ------------------------------------------------------------ an answer that is none

NO_ANSWER = [
    Row(
        name="401",
        happens="it wants other credentials",
        strike=inject(StatusFault(401), **EVERYTHING),
        cause="auth",
        blame=ASKS_FOR_KEY,
        asks=3,
        alone=(FAILED, NOT_NOW),
        why="refuses access (401)",
    ),
    Row(
        name="403",
        happens="it, or a proxy before it, lets nobody in",
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
        happens="too many requests",
        cause="busy",
        blame=PAUSED,
        asks=3,
        alone=(FAILED, NOT_NOW),
        why="is busy (429)",
    ),
    Row(
        name="429 with Retry-After",
        happens="too many requests, and it says for how long",
        strike=inject(StatusFault(429, retry_after=70.0)),
        cause="busy",
        blame=PAUSED,
        asks=3,
        alone=(FAILED, NOT_NOW),
        why="is busy (429)",
        holds=lambda stage, seen: _is_paused_for(stage, 70.0),
    ),
    Row(
        name="instant 503",
        happens="its queue is full, and it says so at once",
        cause="busy",
        blame=PAUSED,
        asks=3,
        alone=(FAILED, NOT_NOW),
        why="is busy (503)",
        holds=lambda stage, seen: _is_paused_for(stage, 1.0),
    ),
    Row(
        name="500 once",
        happens="one request fails",
        cause="error_response",
        blame=STRIKE,
        asks=2,
        alone=(FAILED, ANSWER),
        why="answered with status 500",
    ),
    Row(
        name="500 always",
        happens="every request fails",
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
        name="500 30 %",
        happens="one request in three fails",
        cause="error_response",
        blame=STRIKE,
        asks=6,
        failing=2,
        alone=(ANSWER, FAILED, ANSWER, ANSWER, FAILED, ANSWER),
        why="answered with status 500",
        stage={"of_the_first": {"seed": 10}},
    ),
    Row(
        name="200 with an error body",
        happens="an error where the answer should be",
        cause="error_response",
        blame=STRIKE,
        alone=(FAILED,),
        why="answered with an error inside its answer",
    ),
    Row(
        name="error line first",
        happens="a stream that begins with an error",
        cause="error_response",
        blame=STRIKE,
        alone=(FAILED,),
        why="answered with",
    ),
    Row(
        name="HTML",
        happens="a web page, as of a router or proxy in the way",
        cause="protocol",
        blame=STRIKE,
        alone=(FAILED,),
        why="not with JSON",
    ),
    Row(
        name="huge JSON",
        happens="more than `max_body_bytes` in one piece",
        strike=inject(HugeFault(size_bytes=300_000)),
        cause="protocol",
        blame=STRIKE,
        alone=(FAILED,),
        why="sent more than 100000 bytes",
        settings={"max_body_bytes": 100_000},
    ),
    Row(
        name="reset before headers",
        happens="the connection breaks without a word",
        cause="reset",
        blame=STRIKE,
        alone=(FAILED,),
        why="broke the connection",
    ),
    Row(
        name="reset after headers",
        happens="the connection breaks when the answer should begin",
        cause="reset",
        blame=STRIKE,
        alone=(FAILED,),
        why="broke the connection",
    ),
]

# --------------------------------------------------------------------------- silence

SILENCE = [
    Row(
        name="hung before the first byte",
        happens="it accepts the request and stays silent",
        cause="timeout",
        blame=STRIKE,
        alone=(TIMED_OUT,),
        why="stayed silent for too long",
        limit="first_byte_timeout",
    ),
    Row(
        name="hung load only",
        happens="it answers, but never ends to load a model",
        cause="timeout",
        blame=STRIKE,
        alone=(TIMED_OUT,),
        why="stayed silent for too long",
        limit="first_byte_timeout",
        stage={"warm": False},
    ),
    Row(
        name="slow-loris in the headers",
        happens="the headers come byte by byte",
        strike=inject(SlowLorisFault(pause_s=DRIP)),
        cause="timeout",
        blame=STRIKE,
        alone=(TIMED_OUT,),
        limit="first_byte_timeout",
        stage={"slowness": 1.0},
    ),
    Row(
        name="slow-loris in the first part",
        happens="the first part of the answer comes byte by byte",
        strike=inject(SlowLorisFault(after=0, pause_s=DRIP)),
        cause="timeout",
        blame=STRIKE,
        alone=(TIMED_OUT,),
        limit="first_byte_timeout",
        stage={"slowness": 1.0},
    ),
    Row(
        name="frozen",
        happens="the whole server hangs, as a machine that swaps",
        cause="timeout",
        blame=STRIKE,
        alone=(TIMED_OUT,),
        why="stayed silent for too long",
        limit="first_byte_timeout",
        is_probed=False,
    ),
    Row(
        name="differing num_ctx under load",
        happens="somebody else has the model reloaded with another context, and keeps it busy",
        cause="timeout",
        blame=STRIKE,
        alone=(TIMED_OUT,),
        why="stayed silent for too long",
        limit="first_byte_timeout",
        is_probed=False,
    ),
]

# ------------------------------------------------------------ an answer that breaks off

MID_STREAM = [
    Row(
        name="error line mid-stream",
        happens="a line with an error",
        cause="error_response",
        blame=STRIKE,
        is_mid_stream=True,
        alone=(FAILED,),
        why="answered with",
    ),
    Row(
        name="runner killed at token k",
        happens="the process of the model dies, as for want of memory",
        cause="error_response",
        blame=STRIKE,
        is_mid_stream=True,
        alone=(FAILED,),
        why="answered with",
    ),
    Row(
        name="killed at token k",
        happens="the server dies",
        cause="reset",
        blame=STRUCK_AND_DOWN,
        is_mid_stream=True,
        alone=(FAILED,),
        why="broke the connection",
    ),
    Row(
        name="reset mid-stream",
        happens="the connection breaks",
        cause="reset",
        blame=STRIKE,
        is_mid_stream=True,
        alone=(FAILED,),
        why="broke the connection",
    ),
    Row(
        name="end without done",
        happens="it ends properly, but nothing said that it was complete",
        cause="stream_broken",
        cause_in_one_piece="reset",
        blame_in_one_piece=STRIKE,
        is_mid_stream=True,
        alone=(FAILED,),
    ),
    Row(
        name="repeated-token cut",
        happens="the model repeats one token, and Ollama stops it without a word",
        cause="stream_broken",
        is_mid_stream=True,
        parts=None,
        alone=(FAILED,),
        why="without being complete",
    ),
    Row(
        name="stalled at token k",
        happens="nothing more comes, and the connection stays open",
        cause="timeout",
        blame=STRIKE,
        is_mid_stream=True,
        alone=(TIMED_OUT,),
        why="stayed silent for too long",
        limit="stream_idle_timeout",
    ),
    Row(
        name="slow-loris in the middle",
        happens="the rest comes byte by byte",
        strike=inject(SlowLorisFault(after=BEFORE, pause_s=DRIP)),
        cause="timeout",
        blame=STRIKE,
        is_mid_stream=True,
        alone=(TIMED_OUT,),
        limit="stream_idle_timeout",
        stage={"slowness": 1.0},
    ),
    Row(
        name="endless stream",
        happens="parts come for ever: more than `max_body_bytes`",
        strike=inject(EndlessFault(after=BEFORE, pause_s=0.0)),
        cause="protocol",
        blame=STRIKE,
        is_mid_stream=True,
        parts=None,
        alone=(FAILED,),
        why="sent more than",
        settings={"max_body_bytes": 10_000},
    ),
    Row(
        name="endless line",
        happens="a line without an end",
        strike=inject(EndlessFault(after=BEFORE, in_one_line=True, pause_s=0.0)),
        cause="protocol",
        blame=STRIKE,
        is_mid_stream=True,
        alone=(FAILED,),
        settings={"max_body_bytes": 100_000},
    ),
]

# ------------------------------------------------------------------ memory and loads

LOADS = [
    Row(
        name="load out of memory",
        happens="the model cannot be loaded for want of memory",
        cause="load_failed",
        blame=LOADS_NOT,
        asks=3,
        alone=(FAILED, NOT_NOW),
        why="could not load",
        stage={"warm": False},
    ),
    Row(
        name="dead runner still listed",
        happens="the process of the model has died, and `/api/ps` still shows it",
        failing=0,
        holds=lambda stage, seen: _has_loaded(stage, 1),
        claim="the node loads it again",
    ),
    Row(
        name="silent CPU offload",
        happens="a load lands in system memory, and nothing says so",
        strike=_known_first(OffloadFault()),
        failing=0,
        stage={"warm": False},
        asks=2,
        holds=lambda stage, seen: _is_known_as_slow(stage),
        claim="its tokens are priced by the next probe, and by its answers: others are sooner",
    ),
    Row(
        name="10x slower for a minute",
        happens="its GPU throttles, or somebody else computes there",
        strike=_known_first(SlowFault(factor=10.0)),
        failing=0,
        asks=3,
        holds=lambda stage, seen: _is_known_as_slow(stage),
        claim="its tokens are priced by its answers: others are sooner",
    ),
]

# ---------------------------------------------------------------------- what ps says

LISTINGS = [
    Row(
        name="stale /api/ps",
        happens="`/api/ps` shows a model that is gone",
        strike=_unload_unseen,
        failing=0,
        holds=lambda stage, seen: _has_loaded(stage, 1),
        claim="a load more than was expected",
    ),
    Row(
        name="empty /api/ps",
        happens="`/api/ps` shows nothing of what is loaded",
        failing=0,
        before_each=lambda stage, number: stage.router.refresh(),
        holds=lambda stage, seen: _has_loaded(stage, 0),
        claim="a load is expected and does not come",
    ),
    Row(
        name="wrong /api/ps",
        happens="`/api/ps` shows what is not there",
        failing=0,
        before_each=lambda stage, number: stage.router.refresh(),
        holds=lambda stage, seen: _has_loaded(stage, 0),
        claim="a load is expected and does not come",
    ),
    Row(
        name="/api/ps blocking 20 s",
        happens="`/api/ps` waits for a runner that hangs",
        failing=0,
        before_each=lambda stage, number: stage.router.refresh(),
        settings={"health_check_timeout": 0.1},
        is_probed=False,
        claim="requests wait for no probe",
    ),
]

PARTS = {
    "No connection": NO_CONNECTION,
    "An answer that is none": NO_ANSWER,
    "Silence": SILENCE,
    "An answer that breaks off": MID_STREAM,
    "Loads and speed": LOADS,
    "What `/api/ps` says": LISTINGS,
}
"""The rows by the heads under which the page shows them."""

ROWS = [row for rows in PARTS.values() for row in rows]
