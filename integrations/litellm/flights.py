"""
One request of LiteLLM's from its first choice to its end, over all of its tries.

::

    chosen ──sent──▶ on the wire ──▶ answered
       ▲    │             │
       │    └─put back    └─failed or cancelled
       └──────asked again────────┘

LiteLLM asks for a deployment anew at each try, and gives the same metadata each time. There a
token lies that holds the flight; when nobody holds the metadata any more, the flight is over
whatever happened, and gives its place back.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

from hydra_llm import Dispatch, NodeError, RoutingDecision
from hydra_llm.integrations.litellm.deployments import Deployment
from hydra_llm.integrations.litellm.telling import headers_of
from hydra_llm.integrations.litellm.wire import Wires
from hydra_llm.integrations.litellm.words import buckets

__all__ = ["Flight", "Flights", "call_of_log", "held_by"]

TOKEN_KEY = "_hydra_flight"  # noqa: S105  its name, not a secret


class Token(str):
    """
    Text to whoever copies or writes out the metadata; to us, the flight itself.

    A copy of the metadata shares it. A caller may hand one dictionary of metadata to many calls;
    so it holds the flight of each, by LiteLLM's trace id.
    """

    __slots__ = ("flights",)
    flights: dict[str | None, Flight]

    def __deepcopy__(self, memo: dict[int, Any]) -> Token:
        return self

    def __copy__(self) -> Token:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)


class Flight:
    """
    One request.

    Attributes:
        group: the model group it was last asked for.
        dispatch: its state in the core; None while only looking.
        deployment: what was chosen for the present try.
        is_sent: whether LiteLLM has begun the present try.
    """

    def __init__(self, wires: Wires, trace_id: str | None, group: str) -> None:
        self.wires = wires
        self.trace_id = trace_id
        self.group = group
        self.dispatch: Dispatch | None = None
        self.deployment: Deployment | None = None
        self.level = 0
        self.is_sent = False
        self.is_answered = False
        self.words: dict[str, Any] = {}
        self._decisions: list[RoutingDecision] = []
        self._told: tuple[RoutingDecision, dict[str, Any]] | None = None
        self._watch: tuple[weakref.ref[asyncio.Task[Any]], Callable[[object], None]] | None = None

    def renew(self, dispatch: Dispatch | None) -> None:
        """Go on with another dispatch; what was tried before stays on record."""
        if self.dispatch is not None:
            self._decisions.append(self.dispatch.decision())
        self.dispatch = dispatch

    def watch(self, task: asyncio.Task[Any] | None) -> None:
        """Put the place back if the task ends before anything has gone over our wire."""
        self.unwatch()
        if task is None:
            return
        weak = weakref.ref(self)

        def ended(_: object) -> None:
            flight = weak()
            if flight is not None and flight.dispatch is not None:
                flight.dispatch.put_back()

        task.add_done_callback(ended)
        self._watch = (weakref.ref(task), ended)

    def unwatch(self) -> None:
        """The wire, or LiteLLM, tells the end from now on."""
        if self._watch is not None:
            (weak, ended), self._watch = self._watch, None
            task = weak()
            if task is not None:
                task.remove_done_callback(ended)

    def let_go(self) -> None:
        """Be asked again: a try that was begun has failed there, one that was not is put back."""
        self.unwatch()
        dispatch = self.dispatch
        if dispatch is not None:
            if self.is_sent:
                dispatch.give_up_on_node()
            else:
                dispatch.put_back()
        self.is_sent = False
        self.deployment = None

    @property
    def is_over(self) -> bool:
        """Whether it holds no place any more, and will not be asked again."""
        return self.is_answered and not (self.dispatch is not None and self.dispatch.is_held)

    def answered(self) -> None:
        """The answer is complete, says LiteLLM; on the wire that is known already."""
        self.is_answered = True
        self.unwatch()
        if self.dispatch is not None and self.dispatch.is_held:
            self.dispatch.complete(None)

    def failed(self, error: NodeError | None) -> None:
        """The present try has failed, says LiteLLM."""
        self.unwatch()
        if self.dispatch is not None and self.dispatch.is_held:
            self.dispatch.give_up_on_node(error)

    def cancelled(self) -> None:
        """Nobody waits for it any more."""
        if self.dispatch is not None:
            self.dispatch.cancelled()

    def decision(self) -> dict[str, Any] | None:
        """The decision as plain data, with the attempts of every try."""
        if self.dispatch is None:
            return None
        decision = self.dispatch.decision()
        if self._told is None or self._told[0] is not decision:
            told = decision.to_dict()
            earlier = [a for one in self._decisions for a in one.to_dict()["attempts"]]
            told["attempts"] = earlier + told["attempts"]
            self._told = decision, told
        return self._told[1]

    def headers(self) -> dict[str, str]:
        """What an answer says of it: the node, the reason, the number of attempts."""
        told = self.decision()
        return {} if told is None else headers_of(told)

    def __del__(self) -> None:
        # Whoever held it is gone without a word: a cancelled task, a stream that was dropped.
        if self.dispatch is not None and self.dispatch.is_held:
            self.dispatch.abandon()


class Flights:
    """The flights there are, found by LiteLLM's trace id or in the metadata."""

    def __init__(self) -> None:
        self._by_trace: WeakValueDictionary[str, Flight] = WeakValueDictionary()
        self._by_call: WeakValueDictionary[str, Flight] = WeakValueDictionary()

    def add(self, flight: Flight, bucket: dict[str, Any]) -> None:
        """Have the metadata hold it."""
        token = bucket.get(TOKEN_KEY)
        if not isinstance(token, Token):
            token = bucket[TOKEN_KEY] = Token("in use")
            token.flights = {}
        for trace_id, one in list(token.flights.items()):
            if one.is_over:
                token.flights.pop(trace_id, None)
        token.flights[flight.trace_id] = flight
        if flight.trace_id:
            self._by_trace[flight.trace_id] = flight

    def find(self, trace_id: Any, *holders: dict[str, Any]) -> Flight | None:
        """
        The flight of a request.

        The metadata come first: a trace id may be a caller's own, for many requests.
        """
        for bucket in holders:
            flight = held_by(bucket, trace_id)
            if flight is not None:
                return flight
        return self._by_trace.get(trace_id) if isinstance(trace_id, str) else None

    def name(self, call_id: Any, flight: Flight) -> None:
        """Find it by LiteLLM's id of one call, too."""
        if isinstance(call_id, str):
            self._by_call[call_id] = flight

    def named(self, call_id: Any) -> Flight | None:
        """The flight of a call; None once nobody holds it any more."""
        return self._by_call.get(call_id) if isinstance(call_id, str) else None


def held_by(bucket: dict[str, Any], trace_id: Any = None) -> Flight | None:
    """The flight that some metadata hold for a request; the latest, if it is not named."""
    token = bucket.get(TOKEN_KEY)
    if not isinstance(token, Token):
        return None
    if trace_id:
        return token.flights.get(trace_id)
    return next(reversed(token.flights.values()), None)


def call_of_log(details: Mapping[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """Give the trace id and the metadata out of what LiteLLM logs of a call."""
    params = details.get("litellm_params")
    params = params if isinstance(params, Mapping) else {}
    return details.get("litellm_trace_id") or params.get("litellm_trace_id"), [*buckets(params)]
