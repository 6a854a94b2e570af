"""`install(router)`: one call makes a `litellm.Router` route by our core, sync and async."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import litellm
from litellm.types.router import CustomRoutingStrategyBase, RouterRateLimitError

from hydra_llm import ConfigurationError, Router
from hydra_llm.integrations.litellm.deployments import read_deployment
from hydra_llm.integrations.litellm.flights import call_of_log, held_by
from hydra_llm.integrations.litellm.strategy import HydraRoutingStrategy

__all__ = ["SyncStrategy", "decision_of", "install", "uninstall"]


def install(
    router: litellm.Router, hydra: Router | HydraRoutingStrategy | None = None
) -> HydraRoutingStrategy:
    """
    Have a `litellm.Router` route by hydra_llm.

    ::

        router = litellm.Router(model_list=[...])
        strategy = install(router)

    Asynchronous calls of every `litellm.Router` of the process are served through a callback,
    as LiteLLM's callbacks belong to the process. Synchronous ones of this router are served
    through LiteLLM's custom strategy, if nothing is lost by that: from 1.109 on LiteLLM then no
    longer chooses by its own strategies anywhere in the router. Where that would lose routing
    plugins, an auto-router, strategies of groups, or a strategy other than ``simple-shuffle`` for
    groups without Ollama nodes, a warning says that synchronous calls stay as they are.

    Args:
        router: the router to serve.
        hydra: the core's router, or a strategy made before, to choose with. By default the
            process has one for all of LiteLLM.

    Returns:
        The strategy; its ``close()`` closes the router that it made for itself.

    Raises:
        ConfigurationError: ``router`` is no `litellm.Router`, or a deployment is wrong.
    """
    if not isinstance(router, litellm.Router):
        raise ConfigurationError(
            f"install() takes a litellm.Router, not a {type(router).__name__}; "
            "the proxy takes hydra_llm.integrations.litellm.instance in its config.yaml"
        )
    strategy = _strategy(hydra)
    are_nodes = [read_deployment(raw) is not None for raw in router.model_list]
    if strategy not in litellm.callbacks:
        litellm.logging_callback_manager.add_litellm_callback(strategy)
    lost = _what_would_be_lost(router, all(are_nodes))
    if lost is None:
        plug_in = SyncStrategy(router, strategy)
        register = getattr(router, "register_plugin", None) or router.set_custom_routing_strategy
        register(plug_in)
    else:
        warnings.warn(
            f"synchronous calls are left to LiteLLM's own choice: this router also has {lost}, "
            f"which LiteLLM {_version()} would lose; use asynchronous calls, or a router each",
            stacklevel=2,
        )
    return strategy


def uninstall(strategy: HydraRoutingStrategy) -> None:
    """Take a strategy out of LiteLLM's callbacks again, and close what it opened."""
    for events in (
        litellm.callbacks,
        litellm.input_callback,
        litellm.success_callback,
        litellm.failure_callback,
        litellm._async_success_callback,
        litellm._async_failure_callback,
    ):
        while strategy in events:
            events.remove(strategy)
    strategy.close()


def decision_of(answer: Any) -> dict[str, Any] | None:
    """
    Give the decision behind an answer of LiteLLM's, as plain data; None if it was not routed.

    Of a stream it is complete once the last part has been read.
    """
    hidden: Any = getattr(answer, "_hidden_params", None)
    if isinstance(answer, Mapping):  # of /v1/messages
        hidden = answer.get("_hidden_params")
    told = hidden.get("routing_decision") if hidden is not None else None
    if told:
        return dict(told)
    # Of a synchronous call LiteLLM's logging thread writes it down, a moment later.
    call_id = hidden.get("litellm_call_id") if hidden is not None else None
    for callback in litellm.callbacks:
        if call_id and isinstance(callback, HydraRoutingStrategy):
            flight = callback.flight_of_call(call_id)
            if flight is not None:
                return flight.decision()
    logged = getattr(answer, "logging_obj", None) or getattr(answer, "litellm_logging_obj", None)
    details = getattr(logged, "model_call_details", None)
    trace_id, holders = call_of_log(details if isinstance(details, Mapping) else {})
    for bucket in holders:
        flight = held_by(bucket, trace_id)
        if flight is not None:
            return flight.decision()
    return None


def _strategy(hydra: Router | HydraRoutingStrategy | None) -> HydraRoutingStrategy:
    if isinstance(hydra, HydraRoutingStrategy):
        return hydra
    if hydra is not None:
        return HydraRoutingStrategy(hydra)
    from hydra_llm.integrations.litellm import instance

    return instance


