"""One request on its way through the cluster: which node next, what happened there.

The sync and async doors share it; all that they do themselves is wait and move bytes.

::

    lease ──▶ send ──▶ first byte ──▶ committed ──▶ complete
      ▲        │           │              └──────▶ broken: a typed error, never a 2nd answer
      └─ next ◀┴───────────┘
         node    failed before anything was handed out
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from math import inf
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import urlsplit

import httpx

from hydra_llm.cluster import Claim, Lease, PrefixKey, Waiter
from hydra_llm.exceptions import (
    AllNodesFailedError,
    DeadlineError,
    ModelNotFoundError,
    NodeError,
    NoEligibleNodeError,
    StreamBrokenError,
)
from hydra_llm.ollama.calls import Call, Framing, read_call, with_context
from hydra_llm.patience import Patience
from hydra_llm.scheduling import Choice, Ended, Prospect, RoutingDecision
from hydra_llm.scheduling.filters import MISSES_DEADLINE
from hydra_llm.types import Attempt, InferenceRequest, Node, Placement, Usage
from hydra_llm.words import HEADER_PREFIX, RoutingWords

if TYPE_CHECKING:
    from hydra_llm.router import Router

_NOT_PASSED_ON = frozenset(
    {
        b"host",
        b"authorization",
        b"content-length",
        b"transfer-encoding",
        b"connection",
        # Answers are read on their way; Ollama compresses nothing by itself.
        b"accept-encoding",
    }
)
_PREFIX = HEADER_PREFIX.encode()

AUTHORIZATION_EXTENSION = "hydra_authorization"
"""Request extension: its ``Authorization`` header is meant for every node."""


HOT_KEEP_ALIVE = "30m"
"""What ``manage_keep_alive`` asks for: Ollama pushes out those with the shortest first."""
HOT_SECONDS = 60.0
"""For models that are asked for once in so long, at least."""

LEARNED_IDLE_TOKENS = 50
"""A stream that was silent for so many tokens' time, as measured on its node, is taken for dead."""
LEAST_LEARNED_IDLE_SECONDS = 10.0
"""But not before that: other requests' prompts and loads make a runner pause."""


LEARNED_FIRST_TIMES = 10.0
"""So many times the expected time is a node waited for to begin, while others could take over."""
LEAST_LEARNED_FIRST_SECONDS = 30.0
"""And so much longer."""


class Droppable(Protocol):
    """An answer on its way."""

    def let_go(self) -> None:
        """Nobody waits for it any more."""
        ...


