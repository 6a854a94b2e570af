"""A ledger with the real scheduler behind it, and a clock that only moves when told to."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hydra_llm.cluster import Cluster, Lease, Rules
from hydra_llm.cluster.cluster import Choose
from hydra_llm.events import Event
from hydra_llm.exceptions import NodeError
from hydra_llm.scheduling import Moment, Scheduler
from hydra_llm.scheduling.costs import alone_seconds, load_wait
from hydra_llm.types import (
    GB,
    Demand,
    InferenceRequest,
    Node,
    NodeSnapshot,
    Observation,
    Placement,
)
from tests.helpers import LLAMA, installed, loaded


class Clock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def placing(scheduler: Scheduler, rng: random.Random) -> Choose:
    """The scheduler as the ledger's ``choose``, put together as the router does it."""

    def choose(
        request: InferenceRequest,
        nodes: Sequence[NodeSnapshot],
        demand: Mapping[str, Demand],
        now: float,
        queue_ahead: int,
    ) -> Placement:
        moment = Moment(now=now, demand=demand, queue_ahead=queue_ahead)
        choice = scheduler.schedule(request, nodes, moment, rng)
        request, node = choice.request, choice.selected
        fit = moment.fit(request, node)
        loads = fit.verdict not in ("loaded", "loading")
        warm = node.loaded[request.model] if fit.verdict == "loaded" else None
        return Placement(
            node_id=node.id,
            has_room=choice.has_room,
            causes_load=loads,
            load_seconds=load_wait(request, node, moment) if loads else 0.0,
            expected_seconds=alone_seconds(request, node, moment),
            reserved_bytes=fit.reserved_bytes if loads else 0,
            size_bytes=fit.need_bytes if loads else 0,
            evicts=frozenset(fit.victims) if loads else frozenset(),
            options=request.options,
            context_length=warm.context_length if warm is not None else request.options.num_ctx,
            choice=choice,
        )

    return choose


def node(node_id: str, **about: Any) -> Node:
    return Node(
        **{"url": f"http://{node_id}:11434", "id": node_id, "local": False, "slots": 1, **about}
    )


def seen(
    node_id: str = "a",
    *,
    at: float = 0.0,
    models: Iterable[str] = (LLAMA,),
    warm: Iterable[str] = (),
    free_gb: float | None = None,
    total_gb: float | None = 24.0,
    **about: Any,
) -> Observation:
    """A probe's good news: a 24 GB node with these models, all the rest of it free."""
    runners = loaded(*warm)
    taken = sum(runner.size_vram_bytes for runner in runners.values())
    free = None if total_gb is None else total_gb * GB - taken
    return Observation(
        **{
            "node_id": node_id,
            "observed_at": at,
            "health": "up",
            "version": "0.32.15",
            "installed": installed(*models),
            "loaded": runners,
            "total_vram_bytes": None if total_gb is None else int(total_gb * GB),
            "free_vram_bytes": free if free_gb is None else int(free_gb * GB),
            **about,
        }
    )


def ledger(
    *observations: Observation,
    clock: Callable[[], float] | None = None,
    nodes: Sequence[Node] | None = None,
    choose: Choose | None = None,
    on_event: Callable[[Event], None] | None = None,
    **rules: Any,
) -> Cluster:
    """A cluster of one-slot nodes that have just been seen."""
    cluster = Cluster(
        nodes or [node(observation.node_id) for observation in observations],
        choose or placing(Scheduler(), random.Random(0)),
        clock=clock or Clock(),
        rng=random.Random(0),
        rules=Rules(**rules),
        on_event=on_event,
    )
    for observation in observations:
        cluster.observe(observation)
    return cluster


def granted(cluster: Cluster, request: InferenceRequest) -> Lease:
    """A lease, where the test is sure that there is room."""
    held = cluster.acquire(request)
    assert isinstance(held, Lease)
    return held


def failure(kind: type[NodeError], node_id: str = "a", **about: Any) -> NodeError:
    return kind("it failed", node_id=node_id, node_url=f"http://{node_id}:11434", **about)


def snapshot_of(cluster: Cluster, node_id: str = "a") -> NodeSnapshot:
    return next(snapshot for snapshot in cluster.nodes() if snapshot.id == node_id)
