"""A request under way: what goes on the wire for each token, at the end, and on failure."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hydra_llm.simulation.answers import Answer, Token
from hydra_llm.simulation.asked import Asked
from hydra_llm.simulation.records import Failure, Ticket
from hydra_llm.simulation.text import rng_of, tokens_of
from hydra_llm.simulation.wire import (
    JSON,
    NDJSON,
    PLAIN_JSON,
    Reply,
    date_text,
    error_body,
    go_json,
    json_reply,
)

__all__ = [
    "ChatExchange",
    "Context",
    "Exchange",
    "FixedExchange",
    "GenerateExchange",
    "Writer",
]  # fmt: skip

# "load_duration: about 1-10 ms when the model was loaded."
_OVERHEAD_S = 0.0015


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a writer has to know beside the answer."""

    asked: Asked
    answer: Answer
    rendered: str
    prompt_tokens: int
    is_modern: bool
    number: int
    """Makes ids: the same node gives the same ones for the same requests."""
    wall: Callable[[], float] = time.time
    speed: float = 1.0
    """Simulated seconds in a second of the client's clock, in which durations are told."""


class Exchange(ABC):
    """
    One request that a model is working on.

    The server asks `token` for the bytes of each token, then `finish` or `fail` once.
    """

    ticket: Ticket

    def __init__(self, *, stream: bool) -> None:
        self.stream = stream

    content_type = NDJSON

    @abstractmethod
    def token(self, index: int) -> bytes:
        """Give the chunk for one token; empty when nothing of it is seen."""

    def part(self, start: int, stop: int) -> bytes:
        """Give the chunk for several tokens at once."""
        return b"".join(map(self.token, range(start, stop)))

    @abstractmethod
    def finish(self) -> Reply | tuple[bytes, ...]:
        """Give the whole answer, or the last chunks of a stream."""

    @abstractmethod
    def fail(self, failure: Failure, *, begun: bool) -> Reply | tuple[bytes, ...]:
        """Give the error, as an answer of its own or within a stream that has begun."""


class FixedExchange(Exchange):
    """A request whose answer is one document: loads, embeddings, rendered prompts."""

    def __init__(self, build: Callable[[Ticket], object], *, is_v1: bool = False) -> None:
        super().__init__(stream=False)
        self._build = build
        self._is_v1 = is_v1

    def token(self, index: int) -> bytes:
        """Give nothing: there are no tokens."""
        return b""

    def finish(self) -> Reply:
        """Give the document."""
        return json_reply(
            self._build(self.ticket), content_type=PLAIN_JSON if self._is_v1 else JSON
        )

    def fail(self, failure: Failure, *, begun: bool) -> Reply:
        """Give the error."""
        return _failed(failure, is_v1=self._is_v1)


class Writer(Exchange):
    """What the text endpoints have in common."""

    is_v1 = False

    def __init__(self, context: Context) -> None:
        super().__init__(stream=context.asked.stream)
        self.context = context

    def token(self, index: int) -> bytes:
        """Give the line for one token."""
        return self.line(self.context.answer.tokens[index])

    def part(self, start: int, stop: int) -> bytes:
        """Give one line for several tokens, where they are plain text."""
        tokens = self.context.answer.tokens[start:stop]
        told = self.context.asked.body.get("logprobs")
        kinds = {token.kind for token in tokens}
        if len(tokens) == 1 or told or "content" not in kinds or kinds - {"content", "hidden"}:
            return super().part(start, stop)
        return self.line(Token("".join(t.text for t in tokens if t.kind == "content")))

    @abstractmethod
    def line(self, token: Token) -> bytes:
        """Give the chunk for a token that may have nothing to show."""

    def fail(self, failure: Failure, *, begun: bool) -> Reply | tuple[bytes, ...]:
        """Give an error line once the stream has begun; before, an answer with the status."""
        if begun:
            return (_ndjson({"error": failure.text}),)
        reply = _failed(failure, is_v1=self.is_v1)
        if failure.cause == "runner killed" and self.stream:
            # The stream's headers were prepared already.
            return Reply(reply.status, reply.body + b"\n", PLAIN_JSON, is_chunked=True)
        return reply

    def joined(self, kind: str) -> str:
        """Join the text of all tokens of one kind."""
        return "".join(token.text for token in self.context.answer.tokens if token.kind == kind)

    @property
    def calls(self) -> list[Mapping[str, Any]]:
        """The tool calls of the whole answer, as ``/api`` has them."""
        return [call for token in self.context.answer.tokens for call in self.native_calls(token)]

    def native_calls(self, token: Token) -> list[Mapping[str, Any]]:
        """Give the tool calls of one token, as ``/api`` has them."""
        return [
            {
                "id": self.call_id(index),
                "function": {"index": index, "name": call.name, "arguments": call.arguments},
            }
            for index, call in enumerate(token.calls)
        ]

    def call_id(self, index: int) -> str:
        """Make the id of a tool call."""
        rng = rng_of("call id", self.context.number, index)
        letters = "abcdefghijklmnopqrstuvwxyz0123456789"
        return "call_" + "".join(rng.choice(letters) for _ in range(8))

    def logprobs(self, tokens: tuple[Token, ...]) -> dict[str, Any]:
        """Give the made-up log-probabilities, where they were asked for."""
        if not self.context.asked.body.get("logprobs"):
            return {}
        top = int(self.context.asked.body.get("top_logprobs") or 0)
        listed = []
        for token in tokens:
            if token.kind == "hidden" and not token.text:
                continue
            rng = rng_of("logprob", token.text)
            entry: dict[str, Any] = _logprob(token.text, -rng.uniform(1.0, 5.0))
            if top:
                entry["top_logprobs"] = [
                    _logprob(f" {rng.choice('abcdefgh')}{n}", -rng.uniform(0.01, 1.0))
                    for n in range(top)
                ]
            listed.append(entry)
        return {"logprobs": listed} if listed else {}

    def durations(self) -> dict[str, int]:
        """Give the last line's counters; those that are 0 are left out."""
        ticket, speed = self.ticket, self.context.speed
        counters = {
            "total_duration": _ns((ticket.total_s + _OVERHEAD_S) / speed),
            "load_duration": _ns((ticket.load_s + _OVERHEAD_S) / speed),
            "prompt_eval_count": self.context.prompt_tokens,
            "prompt_eval_duration": _ns(ticket.prompt_eval_s / speed),
            "eval_count": len(self.context.answer.tokens),
            "eval_duration": _ns(ticket.eval_s / speed),
        }
        return {name: value for name, value in counters.items() if value}


