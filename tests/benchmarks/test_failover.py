"""What a failing node costs the request that finds out, in pairs. No assertions."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hydra_llm import Client, HydraSettings, Router
from hydra_llm.testing import (
    CutFault,
    ErrorBodyFault,
    Fault,
    HtmlFault,
    MissingModelFault,
    ResetFault,
    SimulatedCluster,
    SimulatedNode,
    StatusFault,
)
from tests.benchmarks.conftest import PAIRED
from tests.benchmarks.serve import MODEL

MESSAGES = [{"role": "user", "content": "Hello"}]
ROUNDS = 100
CONNECT_SECONDS = 0.25

Ill = Callable[[SimulatedNode], object]


def _injected(fault: Fault) -> Ill:
    return lambda node: node.inject(fault)


ILLNESSES: dict[str, Ill] = {
    "refused": SimulatedNode.kill,
    "503 busy": _injected(StatusFault(503)),
    "500": _injected(StatusFault(500)),
    "401": _injected(StatusFault(401)),
    "404 model": _injected(MissingModelFault()),
    "reset": _injected(ResetFault()),
    "reset after the headers": _injected(ResetFault(after=0)),
    "error body": _injected(ErrorBodyFault()),
    "end without done": _injected(CutFault(after=0)),
    "HTML": _injected(HtmlFault()),
    "black hole": SimulatedNode.vanish,
}


@pytest.fixture
def cluster() -> Iterator[SimulatedCluster]:
    """Two nodes; they have to be in this process, so that one of them can be made ill."""
    nodes = [
        SimulatedNode(name, models=(MODEL,), speed=100_000.0, keep_alive_s=1e12, token_output=14)
        for name in "ab"
    ]
    with SimulatedCluster(nodes) as cluster:
        for node in cluster:
            node.preload(MODEL)
        yield cluster


def _forgiving(cluster: SimulatedCluster) -> Router:
    """A router that sends each first attempt to "a", whatever it knows of it."""
    first, other = cluster.node_list
    nodes = [first.node(labels=("first",)), other.node()]
    settings = HydraSettings(
        nodes=nodes, vram_monitoring=False, health_check_interval=3600, verify=False,
        prefer_label_seconds=600, connect_timeout=CONNECT_SECONDS, health_check_timeout=0.1,
        breaker_failures=10**9, retry_floor=10**9,
    )  # fmt: skip
    return Router(settings=settings)


def _forget(router: Router) -> None:
    """As if nothing had been learned of the failure, so that the next request finds out too."""
    record: Any = router._cluster._records["a"]
    with router._cluster._lock:
        record.health, record.paused_until, record.penalty_seconds = "up", None, 0.0
        record.failed_at = time.monotonic()
        well = router._cluster._records["b"]
        record.installed, record.loaded = dict(well.installed), dict(well.loaded)
        record.breaker.reset()
        router._cluster._publish(record)


@pytest.mark.parametrize("illness", ILLNESSES)
def test_time_added_by_a_failed_attempt(
    benchmark: Any, cluster: SimulatedCluster, illness: str
) -> None:
    rounds = 10 if illness == "black hole" else ROUNDS
    times: dict[str, list[float]] = {"well": [], "ill": []}
    with _forgiving(cluster) as router, Client(router=router) as client:
        router.nodes()
        router._refresh = lambda node_id: None  # type: ignore[method-assign]
        client.chat(MODEL, MESSAGES, node_id="b")
        ILLNESSES[illness](cluster["a"])
        attempts: list[int] = []

        def ask(**words: Any) -> None:
            answer = client.chat(MODEL, MESSAGES, **words)
            attempts.append(len(answer.routing_decision.attempts))

        def a_pair() -> None:
            kinds = ["well", "ill"]
            random.shuffle(kinds)
            for kind in kinds:
                _forget(router)
                words: dict[str, Any] = (
                    {"node_id": "b"} if kind == "well" else {"prefer_labels": "first"}
                )
                began = time.perf_counter()
                ask(**words)
                times[kind].append(time.perf_counter() - began)

        benchmark.pedantic(a_pair, rounds=rounds, warmup_rounds=2)
        cluster["a"].reappear()
    added = [i - w for w, i in zip(times["well"][2:], times["ill"][2:], strict=True)]
    PAIRED.append(
        f"{illness}: an attempt that fails adds {statistics.median(added) * 1e3:.2f} ms "
        f"(95 %: {sorted(added)[int(len(added) * 0.95)] * 1e3:.2f} ms; "
        f"{sum(attempts)} attempts for {len(attempts)} requests)"
    )


def test_a_black_hole_is_met_once(benchmark: Any, cluster: SimulatedCluster) -> None:
    """The first request waits for the connection, those after it for nothing."""
    first, other = cluster.node_list
    settings = HydraSettings(
        nodes=[first.node(labels=("first",)), other.node()], vram_monitoring=False,
        health_check_interval=3600, verify=False, prefer_label_seconds=600,
        connect_timeout=CONNECT_SECONDS,
    )  # fmt: skip
    times: list[float] = []
    with Router(settings=settings) as router, Client(router=router) as client:
        router.nodes()
        first.vanish()

        def ask() -> None:
            began = time.perf_counter()
            client.chat(MODEL, MESSAGES, prefer_labels="first")
            times.append(time.perf_counter() - began)

        benchmark.pedantic(ask, rounds=50)
        first.reappear()
    PAIRED.append(
        f"black hole, connect_timeout {CONNECT_SECONDS * 1e3:.0f} ms: the first request took "
        f"{times[0] * 1e3:.0f} ms, the 49 after it {statistics.median(times[1:]) * 1e3:.2f} ms "
        f"in the median and {max(times[1:]) * 1e3:.2f} ms at the most"
    )
