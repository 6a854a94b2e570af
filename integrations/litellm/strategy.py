"""The routing strategy: LiteLLM's callbacks around the core."""

from __future__ import annotations

import asyncio
import itertools
import threading
import warnings
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from litellm.integrations.custom_logger import CustomLogger

from hydra_llm import HydraError, HydraSettings, Node, Router
from hydra_llm.integrations.litellm.choosing import Chooser, Choosing, Reserve
from hydra_llm.integrations.litellm.deployments import Deployment
from hydra_llm.integrations.litellm.errors import as_litellm_error, node_error_of
from hydra_llm.integrations.litellm.flights import Flight, call_of_log
from hydra_llm.integrations.litellm.telling import headers_of
from hydra_llm.integrations.litellm.wire import Wires
from hydra_llm.integrations.litellm.words import buckets, without_words

__all__ = ["HydraRoutingStrategy"]

_numbers = itertools.count(1)


class HydraRoutingStrategy(CustomLogger):
    """
    Has LiteLLM's routers send their requests to the Ollama node that will answer soonest.

    ::

        strategy = HydraRoutingStrategy()
        litellm.callbacks.append(strategy)      # asynchronous calls of every litellm.Router

    The proxy takes :data:`hydra_llm.integrations.litellm.instance` from its ``config.yaml``;
    :func:`hydra_llm.integrations.litellm.install` serves synchronous calls too. Groups without
    an Ollama node are left alone.

    Args:
        hydra: the router to choose with. By default one of its own is made when first needed,
            of the nodes in the settings and those that deployments name; nodes that only
            deployments name are added to a given one.
    """

    def __init__(self, hydra: Router | None = None) -> None:
        super().__init__()
        # LiteLLM takes callbacks of one class whose public attributes are equal for one.
        self.number = next(_numbers)
        self._given = hydra
        self._wires: Wires | None = None
        self._known: frozenset[str] = frozenset()
        self._lock = threading.Lock()
        self._chooser = Chooser(self._wires_for)

    @property
    def hydra(self) -> Router | None:
        """The router it chooses with; None before its first request."""
        return self._wires.router if self._wires is not None else self._given

    def close(self) -> None:
        """Close what it opened; a router that was given stays open."""
        with self._lock:
            wires, self._wires, self._known = self._wires, None, frozenset()
            self._chooser.forget_groups()
        if wires is not None:
            wires.close()
            if self._given is None:
                wires.router.close()

    def _wires_for(self, deployments: Sequence[Deployment]) -> Wires:
        wires = self._wires
        if wires is not None and all(one.node.url in self._known for one in deployments):
            return wires
        with self._lock:
            fresh = _one_per_url(one.node for one in deployments if one.node.url not in self._known)
            wires = self._wires
            if wires is None:
                wires = self._wires = Wires(self._given or _own_router(fresh))
            wires.router.add_nodes(_with_free_ids(fresh, wires.router.configured))
            self._known |= {node.url for node in fresh}
        return wires

    # ------------------------------------------------------------------- choosing

    async def async_filter_deployments(
        self,
        model: str,
        healthy_deployments: list[Any],
        messages: list[Any] | None,
        request_kwargs: dict[str, Any] | None = None,
        parent_otel_span: Any = None,
    ) -> list[Any]:
        """Leave one of the Ollama nodes; LiteLLM asks before each try."""
        if request_kwargs is None or not healthy_deployments:
            return healthy_deployments
        choosing = self._chooser.choose(model, healthy_deployments, messages, request_kwargs)
        try:
            left, flight = await _run(choosing, self)
        except HydraError as error:
            raise as_litellm_error(error, model) from error
        if flight is not None:
            flight.watch(asyncio.current_task())
        return left

    def choose_sync(
        self, model: str, deployments: Sequence[Any], messages: Any, request: dict[str, Any]
    ) -> list[Any]:
        """As :meth:`async_filter_deployments`, for synchronous calls; it may wait for a slot."""
        choosing = self._chooser.choose(model, deployments, messages, request)
        try:
            left, flight = _run_sync(choosing, self)
        except HydraError as error:
            raise as_litellm_error(error, model) from error
        if flight is not None and flight.dispatch is not None and flight.deployment is not None:
            flight.is_sent = True
            stripped = without_words(request)
            for name in request.keys() - stripped.keys():
                del request[name]
            request.update(stripped)
            if flight.deployment.is_native:
                request["client"] = flight.wires.handler(flight.dispatch)
        return left

    def has_nodes(self, deployments: Sequence[Any]) -> bool:
        """Whether some of LiteLLM's deployments are Ollama nodes."""
        return self._chooser.has_nodes(deployments)

    def forget(self, request: Mapping[str, Any]) -> None:
        """Put the place of a choice back whose end nobody will tell."""
        flight = self._flight(request)
        if flight is not None and flight.dispatch is not None:
            flight.dispatch.put_back()

    def _flight(self, request: Mapping[str, Any]) -> Flight | None:
        return self._chooser.flights.find(request.get("litellm_trace_id"), *buckets(request))

    # ------------------------------------------------------------------ each try

    async def async_pre_call_deployment_hook(
        self, kwargs: dict[str, Any], call_type: Any
    ) -> dict[str, Any] | None:
        """Have the try go over our wire, without the routing words."""
        flight = self._flight(kwargs)
        if flight is None or flight.deployment is None:
            return None
        if (kwargs.get("model_info") or {}).get("id") not in (None, flight.deployment.id):
            return None  # of a mixed group, LiteLLM took one that is no Ollama node
        if flight.dispatch is None:
            await self._hold(flight, kwargs)
        dispatch = flight.dispatch
        assert dispatch is not None
        flight.is_sent = True
        kept = without_words(kwargs)
        if flight.deployment.is_native and dispatch.is_held:
            kept["client"] = flight.wires.async_handler(dispatch, flight.unwatch)
        return kept

    async def _hold(self, flight: Flight, kwargs: Mapping[str, Any]) -> None:
        """Of a mixed group, LiteLLM took the Ollama node that was offered: hold a place there."""
        assert flight.deployment is not None
        deployment = flight.deployment
        words = {**flight.words, "node_id": deployment.node.url, "pin": "require"}
        payload = {"model": deployment.model, "messages": kwargs.get("messages") or []}
        try:
            held = await flight.wires.async_transport.reserve("/api/chat", payload, **words)
        except HydraError as error:
            raise as_litellm_error(error, flight.group) from error
        flight.renew(held)

    async def async_post_call_success_deployment_hook(
        self, request_data: dict[str, Any], response: Any, call_type: Any
    ) -> Any:
        """Close the try, and put the decision on the answer."""
        flight = self._flight(request_data)
        if flight is not None:
            flight.answered()
            _explain(response, flight.decision())
        return response

    async def async_post_call_failure_deployment_hook(
        self,
        request_data: Mapping[str, Any],
        exception: Exception,
        call_type: Any,
        fallback_depth: int | None = None,
    ) -> None:
        """Close the try; of what went over our wire the reason is known already."""
        flight = self._flight(request_data)
        if flight is not None and flight.deployment is not None and flight.is_sent:
            flight.failed(node_error_of(exception, flight.deployment.node))

    def log_pre_api_call(self, model: Any, messages: Any, kwargs: dict[str, Any]) -> None:
        """Learn by which id LiteLLM's answer will name the call."""
        flight = self._flight_of_log(kwargs)
        if flight is not None:
            self._chooser.flights.name(kwargs.get("litellm_call_id"), flight)

    # --------------------------------------------------------------- the whole call

    async def async_logging_hook(
        self, kwargs: dict[str, Any], result: Any, call_type: Any
    ) -> tuple[dict[str, Any], Any]:
        """Put the decision into what LiteLLM's loggers get."""
        return self.logging_hook(kwargs, result, call_type)

    def logging_hook(
        self, kwargs: dict[str, Any], result: Any, call_type: Any
    ) -> tuple[dict[str, Any], Any]:
        """As :meth:`async_logging_hook`."""
        flight = self._flight_of_log(kwargs)
        logged = kwargs.get("standard_logging_object")
        if flight is not None:
            decision = flight.decision()
            _explain(result, decision)
            if isinstance(logged, dict) and isinstance(logged.get("metadata"), dict):
                logged["metadata"]["hydra"] = decision
        return kwargs, result

    async def async_log_success_event(
        self, kwargs: dict[str, Any], response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        """Close what is still open: a stream of another provider, say."""
        self.log_success_event(kwargs, response_obj, start_time, end_time)

    def log_success_event(
        self, kwargs: dict[str, Any], response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        """As :meth:`async_log_success_event`."""
        flight = self._flight_of_log(kwargs)
        if flight is not None:
            flight.answered()

    def flight_of_call(self, call_id: Any) -> Flight | None:
        """Find the flight of an answer by LiteLLM's id of the call; None once it is forgotten."""
        return self._chooser.flights.named(call_id)

    def _flight_of_log(self, kwargs: Mapping[str, Any]) -> Flight | None:
        trace_id, holders = call_of_log(kwargs)
        return self._chooser.flights.find(trace_id, *holders)

    # ------------------------------------------------------------------- the proxy

    async def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: Any, response: Any, request_data: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        """Know the end of a stream: its last part, or a client that has left."""
        try:
            async for part in response:
                yield part
        except (GeneratorExit, asyncio.CancelledError):
            flight = self._flight(request_data)
            if flight is not None:
                flight.cancelled()
            raise
        flight = self._flight(request_data)
        if flight is not None:
            flight.answered()

    async def async_post_call_response_headers_hook(
        self, data: dict[str, Any], user_api_key_dict: Any, response: Any, *more: Any, **others: Any
    ) -> dict[str, str] | None:
        """Say in the answer's headers which node gave it, and why."""
        flight = self._flight(data)
        return flight.headers() if flight is not None else None

    def __repr__(self) -> str:
        return f"<HydraRoutingStrategy over {self.hydra!r}>"


# ------------------------------------------------------------------------- helpers


async def _run(
    choosing: Choosing, strategy: HydraRoutingStrategy
) -> tuple[list[Any], Flight | None]:
    """Drive a choice, waiting where it takes that."""
    try:
        step = next(choosing)
        while True:
            wires = strategy._wires
            assert wires is not None
            try:
                if isinstance(step, Reserve):
                    held = await wires.async_transport.reserve(
                        step.path, step.payload, among=step.among, **step.words
                    )
                else:
                    await wires.async_transport.reserve_again(step.dispatch)
                    held = step.dispatch
            except HydraError as error:
                step = choosing.throw(error)
            else:
                step = choosing.send(held)
    except StopIteration as done:
        left, flight = done.value
        return left, flight


def _run_sync(
    choosing: Choosing, strategy: HydraRoutingStrategy
) -> tuple[list[Any], Flight | None]:
    """As :func:`_run`."""
    try:
        step = next(choosing)
        while True:
            wires = strategy._wires
            assert wires is not None
            try:
                if isinstance(step, Reserve):
                    held = wires.transport.reserve(
                        step.path, step.payload, among=step.among, **step.words
                    )
                else:
                    wires.transport.reserve_again(step.dispatch)
                    held = step.dispatch
            except HydraError as error:
                step = choosing.throw(error)
            else:
                step = choosing.send(held)
    except StopIteration as done:
        left, flight = done.value
        return left, flight


def _explain(answer: Any, decision: dict[str, Any] | None) -> None:
    """Put the decision and its headers where LiteLLM keeps what an answer does not show."""
    if isinstance(answer, dict):  # of /v1/messages
        hidden = answer.setdefault("_hidden_params", {})
    else:
        hidden = getattr(answer, "_hidden_params", None)
    if hidden is None:
        return
    headers = hidden.get("additional_headers") if hasattr(hidden, "get") else None
    told = {
        "routing_decision": decision,
        "additional_headers": {**(headers or {}), **(headers_of(decision) if decision else {})},
    }
    if isinstance(hidden, dict):
        hidden.update(told)
        return
    for name, value in told.items():  # of /v1/completions: an object of LiteLLM's
        setattr(hidden, name, value)


def _own_router(fresh: Sequence[Node]) -> Router:
    settings = HydraSettings()
    if settings.nodes_configured:
        return Router(settings=settings)
    return Router(list(_with_free_ids(fresh, ())), settings=settings)


def _one_per_url(nodes: Any) -> list[Node]:
    return list({node.url: node for node in nodes}.values())


def _with_free_ids(fresh: Sequence[Node], known: Sequence[Node]) -> list[Node]:
    """Nodes that are not known yet; one whose name is taken gets its address for a name."""
    urls, ids = {node.url for node in known}, {node.id for node in known}
    added: list[Node] = []
    for node in fresh:
        if node.url in urls:
            continue
        if node.id in ids:
            warnings.warn(
                f"two nodes are called {node.id!r}; {node.url} goes by its address",
                stacklevel=2,
            )
            added.append(replace(node, id=""))
        else:
            added.append(node)
        ids.add(added[-1].id)
    return added
