"""How long choosing a node takes: the scheduler alone, and with the lease. No assertions."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from hydra_llm import HydraSettings, Router
from hydra_llm.scheduling import Moment, Scheduler
from hydra_llm.types import (
    GB,
    Demand,
    InferenceRequest,
    LoadedModel,
    Node,
    NodeSnapshot,
    Observation,
    RunningRequest,
)
from tests.helpers import installed

MODELS = [f"model{i}:latest" for i in range(30)]


def a_node(number: int, loaded: int = 3) -> dict[str, Any]:
    """Node ``number``: 30 models installed, three loaded, up to two requests running."""
    size = 5 * GB
    warm = [MODELS[(3 * number + k) % len(MODELS)] for k in range(loaded)]
    return {
        "node": Node(f"http://n{number}:11434", vram_gb=24),
        "health": "up",
        "installed": installed(*MODELS, capabilities=frozenset({"completion", "tools"})),
        "loaded": {
            name: LoadedModel(name=name, size_bytes=size, size_vram_bytes=size, context_length=4096)
            for name in warm
        },
        "total_vram_bytes": 24 * GB,
        "measured_free_vram_bytes": 9 * GB,
        "running": tuple(
            RunningRequest(
                lease_id=k,
                model=warm[k],
                started_at=0.0,
                expected_seconds=3.0,
                serving_since=0.0,
            )
            for k in range(number % 3)
        ),
    }


def requests() -> Any:
    """Every model in turn, every prompt of another length: nothing to remember."""
    for number in itertools.count():
        yield InferenceRequest(
            model=MODELS[number % len(MODELS)],
            input_tokens=100 + number % 5000,
            interactive=True,
            capabilities=frozenset({"tools"}),
        )


@pytest.mark.benchmark(group="choosing a node")
@pytest.mark.parametrize("count", [3, 100, 1000])
def test_choosing_among_nodes_with_thirty_models(benchmark: Any, count: int) -> None:
    nodes = tuple(NodeSnapshot(**a_node(i)) for i in range(count))
    scheduler, rng, stream = Scheduler(), random.Random(0), requests()
    demand = {name: Demand(per_second=0.01, warm_nodes=2) for name in MODELS}

    def choose(request: InferenceRequest) -> Any:
        return scheduler.schedule(request, nodes, Moment(now=1.0, demand=demand), rng)

    benchmark.pedantic(choose, setup=lambda: ((next(stream),), {}), rounds=3000, warmup_rounds=100)


@pytest.mark.benchmark(group="choosing, leasing and giving back")
@pytest.mark.parametrize("count", [3, 100])
def test_the_whole_of_choosing_leasing_and_releasing(benchmark: Any, count: int) -> None:
    facts = [a_node(i) for i in range(count)]
    router = Router(settings=HydraSettings(nodes=[fact["node"] for fact in facts]))
    ledger, stream = router._cluster, requests()
    for fact in facts:
        ledger.observe(
            Observation(
                node_id=fact["node"].id,
                observed_at=router._clock(),
                health="up",
                installed=fact["installed"],
                loaded=fact["loaded"],
                total_vram_bytes=fact["total_vram_bytes"],
                free_vram_bytes=fact["measured_free_vram_bytes"],
            )
        )

    def lease(request: InferenceRequest) -> None:
        ledger.release(ledger.acquire(request))  # type: ignore[arg-type]  # there is always room

    benchmark.pedantic(lease, setup=lambda: ((next(stream),), {}), rounds=3000, warmup_rounds=100)
    router.close()
