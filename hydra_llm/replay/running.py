"""One run: the requests, the nodes and who chooses, in virtual time or over sockets."""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import httpx
import ollama

from hydra_llm.client import AsyncClient
from hydra_llm.config import HydraSettings
from hydra_llm.exceptions import HydraError
from hydra_llm.replay.clusters import Machines
from hydra_llm.replay.placing import Wanted, place_by_hand
from hydra_llm.replay.policies import RULES, Answered, Rule, Seen, Told
from hydra_llm.replay.sockets import SocketCluster
from hydra_llm.replay.workload import Asked, Prompts
from hydra_llm.router import Router
from hydra_llm.scheduling.moment import Moment
from hydra_llm.simulation.virtual import VirtualCluster
from hydra_llm.types import InferenceRequest, NodeSnapshot, Rejection

__all__ = ["HYDRA", "KNOWING", "POLICIES", "Answer", "Run", "replay"]

HYDRA, KNOWING = "hydra", "hydra-knowing"
"""The real router; and the same, told how long each answer will be."""
POLICIES = (HYDRA, KNOWING, *RULES)

SimulatedWorld: TypeAlias = VirtualCluster | SocketCluster
_PUSHED_OUT = frozenset({"room", "reload", "memory"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """
    What became of one request.

    Args:
        first_s, whole_s: from its arrival to the first token, and to the end.
        predicted, actual: what the router expected, and measured, in seconds by term.
    """

    asked: Asked
    node: str | None
    first_s: float | None
    whole_s: float
    error: str | None = None
    predicted: Mapping[str, float] = field(default_factory=dict)
    actual: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_ok(self) -> bool:
        """Whether it was answered as a whole."""
        return self.error is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All of one run; loads and evictions are counted by the nodes."""

    policy: str
    seed: int
    answers: tuple[Answer, ...]
    loads: int
    load_s: float
    evictions: int
    seconds: float
    """Simulated time until everything was answered."""
    loads_of: Mapping[str, int] = field(default_factory=dict)
    """How often each model was loaded."""

    @property
    def firsts(self) -> list[float]:
        """Seconds to the first token, of answers that got one."""
        return [answer.first_s for answer in self.answers if answer.first_s is not None]


def replay(
    cluster: Machines,
    requests: Sequence[Asked],
    policy: str,
    *,
    seed: int,
    settings: Mapping[str, Any] | None = None,
    speed: float | None = None,
) -> Run:
    """
    Have all requests answered, from cold.

    Args:
        policy: one of `POLICIES`.
        seed: of what the policy draws.
        settings: of the router, beside those that are configured.
        speed: over real sockets, so many times faster than in life; ``None`` is virtual time.
    """
    nodes = cluster.simulated()
    with VirtualCluster(nodes) if speed is None else SocketCluster(nodes, speed=speed) as world:
        opened: AbstractAsyncContextManager[Door] = (
            _hydra(world, cluster, seed, settings or {}, knows_lengths=policy == KNOWING)
            if policy in (HYDRA, KNOWING)
            else _directly(world, cluster, requests, RULES[policy], seed)
        )
        answers, seconds = world.run(_all_answered(world, opened, requests))
        loads = [load for node in world for load in node.loads]
        pushed = [e for node in world for e in node.evictions if e.reason in _PUSHED_OUT]
        return Run(
            policy=policy,
            seed=seed,
            answers=tuple(answers),
            loads=len(loads),
            load_s=sum(load.ended - load.started for load in loads),
            evictions=len(pushed),
            seconds=seconds,
            loads_of={
                model: sum(load.model == model for load in loads) for model in cluster.shares
            },
        )


async def _all_answered(
    world: SimulatedWorld,
    opened: AbstractAsyncContextManager[Door],
    requests: Sequence[Asked],
) -> tuple[list[Answer], float]:
    prompts = Prompts(requests)
    async with opened as door:
        begin, tasks = world.now, []
        for asked in requests:
            await asyncio.sleep(max(0.0, begin + asked.at - world.now))
            tasks.append(asyncio.ensure_future(_answered(world, door, asked, prompts)))
        answers = await asyncio.gather(*tasks)
        return answers, world.now - begin


class Door(Protocol):
    """What takes a request to a node: the router, or a rule."""

    async def ask(self, asked: Asked, prompt: str, first: Callable[[], None]) -> Ending:
        """Have it answered; ``first`` is called at the first token."""
        ...


@dataclass(frozen=True, slots=True)
class Ending:
    """Who answered, what went wrong, what had been expected, and what was measured."""

    node: str | None
    error: str | None = None
    predicted: Mapping[str, float] = field(default_factory=dict)
    actual: Mapping[str, float] = field(default_factory=dict)


async def _answered(world: SimulatedWorld, door: Door, asked: Asked, prompts: Prompts) -> Answer:
    begin = world.now
    first_at: list[float] = []

    def first() -> None:
        if not first_at:
            first_at.append(world.now)

    ending = await door.ask(asked, prompts.of(asked), first)
    return Answer(
        asked=asked,
        node=ending.node,
        first_s=first_at[0] - begin if first_at else None,
        whole_s=world.now - begin,
        error=ending.error,
        predicted=ending.predicted,
        actual=ending.actual,
    )


# ----------------------------------------------------------------------- the router


def _knows_length(
    request: InferenceRequest, node: NodeSnapshot, moment: Moment
) -> Rejection | None:
    """Take a request's limit for the length of its answer; rejects nobody."""
    if request.output_tokens is not None:
        moment.expected_output = float(request.output_tokens)
    return None


@asynccontextmanager
async def _hydra(
    world: SimulatedWorld,
    cluster: Machines,
    seed: int,
    given: Mapping[str, Any],
    *,
    knows_lengths: bool,
) -> AsyncIterator[_HydraDoor]:
    nodes = [
        node if machine.vram_told else replace(node, vram_gb=None, ram_gb=None)
        for machine, node in zip(cluster.machines, world.nodes(), strict=True)
    ]
    with tempfile.TemporaryDirectory() as nowhere:  # its cordons and rates are no one else's
        settings = HydraSettings(
            nodes,
            **{
                "keep_rates": False,
                "state_dir": nowhere,
                "decision_log": None,
                "discovery_enabled": False,
                "redis_url": None,
                "random_seed": seed,
                **given,
            },
        )
        router = Router(
            settings=settings, world=world, filters=(_knows_length,) if knows_lengths else ()
        )
        async with router:
            yield _HydraDoor(router, knows_lengths=knows_lengths)


class _HydraDoor:
    """The real client over the real router."""

    def __init__(self, router: Router, *, knows_lengths: bool) -> None:
        self._client = AsyncClient(router=router, plain_parts=True)
        self._knows_lengths = knows_lengths

    async def ask(self, asked: Asked, prompt: str, first: Callable[[], None]) -> Ending:
        """Stream the answer, as somebody does who reads along."""
        words: dict[str, Any] = {"priority": asked.priority}
        if asked.session is not None:
            words["session"] = asked.session
        if self._knows_lengths:
            words["options"] = {"num_predict": asked.output_tokens}
        last: Mapping[str, Any] = {}
        try:
            parts = await self._client.chat(
                asked.model, [{"role": "user", "content": prompt}], stream=True, **words
            )
            async for part in parts:
                first()
                last = part
        except (HydraError, ollama.ResponseError) as error:
            return Ending(None, type(error).__name__)
        decision = last["routing_decision"]
        return Ending(
            decision["node_id"],
            predicted=decision["predicted"] or {},
            actual=decision["actual"] or {},
        )


# ------------------------------------------------------------------------- the rules


@asynccontextmanager
async def _directly(
    world: SimulatedWorld,
    cluster: Machines,
    requests: Sequence[Asked],
    kind: type[Rule],
    seed: int,
) -> AsyncIterator[_DirectDoor]:
    told = Told(
        sizes={model.name: cluster.model(model.name).size_bytes for model in cluster.models},
        placed=lambda: place_by_hand(cluster, wanted_of(cluster, requests)),
    )
    rule = kind(random.Random(f"{seed} {kind.__name__}"), told)
    door = _DirectDoor(world, cluster, rule)
    polling = [
        asyncio.ensure_future(door.poll(seen, rule.polls_s))
        for seen in door.nodes
        if rule.polls_s is not None
    ]
    try:
        yield door
    finally:
        for task in polling:
            task.cancel()
        await asyncio.gather(*polling, return_exceptions=True)


def wanted_of(cluster: Machines, requests: Sequence[Asked]) -> dict[str, Wanted]:
    """What somebody knows who has seen all the requests before."""
    span = max(1.0, requests[-1].at - requests[0].at) if requests else 1.0
    found = {}
    for name in cluster.shares:
        mine = [asked for asked in requests if asked.model == name]
        if mine:
            found[name] = Wanted(
                rate=len(mine) / span,
                input_tokens=sum(one.input_tokens for one in mine) / len(mine),
                output_tokens=sum(one.output_tokens for one in mine) / len(mine),
            )
    return found


class _DirectDoor:
    """Sends each request straight to the node that a rule names."""

    def __init__(self, world: SimulatedWorld, cluster: Machines, rule: Rule) -> None:
        self._world = world
        self._rule = rule
        self._urls = {node.id: node.url for node in world}
        self.nodes: list[Seen] = []
        self._having: dict[str, list[Seen]] = {model.name: [] for model in cluster.models}
        for machine, node in zip(cluster.machines, world.nodes(), strict=True):
            seen = Seen(machine.id, round(1e9 * (node.vram_gb or 0.0)))
            self.nodes.append(seen)
            for name in cluster.installed(machine):
                self._having[name].append(seen)

    async def poll(self, seen: Seen, every_s: float) -> None:
        """Ask what is loaded, again and again."""
        while True:
            response = await self._send("GET", seen, "/api/ps")
            document = json.loads(await response.aread())
            seen.loaded = {one["model"]: one["size_vram"] for one in document["models"]}
            await asyncio.sleep(every_s)

    async def _send(
        self, method: str, seen: Seen, path: str, body: Mapping[str, Any] | None = None
    ) -> httpx.Response:
        request = httpx.Request(method, self._urls[seen.id] + path, json=body)
        return await self._world.transport.handle_async_request(request)

    async def ask(self, asked: Asked, prompt: str, first: Callable[[], None]) -> Ending:
        """Stream the answer of the one node."""
        begin = self._world.now
        first_at: list[float] = []
        seen = self._rule.choose(asked, self._having[asked.model], begin)
        seen.in_flight += 1
        seen.of_model[asked.model] += 1
        body: dict[str, Any] = {
            "model": asked.model,
            "messages": [{"role": "user", "content": prompt}],
            "stream": True,
        }
        if self._rule.keep_alive is not None:
            body["keep_alive"] = self._rule.keep_alive
        error: str | None = None
        try:
            response = await self._send("POST", seen, "/api/chat", body)
            last = ""
            async for line in response.aiter_lines():
                first_at.append(self._world.now) if not first_at else None
                first()
                last = line
            error = _error(response.status_code, last)
        except httpx.TransportError as exc:
            error = type(exc).__name__
        finally:
            seen.in_flight -= 1
            seen.of_model[asked.model] -= 1
        now = self._world.now
        first_s = first_at[0] - begin if first_at else None
        self._rule.told(asked, seen, Answered(error is None, first_s, now - begin, now))
        return Ending(seen.id, error)


def _error(status: int, last: str) -> str | None:
    if status != 200:
        return f"status {status}"
    end = json.loads(last) if last else {}
    return None if end.get("done") else "broke off"