class Dispatch:
    """
    The state of one routed request; used by one thread or task at a time.

    Args:
        router: whose nodes may serve it.
        call: the request, read.
        words: what its caller said about it.
        body: its bytes.
        restart_of: how the same request ended before, if the caller asks for it once more:
            what was tried stays excluded, and the retry budget and the deadline go on.
        among: ids of the only nodes that may serve it; None: all.
    """

    def __init__(
        self,
        router: Router,
        call: Call,
        words: RoutingWords,
        body: bytes,
        *,
        restart_of: StreamBrokenError | None = None,
        among: Iterable[str] | None = None,
    ) -> None:
        self._router = router
        self._cluster = router._cluster
        self._clock = router._clock
        self.call = call
        self.words = words
        self._body = body
        self._began = self._clock()
        self._attempts: list[Attempt] = []
        self._lease: Lease | None = None
        self._sent_at = 0.0
        self._first_byte_at: float | None = None
        self._begun: Lease | None = None
        """The lease whose node has begun to answer."""
        self._continued: dict[str, Any] | None = None
        self._begun_by: Choice | None = None
        self._callers_limits: set[str] = set()
        """Time limits of the present attempt that are the caller's own, or his deadline's."""
        self._choice: Choice | None = None
        self._prospect: Prospect | None = None
        """By what it was foreseen when it joined the line for the present node, if it did."""
        self._usage: Usage | None = None
        self._finished_at: float | None = None
        self._is_complete = False
        self._was_seen_to_begin = False
        self._last_error: NodeError | None = None
        self._decision: RoutingDecision | None = None
        self._stream: weakref.ref[Droppable] | None = None
        self._chain = self._prompt_chain()
        tried: frozenset[str] = frozenset()
        if restart_of is not None:
            self._attempts += restart_of.attempts
            self._last_error = restart_of
            self._began = self._began if restart_of._began is None else restart_of._began
            tried = frozenset(attempt.node_id for attempt in self._attempts)
        self.request = self._inference_request(tried, among)

    # ----------------------------------------------------------------- request

    def _prompt_chain(self) -> tuple[PrefixKey, ...]:
        call = self.call
        if not call.parts:
            return ()
        if self.words.session is not None:
            key = hash(("session", self.words.session))
            return (PrefixKey(key, call.input_tokens),)
        return tuple(PrefixKey(part.hash, part.tokens) for part in call.parts)

    def _inference_request(
        self, tried: frozenset[str], among: Iterable[str] | None
    ) -> InferenceRequest:
        call, words = self.call, self.words
        return InferenceRequest(
            model=call.model_name,
            capabilities=call.capabilities,
            options=call.options,
            input_tokens=call.input_tokens,
            output_tokens=call.output_limit,
            interactive=call.framing is not Framing.JSON,
            node_id=words.node_id,
            min_vram_bytes=None if words.min_vram_gb is None else int(words.min_vram_gb * 1e9),
            prefer_local=words.prefer_local,
            priority=words.priority,
            exclude_nodes=frozenset(words.exclude_nodes),
            require_labels=frozenset(words.require_labels),
            prefer_labels=frozenset(words.prefer_labels),
            deadline_seconds=words.deadline_s,
            strict_pin=words.pin == "require",
            strict_vram=words.vram == "require",
            submitted_at=self._began,
            tried=tried,
            among=None if among is None else frozenset(among),
            cached_tokens=self._cluster.cached_tokens(call.model_name, self._chain),
        )

    # ------------------------------------------------------------------- lease

    def acquire(self) -> Lease | Waiter:
        """
        The next node, or a place in the line for it.

        Raises:
            NoEligibleNodeError: nobody may take it, and nobody was tried.
            AllNodesFailedError: nobody is left.
            DeadlineError: no node can make it in time.
            QueueFullError: too many wait already.
        """
        self._check_deadline()
        if self._attempts and not self._cluster.may_retry():
            raise self._given_up("the retry budget is spent") from self._last_error
        try:
            held = self._cluster.acquire(self.request)
        except NoEligibleNodeError as exc:
            raise self._nobody_left(exc) from self._last_error
        if isinstance(held, Lease):
            self.granted(held)
        return held

    def granted(self, lease: Lease, prospect: Prospect | None = None) -> Lease:
        """The lease is ours, at once or after waiting in the line."""
        self._lease, self._prospect = lease, prospect
        self._sent_at = self._clock()
        choice = lease.placement.choice
        assert isinstance(choice, Choice)
        self._choice = choice
        return lease

    def outcome_of(self, waiter: Waiter) -> Lease:
        """What became of a waiter that has been woken."""
        if waiter.lease is not None:
            return self.granted(waiter.lease, self._router._prospect(waiter))
        if isinstance(waiter.error, NoEligibleNodeError):
            raise self._nobody_left(waiter.error) from self._last_error
        assert waiter.error is not None
        raise waiter.error

    def withdraw(self, waiter: Waiter) -> None:
        """The caller no longer waits in the line."""
        self._cluster.withdraw(waiter)

    def claim(self) -> Claim | None:
        """Ask other routers whether the lease may be used; None if there is nobody to ask."""
        sharing = self._router._sharing
        if sharing is None:
            return None
        assert self._choice is not None
        return sharing.claim(self.lease, self._choice.room)

    def choose_again(self) -> Lease | Waiter:
        """Other routers have left no room: the next node, or a place in the line. As acquire()."""
        try:
            held = self._cluster.choose_again(self.lease, self.request)
        except NoEligibleNodeError as exc:
            raise self._nobody_left(exc) from self._last_error
        if isinstance(held, Lease):
            self.granted(held)
        return held

    def _nobody_left(self, exc: NoEligibleNodeError) -> Exception:
        if any(r.reason == MISSES_DEADLINE for r in exc.rejections):
            details = "; ".join(f"{r.node_id}: {r.detail or r.reason}" for r in exc.rejections)
            return DeadlineError(
                f"no node is expected to answer within {self.words.deadline_s:g} s ({details})",
                deadline_seconds=self.words.deadline_s or 0.0,
                predicted_seconds=None,
            )
        if not self._attempts:
            return exc
        all_missing = isinstance(self._last_error, ModelNotFoundError)
        why = "no other node can take it"
        if all_missing and len(exc.rejections) == len(self._attempts):
            why = f"try 'ollama pull {self.call.model}' on one of them"
        return self._given_up(why, exc)

    def _given_up(self, why: str, exc: NoEligibleNodeError | None = None) -> AllNodesFailedError:
        tried = ", ".join(f"{a.node_id} ({a.error or a.outcome})" for a in self._attempts)
        count = len(self._attempts)
        return AllNodesFailedError(
            f"{count} node{'s' if count > 1 else ''} tried for {self.call.model!r}, "
            f"none answered: {tried}; {why}",
            model=self.call.model,
            attempts=self._attempts,
            rejections=exc.rejections if exc is not None else (),
        )

    def bind(self, call: Call, body: bytes) -> None:
        """The request as it is sent after all; the node and the lease stay."""
        self.call, self._body = call, body
        self._chain = self._prompt_chain()

    def put_back(self) -> None:
        """The lease is not needed: nothing was sent, and nobody is to blame."""
        if self._lease is not None and self._finished_at is None:
            self._cluster.release(self._lease)

    def abandon(self) -> None:
        """As :meth:`put_back`, for finalizers: takes no lock, and effect within a second."""
        if self._lease is not None and self._finished_at is None:
            self._cluster.abandon(self._lease)

    def streams(self, stream: Droppable | None) -> None:
        """Its answer comes by that stream, which is let go of when it is cancelled."""
        self._stream = None if stream is None else weakref.ref(stream)

    def drop(self, response: httpx.Response, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """As :meth:`abandon`, while its answer was on its way; the connection is let go of too."""
        self.abandon()
        self._router._pools.drop(response, loop)

    @property
    def is_held(self) -> bool:
        """Whether it holds a place on a node now."""
        return self._lease is not None and self._lease.is_held

    @property
    def tried(self) -> frozenset[str]:
        """Ids of the nodes that have failed it."""
        return self.request.tried

    def give_up_on_node(self, error: NodeError | None = None) -> None:
        """
        Do not come back to the present node for this request.

        Args:
            error: how it failed there; None if that is not the node's fault as far as one knows.
        """
        if self._lease is None or self._finished_at is not None:
            return
        if error is not None and self._lease.is_held:
            self.failed(error)
            return
        self.put_back()
        self._leave_out()

    def _leave_out(self) -> None:
        """The present node is none for this request any more."""
        self.request = replace(self.request, tried=self.request.tried | {self.lease.node_id})

    # ---------------------------------------------------------------- deadline

    def seconds_left(self) -> float | None:
        """Until the caller's deadline; None without one."""
        if self.words.deadline_s is None:
            return None
        return self._began + self.words.deadline_s - self._clock()

    def _check_deadline(self) -> None:
        left = self.seconds_left()
        if left is not None and left <= 0:
            raise self.out_of_time()

    def out_of_time(self) -> DeadlineError:
        """The error for a deadline that has passed."""
        tried = ", ".join(f"{a.node_id} ({a.outcome})" for a in self._attempts) or "none"
        return DeadlineError(
            f"{self.words.deadline_s:g} s have passed without an answer; nodes tried: {tried}",
            deadline_seconds=self.words.deadline_s or 0.0,
            predicted_seconds=None,
        )

    # ----------------------------------------------------------------- sending

    @property
    def lease(self) -> Lease:
        """The present one."""
        assert self._lease is not None
        return self._lease

    @property
    def clock(self) -> Callable[[], float]:
        """The router's."""
        return self._clock

    @property
    def node(self) -> Node:
        """The node of the present attempt."""
        assert self._choice is not None
        return self._choice.selected.node

    def outgoing(self, incoming: httpx.Request) -> httpx.Request:
        """The request as it goes to the node of the present attempt."""
        timeouts = self.timeouts(incoming)
        silence = timeouts["read"]
        if silence is not None:
            # Until something comes nothing renews the lease: it has to outlive the silence.
            self.lease.renew(self._clock() + silence)
            timeouts["read"] = patience = Patience(silence, self._clock)
            patience.begin(silence)
        body = self._body_for(self.lease.placement)
        return outgoing_request(self.node, incoming, body, timeouts)

    def _body_for(self, placement: Placement) -> bytes:
        call = self.call
        if call.payload is None or not call.native or not call.generates:
            return self._body
        payload: Mapping[str, Any] = call.payload
        body: bytes | None = self._body
        if self._stays_loaded():
            payload, body = {**payload, "keep_alive": HOT_KEEP_ALIVE}, None
        if (
            call.options.num_ctx is None
            and placement.context_length is not None
            and not placement.causes_load
        ):
            payload, changed = with_context(payload, self._body, placement.context_length)
            body = None if body is None else changed
        if body is not None:
            return body
        try:
            return encode(payload)
        except ValueError:  # what Python reads and cannot write: NaN, half a surrogate pair
            return self._body

    def _stays_loaded(self) -> bool:
        """Whether its model is to be among the last that Ollama pushes out, and we may say so."""
        payload = self.call.payload
        if not self._router.settings.manage_keep_alive or not payload or "keep_alive" in payload:
            return False
        demand = self._cluster.demand().get(self.request.model)
        return demand is not None and demand.faded(self._clock()) >= 1.0 / HOT_SECONDS

    def timeouts(self, incoming: httpx.Request) -> dict[str, float | None]:
        """Connect, write and first byte; the caller's own limits and deadline are kept too."""
        settings = self._router.settings
        asked: Mapping[str, float | None] = incoming.extensions.get("timeout") or {}
        left = self.seconds_left()
        is_stream = self.call.framing is not Framing.JSON
        silence = settings.first_byte_timeout if is_stream else settings.whole_answer_timeout
        silence = min(silence, self._learned_silence(is_stream))
        own = {
            "connect": settings.connect_timeout,
            "write": settings.stream_idle_timeout,
            "read": silence,
        }
        limits = {name: _least(asked.get(name), limit, left) for name, limit in own.items()}
        self._callers_limits = {name for name, limit in own.items() if limits[name] != limit}
        return {"pool": None, **limits}

    def _learned_silence(self, is_stream: bool) -> float:
        """
        By the node's own pace, if all that will happen is known and somebody else could take it.

        Who is the last one that can is waited for as long as the settings say: perhaps it only
        has other people's work to do.
        """
        choice = self._choice
        assert choice is not None
        speed = choice.selected.speeds.get(self.request.model)
        if len(choice.eligible) < 2 or speed is None or speed.prefill_seconds_per_token is None:
            return inf
        if self.lease.running.loading and speed.load_seconds is None:
            return inf
        tokens = 0 if is_stream else self.call.output_limit
        pace = speed.decode_seconds_per_token if tokens else 0.0
        if tokens is None or pace is None:
            return inf
        expected = choice.predicted()["first_token"] + tokens * pace
        return LEAST_LEARNED_FIRST_SECONDS + LEARNED_FIRST_TIMES * expected

    def patience(self, incoming: httpx.Request) -> Patience:
        """Silence allowed once an answer has begun."""
        asked: Mapping[str, float | None] = incoming.extensions.get("timeout") or {}
        own = self._idle_seconds()
        idle = _least(asked.get("read"), own, self.seconds_left())
        assert idle is not None
        if idle != own:
            self._callers_limits.add("read")
        return Patience(idle, self._clock)

    def _idle_seconds(self) -> float:
        """By the node's own pace if that is known, and if it says something of its silences."""
        limit = self._router.settings.stream_idle_timeout
        assert self._choice is not None
        speed = self._choice.selected.speeds.get(self.request.model)
        pace = None if speed is None else speed.decode_seconds_per_token
        # Ollama holds back what may become the call of a tool, however long that gets.
        if pace is None or (self.call.payload or {}).get("tools"):
            return limit
        return min(limit, max(LEAST_LEARNED_IDLE_SECONDS, LEARNED_IDLE_TOKENS * pace))

    # ---------------------------------------------------------------- outcomes

    def first_byte(self) -> None:
        """The node has begun to answer."""
        if self._begun is self._lease:
            return
        self._begun = self._lease
        if self._first_byte_at is None:
            self._first_byte_at = self._clock()
        if self._cluster.first_byte(self.lease):
            self._router._refresh(self.lease.node_id)

    def complete(self, usage: Usage | None) -> None:
        """The answer is complete."""
        if self._finished_at is not None:
            return
        self._was_seen_to_begin = self._begun is self._lease
        self.first_byte()
        self._finished_at = self._clock()
        self._usage, self._is_complete = usage, True
        self._note("ok")
        self._cluster.succeeded(self.lease, usage, self._chain)
        if self.call.unloads:
            self._router._refresh(self.lease.node_id)
        self._router._decided(self)

    def refused(self, status: int) -> None:
        """The node answered that the caller made a mistake: no blame, no other node."""
        self._finished_at = self._clock()
        self._note("refused", status=status)
        self._cluster.release(self.lease)
        self._router._decided(self)

    def cancelled(self) -> None:
        """The caller has gone before the end."""
        if self._finished_at is not None or self._lease is None or not self._lease.is_held:
            return
        self._finished_at = self._clock()
        self._note("cancelled")
        self._cluster.release(self.lease)
        stream = None if self._stream is None else self._stream()
        if stream is not None:
            stream.let_go()
        self._router._decided(self)

    def failed(self, error: NodeError) -> None:
        """The node failed before anything was handed out; the next one may be tried."""
        self._book_failure(error)
        self._leave_out()
        if self._continued is None:
            self._first_byte_at = None

    def broken(self, error: NodeError, parts: int) -> StreamBrokenError:
        """The node failed after something had been handed out: the error for the caller."""
        self._book_failure(error)
        return self.break_off(error, parts)

    def break_off(self, error: NodeError, parts: int, *, why: str = "") -> StreamBrokenError:
        """The error for a stream that ends here; ``why`` nobody goes on with it."""
        self._finished_at, self._decision = self._clock(), None
        self._router._decided(self)
        if isinstance(error, StreamBrokenError):
            broken = error
        else:
            told = f"the answer of {error.node_id} broke off after {parts} parts: {error}"
            broken = StreamBrokenError(
                f"{told}; not continued: {why}" if why else told,
                parts=parts,
                node_id=error.node_id,
                node_url=error.node_url,
            )
            broken.__cause__ = error
        broken.attempts, broken._began = tuple(self._attempts), self._began
        return broken

    # ------------------------------------------------------------ continuation

    @property
    def continues(self) -> bool:
        """Whether a stream that breaks off is to be gone on with on another node."""
        said = self.words.continue_streams
        return self._router.settings.continue_streams if said is None else said

    def to_be_continued(self, error: NodeError, parts: int) -> None:
        """The node failed in the middle of a stream, and another one is to go on with it."""
        self._continued = {"from": error.node_id, "after_parts": parts}
        self._begun_by = self._choice
        self.failed(error)

    def not_continued(self, error: NodeError, parts: int, why: str) -> StreamBrokenError:
        """Nobody goes on with it: the error for the caller, and the answer is the first node's."""
        self.put_back()
        self._continued, self._choice = None, self._begun_by
        return self.break_off(error, parts, why=why)

    @property
    def begun_by(self) -> str:
        """The node that began an answer which another one goes on with."""
        assert self._continued is not None
        return str(self._continued["from"])

    def continue_with(self, payload: Mapping[str, Any]) -> None:
        """The request for the rest of the answer."""
        self.bind(read_call("POST", self.call.path, payload), encode(payload))

    @property
    def max_body_bytes(self) -> int:
        """The longest answer a node may give."""
        return self._router.settings.max_body_bytes

    def _book_failure(self, error: NodeError) -> None:
        self._last_error = _without_frames(error)
        self._note(error.cause, status=getattr(error, "status_code", None), error=str(error))
        if self._is_callers_haste(error):
            self._cluster.release(self.lease)
            return
        self._cluster.failed(self.lease, error)
        self._router._refresh(self.lease.node_id)

    def _is_callers_haste(self, error: NodeError) -> bool:
        """Whether only the caller's own limit was over, which says nothing of the node."""
        cause = error.__cause__
        return (
            (isinstance(cause, httpx.ReadTimeout) and "read" in self._callers_limits)
            or (isinstance(cause, httpx.ConnectTimeout) and "connect" in self._callers_limits)
            or (isinstance(cause, httpx.WriteTimeout) and "write" in self._callers_limits)
        )

    def _note(self, outcome: str, *, status: int | None = None, error: str = "") -> None:
        self._attempts.append(
            Attempt(
                node_id=self.node.id,
                node_url=self.node.url,
                outcome=outcome,
                seconds=self._clock() - self._sent_at,
                status_code=status,
                error=error,
            )
        )
        self._decision = None

    def incomplete(self, parts: int) -> StreamBrokenError:
        """The error for an answer that ended without saying that it was done."""
        return StreamBrokenError(
            f"the answer of {self.node.id} ended after {parts} parts without being complete",
            parts=parts,
            node_id=self.node.id,
            node_url=self.node.url,
        )

    # ---------------------------------------------------------------- decision

    def decision(self) -> RoutingDecision:
        """The explanation as of now."""
        if self._decision is None:
            self._decision = RoutingDecision(
                model=self.call.model,
                requested_node=self.words.node_id,
                choice=self._choice,
                attempts=tuple(self._attempts),
                actual=self._actual(),
                continued=self._continued,
                ended=self._ended(),
            )
        return self._decision

    def _ended(self) -> Ended | None:
        """For the outcome; None where there is nothing to compare."""
        call = self.call
        if self._finished_at is None or self._continued is not None or not self._is_complete:
            return None
        if call.generates and not call.parts:
            return None  # without a prompt a model is only loaded or unloaded
        # Of an answer in one piece, or that somebody else has read, it is not known.
        knows_first = call.framing is not Framing.JSON and self._was_seen_to_begin
        return Ended(
            self._prospect,
            self._sent_at,
            self._first_byte_at if knows_first else None,
            self._finished_at,
            self._usage,
        )

    def _actual(self) -> dict[str, float] | None:
        if self._finished_at is None or self._choice is None:
            return None
        actual = {
            "total": self._finished_at - self._began,
            "queued": self._sent_at - self._began,
        }
        if self._first_byte_at is not None:
            actual["first_token"] = self._first_byte_at - self._began
        usage = self._usage
        if usage is not None:
            for name, value in (
                ("load", usage.load_seconds),
                ("prefill", usage.prefill_seconds),
                ("decode", usage.decode_seconds),
                ("prompt_tokens", usage.prompt_tokens),
                ("output_tokens", usage.output_tokens),
            ):
                if value is not None:
                    actual[name] = float(value)
        return actual


# ------------------------------------------------------------------------- helpers


_OF_AN_ATTEMPT = frozenset({"anyio", "contextlib", "h11", "httpcore", "httpx", "hydra_llm"})
"""Packages whose frames an attempt goes through; the callers' own are none of ours."""


def clear_frames(error: NodeError) -> None:
    """
    Have the frames that a failed attempt has left forget their variables.

    Some of them hold the very error that holds them, httpx's too; so the attempt, and whatever its
    callers' frames hold, would be there until Python's garbage collector comes by.
    """
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        left += [one.__cause__, one.__context__]
        trace = one.__traceback__
        while trace is not None:
            package = str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0]
            if package in _OF_AN_ATTEMPT:
                with suppress(RuntimeError):  # it is still at work
                    trace.tb_frame.clear()
            trace = trace.tb_next


