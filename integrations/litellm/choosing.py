"""
Which deployment a request goes to. No waiting happens here.

The choice is a generator: it yields what is to be done (reserve a place, the next place) and
is sent what came of it, so that the sync and the async side share every decision.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra_llm import (
    AllNodesFailedError,
    Dispatch,
    NoEligibleNodeError,
    Router,
)
from hydra_llm.integrations.litellm.deployments import (
    Deployment,
    DeploymentReader,
    by_order,
    runner_options,
    still_allowed,
)
from hydra_llm.integrations.litellm.flights import Flight, Flights, held_by
from hydra_llm.integrations.litellm.wire import Wires
from hydra_llm.integrations.litellm.words import buckets, words_of

__all__ = ["Again", "Chooser", "Reserve", "Step"]


@dataclass(frozen=True, slots=True)
class Reserve:
    """Choose a node, and hold a place there."""

    path: str
    payload: Mapping[str, Any]
    among: frozenset[str]
    words: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Again:
    """Hold a place on the next node."""

    dispatch: Dispatch


Step = Reserve | Again
Choosing = Generator[Step, Dispatch, "tuple[list[Any], Flight | None]"]

MOST_GROUPS = 256
"""Sets of deployments that are remembered: cooldowns and filters make ever other ones."""


class Level:
    """Deployments of one ``order``: which models they have, and where."""

    def __init__(self, deployments: Sequence[Deployment], router: Router) -> None:
        ids = {node.url: node.id for node in router.configured}
        self.places: dict[str, dict[str, Deployment]] = {}
        """By model, the deployments by the ids of their nodes; of two on a node the first."""
        for one in deployments:
            self.places.setdefault(one.model, {}).setdefault(ids[one.node.url], one)
        self.among = {model: frozenset(nodes) for model, nodes in self.places.items()}


class Group:
    """The Ollama nodes of one choice, looked through once for all choices of the same ones."""

    def __init__(self, deployments: Sequence[Deployment], wires: Wires) -> None:
        self.deployments = tuple(deployments)
        self.wires = wires
        self.words = deployments[0].words
        self.levels = [Level(level, wires.router) for level in by_order(deployments)]
        self.whole = Level(deployments, wires.router) if len(self.levels) > 1 else self.levels[0]

    def pinned_by_id(self, words: dict[str, Any]) -> dict[str, Any]:
        """A pin may also name a deployment by LiteLLM's id of it."""
        pinned = words.get("node_id")
        if pinned is not None:
            for one in self.deployments:
                if one.id == pinned:
                    return {**words, "node_id": one.node.url}
        return words


