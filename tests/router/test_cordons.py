"""A node is taken out of use without anybody noticing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hydra_llm import Client, ConfigurationError, NoEligibleNodeError, Router
from hydra_llm.testing import SimulatedCluster
from tests.router.conftest import MODEL, make_router

MESSAGES = [{"role": "user", "content": "Hello"}]


def until(condition: Callable[[], object]) -> None:
    """Wait for another thread; pytest-timeout is the limit."""
    while not condition():
        time.sleep(0.005)


def cordoned(router: Router) -> list[str]:
    return [node.id for node in router.nodes() if node.cordoned]


def test_nothing_new_comes_and_streams_go_on(cluster: SimulatedCluster, router: Router) -> None:
    with Client(router=router) as client:
        parts = client.chat(MODEL, MESSAGES, stream=True, node_id="a")
        next(parts)
        router.cordon("a")
        answer = client.chat(MODEL, MESSAGES, node_id="a")
        assert answer.node_id != "a"
        assert "a: cordoned" in answer.routing_decision.reason or answer.routing_decision.warnings
        with pytest.raises(NoEligibleNodeError, match="a: cordoned"):
            client.chat(MODEL, MESSAGES, node_id="a", pin="require")
        assert list(parts)[-1].done

        router.uncordon("a")
        assert client.chat(MODEL, MESSAGES, node_id="a").node_id == "a"


def test_draining_waits_for_what_is_under_way(cluster: SimulatedCluster, router: Router) -> None:
    with Client(router=router) as client:
        parts = client.chat(MODEL, MESSAGES, stream=True, node_id="a")
        next(parts)
        assert router.drain("a", timeout=0.0) is False
        assert cordoned(router) == ["a"]

        drained: list[bool] = []
        waiting = threading.Thread(target=lambda: drained.append(router.drain("a")))
        waiting.start()
        assert list(parts)[-1].done
        waiting.join()

    assert drained == [True]
    assert router.drain("b", timeout=0.0) is True


async def test_draining_in_an_event_loop(cluster: SimulatedCluster, router: Router) -> None:
    with Client(router=router) as client:
        parts = client.chat(MODEL, MESSAGES, stream=True, node_id="a")
        next(parts)
        assert await router.adrain("a", timeout=0.0) is False
        draining = asyncio.create_task(router.adrain("a"))
        await asyncio.sleep(0)
        assert not draining.done()
        await asyncio.to_thread(list, parts)
        assert await draining is True


@pytest.mark.parametrize("when", ["before", "while it runs"])
def test_one_router_tells_the_others(cluster: SimulatedCluster, tmp_path: Path, when: str) -> None:
    about: dict[str, Any] = {"state_dir": tmp_path, "keep_rates": False}
    with make_router(cluster, **about) as teller, make_router(cluster, **about) as other:
        if when == "while it runs":
            assert cordoned(other) == []
        teller.cordon("a", for_all=True)
        assert cordoned(teller) == ["a"]
        if when == "before":
            assert cordoned(other) == ["a"]
        until(lambda: cordoned(other) == ["a"])
        with make_router(cluster, **about) as later:
            assert cordoned(later) == ["a"]

        other.uncordon("a", for_all=True)
        assert cordoned(other) == []
        until(lambda: cordoned(teller) == [])


def test_without_a_place_to_tell_it_says_so(router: Router) -> None:
    with pytest.raises(ConfigurationError, match="set state_dir or redis_url"):
        router.cordon("a", for_all=True)


def test_a_folder_that_cannot_be_written_is_told(cluster: SimulatedCluster, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with make_router(cluster, state_dir=tmp_path / "file" / "folder", keep_rates=False) as router:
        with pytest.raises(ConfigurationError, match="other routers cannot be told of a"):
            router.cordon("a", for_all=True)


@pytest.mark.parametrize("verb", ["cordon", "uncordon", "drain"])
def test_an_unknown_node_is_an_error(router: Router, verb: str) -> None:
    with pytest.raises(ConfigurationError, match="no configured node is called 'nobody'"):
        getattr(router, verb)("nobody")