_E = TypeVar("_E", bound=BaseException)


def _without_frames(error: _E) -> _E:
    """
    The same error and its causes, without the frames that they have come through.

    They hold this very request, and with LiteLLM much more, its streams included: an error that is
    kept would have all of it wait for Python's garbage collector.
    """
    kept = type(error).__new__(type(error), *error.args)
    vars(kept).update(vars(error))
    kept.__cause__ = None if error.__cause__ is None else _without_frames(error.__cause__)
    return kept


def _least(*limits: float | None) -> float | None:
    given = [limit for limit in limits if limit is not None]
    return max(min(given), 0.001) if given else None


def encode(payload: Mapping[str, Any]) -> bytes:
    """As httpx encodes JSON."""
    import json

    return json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


@lru_cache(maxsize=1024)
def _target(node_url: str, raw_path: bytes) -> tuple[httpx.URL, bytes]:
    """The URL at the node, and its Host header."""
    url = httpx.URL(node_url + raw_path.decode("ascii"))
    return url, urlsplit(node_url).netloc.encode("ascii")


def outgoing_request(
    node: Node,
    incoming: httpx.Request,
    body: bytes | httpx.SyncByteStream | httpx.AsyncByteStream,
    timeouts: dict[str, float | None],
) -> httpx.Request:
    """
    ``incoming`` as it goes to ``node``: its Host, its credentials, and nobody else's.

    The caller's own ``Authorization`` header is not passed on unless the extension
    ``hydra_authorization`` says so: openai's client always sends one, ollama's takes it from
    ``OLLAMA_API_KEY``, and a key for one machine is none of the others' business.
    """
    url, host = _target(node.url, incoming.url.raw_path)
    own = [(name.encode(), value.encode()) for name, value in (node.headers or {}).items()]
    own_names = {name.lower() for name, _ in own}
    kept_back = _NOT_PASSED_ON
    if incoming.extensions.get(AUTHORIZATION_EXTENSION):
        kept_back = _NOT_PASSED_ON - {b"authorization"}
    headers = [(b"Host", host), (b"Accept-Encoding", b"identity")]
    for name, value in incoming.headers.raw:
        lower = name.lower()
        if lower in kept_back or lower in own_names or lower.startswith(_PREFIX):
            continue
        headers.append((name, value))
    headers += own
    extensions = {"timeout": timeouts}
    if isinstance(body, bytes):
        if body or incoming.method in ("POST", "PUT", "PATCH"):
            headers.append((b"Content-Length", str(len(body)).encode()))
        return httpx.Request(
            incoming.method,
            url,
            headers=headers,
            stream=httpx.ByteStream(body),
            extensions=extensions,
        )
    for framing in ("content-length", "transfer-encoding"):
        if framing in incoming.headers:
            headers.append((framing.encode(), incoming.headers[framing].encode()))
    return httpx.Request(incoming.method, url, headers=headers, stream=body, extensions=extensions)
