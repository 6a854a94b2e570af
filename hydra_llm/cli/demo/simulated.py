"""The stories on three simulated nodes: real HTTP on this machine, no GPU."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from hydra_llm.cli.demo.stage import ANSWER_TOKENS, PROMPT, Result, Stage, close, took
from hydra_llm.cli.tables import plain_table
from hydra_llm.client import Client, EmbedResponse
from hydra_llm.config import HydraSettings
from hydra_llm.exceptions import HydraError, NoEligibleNodeError, StreamBrokenError
from hydra_llm.router import Router
from hydra_llm.scheduling import RoutingDecision
from hydra_llm.testing import SimulatedCluster, SimulatedNode, TokenFault

CHAT = "qwen3:8b"
BIG = "mistral-small:24b"
MEDIUM = "gemma3:12b"
EMBEDDING = "nomic-embed-text"
LOCAL = "workstation"

HEALTH_CHECK_SECONDS = 0.5
URGENT, PATIENT = 10, 1
OF_EACH = 4
"""Requests of either priority."""


@dataclass(frozen=True, slots=True)
class Play:
    """The stage, and the machines behind it, which no router sees this way."""

    stage: Stage
    cluster: SimulatedCluster

    def served(self) -> Counter[str]:
        """Answers that each node has given in full, by its own books."""
        return Counter(
            node.id
            for node in self.cluster
            for request in node.requests
            if request.path in ("/api/chat", "/api/embed") and request.outcome == "done"
        )

    def asked(self) -> int:
        """Chats that have reached any node, by their own books."""
        return sum(1 for node in self.cluster for r in node.requests if r.path == "/api/chat")


def play(console: Console, *, speed: float = 1.0) -> Result:
    """Start the nodes, play all stories, and say what was proved."""
    began = time.monotonic()
    result = Result(simulated=True)
    with SimulatedCluster.demo(speed=speed) as cluster:
        cluster["gaming"].preload(CHAT)
        settings = settings_for(cluster)
        with Router(settings=settings) as router, Client(router=router) as client:
            stage = Stage(router, client, console, result)
            _introduce(stage, speed)
            stage.play(STORIES, Play(stage, cluster))
            result.seconds = time.monotonic() - began
            close(stage)
    console.print(
        Text("Now with your own nodes: hydra-llm doctor --node http://HOST:11434", style="dim")
    )
    return result


def settings_for(cluster: SimulatedCluster) -> HydraSettings:
    """The defaults, whatever this machine says; its own GPU must not mix in."""
    defaults = {
        name: setting.default
        for name, setting in HydraSettings.model_fields.items()
        if name != "nodes"
    }
    changed = {
        "vram_monitoring": False,
        "health_check_interval": HEALTH_CHECK_SECONDS,
        # These nodes are gone in a moment.
        "keep_rates": False,
    }
    nodes = [node.node(local=node.id == LOCAL) for node in cluster]
    return HydraSettings(nodes, **{**defaults, **changed})


def _introduce(stage: Stage, speed: float) -> None:
    fast = "" if speed == 1.0 else f", computing {speed:g} times as fast as real ones"
    stage.say(
        "Three simulated Ollama nodes on this machine: real HTTP, no GPU, no download"
        f"{fast}. Other programs hold 6.5 GB of the workstation's 8 GB of VRAM."
    )
    stage.say(
        "Seconds in the tables are what a node would cost a request; the lowest sum wins.",
        "dim",
    )
    stage.console.print()
    with stage.waiting("looking at the nodes ..."):
        stage.router.refresh()
        stage.until(lambda: _models_are_known(stage), seconds=3)
    stage.nodes()


def _models_are_known(stage: Stage) -> bool:
    """Whether each node has been asked about each of its models, a few in a round."""
    models = [model for node in stage.router.nodes() for model in node.installed.values()]
    return all(model.shape is not None for model in models)


# -------------------------------------------------------------------------- stories


def automatic_routing(play: Play) -> None:
    """Automatic routing.

    gaming has the model loaded; rack is faster but would have to load it; workstation is
    this machine but short of VRAM. The sum of the seconds decides.
    """
    stage = play.stage
    before = play.served()
    decision = stage.chat(CHAT).routing_decision
    served = _served_since(before, play.served())
    cheapest = decision.candidates[0].total_seconds
    mine = _candidate_seconds(decision)
    stage.claim(
        "the node with the lowest sum answered",
        served == [decision.selected_node] and mine <= cheapest + max(0.05, 0.05 * cheapest),
        f"{', '.join(served)}, {took(decision)}",
    )
    stage.call("router.explain", repr(BIG))
    plan = stage.router.explain(BIG)
    stage.decision(plan)
    homes = [node.id for node in play.cluster if _has(stage, node.id, BIG)]
    without = sorted(r.node_id for r in plan.rejections if r.reason == "without the model")
    stage.claim(
        "a model that one node has goes there, and the others say why not",
        [plan.selected_node] == homes and len(without) == len(play.cluster) - len(homes),
        f"{plan.selected_node}; without the model: {', '.join(without)}",
    )


def vram_wanted(play: Play) -> None:
    """Memory wanted: min_vram_gb.

    Available is what is free, and what is loaded for this very model. If no node has as
    much, the best one that could run it is taken, with a warning; if none could even with
    its system memory, there is an error.
    """
    stage = play.stage
    available = _available(stage, CHAT)
    decision = stage.chat(CHAT, min_vram_gb=15).routing_decision
    chosen = decision.selected_node
    stage.claim(
        "15 GB wanted: a node that has them",
        available[chosen] >= 15 and not decision.warnings,
        f"{chosen} with {available[chosen]:.1f} GB",
    )
    available = _available(stage, CHAT)
    decision = stage.chat(CHAT, min_vram_gb=35).routing_decision
    warning = "; ".join(decision.warnings)
    named = [name for name, gb in available.items() if f"{name} {gb:.1f} GB" in warning]
    stage.claim(
        "35 GB wanted: the best there is, and a warning with every node's figure",
        decision.selected_node is not None and len(named) == len(available),
        f"{decision.selected_node}; "
        + ", ".join(f"{name} {gb:.1f} GB" for name, gb in available.items()),
    )
    before = play.asked()
    error = stage.refused(CHAT, min_vram_gb=1000)
    stage.claim(
        "1000 GB wanted: an error that names every node, and nothing is sent",
        isinstance(error, NoEligibleNodeError)
        and all(name in str(error) for name in available)
        and play.asked() == before,
        f"{_kind(error)}, {play.asked() - before} requests sent",
    )


def pinning(play: Play) -> None:
    """Pinned: node_id.

    A pin, a pin that leads nowhere, and a pin that must hold.
    """
    stage = play.stage
    free_choice = stage.router.explain(CHAT).selected_node
    pinned = "gaming" if free_choice != "gaming" else "rack"
    before = play.served()
    decision = stage.chat(CHAT, node_id=pinned).routing_decision
    served = _served_since(before, play.served())
    stage.claim(
        "a pin beats the router's own choice",
        served == [pinned] and decision.selected_node == pinned,
        f"answered by {', '.join(served)}; without the pin it had been {free_choice}",
    )
    before = play.served()
    decision = stage.chat(CHAT, node_id="attic").routing_decision
    served = _served_since(before, play.served())
    stage.claim(
        "a pin to an unknown node falls back, and says so",
        served == [decision.selected_node] and "attic" in " ".join(decision.warnings),
        f"answered by {', '.join(served)}, with a warning",
    )
    asked = play.asked()
    error = stage.refused(CHAT, node_id="attic", pin="require")
    stage.claim(
        "with pin='require' it fails instead",
        isinstance(error, NoEligibleNodeError) and play.asked() == asked,
        f"{_kind(error)}, {play.asked() - asked} requests sent",
    )


def this_machine_first(play: Play) -> None:
    """This machine first: prefer_local.

    It is worth three seconds, or none. rack has the embedding model loaded, workstation would
    have to load it.
    """
    stage = play.stage
    with stage.waiting("rack loads the embedding model ..."):
        pin: dict[str, Any] = {"node_id": "rack"}
        stage.client.embed(EMBEDDING, "warm up", **pin)
    outcomes = {}
    for preferred in (False, True):
        words: dict[str, Any] = {"prefer_local": preferred}
        stage.call("client.embed", repr(EMBEDDING), "text", **words)
        before = play.served()
        with stage.waiting("embedding ..."):
            answer = stage.client.embed(EMBEDDING, "a note", **words)
        assert isinstance(answer, EmbedResponse)
        stage.decision(answer.routing_decision)
        outcomes[preferred] = (
            _served_since(before, play.served()),
            answer.routing_decision,
        )
    (away, without), (home, preferring) = outcomes[False], outcomes[True]
    stage.claim(
        "off: the node that answers soonest",
        away == [without.candidates[0].node_id] and away != [LOCAL],
        f"answered by {', '.join(away)}, {took(without)}",
    )
    stage.claim(
        "on: this machine, as it is not three seconds slower",
        home == [LOCAL],
        f"answered by {', '.join(home)}, {took(preferring)}",
    )


def priorities(play: Play) -> None:
    """Under load: priority.

    All go to rack, which answers one at a time, and is held still until nine are there: a
    usual one first, then four patient ones, and four urgent ones last.
    """
    stage, rack, everyone = play.stage, play.cluster["rack"], 2 * OF_EACH + 1
    stage.call("9 × client.chat", repr(CHAT), "messages", "node_id='rack'", "priority=...")
    with ThreadPoolExecutor(everyone) as threads, stage.waiting("nine requests at once ..."):
        answered: list[_Answered] = []

        def ask(name: str, priority: int) -> None:
            began = time.monotonic()
            words: dict[str, Any] = {"node_id": "rack", "pin": "require", "priority": priority}
            stage.client.chat(CHAT, PROMPT, options={"num_predict": ANSWER_TOKENS}, **words)
            answered.append(_Answered(name, priority, time.monotonic() - began))

        # On a slow machine, or with a high --speed, the first would be answered before the
        # last has come, and nobody would have to wait.
        rack.freeze()
        asks = [threads.submit(ask, "usual", 5)]
        stage.until(lambda: stage.router.in_flight > 0, seconds=5)
        for number in range(1, OF_EACH + 1):
            asks.append(threads.submit(ask, f"patient {number}", PATIENT))
            stage.until(lambda n=number: stage.router.waiting >= n, seconds=2)  # type: ignore[misc]
        asks += [threads.submit(ask, f"urgent {n}", URGENT) for n in range(1, OF_EACH + 1)]
        stage.until(lambda: stage.router.in_flight + stage.router.waiting == everyone, seconds=5)
        rack.thaw()
        for asked in asks:
            asked.result()
    order = plain_table()
    for head in ("answered", "request", "priority", "seconds"):
        order.add_column(head, justify="left" if head == "request" else "right")
    for place, one in enumerate(answered, 1):
        style = {URGENT: "bold", PATIENT: "dim"}.get(one.priority, "")
        order.add_row(f"{place}.", one.name, str(one.priority), f"{one.seconds:.2f}", style=style)
    stage.console.print(Padding(order, (0, 0, 0, 2)))
    urgent = [place for place, one in enumerate(answered) if one.priority == URGENT]
    patient = [place for place, one in enumerate(answered) if one.priority == PATIENT]
    stage.claim(
        "all urgent ones were answered before any patient one",
        len(urgent) == len(patient) == OF_EACH and max(urgent) < min(patient),
        f"{_mean(answered, URGENT):.1f} s on average against {_mean(answered, PATIENT):.1f} s",
    )
    stage.claim(
        "nobody was forgotten",
        len(answered) == everyone and not stage.router.in_flight + stage.router.waiting,
        f"{len(answered)} answers, {stage.router.in_flight} still in flight",
    )


def killed_nodes(play: Play) -> None:
    """A node dies in mid-request.

    As by SIGKILL: every connection breaks, the port refuses. Before anything was handed
    out another node answers; in mid-stream a second answer would be a lie, so there is an
    error, and what was received stands.
    """
    stage = play.stage
    with _killing_whoever_answers(play, after=10) as killed:
        answer = stage.chat(CHAT)
    decision = answer.routing_decision
    stage.claim(
        "not streaming: another node answered, in full",
        [a.outcome == "ok" for a in decision.attempts] == [False, True]
        and killed == [decision.attempts[0].node_id] != [decision.selected_node]
        and bool(answer.done),
        " then ".join(f"{a.node_id} {a.outcome} ({a.seconds:.1f} s)" for a in decision.attempts),
    )
    _kill_in_mid_stream(play)


def _kill_in_mid_stream(play: Play) -> None:
    stage = play.stage
    asked, parts = play.asked(), 0
    text = ""
    error: HydraError | None = None
    with _killing_whoever_answers(play, after=12) as killed:
        stage.call("client.chat", repr(CHAT), "messages", stream=True)
        try:
            options = {"num_predict": ANSWER_TOKENS}
            for part in stage.client.chat(CHAT, PROMPT, stream=True, options=options):
                parts += 1
                text += (part.message.thinking or "") + (part.message.content or "")
        except HydraError as caught:
            error = caught
            stage.error(caught)
    stage.claim(
        "streaming: an error names the node and how much had come",
        isinstance(error, StreamBrokenError)
        and [error.node_id] == killed
        and error.parts == parts > 0,
        f"{_kind(error)}: {getattr(error, 'node_id', '?')} after "
        f"{getattr(error, 'parts', '?')} parts; {parts} received",
    )
    stage.claim(
        "what was received stands, and nobody else was asked",
        bool(text) and play.asked() == asked + 1,
        f"{len(text)} characters kept, {play.asked() - asked} request sent",
    )


@contextmanager
def _killing_whoever_answers(play: Play, *, after: int) -> Iterator[list[str]]:
    """Kill the first node that has said so many tokens; the list then names it."""
    killed: list[str] = []

    def kill(node: SimulatedNode) -> None:
        if not killed:
            killed.append(node.id)
            node.kill()

    play.stage.console.print()
    play.stage.say(f"Whichever node answers is killed after {after} tokens.", "yellow")
    for node in play.cluster:
        node.inject(TokenFault(after=after, action=kill))
    try:
        yield killed
    finally:
        for node in play.cluster:
            node.clear_faults()


def coming_back(play: Play) -> None:
    """A node comes back.

    Nothing has to be told or restarted: the router looks at every node twice a second here.
    """
    stage = play.stage
    dead = [node for node in play.cluster if node.id != LOCAL]
    stage.until(lambda: not any(_is_up(stage, node.id) for node in dead), seconds=5)
    error = stage.refused(MEDIUM)
    stage.claim(
        f"while all nodes with {MEDIUM} are down, nobody can take it",
        isinstance(error, NoEligibleNodeError),
        f"{_kind(error)}; down: {', '.join(n.id for n in dead if not _is_up(stage, n.id))}",
    )
    back = min(dead, key=lambda node: node.id != "rack")
    back.revive()
    stage.console.print()
    stage.say(f"{back.id} has been started again.", "yellow")
    with stage.waiting("waiting for the router to see it ..."):
        seen = stage.until(lambda: _is_up(stage, back.id), seconds=5)
    stage.claim(
        "the router sees it by itself",
        seen is not None,
        "not within 5 s" if seen is None else f"after {seen:.1f} s",
    )
    before = play.served()
    decision = stage.chat(MEDIUM).routing_decision
    served = _served_since(before, play.served())
    stage.claim(
        "and it serves again", served == [back.id], f"{', '.join(served)}, {took(decision)}"
    )
    for node in dead:
        node.revive()
    everyone = [node.id for node in play.cluster]
    stage.until(lambda: all(_is_up(stage, name) for name in everyone), seconds=5)
    stage.console.print()
    stage.nodes()


STORIES = (
    automatic_routing,
    vram_wanted,
    pinning,
    this_machine_first,
    priorities,
    killed_nodes,
    coming_back,
)


# -------------------------------------------------------------------------- helpers


@dataclass(frozen=True, slots=True)
class _Answered:
    name: str
    priority: int
    seconds: float


def _mean(answered: list[_Answered], priority: int) -> float:
    seconds = [one.seconds for one in answered if one.priority == priority]
    return sum(seconds) / len(seconds) if seconds else float("nan")


def _served_since(before: Counter[str], after: Counter[str]) -> list[str]:
    return sorted((after - before).elements())


def _candidate_seconds(decision: RoutingDecision) -> float:
    mine = (c for c in decision.candidates if c.node_id == decision.selected_node)
    return next(mine).total_seconds


def _available(stage: Stage, model: str) -> dict[str, float]:
    """GB of VRAM that each node has for a model, what it holds of it already included."""
    stage.router.refresh()
    available = {}
    for node in stage.router.get_node_resources():
        own = sum(m["vram_gb"] for m in node["loaded_models"] if m["name"] == model)
        available[node["id"]] = (node["vram_available_gb"] or 0.0) + own
    return available


def _resources(stage: Stage, node_id: str) -> dict[str, Any]:
    return next(node for node in stage.router.get_node_resources() if node["id"] == node_id)


def _has(stage: Stage, node_id: str, model: str) -> bool:
    return model in _resources(stage, node_id)["installed_models"]


def _is_up(stage: Stage, node_id: str) -> bool:
    return bool(_resources(stage, node_id)["healthy"])


def _kind(error: HydraError | None) -> str:
    return "no error" if error is None else type(error).__name__
