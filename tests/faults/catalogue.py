"""
Everything that can go wrong with a node, for tests that go through all of it.

::

    for case in CASES:
        with case.around(nodes), Router(case.configured(nodes), **case.router) as router:
            case.ill(nodes[0])
            ...
            case.well(nodes[0])

The nodes have `MODEL` installed. Where ``loads_only``, it must not be loaded before ``ill``;
otherwise it may be.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hydra_llm.testing import (
    CutFault,
    EndlessFault,
    ErrorBodyFault,
    ErrorLineFault,
    Fault,
    HangFault,
    HostNames,
    HtmlFault,
    HugeFault,
    LoadFault,
    LoopFault,
    MissingModelFault,
    OffloadFault,
    PsFault,
    ResetFault,
    SimulatedNode,
    SlowFault,
    SlowLorisFault,
    StallFault,
    StatusFault,
    TokenFault,
)
from hydra_llm.types import Node

__all__ = ["BY_NAME", "CASES", "K", "MODEL", "OTHER_CONTEXT", "Case"]

MODEL = "llama3.2:3b"
OTHER_CONTEXT = 2048
"""What a program of somebody else's loads the model with: no automatic context."""


K = 3
"""Tokens that come before a stream is struck in the middle."""

Ill = Callable[[SimulatedNode], object]


def _clear(node: SimulatedNode) -> None:
    node.clear_faults()


def _clear_and_revive(node: SimulatedNode) -> None:
    node.clear_faults()
    node.revive()


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """
    One way for a node to be ill.

    Args:
        name: in the words of the fault matrix.
        ill, well: make a node so, and undo it.
        strikes: where a request for a stream meets it: ``connecting``; ``before`` the first byte
            of the answer; ``after`` its first part; ``never``: the answer comes whole, though
            late perhaps, or only what ``/api/ps`` says is wrong.
        loads_only: it concerns requests that need a load and no others.
        chance: of a request to be struck; ``times`` limits how many are, ``None`` is all.
        url: where a router is told that the node is.
        around: what has to be so from before there is a router until after it.
        router: what it has to be told besides.
    """

    name: str
    ill: Ill
    well: Ill = _clear
    strikes: Literal["connecting", "before", "after", "never"]
    loads_only: bool = False
    chance: float = 1.0
    times: int | None = None
    url: Callable[[SimulatedNode], str] = field(default=lambda node: node.url)
    around: Callable[[Sequence[SimulatedNode]], AbstractContextManager[object]] = field(
        default=lambda nodes: nullcontext()
    )
    router: dict[str, Any] = field(default_factory=dict)

    def configured(self, nodes: Sequence[SimulatedNode], **words: Any) -> list[Node]:
        """Give the nodes as a router is to be told of them."""
        return [node.node(url=self.url(node), **words) for node in nodes]

    def __str__(self) -> str:
        return self.name


def _injected(
    name: str, fault: Fault, strikes: Literal["before", "after", "never"], **more: Any
) -> Case:
    return Case(
        name=name,
        ill=lambda node: node.inject(fault),
        strikes=strikes,
        chance=fault.probability,
        times=fault.times,
        **more,
    )


# ---------------------------------------------------------------- names


def _name_of(node: SimulatedNode) -> str:
    return f"{node.id}.internal"


NAMES = HostNames()
NOBODYS_ADDRESS = "127.0.0.2"
"""Of this machine, but no node listens there: the port is refused."""


def _url_by_name(node: SimulatedNode) -> str:
    return f"http://{_name_of(node)}:{node.port}"


def _lose_name(node: SimulatedNode) -> None:
    NAMES.lose(_name_of(node))
    # Names are looked up for new connections only.
    node.hang_up()


def _move_name(node: SimulatedNode) -> None:
    NAMES.point(_name_of(node), NOBODYS_ADDRESS)
    node.hang_up()


def _find_name(node: SimulatedNode) -> None:
    NAMES.point(_name_of(node), node.host)


@contextmanager
def _named(nodes: Sequence[SimulatedNode]) -> Iterator[None]:
    with NAMES:
        for node in nodes:
            NAMES.point(_name_of(node), node.host)
        yield


# ---------------------------------------------------------------- TLS

HERE = Path(__file__).parent
TRUSTED = HERE.parent / "agent"
STRANGER = HERE


