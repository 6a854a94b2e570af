"""The virtual world: time that is counted, and a network that says what sockets say."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hydra_llm import AsyncClient, Client, ConfigurationError, HydraSettings, Router
from hydra_llm.exceptions import AllNodesFailedError, HydraError, NodeError, StreamBrokenError
from hydra_llm.testing import (
    Behaviour,
    CutFault,
    Fault,
    HangFault,
    HtmlFault,
    ResetFault,
    SimulatedCluster,
    SimulatedModel,
    SimulatedNode,
    SlowFault,
    SlowLorisFault,
    StallFault,
    StatusFault,
    TokenFault,
    VirtualCluster,
)
from tests.helpers import LLAMA

DAY = 86_400.0
ROOT = Path(__file__).parents[2]


def router_of(world: VirtualCluster, **settings: Any) -> Router:
    given = HydraSettings(world.nodes(), keep_rates=False, random_seed=1, **settings)
    return Router(settings=given, world=world)


async def chat(router: Router, model: str = LLAMA, **keywords: Any) -> str:
    """A streamed answer; whatever is raised has the text so far as ``heard``."""
    client = AsyncClient(router=router)
    messages = [{"role": "user", "content": "Hi"}]
    text = ""
    try:
        async for part in await client.chat(model, messages=messages, stream=True, **keywords):
            text += part.message.content
    except HydraError as error:
        vars(error)["heard"] = text
        raise
    return text


def test_a_day_passes_at_once() -> None:
    began = time.monotonic()
    with VirtualCluster([SimulatedNode("a")]) as world:
        world.run(asyncio.sleep(DAY))
        assert world.now == DAY
        assert world.wall_clock() - world.clock() == 1_790_000_000.0
    assert time.monotonic() - began < 5.0


def slowly() -> str:
    time.sleep(0.02)
    return "found"


def test_what_a_thread_does_takes_no_virtual_time() -> None:
    async def work() -> str:
        alarm = asyncio.create_task(asyncio.sleep(3600))
        found = await asyncio.to_thread(slowly)
        assert not alarm.done()
        alarm.cancel()
        return found

    with VirtualCluster([]) as world:
        assert world.run(work()) == "found"
        assert world.now == 0.0


def test_a_world_in_which_everybody_waits_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydra_llm.simulation.virtual_loop._STUCK_S", 0.01)
    with VirtualCluster([]) as world:
        with pytest.raises(RuntimeError, match="everybody waits"):
            world.run(asyncio.Event().wait())


def test_a_world_in_which_time_stands_still_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydra_llm.simulation.virtual_loop._MOST_TURNS", 1000)

    async def restless() -> None:
        while True:
            await asyncio.sleep(0)

    with VirtualCluster([]) as world:
        with pytest.raises(RuntimeError, match="stands still"):
            world.run(restless())


def test_an_answer_takes_the_virtual_time_that_the_model_takes() -> None:
    # 2 GB at 2 GB/s and half a second: a load of 1.5 s; 400 GB/s reads them 200 times a second.
    model = SimulatedModel("m", size_gb=2.0)
    with VirtualCluster([SimulatedNode("a", models=[model], token_output=64)]) as world:
        router = router_of(world)

        async def work() -> float:
            began = world.now
            await chat(router, "m")
            cold = world.now - began
            began = world.now
            await chat(router, "m")
            assert cold - (world.now - began) == pytest.approx(1.5, abs=0.05)
            await router.aclose()
            return cold

        assert world.run(work()) == pytest.approx(1.5 + 65 * 0.005, rel=0.1)
        assert world["a"].load_count == 1


def test_a_loaded_model_expires_in_virtual_time_and_the_probes_see_it() -> None:
    with VirtualCluster([SimulatedNode("a", keep_alive_s=300)]) as world:
        router = router_of(world)

        async def work() -> None:
            await chat(router)
            await asyncio.sleep(290)
            (node,) = router.nodes()
            (seen,) = node.loaded.values()
            assert seen.keep_alive_seconds == 300.0
            await asyncio.sleep(20)
            assert router.nodes()[0].loaded == {}
            await router.aclose()

        world.run(work())


def test_sync_doors_are_refused_in_a_world_without_sockets() -> None:
    with VirtualCluster([SimulatedNode("a")]) as world:
        router = router_of(world)
        world.run(router.await_until_seen())
        with pytest.raises(ConfigurationError, match="async doors only"):
            Client(router=router).chat(LLAMA, messages=[{"role": "user", "content": "Hi"}])
        world.run(router.aclose())


def test_two_nodes_of_one_port_are_refused() -> None:
    nodes = [SimulatedNode("a", port=7), SimulatedNode("b", port=7)]
    with pytest.raises(OSError, match="in use"), VirtualCluster(nodes):
        pass
    with pytest.raises(ValueError, match="two nodes have one id"):
        VirtualCluster([SimulatedNode("a"), SimulatedNode("a")])


def test_a_world_that_is_closed_early_leaves_nothing() -> None:
    world = VirtualCluster([SimulatedNode("a")]).start()
    router = router_of(world)
    world.run(router.await_until_seen())
    task = world.loop.create_task(chat(router))
    world.run(asyncio.sleep(0.1))
    world.close()
    assert task.cancelled()
    assert world["a"].in_flight == 0
    router.close()


# ------------------------------------------------------- the same as over sockets

Doing = Callable[[SimulatedNode], object]


def faulty(fault: Fault) -> Doing:
    return lambda node: node.inject(fault)


TROUBLES: dict[str, Doing] = {
    "killed": SimulatedNode.kill,
    "500": faulty(StatusFault(500)),
    "503": faulty(StatusFault(503, retry_after=2)),
    "404": faulty(StatusFault(404, text="model 'x' not found")),
    "401": faulty(StatusFault(401)),
    "HTML": faulty(HtmlFault()),
    "reset at once": faulty(ResetFault()),
    "reset after the head": faulty(ResetFault(after=0)),
    "reset in the middle": faulty(ResetFault(after=3)),
    "cut": faulty(CutFault(after=3)),
    "killed in the middle": faulty(TokenFault(after=3)),
    "hangs": faulty(HangFault()),
    "stalls": faulty(StallFault(after=3)),
    "frozen": SimulatedNode.freeze,
}
SETTINGS = {"first_byte_timeout": 1.0, "stream_idle_timeout": 0.5}


async def outcome(router: Router, trouble: Doing, node: SimulatedNode) -> tuple[str, ...]:
    await router.await_until_seen()
    trouble(node)
    try:
        await chat(router)
    except (NodeError, AllNodesFailedError) as error:
        told = (type(error).__name__, str(error), getattr(error, "heard", ""))
        causes = [f"{a.outcome}: {a.error}" for a in getattr(error, "attempts", ())]
        assert router.in_flight == 0
        return (*told, *causes)
    finally:
        node.thaw()
        await router.aclose()
    return ("answered",)


@pytest.mark.parametrize("name", TROUBLES)
def test_the_virtual_network_says_what_sockets_say(name: str) -> None:
    def node() -> SimulatedNode:
        made = SimulatedNode("a", speed=50)
        made.preload(LLAMA)
        return made

    trouble = TROUBLES[name]
    with VirtualCluster([node()]) as world:
        virtual = world.run(outcome(router_of(world, **SETTINGS), trouble, world["a"]))
    with SimulatedCluster([node()]) as cluster:
        given = HydraSettings(cluster.nodes(local=False), keep_rates=False, **SETTINGS)
        real = asyncio.run(outcome(Router(settings=given), trouble, cluster["a"]))

    assert virtual != ("answered",)
    assert virtual == real


Change = Callable[[VirtualCluster], None]


@pytest.mark.parametrize(
    ("broken", "mended", "seconds", "reason"),
    [
        (
            lambda world: world["a"].vanish(),
            lambda world: world["a"].reappear(),
            5.0,
            "timed out",
        ),
        (
            lambda world: world.set_way("a", "no route"),
            lambda world: world.set_way("a", "open"),
            0.0,
            "no route to host",
        ),
        (
            lambda world: world.set_way("a", "unknown host"),
            lambda world: world.set_way("a", "open"),
            0.0,
            "unknown host name",
        ),
    ],
)
def test_a_broken_way_costs_its_time_and_is_named(
    broken: Change, mended: Change, seconds: float, reason: str
) -> None:
    with VirtualCluster([SimulatedNode("a")]) as world:
        router = router_of(world)

        async def work() -> None:
            await router.await_until_seen()
            broken(world)
            began = world.now
            with pytest.raises(AllNodesFailedError, match=reason):
                await chat(router)
            assert world.now - began == pytest.approx(seconds, abs=0.01)
            mended(world)
            await asyncio.sleep(10)
            assert await chat(router)
            await router.aclose()

        world.run(work())


# ------------------------------------------------------------------- once more

STORY = """
import asyncio
from tests.simulation.test_virtual import story
print(story(7))
"""


def story(seed: int) -> str:
    """What became of some requests, down to the last digit."""
    models = (LLAMA, "qwen3:8b", "gemma3:12b")
    nodes = [
        SimulatedNode(name, models=models, vram_gb=gb)
        for name, gb in (("a", 24), ("b", 8), ("c", 24))
    ]
    told: list[str] = []
    with VirtualCluster(nodes) as world:
        settings = HydraSettings(world.nodes(), keep_rates=False, random_seed=seed)
        router = Router(
            settings=settings,
            world=world,
            on_decision=lambda d: told.append(f"{d.selected_node} {d.actual} {d.predicted}"),
            on_event=lambda event: told.append(str(event)),
        )

        async def work() -> None:
            tasks = []
            for number in range(60):
                await asyncio.sleep(0.7)
                tasks.append(asyncio.ensure_future(chat(router, models[number % 3])))
                if number == 20:
                    world["a"].inject(StatusFault(500), probability=0.5)
                    world["b"].inject(SlowFault(3.0))
                if number == 40:
                    world["b"].kill()
            for one in await asyncio.gather(*tasks, return_exceptions=True):
                told.append(str(one))
            await router.aclose()

        world.run(work())
        told.append(repr(world.now))
    return "\n".join(told)


def test_a_run_can_be_repeated_in_another_process() -> None:
    told = [
        subprocess.run(
            [sys.executable, "-c", STORY],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert told[0].count("\n") > 100
    assert told[0] == told[1]
    assert story(7) + "\n" == told[0]
    assert story(8) + "\n" != told[0]


def test_a_stream_that_breaks_off_is_the_beginning_of_the_answer() -> None:
    with VirtualCluster([SimulatedNode("a")]) as world:
        router = router_of(world)

        async def work() -> None:
            whole = await chat(router)
            world["a"].inject(TokenFault(after=5), times=1)
            parts: list[str] = []
            client = AsyncClient(router=router)
            with pytest.raises(StreamBrokenError):
                async for part in await client.chat(
                    LLAMA, messages=[{"role": "user", "content": "Hi"}], stream=True
                ):
                    parts.append(part.message.content)
            assert "".join(parts)
            assert whole.startswith("".join(parts))
            await router.aclose()

        world.run(work())


def test_a_node_remembers_as_many_requests_as_it_is_told_to() -> None:
    with VirtualCluster([SimulatedNode("a", keep_requests=5)]) as world:
        router = router_of(world)

        async def work() -> None:
            asked = [asyncio.ensure_future(chat(router)) for _ in range(7)]
            await asyncio.sleep(0.1)
            assert len(world["a"].requests) == 5
            await asyncio.gather(*asked)
            await asyncio.sleep(60)
            await router.aclose()

        world.run(work())
        assert len(world["a"].requests) == 5
        assert world["a"].in_flight == 0
        # One at work, and one of the usual priority behind it.
        assert world["a"].peaks == {LLAMA: 2}


def test_bytes_that_drip_have_an_end_here_too() -> None:
    with VirtualCluster([SimulatedNode("a"), SimulatedNode("b")]) as world:
        settings = HydraSettings(nodes=world.nodes(), first_byte_timeout=30.0, random_seed=1)
        router = Router(settings=settings, world=world)
        world["a"].inject(SlowLorisFault(after=0, pause_s=5.0))

        async def ask() -> Any:
            async with router, AsyncClient(router=router) as client:
                answer = await client.chat(
                    LLAMA, [{"role": "user", "content": "Hi"}], node_id="a", stream=True
                )
                return [part async for part in answer][-1].routing_decision

        decision = world.run(ask())
        assert [a.outcome for a in decision.attempts] == ["timeout", "ok"]
        assert 29.0 < decision.attempts[0].seconds < 40.0


@pytest.mark.parametrize(("several", "parts"), [(1, 100), (16, 9)])
def test_tokens_that_come_several_at_a_time_take_as_long(several: int, parts: int) -> None:
    model = SimulatedModel("long:7b", size_gb=4.0, behaviour=Behaviour(kind="length"))
    with VirtualCluster([SimulatedNode("a", models=[model], tokens_per_part=several)]) as world:

        async def ask() -> tuple[list[Any], float]:
            told, first = [], 0.0
            async with router_of(world) as router, AsyncClient(router=router) as client:
                messages = [{"role": "user", "content": "Say it in 100"}]
                async for part in await client.chat("long:7b", messages, stream=True):
                    first = first or world.now
                    told.append(part)
            return told, world.now - first

        told, seconds = world.run(ask())
        assert seconds == pytest.approx(99 * 0.01)
        assert told[-1].eval_count == 100
        assert len("".join(part.message.content for part in told).split()) == 99
        assert len(told) == parts
        assert max(request.tokens for request in world["a"].requests) == 100


def test_a_decision_is_explained_by_what_was_known_when_it_was_made() -> None:
    models = [SimulatedModel("one:7b", size_gb=5.0), SimulatedModel("other:7b", size_gb=5.0)]
    with VirtualCluster([SimulatedNode("a", models=models, vram_gb=8.0)]) as world:

        async def work() -> None:
            async with router_of(world) as router:
                await chat(router, "one:7b")
                await asyncio.sleep(10.0)
                now, later = router.explain("other:7b"), router.explain("other:7b")
                costs = [candidate.costs for candidate in now.candidates]
                assert costs[0]["eviction"] > 0.0

                for _ in range(5):
                    await chat(router, "one:7b")
                assert [candidate.costs for candidate in later.candidates] == costs
                [fresh] = router.explain("other:7b").candidates
                assert fresh.costs["eviction"] > costs[0]["eviction"]

        world.run(work())
