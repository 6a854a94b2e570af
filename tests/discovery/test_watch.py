"""The search in the background, alone and in a router."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from queue import Queue
from typing import Any

import pytest

from hydra_llm import HydraSettings, Router
from hydra_llm.discovery import FoundNode, Search, SearchResult
from hydra_llm.discovery.watch import DiscoveryWatch
from hydra_llm.events import Event, NodeDiscovered
from hydra_llm.testing import HangFault, SimulatedCluster, SimulatedNode
from hydra_llm.types import Node
from tests.discovery.conftest import free_port

NOTHING = SearchResult(found=(), asked=0, planned=0, seconds=0.0)
PATIENCE = 20.0


class Rounds:
    """Searches that find nothing, and pauses that end when the test says so."""

    def __init__(self) -> None:
        self.searched: Queue[Search] = Queue()
        self.paused: Queue[tuple[float, asyncio.AbstractEventLoop, asyncio.Event]] = Queue()

    async def run(self, plan: Search) -> SearchResult:
        self.searched.put(plan)
        return NOTHING

    async def sleep(self, seconds: float) -> None:
        over = asyncio.Event()
        self.paused.put((seconds, asyncio.get_running_loop(), over))
        await over.wait()

    def go_on(self) -> float:
        seconds, loop, over = self.paused.get(timeout=PATIENCE)
        loop.call_soon_threadsafe(over.set)
        return seconds


def watch(rounds: Rounds, **about: Any) -> DiscoveryWatch:
    given = {"plan": Search, "on_result": lambda _: None, "run": rounds.run, **about}
    return DiscoveryWatch(**given, interval_seconds=600.0, sleep=rounds.sleep)


def test_it_searches_again_after_each_pause() -> None:
    rounds, results = Rounds(), Queue[SearchResult]()
    one = watch(rounds, on_result=results.put)
    assert repr(one) == "<DiscoveryWatch not started>"
    one.start()
    one.start()
    try:
        for _ in range(3):
            assert results.get(timeout=PATIENCE) is NOTHING
            assert rounds.go_on() == 600.0
        assert repr(one) == "<DiscoveryWatch running>"
    finally:
        one.stop()
    assert repr(one) == "<DiscoveryWatch stopped>"


@pytest.mark.parametrize("where", ["plan", "run", "on_result"])
def test_a_search_that_fails_does_not_end_it(where: str, caplog: pytest.LogCaptureFixture) -> None:
    rounds, calls = Rounds(), 0
    results = Queue[SearchResult]()

    def fail_once() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError("nothing goes")

    def plan() -> Search:
        if where == "plan":
            fail_once()
        return Search()

    async def run(plan: Search) -> SearchResult:
        if where == "run":
            fail_once()
        return await rounds.run(plan)

    def on_result(result: SearchResult) -> None:
        if where == "on_result":
            fail_once()
        results.put(result)

    one = watch(rounds, plan=plan, run=run, on_result=on_result)
    one.start()
    try:
        rounds.go_on()
        assert results.get(timeout=PATIENCE) is NOTHING
    finally:
        one.stop()
    assert "a search for nodes failed" in caplog.text


def test_stopped_it_gives_up_the_search_under_way() -> None:
    with SimulatedNode("a", host="127.0.0.2") as node:
        node.inject(HangFault(), paths=("/api/version",))
        settings = searching(node.port)
        with Router(free_node(), settings=settings) as router:
            router.start()
            while not node.requests:
                pass
        assert not [t for t in threading.enumerate() if t.name == "hydra-llm-discovery"]


def test_stopped_it_stays_so_and_never_started_it_ends_too() -> None:
    one = watch(Rounds())
    one.stop()
    one.start()
    one.stop()

    assert not [t for t in threading.enumerate() if t.name == "hydra-llm-discovery"]


def test_it_can_be_stopped_from_its_own_thread() -> None:
    rounds, ended = Rounds(), threading.Event()

    def stop(_: SearchResult) -> None:
        one.stop()
        ended.set()

    one = watch(rounds, on_result=stop)
    one.start()

    assert ended.wait(PATIENCE)
    one.stop()


# ------------------------------------------------------------------------ a router


def searching(*ports: int, network: str = "127.0.0.0/28", **about: Any) -> HydraSettings:
    return HydraSettings(
        free_node(),
        discovery_enabled=True,
        discovery_networks=[network],
        discovery_ports=ports,
        **{"vram_monitoring": False, "health_check_interval": 0.2, **about},
    )


def free_node() -> str:
    """Where nobody is."""
    return f"none=http://127.0.0.1:{free_port()}"


@pytest.fixture
def node() -> Iterator[SimulatedNode]:
    with SimulatedNode("a", host="127.0.0.2", speed=200.0) as node:
        yield node


class Discovered:
    """The nodes that were found, as events."""

    def __init__(self) -> None:
        self.events: Queue[NodeDiscovered] = Queue()

    def __call__(self, event: Event) -> None:
        if isinstance(event, NodeDiscovered):
            self.events.put(event)


def test_a_router_takes_in_what_a_search_finds(node: SimulatedNode) -> None:
    told = Discovered()
    with Router(settings=searching(node.port), on_event=told) as router:
        router.start()
        event = told.events.get(timeout=PATIENCE)
        router.refresh()
        decision = router.explain("llama3.2:3b")

        assert (event.url, event.version, event.exporter) == (node.url, "0.32.15", None)
        assert event.node_id == f"127.0.0.2:{node.port}"
        assert decision.selected_node == event.node_id
        assert [one.url for one in router.configured][1:] == [node.url]


def test_requests_do_not_wait_for_a_search(node: SimulatedNode) -> None:
    # Somebody who never answers is on the network too.
    with SimulatedNode("mute", host="127.0.0.3", port=node.port) as mute:
        mute.inject(HangFault(), paths=("/api/version",))
        settings = searching(node.port, network="127.0.0.3/32")
        with Router(node.url, settings=settings) as router:
            while not mute.requests:
                router.start()
            assert router.explain("llama3.2:3b").selected_node is not None
            assert not mute.requests[0].finished


@pytest.mark.parametrize("how", ["found", "added"])
@pytest.mark.parametrize("way", ["sync", "async"])
def test_further_nodes_do_not_cut_short_the_first_look_that_a_request_waits_for(
    node: SimulatedNode, monkeypatch: pytest.MonkeyPatch, how: str, way: str
) -> None:
    def further() -> None:
        if how == "found":
            router._take_in(result(found(f"http://127.0.0.7:{free_port()}")))
        else:
            router.add_nodes(f"http://127.0.0.7:{free_port()}")

    async def first_look(timeout_seconds: float) -> None:
        further()  # ends the collector that is waited for
        await looks_async(timeout_seconds)

    def first_look_sync(timeout_seconds: float) -> None:
        further()
        looks(timeout_seconds)

    with Router(node.url) as router:
        collector = router._collector
        looks, looks_async = collector.wait_first, collector.await_first
        monkeypatch.setattr(collector, "wait_first", first_look_sync)
        monkeypatch.setattr(collector, "await_first", first_look)

        if way == "sync":
            router.wait_until_seen()
        else:
            asyncio.run(router.await_until_seen())

        assert next(one.health for one in router._cluster.nodes()) == "up"
        assert len(router.configured) == 2


def test_a_router_that_is_not_told_to_searches_nothing(node: SimulatedNode) -> None:
    settings = HydraSettings(
        free_node(), discovery_networks=["127.0.0.0/28"], discovery_ports=[node.port]
    )
    with Router(settings=settings) as router:
        router.refresh()
        assert not [t for t in threading.enumerate() if t.name == "hydra-llm-discovery"]

    assert node.requests == []


def test_nothing_is_begun_before_the_router_is_used(node: SimulatedNode) -> None:
    with Router(settings=searching(node.port)):
        assert not [t for t in threading.enumerate() if t.name.startswith("hydra-llm")]


def test_a_forgotten_router_ends_its_search(node: SimulatedNode) -> None:
    router = Router(settings=searching(node.port))
    router.start()
    del router
    gc.collect()
    # The tests' watch sees to it that no thread is left.


def result(*found: FoundNode) -> SearchResult:
    return SearchResult(found=found, asked=1, planned=1, seconds=0.1)


def found(url: str, **about: Any) -> FoundNode:
    return FoundNode(urls=(url,), version="0.32.15", models=(), **about)


def test_what_is_known_or_may_be_is_not_taken_in() -> None:
    with SimulatedCluster([SimulatedNode("a")]) as cluster:
        told = Discovered()
        with Router(cluster.nodes(), on_event=told) as router:
            [known] = router.configured
            router._take_in(
                result(
                    found(known.url),
                    found("http://127.0.0.7:11434", known=(known,)),
                    found("http://127.0.0.8:11434", perhaps_same_as=(known.url,)),
                )
            )

            assert router.configured == (known,)
    assert told.events.empty()


def test_a_name_that_another_node_has_is_not_taken_twice() -> None:
    taken = f"127.0.0.7:{free_port()}"
    with Router(Node(f"http://127.0.0.1:{free_port()}", id=taken)) as router:
        router._take_in(result(found(f"http://{taken}")))

        assert len(router.configured) == 1


def test_a_closed_router_takes_nothing_in() -> None:
    router = Router(free_node())
    router.close()
    router._take_in(result(found("http://127.0.0.7:11434")))

    assert len(router.configured) == 1
