"""What our choice costs inside LiteLLM, beside its simple-shuffle, in pairs. No assertions."""

from __future__ import annotations

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import asyncio
import gc
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import litellm
import pytest
from litellm.integrations.custom_logger import CustomLogger

from hydra_llm import HydraSettings, Node, Router
from hydra_llm.integrations.litellm import HydraRoutingStrategy, install, uninstall
from hydra_llm.testing import SimulatedCluster, SimulatedNode
from tests.benchmarks.conftest import PAIRED
from tests.benchmarks.serve import MODEL
from tests.litellm.conftest import LiteRouter, lite_router

pytestmark = [
    pytest.mark.leaks(reason="LiteLLM's own threads and sessions stay"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.timeout(300),
]
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
ROUNDS = 300
WARM_UP = 40


def model_list(urls: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "model_name": "chat",
            "litellm_params": {"model": f"ollama_chat/{MODEL}", "api_base": url},
            "model_info": {"id": str(number)},
        }
        for number, url in enumerate(urls)
    ]


class Nothing(CustomLogger):  # type: ignore[misc]
    """A callback that leaves every choice to LiteLLM: what being asked costs by itself."""

    async def async_filter_deployments(self, *args: Any, **named: Any) -> Any:
        return named["healthy_deployments"] if "healthy_deployments" in named else args[1]


@contextmanager
def instead_of(strategy: HydraRoutingStrategy, *others: CustomLogger) -> Iterator[None]:
    """Have other callbacks in our place, or none."""
    litellm.callbacks.remove(strategy)
    litellm.callbacks.extend(others)
    try:
        yield
    finally:
        for one in others:
            litellm.callbacks.remove(one)
        litellm.callbacks.append(strategy)


@pytest.fixture(scope="module")
def hundred() -> Iterator[SimulatedCluster]:
    with SimulatedCluster(
        [SimulatedNode(str(n), models=(MODEL,), keep_alive_s=1e9) for n in range(100)]
    ) as many:
        for node in many:
            node.preload(MODEL)
        yield many


@pytest.mark.parametrize("count", [3, 10, 100])
def test_choosing_inside_litellm(benchmark: Any, hundred: SimulatedCluster, count: int) -> None:
    nodes = [Node(node.url, id=node.id, vram_gb=24) for node in list(hundred)[:count]]
    settings = HydraSettings(nodes=nodes, vram_monitoring=False, health_check_interval=600)
    times: dict[str, list[float]] = {"shuffle": [], "nothing": [], "hydra": []}
    nothing = Nothing()
    with Router(settings=settings, clock=time.monotonic) as hydra:
        hydra.refresh(timeout=30)
        plain = lite_router(model_list=model_list([node.url for node in nodes]))
        ours = lite_router(model_list=model_list([node.url for node in nodes]))
        strategy = HydraRoutingStrategy(hydra)
        litellm.callbacks.append(strategy)

        async def choose(router: LiteRouter) -> float:
            request: dict[str, Any] = {"metadata": {}, "litellm_trace_id": str(random.random())}
            began = time.perf_counter()
            await select(router, request)
            spent = time.perf_counter() - began
            request.clear()  # the place is given back
            return spent

        async def both() -> None:
            for _ in range(ROUNDS + WARM_UP):
                for name in random.sample(sorted(times), 3):
                    if name == "hydra":
                        times[name].append(await choose(ours))
                    else:
                        with instead_of(strategy, *([nothing] if name == "nothing" else [])):
                            times[name].append(await choose(plain))

        gc.collect()
        benchmark.pedantic(lambda: asyncio.run(both()), rounds=1)
        uninstall(strategy)
    report(f"choosing among {count} deployments", times)


async def select(router: LiteRouter, request: dict[str, Any]) -> Any:
    if hasattr(router, "select"):
        return await router.select("chat", request, messages=HELLO)
    return await router.async_get_available_deployment("chat", request, messages=HELLO)


@pytest.mark.parametrize("kind", ["whole", "stream"])
def test_a_call_through_litellm(benchmark: Any, urls: list[str], router: Router, kind: str) -> None:
    times: dict[str, list[float]] = {"shuffle": [], "hydra": []}
    plain, ours = (lite_router(model_list=model_list(urls)) for _ in range(2))
    strategy = install(ours, HydraRoutingStrategy(router))

    async def call(one: LiteRouter) -> float:
        began = time.perf_counter()
        answer = await one.acompletion("chat", HELLO, stream=kind == "stream")
        if kind == "stream":
            async for _ in answer:
                pass
        return time.perf_counter() - began

    async def both() -> None:
        for _ in range(ROUNDS + WARM_UP):
            for name in random.sample(("shuffle", "hydra"), 2):
                if name == "hydra":
                    times[name].append(await call(ours))
                else:
                    with instead_of(strategy):
                        times[name].append(await call(plain))

    benchmark.pedantic(lambda: asyncio.run(both()), rounds=1)
    uninstall(strategy)
    report(f"acompletion, {kind}", times)


def report(title: str, times: dict[str, list[float]]) -> None:
    counted = {name: values[WARM_UP:] for name, values in times.items()}
    shuffle = counted.pop("shuffle")
    line = f"{title}: simple-shuffle {statistics.median(shuffle) * 1e3:.3f} ms"
    for name, values in counted.items():
        difference = statistics.median(v - s for s, v in zip(shuffle, values, strict=True))
        line += (
            f"; {name} {statistics.median(values) * 1e3:.3f} ms ({difference * 1e3:+.3f} paired)"
        )
    PAIRED.append(line)