def _what_would_be_lost(router: Any, only_nodes: bool) -> str | None:
    """What of a router LiteLLM would no longer heed if it had a custom strategy."""
    registry = router.registry() if hasattr(router, "registry") else None
    if registry.plugins("routing") if registry else getattr(router, "routing_plugins", None):
        return "routing plugins"
    if registry is None:
        return None  # before 1.109 the strategy is replaced for each call, and can be asked
    if any(
        str(raw["litellm_params"]["model"]).startswith("auto_router/") for raw in router.model_list
    ):
        return "an auto-router"
    if registry.routing_groups() or any(
        raw["model_info"].get("routing_strategy") for raw in router.model_list
    ):
        return "strategies of groups"
    strategy = str(getattr(router.routing_strategy, "value", router.routing_strategy))
    if strategy != "simple-shuffle" and not only_nodes:
        return f"groups without Ollama nodes under {strategy!r}"
    return None


def _version() -> str:
    from importlib.metadata import version

    return version("litellm")


class SyncStrategy(CustomRoutingStrategyBase):
    """
    What LiteLLM calls a custom strategy: it serves the synchronous calls of one router.

    Its asynchronous half hands on to LiteLLM's own choice, in which our callback has its say.
    """

    def __init__(self, router: litellm.Router, strategy: HydraRoutingStrategy) -> None:
        self._router = router
        self._strategy = strategy

    def get_available_deployment(
        self,
        model: str,
        messages: Any = None,
        input: Any = None,  # noqa: A002  LiteLLM's name
        specific_deployment: bool | None = False,
        request_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Choose for a synchronous call."""
        deployments = self._group(model)
        if specific_deployment or not deployments or not self._replaces(deployments):
            return self._own_choice(model, messages, input, specific_deployment, request_kwargs)
        deployments = self._not_cooled_down(model, deployments)
        request = request_kwargs
        if request is None:
            request = {} if input is None else {"input": input}
        left = self._strategy.choose_sync(model, deployments, messages, request)
        if request_kwargs is None:
            # Old versions tell nothing of a synchronous embedding: nobody will close it.
            self._strategy.forget(request)
        if len(left) == 1:
            return left[0]
        return _weighted(left)

    async def async_get_available_deployment(
        self,
        model: str,
        messages: Any = None,
        input: Any = None,  # noqa: A002  LiteLLM's name
        specific_deployment: bool | None = False,
        request_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Hand on an asynchronous call."""
        if not hasattr(self._router, "select"):
            return await type(self._router).async_get_available_deployment(
                self._router,
                model=model,
                messages=messages,
                input=input,
                specific_deployment=specific_deployment,
                request_kwargs=request_kwargs if request_kwargs is not None else {},
            )
        left = await self._router.select(
            model,
            request_kwargs,
            kind="healthy",
            messages=messages,
            input=input,
            specific_deployment=specific_deployment,
        )
        return _weighted(left) if isinstance(left, list) else left

    def _group(self, model: str) -> list[Any]:
        if hasattr(self._router, "registry"):
            registry = self._router.registry()
            name = registry.resolve(model)
            return [dict(d) for d in registry.deployments(name, source="for_request")]
        return list(self._router.get_model_list(model_name=model) or ())

    def _replaces(self, deployments: Sequence[Any]) -> bool:
        """Whether LiteLLM's own choice among some deployments is ours to make."""
        # From 1.109 on LiteLLM's choice cannot be asked any more, once there is a custom strategy.
        return hasattr(self._router, "registry") or self._strategy.has_nodes(deployments)

    def _not_cooled_down(self, model: str, deployments: Sequence[Any]) -> list[Any]:
        """Leave out what LiteLLM has put aside: of synchronous calls a strategy is given all."""
        router: Any = self._router
        cooldowns = (
            router.health().cooldowns if hasattr(router, "health") else router.cooldown_cache
        )
        ids = [raw["model_info"]["id"] for raw in deployments]
        cooled = [one for one, _ in cooldowns.get_active_cooldowns(ids, None)]
        left = [raw for raw in deployments if raw["model_info"]["id"] not in cooled]
        if not left:
            raise RouterRateLimitError(
                model=model,
                cooldown_time=cooldowns.get_min_cooldown(ids, None),
                enable_pre_call_checks=bool(router.enable_pre_call_checks),
                cooldown_list=cooled,
            )
        return left

    def _own_choice(
        self, model: str, messages: Any, given: Any, specific: Any, request: Any
    ) -> Any:
        """LiteLLM's: of a deployment that is named by its id, for example."""
        if hasattr(self._router, "registry"):
            found = self._router.registry().deployment_dict(model)
            if found is not None:
                return found
            raise litellm.exceptions.BadRequestError(
                message=f"there is no model group or deployment {model!r}",
                model=model,
                llm_provider="",
            )
        return type(self._router).get_available_deployment(
            self._router,
            model=model,
            messages=messages,
            input=given,
            specific_deployment=specific,
            request_kwargs=request,
        )


def _weighted(deployments: Sequence[Any]) -> Any:
    """As ``simple-shuffle``: at random, by ``weight``, else ``rpm``, else ``tpm``, if given."""
    if not deployments:
        return None
    for name in ("weight", "rpm", "tpm"):
        weights = [float(d["litellm_params"].get(name) or 0) for d in deployments]
        if any(weights):
            return random.choices(deployments, weights=weights)[0]
    return random.choice(deployments)