class Chooser:
    """
    Chooses among the deployments that LiteLLM has left.

    Args:
        wires: gives the router and its clients for the nodes of some deployments.
    """

    def __init__(self, wires: Callable[[Sequence[Deployment]], Wires]) -> None:
        self._wires = wires
        self.flights = Flights()
        self._reader = DeploymentReader()
        self._groups: dict[tuple[int, ...], Group] = {}

    def forget_groups(self) -> None:
        """The wires are no longer good."""
        self._groups = {}

    def has_nodes(self, healthy: Sequence[Any]) -> bool:
        """Whether some deployments are Ollama nodes."""
        return any(self._reader.read(raw) is not None for raw in healthy)

    # ------------------------------------------------------------------- choosing

    def choose(
        self,
        group: str,
        healthy: Sequence[Any],
        messages: Any,
        request: dict[str, Any],
    ) -> Choosing:
        """
        Reduce the deployments that LiteLLM calls healthy to those it should go on with.

        Of the Ollama nodes one is left, on which a place is held; what is no Ollama node stays,
        and is LiteLLM's to choose from.

        Raises:
            HydraError: no node can take the request, or a routing word is wrong.
        """
        read = self._reader.read
        known = [read(raw) for raw in healthy]
        mine = [one for one in known if one is not None]
        if not mine:
            return list(healthy), None
        nodes = self._group(still_allowed(mine, request, _tags(request)))
        words = nodes.pinned_by_id(words_of(request, nodes.words))
        flight = self._flight(nodes.wires, group, request)
        if len(mine) < len(known):
            best = self._best(nodes.wires.router, nodes.whole, messages, request, words)
            flight.renew(None)
            flight.deployment, flight.words = best, words
            others = (raw for raw, one in zip(healthy, known, strict=True) if one is None)
            return [*_raw_of(best, healthy, known), *others], flight
        chosen = yield from self._reserve(flight, nodes, messages, request, words)
        return _raw_of(chosen, healthy, known), flight

    def _group(self, deployments: Sequence[Deployment]) -> Group:
        # What is read is kept as long as a group has it, so its id stays its own.
        key = tuple(map(id, deployments))
        group = self._groups.get(key)
        if group is None:
            if len(self._groups) >= MOST_GROUPS:
                self._groups = {}
            group = self._groups[key] = Group(deployments, self._wires(deployments))
        return group

    def _flight(self, wires: Wires, group: str, request: dict[str, Any]) -> Flight:
        """The request's flight: that of its last try, or a new one."""
        trace_id = request.get("litellm_trace_id")
        holders = buckets(request)
        # Only by the metadata: a trace id may be a caller's own, for many requests at once.
        for holder in holders:
            flight = held_by(holder, trace_id)
            if flight is None:
                continue
            # A caller may hand the same metadata to many requests, one after the other.
            if flight.is_answered or flight.wires is not wires:
                break
            flight.let_go()
            if flight.group != group:  # a fallback: other nodes may serve it, or the same ones
                flight.group, flight.level = group, 0
                flight.renew(None)
            return flight
        flight = Flight(wires, trace_id if isinstance(trace_id, str) else None, group)
        if not holders:
            holders = [request.setdefault("metadata", {})]
        self.flights.add(flight, holders[-1])
        return flight

    def _reserve(
        self,
        flight: Flight,
        nodes: Group,
        messages: Any,
        request: Mapping[str, Any],
        words: dict[str, Any],
    ) -> Generator[Step, Dispatch, Deployment]:
        last = len(nodes.levels) - 1
        while True:
            level = nodes.levels[min(flight.level, last)]
            try:
                return (yield from self._reserve_among(flight, level, messages, request, words))
            except (NoEligibleNodeError, AllNodesFailedError):
                if flight.level >= last:
                    raise
                flight.level += 1
                flight.renew(None)

    def _reserve_among(
        self,
        flight: Flight,
        level: Level,
        messages: Any,
        request: Mapping[str, Any],
        words: dict[str, Any],
    ) -> Generator[Step, Dispatch, Deployment]:
        if flight.dispatch is None:
            model = next(iter(level.places))
            if len(level.places) > 1:
                best = self._best(flight.wires.router, level, messages, request, words)
                model = best.model if best else model
            places = level.places[model]
            path, payload = planned(next(iter(places.values())), messages, request)
            flight.renew((yield Reserve(path, payload, level.among[model], words)))
        else:
            places = level.places.get(flight.dispatch.call.model, {})
            yield Again(flight.dispatch)
        assert flight.dispatch is not None
        while flight.dispatch.node.id not in places:
            # LiteLLM has dropped it since the first try.
            flight.dispatch.give_up_on_node()
            yield Again(flight.dispatch)
        flight.deployment = places[flight.dispatch.node.id]
        return flight.deployment

    def _best(
        self,
        router: Router,
        level: Level,
        messages: Any,
        request: Mapping[str, Any],
        words: dict[str, Any],
    ) -> Deployment | None:
        """The deployment that would be chosen now; nothing is held."""
        best: tuple[float, Deployment] | None = None
        for model, places in level.places.items():
            some = next(iter(places.values()))
            _, payload = planned(some, messages, request)
            decision = router.explain(
                model,
                num_ctx=runner_options(request, some).get("num_ctx"),
                input_tokens=len(str(payload.get("messages") or payload.get("input") or "")) // 4,
                among=level.among[model],
                **words,
            )
            for candidate in decision.candidates:
                if candidate.node_id == decision.selected_node and (
                    best is None or candidate.total_seconds < best[0]
                ):
                    best = candidate.total_seconds, places[candidate.node_id]
        return best[1] if best else None


def _raw_of(
    wanted: Deployment | None, healthy: Sequence[Any], known: Sequence[Deployment | None]
) -> list[Any]:
    """The deployment as LiteLLM gave it."""
    found = (raw for raw, one in zip(healthy, known, strict=True) if one is wanted)
    return [next(found)] if wanted is not None else []


def _tags(request: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for bucket in buckets(request):
        tags = bucket.get("tags")
        found += [str(tag) for tag in tags] if isinstance(tags, (list, tuple)) else []
    return found


def planned(
    deployment: Deployment, messages: Any, request: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Give the path and the body that LiteLLM will send, as far as the choice depends on them."""
    payload: dict[str, Any] = {
        "model": deployment.model,
        "options": runner_options(request, deployment),
        "stream": bool(request.get("stream")),
    }
    if messages is None and "input" in request and "litellm_metadata" not in request:
        return "/api/embed", {**payload, "input": request["input"]}
    messages = messages or request.get("messages") or request.get("input")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    limit = request.get("max_completion_tokens") or request.get("max_tokens")
    if limit is not None:
        payload["options"]["num_predict"] = limit
    if request.get("tools") and deployment.provider != "ollama":
        payload["tools"] = request["tools"]
    return "/api/chat", {**payload, "messages": messages or []}
