"""The OpenAI-style endpoints: requests turned into native ones, answers written their way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hydra_llm.simulation.answers import Token
from hydra_llm.simulation.exchange import Context, Writer
from hydra_llm.simulation.records import Failure
from hydra_llm.simulation.wire import (
    EVENTS,
    PLAIN_JSON,
    Reply,
    RequestError,
    go_json,
    json_reply,
)

__all__ = [
    "OpenAIChatExchange",
    "OpenAICompletionExchange",
    "arguments_of",
    "chat_body",
    "completion_body",
    "embed_body",
]

_OPTIONS = {
    "max_tokens": "num_predict",
    "max_completion_tokens": "num_predict",
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
}


def chat_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``/v1/chat/completions`` into ``/api/chat``."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise RequestError(400, "[] is too short - 'messages'", in_binding=True)
    native = _common(body) | {"messages": [_message(message) for message in messages]}
    for name in ("tools", "logprobs", "top_logprobs", "stream_options"):
        if body.get(name) is not None:
            native[name] = body[name]
    effort = body.get("reasoning_effort") or (body.get("reasoning") or {}).get("effort")
    if effort is not None:
        native["think"] = False if effort == "none" else effort
    form = body.get("response_format") or {}
    if form.get("type") == "json_object":
        native["format"] = "json"
    elif form.get("type") == "json_schema":
        native["format"] = (form.get("json_schema") or {}).get("schema")
    return native


def completion_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``/v1/completions`` into ``/api/generate``."""
    prompt = body.get("prompt") or ""
    if isinstance(prompt, list):
        prompt = "".join(str(part) for part in prompt)
    native = _common(body) | {"prompt": prompt}
    if body.get("stream_options"):
        native["stream_options"] = body["stream_options"]
    return native


