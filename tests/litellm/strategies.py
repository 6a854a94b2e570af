"""
Requests lost with one of three nodes dead, by each of LiteLLM's strategies and by ours.

    python -m tests.litellm.strategies

Prints the table of `docs/litellm.md`: 60 requests one after the other, `num_retries=1`, the dead
node in each position.
"""

from __future__ import annotations

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # before LiteLLM is imported

import asyncio
import logging
from typing import Any

import litellm

from hydra_llm.integrations.litellm import HydraRoutingStrategy, install, uninstall
from tests.litellm.conftest import HELLO, deployments, lite_router, loaded_cluster
from tests.router.conftest import make_router

REQUESTS = 60
STRATEGIES = (
    "simple-shuffle",
    "least-busy",
    "latency-based-routing",
    "usage-based-routing-v2",
    "cost-based-routing",
    "hydra",
)


async def lost(strategy: str, dead: str) -> int:
    """Count the requests whose caller sees an error."""
    failed = 0
    with loaded_cluster() as cluster, make_router(cluster) as hydra:
        cluster[dead].kill()
        name = "simple-shuffle" if strategy == "hydra" else strategy
        router = lite_router(model_list=deployments(cluster), num_retries=1, routing_strategy=name)
        ours = HydraRoutingStrategy(hydra)
        if strategy == "hydra":
            install(router, ours)
        for _ in range(REQUESTS):
            try:
                await router.acompletion("chat", HELLO, max_tokens=5)
            except Exception:
                failed += 1
        uninstall(ours)
    return failed


async def main() -> None:
    logging.disable(logging.CRITICAL)
    print(f"litellm {_version()}: of {REQUESTS} requests, lost with the node dead in position")
    print(f"{'strategy':<24} {'1':>4} {'2':>4} {'3':>4}")
    for strategy in STRATEGIES:
        counts: list[Any] = [await lost(strategy, dead) for dead in "abc"]
        print(f"{strategy:<24} {counts[0]:>4} {counts[1]:>4} {counts[2]:>4}", flush=True)


def _version() -> str:
    from importlib.metadata import version

    return version("litellm")


if __name__ == "__main__":
    litellm.suppress_debug_info = True
    asyncio.run(main())
