"""What ChatHydra costs on top of ChatOllama, in pairs. No assertions."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
from langchain_ollama import ChatOllama

from hydra_llm import Router
from hydra_llm.integrations.langchain import ChatHydra
from tests.benchmarks.conftest import PAIRED
from tests.benchmarks.serve import MODEL

ROUNDS = 400
WARM_UP = 30


class Pairs:
    """Wall and CPU time of the calling thread, for each of two models."""

    def __init__(self) -> None:
        self.times: dict[str, list[tuple[float, float]]] = {"plain": [], "hydra": []}

    def note(self, name: str, wall: float, cpu: float) -> None:
        self.times[name].append((wall, cpu))

    def report(self, title: str) -> None:
        plain, hydra = (self.times[name][WARM_UP:] for name in ("plain", "hydra"))
        pairs = list(zip(plain, hydra, strict=True))
        wall, cpu = (statistics.median(h[i] - p[i] for p, h in pairs) * 1e3 for i in (0, 1))
        whole = [statistics.median(one[1] for one in times) * 1e3 for times in (plain, hydra)]
        PAIRED.append(
            f"{title}: CPU of ChatOllama {whole[0]:.3f} ms, of ChatHydra {whole[1]:.3f} ms; "
            f"median of the paired differences {cpu:+.3f} ms CPU, {wall:+.3f} ms wall"
        )


def shuffled(plain: Any, hydra: Any) -> list[tuple[str, Any]]:
    pair = [("plain", plain), ("hydra", hydra)]
    random.shuffle(pair)
    return pair


SYNC: dict[str, Callable[[Any], object]] = {
    "invoke": lambda model: model.invoke("Hello"),
    "stream": lambda model: list(model.stream("Hello")),
}


@pytest.mark.leaks(reason="the nodes and the router live as long as the module")
@pytest.mark.parametrize("verb", SYNC)
def test_overhead_of_a_sync_call(
    benchmark: Any, urls: list[str], router: Router, verb: str
) -> None:
    plain = ChatOllama(model=MODEL, base_url=urls[0])
    hydra = ChatHydra(model=MODEL, router=router, node_id="a")
    pairs = Pairs()

    def a_pair() -> None:
        for name, model in shuffled(plain, hydra):
            wall, cpu = time.perf_counter(), time.thread_time()
            SYNC[verb](model)
            pairs.note(name, time.perf_counter() - wall, time.thread_time() - cpu)

    benchmark.pedantic(a_pair, rounds=ROUNDS, warmup_rounds=WARM_UP)
    pairs.report(f"langchain, {verb} of 15 parts")
    plain._client._client.close()


@pytest.mark.leaks(reason="the nodes and the router live as long as the module")
@pytest.mark.parametrize("verb", ["ainvoke", "astream"])
def test_overhead_of_an_async_call(
    benchmark: Any, urls: list[str], router: Router, verb: str
) -> None:
    async def ask(model: Any) -> None:
        if verb == "ainvoke":
            await model.ainvoke("Hello")
        else:
            async for _ in model.astream("Hello"):
                pass

    async def all_pairs() -> None:
        plain = ChatOllama(model=MODEL, base_url=urls[0])
        hydra = ChatHydra(model=MODEL, router=router, node_id="a")
        pairs = Pairs()
        for _ in range(ROUNDS + WARM_UP):
            for name, model in shuffled(plain, hydra):
                wall, cpu = time.perf_counter(), time.thread_time()
                await ask(model)
                pairs.note(name, time.perf_counter() - wall, time.thread_time() - cpu)
        pairs.report(f"langchain, {verb} of 15 parts")
        await plain._async_client._client.aclose()

    benchmark.pedantic(lambda: asyncio.run(all_pairs()), rounds=1)


MADE: dict[str, Callable[[list[str], Router], object]] = {
    "ChatOllama": lambda urls, router: ChatOllama(model=MODEL, base_url=urls[0]),
    "ChatHydra of nodes": lambda urls, router: ChatHydra(model=MODEL, nodes=urls),
    "ChatHydra of a router": lambda urls, router: ChatHydra(model=MODEL, router=router),
    "with_routing": lambda urls, router: ChatHydra(model=MODEL, router=router).with_routing(
        node_id="a"
    ),
}


@pytest.mark.leaks(reason="the nodes and the router live as long as the module")
@pytest.mark.benchmark(group="making a model")
@pytest.mark.parametrize("way", MADE)
def test_making_a_model(benchmark: Any, urls: list[str], router: Router, way: str) -> None:
    benchmark.pedantic(lambda: MADE[way](urls, router), rounds=50, warmup_rounds=5)
