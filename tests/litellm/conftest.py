"""A small cluster, LiteLLM's router over it, and a watch on what we leave behind."""

from __future__ import annotations

import os

# Else the import asks the internet for prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import asyncio
import gc
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import litellm
import pytest

from hydra_llm import Router
from hydra_llm.integrations.litellm import HydraRoutingStrategy, install, uninstall
from hydra_llm.testing import SimulatedCluster, SimulatedModel
from tests.router.conftest import make_nodes, make_router, preloaded

litellm.suppress_debug_info = True

LiteRouter: TypeAlias = Any
"""A `litellm.Router`; its own types do not fit what it takes."""

CHAT = "qwen3:8b"
OTHER = "llama3.2:3b"
EMBEDDING = "nomic-embed-text"
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
SPEED = 500.0

ABLE = SimulatedModel(
    CHAT, size_gb=5.2, capabilities=("completion", "tools", "thinking"), family="qwen3"
)


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """LiteLLM keeps threads and sessions of its own; `ours_is_gone` looks for ours."""
    here = os.path.dirname(__file__)  # noqa: PTH120
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.leaks(reason="LiteLLM's own threads and sessions stay"))
            # Its deprecations, of pydantic and of its own members, are its authors' business.
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::UserWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))
            item.add_marker(
                pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
            )


@pytest.fixture(autouse=True)
def ours_is_gone() -> Iterator[None]:
    """Watch our threads; sockets and leases are looked at where the cluster is closed."""
    yield
    deadline = time.monotonic() + 3
    while found := [t.name for t in threading.enumerate() if t.name.startswith("hydra-llm")]:
        assert time.monotonic() < deadline, f"left behind: {found}"
        time.sleep(0.01)
    # What LiteLLM leaves open would else be found, and blamed, in some later test.
    litellm.in_memory_llm_clients_cache.flush_cache()
    gc.collect()


@contextmanager
def loaded_cluster(**about: Any) -> Iterator[SimulatedCluster]:
    """Three equal nodes a, b and c with every model loaded."""
    given: dict[str, Any] = {"models": (ABLE, OTHER, EMBEDDING), "speed": SPEED, **about}
    with preloaded(make_nodes("a", "b", "c", **given), CHAT, OTHER, EMBEDDING) as cluster:
        yield cluster


@pytest.fixture
def cluster() -> Iterator[SimulatedCluster]:
    with loaded_cluster() as cluster:
        yield cluster


@pytest.fixture
def hydra(cluster: SimulatedCluster) -> Iterator[Router]:
    """The core's router; nothing may be left on it, nor on the nodes."""
    with make_router(cluster) as router:
        yield router
        until(lambda: not router.in_flight and not router.waiting)
        until(lambda: not any(node.in_flight for node in cluster))


@pytest.fixture
def strategy(hydra: Router) -> Iterator[HydraRoutingStrategy]:
    """Ours, among LiteLLM's callbacks while the test runs."""
    strategy = HydraRoutingStrategy(hydra)
    yield strategy
    uninstall(strategy)


@pytest.fixture
def routed(cluster: SimulatedCluster, strategy: HydraRoutingStrategy) -> LiteRouter:
    """LiteLLM's router with the groups `chat` and `embed`, routed by us."""
    router = litellm.Router(
        model_list=[*deployments(cluster), *deployments(cluster, "embed", f"ollama/{EMBEDDING}")],
        num_retries=2,
    )
    install(router, strategy)
    return router


def lite_router(**settings: Any) -> LiteRouter:
    return litellm.Router(**settings)


def deployments(
    cluster: SimulatedCluster,
    group: str = "chat",
    model: str = f"ollama_chat/{CHAT}",
    **params: Any,
) -> list[dict[str, Any]]:
    """A `model_list`: one line for each node, whose id is `<group>-<node>`."""
    return [
        {
            "model_name": group,
            "litellm_params": {"model": model, "api_base": node.url, **params},
            "model_info": {"id": f"{group}-{node.id}"},
        }
        for node in cluster
    ]


def until(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for something that comes by itself."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"never came: {inspect.getsource(holds).strip()}"
        time.sleep(0.005)


async def auntil(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    """As `until`, on an event loop."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"never came: {inspect.getsource(holds).strip()}"
        await asyncio.sleep(0.005)


def asked(cluster: SimulatedCluster, *paths: str) -> dict[str, int]:
    """How many requests to models each node has had."""
    paths = paths or ("/api/chat", "/api/generate", "/api/embed")
    return {node.id: sum(r.path in paths for r in node.requests) for node in cluster}


def total(counts: dict[str, int]) -> int:
    return sum(counts.values())


def bodies(cluster: SimulatedCluster) -> list[Any]:
    """What was sent to models, by any node."""
    return [
        r.body
        for node in cluster
        for r in node.requests
        if r.path in ("/api/chat", "/api/generate", "/api/embed")
    ]
