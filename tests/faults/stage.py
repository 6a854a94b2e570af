"""The nodes of a case, the router over them, and what is looked at afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import httpx
import pytest

from hydra_llm import HydraSettings, Node, Router, RoutingDecision
from hydra_llm.dispatch import Dispatch
from hydra_llm.events import AttemptFailed, Event
from hydra_llm.patience import Patience
from hydra_llm.testing import RequestRecord, SimulatedCluster, SimulatedNode
from hydra_llm.types import NodeSnapshot
from tests.faults.catalogue import MODEL, Case

MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "Tell me about lighthouses."}]
PREFERRED: dict[str, Any] = {"prefer_labels": ["first"]}
"""Words with which a request goes to the first node as long as that may be asked at all."""

SPEED = 5000.0
TOKENS = 8
AMPLE_SECONDS = 20.0
GRACE_SECONDS = 3.0


class SlowMotion:
    """
    A router's clock on which a second lasts a quarter of an hour.

    Pauses and back-offs last as long as a test needs, however slow the machine is.
    """

    def __init__(self, slowness: float = 1000.0) -> None:
        self._slowness = slowness

    def __call__(self) -> float:
        return time.monotonic() / self._slowness

    def real_seconds(self, seconds: float) -> float:
        """How long so much of its time has taken."""
        return seconds * self._slowness


class Stage:
    """
    Some nodes, of which the first is the one that will fail, and a router that has seen them.

    Attributes:
        failures: every failed attempt as the router saw it: node and cause.
        decisions: about every request that has come to an end on some node.
        clock: the router's.
    """

    def __init__(self, cluster: SimulatedCluster, router: Router, clock: SlowMotion) -> None:
        self.cluster = cluster
        self.router = router
        self.clock = clock
        self.events: list[Event] = []
        self.decisions: list[RoutingDecision] = []
        self._before: dict[str, int] = {}

    @property
    def first(self) -> SimulatedNode:
        """The one that fails."""
        return self.cluster.node_list[0]

    @property
    def others(self) -> list[SimulatedNode]:
        return self.cluster.node_list[1:]

    @property
    def failures(self) -> list[tuple[str, str]]:
        return [(e.node_id, e.cause) for e in self.events if isinstance(e, AttemptFailed)]

    def forget_requests(self) -> None:
        """Count from now on."""
        self.decisions.clear()
        self._before = {node.id: len(node.requests) for node in self.cluster}

    def asked_of(self, node: SimulatedNode) -> list[RequestRecord]:
        """The requests to models that a node has read."""
        before = self._before.get(node.id, 0)
        return [one for one in node.requests[before:] if one.path == "/api/chat"]

    def seen(self, node_id: str = "a") -> NodeSnapshot:
        """What the router knows of a node now."""
        return next(node for node in self.router.nodes() if node.id == node_id)

    def record(self, node_id: str = "a") -> Any:
        return self.router._cluster._records[node_id]


@contextmanager
def stage_of(
    count: int,
    *,
    warm: bool = True,
    of_the_first: Mapping[str, Any] | None = None,
    case: Case | None = None,
    slowness: float = 1000.0,
    **settings: Any,
) -> Iterator[Stage]:
    """
    Nodes a, b, c, d, of which requests that prefer it go to the first.

    Args:
        count: of nodes.
        warm: whether the model is loaded on the first; on the others it always is.
        of_the_first: further arguments of the first one.
        case: of the catalogue, which may want its nodes to be called by other URLs.
        slowness: of the router's clock; 1 where limits are to be seen that it measures.
        settings: of the router.
    """
    given: dict[str, Any] = {
        "models": (MODEL,), "speed": SPEED, "keep_alive_s": 1e9, "token_output": TOKENS,
    }  # fmt: skip
    made = [SimulatedNode("a", **{**given, **(of_the_first or {})})]
    made += [SimulatedNode(name, **given) for name in "bcd"[: count - 1]]
    clock = SlowMotion(slowness)
    around = case.around(made) if case is not None else nullcontext()
    with SimulatedCluster(made) as cluster, around:
        for node in cluster.node_list[0 if warm else 1 :]:
            node.preload(MODEL)
        known = HydraSettings(
            nodes=configured(cluster, case),
            **{
                # Probed when a test says so, and after each failure.
                "health_check_interval": 3600.0,
                "vram_monitoring": False,
                "prefer_label_seconds": 60.0,
                # To read the authorities takes longer than all the rest of a case.
                "verify": False,
                **settings,
            },
        )
        stage: Stage | None = None

        def on_event(event: Event) -> None:
            if stage is not None:
                stage.events.append(event)

        def on_decision(decision: RoutingDecision) -> None:
            if stage is not None:
                stage.decisions.append(decision)

        with Router(
            settings=known, clock=clock, on_event=on_event, on_decision=on_decision
        ) as router:
            router.nodes()
            stage = Stage(cluster, router, clock)
            yield stage
            nothing_is_left(stage)
        for node in cluster:
            if case is not None and node is cluster.node_list[0]:
                case.well(node)
            node.clear_faults()
            _until_left(node)


def configured(cluster: SimulatedCluster, case: Case | None) -> list[Node]:
    return [
        node.node(
            url=node.url if case is None else case.url(node),
            labels=("first",) if node is cluster.node_list[0] else (),
        )
        for node in cluster
    ]


def nothing_is_left(stage: Stage) -> None:
    """No lease, no place in the line, no half-open probe, no connection in use, no request."""
    router = stage.router
    assert (router.in_flight, router.waiting) == (0, 0)
    for known in router.nodes():
        record = stage.record(known.id)
        assert not known.running
        assert not record.leases
        for breaker in (record.breaker, *record.load_breakers.values()):
            assert not breaker._probe_out, f"{known.id} waits for the end of a probe"
    assert not router._pools._async, "a loop that is over has left its pool"
    until(lambda: not _in_use(router), "connections stay in use")
    for node in stage.cluster:
        _until_idle(node)


def _until_idle(node: SimulatedNode) -> None:
    until(lambda: not node.in_flight, f"{node.id} still answers somebody")


def _until_left(node: SimulatedNode) -> None:
    until(lambda: not node.open_connections, f"connections to {node.id} stay open")


def _in_use(router: Router) -> int:
    pool: httpx.HTTPTransport | None = router._pools._sync
    if pool is None:
        return 0
    inner: Any = pool
    return sum(not one.is_idle() and not one.is_closed() for one in inner._pool.connections)


def until(holds: Callable[[], bool], else_: str) -> None:
    """Wait for something that comes by itself, soon."""
    deadline = time.monotonic() + GRACE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, else_
        time.sleep(0.002)


@pytest.fixture
def ample_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short limits are for the node that fails: the others take what a busy machine takes."""
    give_others_time(monkeypatch)


def give_others_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # Eight megabytes take their time to come.
    monkeypatch.setattr("hydra_llm.ollama.answers.MAX_LINE_BYTES", 50_000)
    timeouts, patience = Dispatch.timeouts, Dispatch.patience

    def has_time(dispatch: Dispatch) -> bool:
        return dispatch.node.id != "a" and dispatch.words.deadline_s is None

    def ample_timeouts(self: Dispatch, incoming: httpx.Request) -> dict[str, float | None]:
        found = timeouts(self, incoming)
        return dict.fromkeys(found, AMPLE_SECONDS) if has_time(self) else found

    def ample_patience(self: Dispatch, incoming: httpx.Request) -> Patience:
        if not has_time(self):
            return patience(self, incoming)
        return Patience(AMPLE_SECONDS, self.clock)

    monkeypatch.setattr(Dispatch, "timeouts", ample_timeouts)
    monkeypatch.setattr(Dispatch, "patience", ample_patience)