def embed_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``/v1/embeddings`` into ``/api/embed``."""
    if not body.get("input"):
        raise RequestError(400, "invalid input")
    return {"model": body.get("model"), "input": body["input"]}


def _common(body: Mapping[str, Any]) -> dict[str, Any]:
    options = {ours: body[theirs] for theirs, ours in _OPTIONS.items()
               if body.get(theirs) is not None}  # fmt: skip
    stop = body.get("stop")
    if stop:
        options["stop"] = [stop] if isinstance(stop, str) else stop
    return {
        "model": body.get("model"),
        "stream": bool(body.get("stream")),
        "options": options,
    }


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    native = dict(message)
    content = message.get("content")
    if isinstance(content, list):
        native["content"] = "".join(
            str(part.get("text", "")) for part in content if part.get("type") == "text"
        )
        images = [
            part["image_url"]["url"].split(",", 1)[-1]
            for part in content
            if part.get("type") == "image_url"
        ]
        if images:
            native["images"] = images
    if message.get("tool_calls"):
        native["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": arguments_of(call)}}
            for call in message["tool_calls"]
        ]
    return native


def arguments_of(call: Mapping[str, Any]) -> Any:
    """Read the arguments of a call in a request, given as JSON text."""
    given = call["function"].get("arguments") or "{}"
    try:
        return json.loads(given) if isinstance(given, str) else given
    except ValueError as exc:
        raise RequestError(400, "invalid tool call arguments") from exc


class _OpenAIWriter(Writer):
    is_v1 = True
    content_type = EVENTS
    prefix = "chatcmpl"

    @property
    def finish_reason(self) -> str | None:
        reason = self.context.answer.done_reason
        return "tool_calls" if reason == "stop" and self.calls else reason

    def usage(self) -> dict[str, int]:
        prompt, made = self.context.prompt_tokens, len(self.context.answer.tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
        }

    def wants_usage(self) -> bool:
        options = self.context.asked.body.get("stream_options") or {}
        return bool(options.get("include_usage"))

    def head(self, kind: str, model: str | None = None) -> dict[str, Any]:
        asked = self.context.asked.model
        return {
            "id": f"{self.prefix}-{self.context.number % 1000}",
            "object": kind,
            "created": int(self.context.wall()),
            "model": asked if model is None else model,
            "system_fingerprint": "fp_ollama",
        }


class OpenAIChatExchange(_OpenAIWriter):
    """``POST /v1/chat/completions``."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._began = False

    def line(self, token: Token) -> bytes:
        """Give the event for a token."""
        delta: dict[str, Any] = {"content": ""}
        if token.kind == "content":
            delta["content"] = token.text
        elif token.kind == "thinking":
            delta["reasoning"] = token.text
        elif token.kind == "call":
            delta["tool_calls"] = self._calls(token)
        else:
            return b""
        return self._event(delta, None, self.logprobs((token,)))

    def finish(self) -> Reply | tuple[bytes, ...]:
        """Give the last events, or the whole answer."""
        if not self.stream:
            message: dict[str, Any] = {"role": "assistant", "content": self.joined("content")}
            if thinking := self.joined("thinking"):
                message["reasoning"] = thinking
            calls = [call for token in self.context.answer.tokens for call in self._calls(token)]
            if calls:
                message["tool_calls"] = calls
            choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
            body = {
                **self.head("chat.completion"),
                "choices": [choice | _wrapped(self.logprobs(self.context.answer.tokens))],
                "usage": self.usage(),
            }
            return json_reply(body, content_type=PLAIN_JSON)
        if self.finish_reason is None:
            return ()
        end: dict[str, Any] = {} if self.context.is_modern else {"content": ""}
        chunks = [self._event(end, self.finish_reason, {})]
        if self.wants_usage():
            head = self.head("chat.completion.chunk")
            chunks.append(_event({**head, "choices": [], "usage": self.usage()}))
        return (*chunks, b"data: [DONE]\n\n")

    def fail(self, failure: Failure, *, begun: bool) -> Reply | tuple[bytes, ...]:
        """End the stream with an empty chunk: the error itself is not to be seen."""
        if not begun:
            return super().fail(failure, begun=False)
        return (self._event({"content": ""}, None, {}, model=""),)

    def _event(
        self,
        delta: Mapping[str, Any],
        reason: str | None,
        logprobs: Mapping[str, Any],
        model: str | None = None,
    ) -> bytes:
        says_role = not self.context.is_modern or not self._began
        self._began = True
        delta = {"role": "assistant", **delta} if says_role else delta
        choice = {"index": 0, "delta": delta, "finish_reason": reason, **_wrapped(logprobs)}
        return _event({**self.head("chat.completion.chunk", model), "choices": [choice]})

    def _calls(self, token: Token) -> list[Mapping[str, Any]]:
        return [
            {
                "id": self.call_id(index),
                "index": index,
                "type": "function",
                "function": {"name": call.name, "arguments": go_json(call.arguments)},
            }
            for index, call in enumerate(token.calls)
        ]


class OpenAICompletionExchange(_OpenAIWriter):
    """``POST /v1/completions``."""

    prefix = "cmpl"

    def line(self, token: Token) -> bytes:
        """Give the event for a token."""
        return self._event(token.text, None) if token.kind == "content" else b""

    def finish(self) -> Reply | tuple[bytes, ...]:
        """Give the last events, or the whole answer."""
        reason = self.finish_reason
        if not self.stream:
            choice = {"text": self.joined("content"), "index": 0, "finish_reason": reason}
            body = {**self.head("text_completion"), "choices": [choice], "usage": self.usage()}
            return json_reply(body, content_type=PLAIN_JSON)
        if reason is None:
            return ()
        chunks = [self._event("", reason)]
        if self.wants_usage():
            usage = {**self.head("text_completion"), "choices": [], "usage": self.usage()}
            chunks.append(_event(usage))
        return (*chunks, b"data: [DONE]\n\n")

    def fail(self, failure: Failure, *, begun: bool) -> Reply | tuple[bytes, ...]:
        """End the stream with an empty chunk, as the chat endpoint does."""
        return (self._event("", None),) if begun else super().fail(failure, begun=False)

    def _event(self, text: str, reason: str | None) -> bytes:
        choice = {"text": text, "index": 0, "finish_reason": reason}
        return _event({**self.head("text_completion"), "choices": [choice]})


def _wrapped(logprobs: Mapping[str, Any]) -> dict[str, Any]:
    return {"logprobs": {"content": logprobs["logprobs"]}} if logprobs else {}


def _event(value: object) -> bytes:
    return b"data: " + go_json(value).encode("utf-8", "surrogatepass") + b"\n\n"
