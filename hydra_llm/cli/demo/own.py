"""The stories on the user's own nodes: nothing is killed, nothing big is loaded unsaid."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from hydra_llm.cli.demo.stage import Result, Stage, close, took
from hydra_llm.cli.options import without_discovery
from hydra_llm.client import Client
from hydra_llm.config import HydraSettings
from hydra_llm.exceptions import RoutingError
from hydra_llm.router import Router
from hydra_llm.types import GB, NodeSnapshot

SMALL_BYTES = 6 * GB
"""A model up to this size is loaded for the one short chat, if none is loaded already."""
TOKENS = 16


@dataclass(frozen=True, slots=True)
class Pick:
    """The model that the stories use."""

    name: str
    size_bytes: int
    is_loaded: bool


@dataclass(frozen=True, slots=True)
class Play:
    """The stage, and the model that is there."""

    stage: Stage
    pick: Pick


def play(settings: HydraSettings, console: Console) -> Result:
    """Play what is harmless."""
    began = time.monotonic()
    result = Result(simulated=False)
    own = without_discovery(settings)
    with Router(settings=own) as router, Client(router=router) as client:
        stage = Stage(router, client, console, result)
        stage.say(
            f"Your own nodes, from {settings.nodes_source}: only harmless things are done. "
            "'hydra-llm demo' with no node configured kills and revives simulated ones."
        )
        console.print()
        with stage.waiting("looking at the nodes ..."):
            nodes = router.refresh()
        stage.nodes()
        pick = pick_model(nodes)
        if pick is None:
            raise RoutingError(_why_nothing(nodes))
        stage.play(STORIES, Play(stage, pick))
        result.seconds = time.monotonic() - began
        close(stage)
    return result


def pick_model(nodes: Sequence[NodeSnapshot]) -> Pick | None:
    """A model for a short chat: a loaded one if there is one, the smallest of those."""
    picks = [
        Pick(name, model.size_bytes, name in node.loaded)
        for node in nodes
        if node.health == "up"
        for name, model in node.installed.items()
        if _can_chat(name, model.capabilities)
    ]
    return min(picks, key=lambda pick: (not pick.is_loaded, pick.size_bytes), default=None)


def _can_chat(name: str, capabilities: frozenset[str] | None) -> bool:
    if capabilities is None:
        return "embed" not in name  # an old server does not say
    return "completion" in capabilities


def _why_nothing(nodes: Sequence[NodeSnapshot]) -> str:
    up = [node for node in nodes if node.health == "up"]
    if not up:
        return f"0/{len(nodes)} nodes are up"
    return "no node has a model to chat with; run 'ollama pull llama3.2:3b' on one of them"


# -------------------------------------------------------------------------- stories


def routing_explained(play: Play) -> None:
    """Where a request would go.

    Nothing is sent: this is what 'hydra-llm explain' shows.
    """
    stage, model = play.stage, play.pick.name
    stage.call("router.explain", repr(model))
    plan = stage.router.explain(model)
    stage.decision(plan)
    accounted = {c.node_id for c in plan.candidates} | {r.node_id for r in plan.rejections}
    nodes = stage.router.nodes()
    stage.claim(
        "every node is a candidate or says why not",
        accounted == {node.id for node in nodes},
        f"{len(plan.candidates)} of {len(nodes)} can take it, {len(plan.rejections)} say why not",
    )


def one_short_chat(play: Play) -> None:
    """One short chat."""
    stage, pick = play.stage, play.pick
    size = f"{pick.size_bytes / GB:.1f} GB"
    if not pick.is_loaded and pick.size_bytes > SMALL_BYTES:
        stage.say(
            f"Left out: no model is loaded, and the smallest one, {pick.name}, has {size}. "
            f"Try it yourself: hydra-llm chat {pick.name} Hello",
            "yellow",
        )
        return
    if not pick.is_loaded:
        stage.say(f"No model is loaded, so this loads the smallest: {pick.name}, {size}.", "yellow")
    answer = stage.chat(pick.name, tokens=TOKENS)
    decision = answer.routing_decision
    stage.claim(
        "it was answered by the node that was chosen",
        bool(answer.done) and answer.node_id == decision.selected_node is not None,
        f"{answer.node_id}, {took(decision)}",
    )


def pinning(play: Play) -> None:
    """Pinned: node_id.

    Nothing is sent.
    """
    stage, model = play.stage, play.pick.name
    target = stage.router.explain(model).candidates[-1].node_id
    stage.call("router.explain", repr(model), node_id=target)
    plan = stage.router.explain(model, node_id=target)
    stage.decision(plan)
    stage.claim("a pin goes where it says", plan.selected_node == target, str(plan.selected_node))
    stage.call("router.explain", repr(model), node_id="no-such-node")
    plan = stage.router.explain(model, node_id="no-such-node")
    stage.decision(plan)
    stage.claim(
        "a pin to an unknown node falls back, and says so",
        plan.selected_node is not None and bool(plan.warnings),
        f"{plan.selected_node}, with a warning",
    )


def vram_wanted(play: Play) -> None:
    """More memory than anybody has."""
    stage, model = play.stage, play.pick.name
    nodes = stage.router.nodes()
    most = max((node.ram_bytes or 0) + (node.total_vram_bytes or 0) for node in nodes)
    wanted = max(1000, round(2 * most / GB))
    stage.call("router.explain", repr(model), min_vram_gb=wanted)
    plan = stage.router.explain(model, min_vram_gb=wanted)
    stage.decision(plan)
    stage.claim(
        f"{wanted} GB wanted: nobody, and each node says what it has",
        plan.selected_node is None and len(plan.rejections) == len(nodes),
        f"{len(plan.rejections)} rejected",
    )


STORIES = (routing_explained, one_short_chat, pinning, vram_wanted)