class ChatExchange(Writer):
    """``POST /api/chat``."""

    def line(self, token: Token) -> bytes:
        """Give the line for a token."""
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        if token.kind == "content":
            message["content"] = token.text
        elif token.kind == "thinking":
            message["thinking"] = token.text
        elif token.kind == "call":
            message["tool_calls"] = self.native_calls(token)
        else:
            return b""
        return _ndjson({**self._head(), "message": message, "done": False,
                        **self.logprobs((token,))})  # fmt: skip

    def finish(self) -> Reply | tuple[bytes, ...]:
        """Give the last line, or the whole answer."""
        reason = self.context.answer.done_reason
        end = {"done": True, "done_reason": reason, **self.durations()} if reason else {}
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        if self.stream:
            return (_ndjson({**self._head(), "message": message, **end}),) if reason else ()
        message["content"] = self.joined("content")
        if thinking := self.joined("thinking"):
            message["thinking"] = thinking
        if calls := self.calls:
            message["tool_calls"] = calls
        logprobs = self.logprobs(self.context.answer.tokens)
        end = {"done": bool(reason), **end, **logprobs}
        return json_reply({**self._head(), "message": message, **_ordered(end)})

    def _head(self) -> dict[str, Any]:
        return _head(self.context)


class GenerateExchange(Writer):
    """``POST /api/generate``."""

    def line(self, token: Token) -> bytes:
        """Give the line for a token."""
        shown: dict[str, Any] = {"response": ""}
        if token.kind == "content":
            shown["response"] = token.text
        elif token.kind == "thinking":
            shown["thinking"] = token.text
        elif token.kind != "tag":
            return b""
        return _ndjson({**_head(self.context), **shown, "done": False,
                        **self.logprobs((token,))})  # fmt: skip

    def finish(self) -> Reply | tuple[bytes, ...]:
        """Give the last line, or the whole answer."""
        reason = self.context.answer.done_reason
        end: dict[str, Any] = {}
        if reason:
            end = {"done": True, "done_reason": reason}
            if not self.context.asked.body.get("raw"):
                end["context"] = _token_numbers(self.context.rendered + self.context.answer.text)
            end |= self.durations()
        head = {**_head(self.context), "response": ""}
        if self.stream:
            return (_ndjson({**head, **end}),) if reason else ()
        head["response"] = self.joined("content")
        if thinking := self.joined("thinking"):
            head["thinking"] = thinking
        end = {"done": bool(reason), **end, **self.logprobs(self.context.answer.tokens)}
        return json_reply({**head, **_ordered(end)})


def _failed(failure: Failure, *, is_v1: bool) -> Reply:
    body = error_body(failure.status, failure.text, is_v1=is_v1)
    return json_reply(body, failure.status, PLAIN_JSON if is_v1 else JSON)


def _head(context: Context) -> dict[str, Any]:
    return {"model": context.asked.model, "created_at": date_text(context.wall())}


def _ordered(end: Mapping[str, Any]) -> dict[str, Any]:
    """Put the log-probabilities where Go's struct has them: before the counters."""
    first = {name: end[name] for name in ("done", "done_reason", "logprobs") if name in end}
    return {**first, **end}


def _logprob(text: str, value: float) -> dict[str, Any]:
    return {"token": text, "logprob": value, "bytes": list(text.encode())}


def _token_numbers(text: str) -> list[int]:
    return [int.from_bytes(token.encode()[-2:], "big") % 32000 for token in tokens_of(text)]


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _ndjson(value: object) -> bytes:
    return go_json(value).encode("utf-8", "surrogatepass") + b"\n"
