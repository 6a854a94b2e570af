"""What a request costs on top of the plain ``ollama`` client, in pairs. No assertions."""

from __future__ import annotations

import asyncio
import functools
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import ollama
import pytest

from hydra_llm import AsyncClient, Client, Router
from tests.benchmarks.conftest import PAIRED
from tests.benchmarks.serve import MODEL

MESSAGES = [{"role": "user", "content": "Hello"}]
ROUNDS = 400


def report(name: str, plain: list[float], hydra: list[float]) -> None:
    difference = statistics.median(h - p for p, h in zip(plain, hydra, strict=True)) * 1e3
    PAIRED.append(
        f"{name}: ollama {statistics.median(plain) * 1e3:.3f} ms, "
        f"hydra {statistics.median(hydra) * 1e3:.3f} ms, "
        f"median of the paired differences {difference:+.3f} ms"
    )


def timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


@pytest.mark.leaks(reason="the nodes and the router live as long as the module")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_overhead_of_a_sync_request(
    benchmark: Any, urls: list[str], router: Router, stream: bool
) -> None:
    plain, hydra = ollama.Client(urls[0]), Client(router=router, node_id="a")
    times: dict[str, list[float]] = {"plain": [], "hydra": []}

    def ask(client: Any) -> object:
        answer = client.chat(MODEL, MESSAGES, stream=stream)
        return list(answer) if stream else answer

    def a_pair() -> None:
        pair = [("plain", plain), ("hydra", hydra)]
        random.shuffle(pair)
        for name, client in pair:
            times[name].append(timed(functools.partial(ask, client)))

    benchmark.pedantic(a_pair, rounds=ROUNDS, warmup_rounds=30)
    kind = "stream of 15 parts" if stream else "whole answer"
    report(f"sync, {kind}", times["plain"][30:], times["hydra"][30:])
    plain._client.close()
    hydra.close()


@pytest.mark.leaks(reason="the nodes and the router live as long as the module")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_overhead_of_an_async_request(
    benchmark: Any, urls: list[str], router: Router, stream: bool
) -> None:
    async def ask(client: Any) -> float:
        began = time.perf_counter()
        answer = await client.chat(MODEL, MESSAGES, stream=stream)
        if stream:
            async for _ in answer:
                pass
        return time.perf_counter() - began

    async def pairs() -> None:
        plain, hydra = ollama.AsyncClient(urls[0]), AsyncClient(router=router, node_id="a")
        times: dict[str, list[float]] = {"plain": [], "hydra": []}
        for _ in range(ROUNDS + 30):
            pair = [("plain", plain), ("hydra", hydra)]
            random.shuffle(pair)
            for name, client in pair:
                times[name].append(await ask(client))
        kind = "stream of 15 parts" if stream else "whole answer"
        report(f"async, {kind}", times["plain"][30:], times["hydra"][30:])
        await plain._client.aclose()
        await hydra.close()

    benchmark.pedantic(lambda: asyncio.run(pairs()), rounds=1)
