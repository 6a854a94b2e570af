"""
Which deployment a request goes to. No waiting happens here.

The choice is a generator: it yields what is to be done (reserve a place, the next place) and
is sent what came of it, so that the sync and the async side share every decision.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra_llm import (
    AllNodesFailedError,
    Dispatch,
    NoEligibleNodeError,
    Router,
)
from hydra_llm.integrations.litellm.deployments import (
    Deployment,
    by_order,
    read_deployment,
    runner_options,
    still_allowed,
)
from hydra_llm.integrations.litellm.flights import Flight, Flights, held_by
from hydra_llm.integrations.litellm.wire import Wires
from hydra_llm.integrations.litellm.words import buckets, default_words, words_of

__all__ = ["Again", "Chooser", "Reserve", "Step"]


@dataclass(frozen=True, slots=True)
class Reserve:
    """Choose a node, and hold a place there."""

    path: str
    payload: Mapping[str, Any]
    words: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Again:
    """Hold a place on the next node."""

    dispatch: Dispatch


Step = Reserve | Again
Choosing = Generator[Step, Dispatch, list[Any]]


class Chooser:
    """
    Chooses among the deployments that LiteLLM has left.

    Args:
        wires: gives the router and its clients for the nodes of some deployments.
    """

    def __init__(self, wires: Callable[[Sequence[Deployment]], Wires]) -> None:
        self._wires = wires
        self.flights = Flights()
        self._read: dict[tuple[Any, ...], Deployment | None] = {}

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
        mine: list[Deployment] = []
        others: list[Any] = []
        for raw in healthy:
            known = self._deployment(raw)
            if known is None:
                others.append(raw)
            else:
                mine.append(known)
        if not mine:
            return list(healthy)
        mine = still_allowed(mine, request, _tags(request))
        words = words_of(request, default_words(mine[0].model_info))
        wires = self._wires(mine)
        flight = self._flight(wires, group, request)
        if others:
            best = self._best(wires.router, mine, messages, request, words)
            flight.renew(None)
            flight.deployment, flight.words = best, words
            return [*([best.raw] if best else ()), *others]
        chosen = yield from self._reserve(flight, mine, messages, request, words)
        return [chosen.raw]

    def _flight(self, wires: Wires, group: str, request: dict[str, Any]) -> Flight:
        """The request's flight: that of its last try, or a new one."""
        trace_id = request.get("litellm_trace_id")
        holders = list(buckets(request))
        # Only by the metadata: a trace id may be a caller's own, for many requests at once.
        found = (held_by(holder, trace_id) for holder in holders)
        flight = next((one for one in found if one is not None), None)
        # A caller may hand the same metadata to many requests, one after the other.
        if flight is not None and not flight.is_answered and flight.wires is wires:
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
        mine: Sequence[Deployment],
        messages: Any,
        request: Mapping[str, Any],
        words: dict[str, Any],
    ) -> Generator[Step, Dispatch, Deployment]:
        levels = by_order(mine)
        while True:
            level = levels[min(flight.level, len(levels) - 1)]
            try:
                return (yield from self._reserve_among(flight, level, messages, request, words))
            except (NoEligibleNodeError, AllNodesFailedError):
                if flight.level >= len(levels) - 1:
                    raise
                flight.level += 1
                flight.renew(None)

    def _reserve_among(
        self,
        flight: Flight,
        mine: Sequence[Deployment],
        messages: Any,
        request: Mapping[str, Any],
        words: dict[str, Any],
    ) -> Generator[Step, Dispatch, Deployment]:
        router = flight.wires.router
        models = dict.fromkeys(one.model for one in mine)
        if len(models) > 1 and flight.dispatch is None:
            best = self._best(router, mine, messages, request, words)
            models = {best.model: None} if best else models
        model = next(iter(models)) if flight.dispatch is None else flight.dispatch.call.model
        places = _places(mine, model)
        if flight.dispatch is None:
            words = _pinned_by_id(words, mine)
            words = {**words, "exclude_nodes": _excluding(words, router, places)}
            path, payload = planned(places[next(iter(places))], messages, request)
            flight.renew((yield Reserve(path, payload, words)))
        else:
            yield Again(flight.dispatch)
        assert flight.dispatch is not None
        while flight.dispatch.node.url not in places:
            # LiteLLM has dropped it since the first try.
            flight.dispatch.give_up_on_node()
            yield Again(flight.dispatch)
        flight.deployment = places[flight.dispatch.node.url]
        return flight.deployment

    def _best(
        self,
        router: Router,
        mine: Sequence[Deployment],
        messages: Any,
        request: Mapping[str, Any],
        words: dict[str, Any],
    ) -> Deployment | None:
        """The deployment that would be chosen now; nothing is held."""
        best: tuple[float, Deployment] | None = None
        words = _pinned_by_id(words, mine)
        urls = {node.id: node.url for node in router.configured}
        for model in dict.fromkeys(one.model for one in mine):
            places = _places(mine, model)
            some = places[next(iter(places))]
            _, payload = planned(some, messages, request)
            decision = router.explain(
                model,
                num_ctx=runner_options(request, some).get("num_ctx"),
                input_tokens=len(str(payload.get("messages") or payload.get("input") or "")) // 4,
                **{**words, "exclude_nodes": _excluding(words, router, places)},
            )
            for candidate in decision.candidates:
                if candidate.node_id == decision.selected_node and (
                    best is None or candidate.total_seconds < best[0]
                ):
                    best = candidate.total_seconds, places[urls[candidate.node_id]]
        return best[1] if best else None

    # ---------------------------------------------------------------- deployments

    def _deployment(self, raw: Any) -> Deployment | None:
        params, info = raw.get("litellm_params") or {}, raw.get("model_info") or {}
        about = info.get("hydra")
        key = (
            info.get("id"),
            params.get("model"),
            params.get("api_base"),
            params.get("order"),
            params.get("num_ctx"),
            tuple(params.get("tags") or ()),
            None if about is None else repr(about),
        )
        known = self._read.get(key)
        if known is not None:
            return known if known.raw is raw else replace(known, raw=raw)
        if key in self._read:
            return None
        known = self._read[key] = read_deployment(raw)
        return known


def _tags(request: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for bucket in buckets(request):
        tags = bucket.get("tags")
        found += [str(tag) for tag in tags] if isinstance(tags, (list, tuple)) else []
    return found


def _places(mine: Sequence[Deployment], model: str) -> dict[str, Deployment]:
    """The deployments of one model by their nodes' URLs; of two on a node the first."""
    return {one.node.url: one for one in reversed(mine) if one.model == model}


def _pinned_by_id(words: dict[str, Any], mine: Sequence[Deployment]) -> dict[str, Any]:
    """A pin may also name a deployment by LiteLLM's id of it."""
    pinned = words.get("node_id")
    for one in mine:
        if pinned is not None and one.id == pinned:
            return {**words, "node_id": one.node.url}
    return words


def _excluding(
    words: Mapping[str, Any], router: Router, places: Mapping[str, Deployment]
) -> tuple[str, ...]:
    """The caller's exclusions, and every node that has no deployment in the group."""
    said = words.get("exclude_nodes") or ()
    said = tuple(said.split(",")) if isinstance(said, str) else tuple(said)
    return (*said, *(node.id for node in router.configured if node.url not in places))


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