def _tls(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return context


def _speak_trusted(node: SimulatedNode) -> None:
    node.speak_tls(_tls(TRUSTED))


@contextmanager
def _encrypted(nodes: Sequence[SimulatedNode]) -> Iterator[None]:
    for node in nodes:
        _speak_trusted(node)
    yield


def _over_tls(name: str, ill: Ill, well: Ill = _speak_trusted) -> Case:
    return Case(
        name=name,
        ill=ill,
        well=well,
        strikes="connecting",
        around=_encrypted,
        url=lambda node: f"https://{node.host}:{node.port}",
        router={"verify": str(TRUSTED / "certificate.pem")},
    )


# ---------------------------------------------------------------- loads and memory


def _runner_dies(node: SimulatedNode) -> None:
    node.preload(MODEL)
    node.kill_runner(MODEL)


def _somebody_else(node: SimulatedNode) -> None:
    node.preload(MODEL, num_ctx=OTHER_CONTEXT)
    node.occupy(MODEL, num_ctx=OTHER_CONTEXT)


def _load_anew(node: SimulatedNode) -> None:
    """Have what was loaded wrongly loaded again, as when somebody restarts Ollama."""
    node.clear_faults()
    node.kill_runner(MODEL)


CASES: tuple[Case, ...] = (
    # ------------------------------------------------------------ no connection
    Case(
        name="refused",
        ill=SimulatedNode.kill,
        well=SimulatedNode.revive,
        strikes="connecting",
    ),
    Case(
        name="black hole",
        ill=SimulatedNode.vanish,
        well=SimulatedNode.reappear,
        strikes="connecting",
    ),
    Case(
        name="DNS: no such name",
        ill=_lose_name,
        well=_find_name,
        strikes="connecting",
        around=_named,
        url=_url_by_name,
    ),
    Case(
        name="DNS: the name has moved",
        ill=_move_name,
        well=_find_name,
        strikes="connecting",
        around=_named,
        url=_url_by_name,
    ),
    _over_tls("TLS: certificate of a stranger", lambda node: node.speak_tls(_tls(STRANGER))),
    _over_tls("TLS: plain HTTP on the port", lambda node: node.speak_tls(None)),
    _over_tls("TLS: hung in the handshake", SimulatedNode.freeze, SimulatedNode.thaw),
    # ------------------------------------------------------------ an answer that is none
    _injected("401", StatusFault(401), "before"),
    _injected("403", StatusFault(403), "before"),
    _injected("404 model", MissingModelFault(), "before"),
    _injected("429", StatusFault(429), "before"),
    _injected("429 with Retry-After", StatusFault(429, retry_after=1), "before"),
    _injected("500 once", StatusFault(500, times=1), "before"),
    _injected("500 always", StatusFault(500), "before"),
    _injected("500 30 %", StatusFault(500, probability=0.3), "before"),
    _injected("instant 503", StatusFault(503), "before"),
    _injected("200 with an error body", ErrorBodyFault(), "before"),
    _injected("error line first", ErrorLineFault(after=0), "before"),
    _injected("HTML", HtmlFault(), "before"),
    _injected("huge JSON", HugeFault(), "before"),
    _injected("reset before headers", ResetFault(), "before"),
    _injected("reset after headers", ResetFault(after=0), "before"),
    # ------------------------------------------------------------ silence
    _injected("hung before the first byte", HangFault(), "before"),
    _injected("hung load only", HangFault(loads_only=True), "before", loads_only=True),
    _injected("slow-loris in the headers", SlowLorisFault(pause_s=0.2), "before"),
    _injected("slow-loris in the first part", SlowLorisFault(after=0, pause_s=0.2), "before"),
    _injected("slow-loris in the middle", SlowLorisFault(after=K, pause_s=0.2), "after"),
    Case(
        name="frozen",
        ill=SimulatedNode.freeze,
        well=SimulatedNode.thaw,
        strikes="before",
    ),
    # ------------------------------------------------------------ a stream that breaks
    _injected("error line mid-stream", ErrorLineFault(after=K), "after"),
    _injected("end without done", CutFault(after=K), "after"),
    _injected("repeated-token cut", LoopFault(), "after"),
    _injected("reset mid-stream", ResetFault(after=K), "after"),
    replace(
        _injected("killed at token k", TokenFault(after=K), "after"),
        well=_clear_and_revive,
    ),
    _injected(
        "runner killed at token k",
        TokenFault(after=K, action=lambda node: node.kill_runner(MODEL)),
        "after",
    ),
    _injected("stalled at token k", StallFault(after=K), "after"),
    _injected("endless stream", EndlessFault(after=K), "after"),
    _injected("endless line", EndlessFault(after=K, in_one_line=True), "after"),
    # ------------------------------------------------------------ memory and loads
    Case(
        name="differing num_ctx under load",
        ill=_somebody_else,
        well=SimulatedNode.vacate,
        strikes="before",
    ),
    _injected("load out of memory", LoadFault(), "before", loads_only=True),
    replace(
        _injected("silent CPU offload", OffloadFault(), "never", loads_only=True), well=_load_anew
    ),
    Case(
        name="dead runner still listed",
        ill=_runner_dies,
        well=lambda node: None,
        strikes="never",
    ),
    # ------------------------------------------------------------ slow, unsteady
    _injected("10x slower for a minute", SlowFault(factor=10.0, for_s=60.0), "never"),
    Case(
        name="flapping",
        ill=lambda node: node.flap(up_s=0.2, down_s=0.2),
        strikes="connecting",
    ),
    # ------------------------------------------------------------ /api/ps
    _injected("stale /api/ps", PsFault(shows="stale"), "never"),
    _injected("empty /api/ps", PsFault(shows="empty"), "never"),
    _injected(
        "wrong /api/ps",
        PsFault(shows="given", entries=[{"name": "ghost:latest", "model": "ghost:latest"}]),
        "never",
    ),
    _injected("/api/ps blocking 20 s", PsFault(block_s=20.0), "never"),
)

BY_NAME = {case.name: case for case in CASES}
