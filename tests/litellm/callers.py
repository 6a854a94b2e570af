"""Clients of a proxy, who ask for everything in every way and do not always stay."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import httpx

from hydra_llm.testing import (
    CutFault,
    ErrorLineFault,
    Fault,
    HangFault,
    ResetFault,
    SimulatedCluster,
    SlowFault,
    StallFault,
    StatusFault,
)
from tests.litellm.conftest import HELLO, OTHER

CALLS = 500
AT_ONCE = 30
PATIENCE_SECONDS = 1.5
"""What the proxy is given for an attempt by those who are in no hurry."""

FAULTS: dict[Fault, float] = {
    StatusFault(500): 0.03,
    ResetFault(): 0.03,
    ResetFault(after=2): 0.03,
    CutFault(after=1): 0.02,
    ErrorLineFault(): 0.02,
    ErrorLineFault(after=2): 0.03,
    HangFault(): 0.02,
}
"""How often each strikes a request to a node."""

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "qwen3", "messages": HELLO},
    "/v1/completions": {"model": "qwen3", "prompt": "Hello"},
    "/v1/embeddings": {"model": "embed", "input": ["Hello"]},
    "/v1/responses": {"model": "qwen3", "input": "Hello"},
    "/v1/messages": {"model": "qwen3", "messages": HELLO},
}
LIMIT_OF_TOKENS = {"/v1/responses": "max_output_tokens"}


class Callers:
    """
    Ask a proxy, many at a time.

    Args:
        url: the proxy's.
        rng: what is asked, how, and who leaves when.

    Attributes:
        ends: how the calls ended, for their clients.
    """

    def __init__(self, url: str, rng: random.Random) -> None:
        self._rng = rng
        self._url = url
        self.ends: Counter[str] = Counter()

    async def ask(self, calls: int) -> None:
        """All of them, to their ends."""
        turns = asyncio.Semaphore(AT_ONCE)
        limits = httpx.Limits(max_keepalive_connections=AT_ONCE)
        async with httpx.AsyncClient(
            base_url=self._url, timeout=30, limits=limits, headers={"Authorization": "Bearer sk-x"}
        ) as client:

            async def one(path: str) -> None:
                async with turns:
                    self.ends[await self._call(client, path)] += 1

            await asyncio.gather(*(one(self._rng.choice(list(BODIES))) for _ in range(calls)))

    async def _call(self, client: httpx.AsyncClient, path: str) -> str:
        rng = self._rng
        is_stream = path != "/v1/embeddings" and rng.random() < 0.5
        leaves_after = rng.uniform(0.0, 0.6) if rng.random() < 0.2 else None
        parts = rng.randint(0, 3) if is_stream and rng.random() < 0.3 else None
        body = dict(BODIES[path])
        if path != "/v1/embeddings":
            body |= {
                "stream": is_stream,
                LIMIT_OF_TOKENS.get(path, "max_tokens"): rng.randint(3, 15),
            }
            if leaves_after is not None or parts is not None:
                body["model"] = rng.choice(("qwen3", "other"))  # the other one falls silent
        limit = rng.uniform(0.02, 0.3) if rng.random() < 0.15 else PATIENCE_SECONDS
        headers = {"x-litellm-timeout": f"{limit}", "x-litellm-stream-timeout": f"{limit}"}
        request = client.build_request("POST", path, json=body, headers=headers)
        try:
            return await asyncio.wait_for(self._read(client, request, parts), leaves_after)
        except asyncio.TimeoutError:
            return "left before the end"
        except httpx.HTTPError as error:
            return type(error).__name__

    @staticmethod
    async def _read(client: httpx.AsyncClient, request: httpx.Request, parts: int | None) -> str:
        answer = await client.send(request, stream=True)
        try:
            text = ""
            read = 0
            async for line in answer.aiter_lines():
                if read == parts:
                    return "left a stream"
                text += line
                read += line.startswith("data:")
        finally:
            await answer.aclose()
        if answer.status_code == 200 and '"error"' in text:
            return "broken stream"
        return str(answer.status_code)


async def trouble(cluster: SimulatedCluster, rng: random.Random) -> None:
    """Until it is cancelled: now a node dies, now one stands still, now one is slow."""
    for node in cluster:
        for fault, probability in FAULTS.items():
            node.inject(fault, probability=probability)
        node.inject(StallFault(after=2), models=(OTHER,))
    try:
        while True:
            node = rng.choice(cluster.node_list)
            node.inject(SlowFault(factor=rng.choice((100.0, 400.0))))
            await asyncio.sleep(rng.uniform(0.3, 1.0))
            node = rng.choice(cluster.node_list)
            if rng.random() < 0.5:
                node.kill()
                await asyncio.sleep(rng.uniform(0.1, 0.5))
                node.revive()
            else:
                node.freeze()
                await asyncio.sleep(rng.uniform(0.1, 0.5))
                node.thaw()
    finally:
        for node in cluster:
            node.thaw()
            node.revive()
            node.clear_faults()
