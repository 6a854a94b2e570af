"""``POST /v1/messages``: the Anthropic-style endpoint. Not held against any recording."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra_llm.simulation.answers import Token
from hydra_llm.simulation.exchange import Context, Writer
from hydra_llm.simulation.records import Failure
from hydra_llm.simulation.wire import EVENTS, PLAIN_JSON, Reply, RequestError, go_json, json_reply

__all__ = ["MessagesExchange", "messages_body"]

_REASONS = {"stop": "end_turn", "length": "max_tokens"}


def messages_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``/v1/messages`` into ``/api/chat``."""
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise RequestError(400, "messages is required", in_binding=True)
    messages: list[dict[str, Any]] = []
    if system := body.get("system"):
        messages.append({"role": "system", "content": _text(system)})
    for message in given:
        messages += _messages(message)
    options = {
        ours: body[theirs]
        for theirs, ours in (
            ("max_tokens", "num_predict"),
            ("temperature", "temperature"),
            ("top_p", "top_p"),
            ("stop_sequences", "stop"),
        )
        if body.get(theirs) is not None
    }
    native: dict[str, Any] = {
        "model": body.get("model"),
        "messages": messages,
        "stream": bool(body.get("stream")),
        "options": options,
        "think": (body.get("thinking") or {}).get("type") == "enabled",
    }
    if tools := body.get("tools"):
        native["tools"] = [_tool(tool) for tool in tools]
    return native


def _text(content: object) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return str(content or "")


def _messages(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Turn one message into as many as the native form needs: results stand alone there."""
    content = message.get("content")
    if not isinstance(content, list):
        return [dict(message)]
    results = [
        {"role": "tool", "content": _text(part.get("content"))}
        for part in content
        if part.get("type") == "tool_result"
    ]
    calls = [
        {"function": {"name": part["name"], "arguments": part["input"]}}
        for part in content
        if part.get("type") == "tool_use"
    ]
    images = [part["source"]["data"] for part in content if part.get("type") == "image"]
    text = "".join(str(part.get("text", "")) for part in content if part.get("type") == "text")
    own: dict[str, Any] = {"role": message.get("role"), "content": text}
    if calls:
        own["tool_calls"] = calls
    if images:
        own["images"] = images
    return results + ([own] if text or calls or images else [])


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = {
        "name": tool.get("name"),
        "description": tool.get("description", ""),
        "parameters": tool.get("input_schema") or {},
    }
    return {"type": "function", "function": function}


class MessagesExchange(Writer):
    """An answer as blocks: thinking, text, calls."""

    is_v1 = True
    content_type = EVENTS

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._open: str | None = None
        self._index = -1

    def line(self, token: Token) -> bytes:
        """Give the events for a token: a block is opened by the first of its kind."""
        if token.kind == "content":
            return self._delta("text", {"type": "text_delta", "text": token.text})
        if token.kind == "thinking":
            return self._delta("thinking", {"type": "thinking_delta", "thinking": token.text})
        events = b""
        for call in self.native_calls(token):
            function = call["function"]
            block = {"type": "tool_use", "id": call["id"], "name": function["name"], "input": {}}
            events += self._start(block)
            arguments = go_json(function["arguments"])
            events += self._delta(
                "tool_use", {"type": "input_json_delta", "partial_json": arguments}
            )
        return events

    def finish(self) -> Reply | tuple[bytes, ...]:
        """Give the last events, or the whole answer."""
        usage = {"output_tokens": len(self.context.answer.tokens)}
        if self.stream:
            delta = {"stop_reason": self._reason, "stop_sequence": None}
            end = {"type": "message_delta", "delta": delta, "usage": usage}
            return (self._stop(), _event(end), _event({"type": "message_stop"}))
        content: list[dict[str, Any]] = []
        if thinking := self.joined("thinking"):
            content.append({"type": "thinking", "thinking": thinking})
        if text := self.joined("content"):
            content.append({"type": "text", "text": text})
        for call in self.calls:
            function = call["function"]
            content.append(
                {
                    "type": "tool_use",
                    "id": call["id"],
                    "name": function["name"],
                    "input": function["arguments"],
                }
            )
        message = self._message(content, self._reason, usage)
        return json_reply(message, content_type=PLAIN_JSON)

    def fail(self, failure: Failure, *, begun: bool) -> Reply | tuple[bytes, ...]:
        """Give the error as an event, or as an answer of its own."""
        error = {"type": "error", "error": {"type": "api_error", "message": failure.text}}
        if begun:
            return (_event(error),)
        return json_reply(error, failure.status, PLAIN_JSON)

    @property
    def _reason(self) -> str | None:
        reason = self.context.answer.done_reason
        return "tool_use" if reason == "stop" and self.calls else _REASONS.get(reason or "")

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, usage: Mapping[str, int]
    ) -> dict[str, Any]:
        return {
            "id": f"msg_{self.context.number:08d}",
            "type": "message",
            "role": "assistant",
            "model": self.context.asked.model,
            "content": content,
            "stop_reason": reason,
            "usage": {"input_tokens": self.context.prompt_tokens, **usage},
        }

    def _start(self, block: Mapping[str, Any]) -> bytes:
        events = self._stop()
        if self._index < 0:
            message = self._message([], None, {"output_tokens": 0})
            events += _event({"type": "message_start", "message": message})
        self._index, self._open = self._index + 1, str(block["type"])
        return events + _event(
            {"type": "content_block_start", "index": self._index, "content_block": block}
        )

    def _delta(self, kind: str, delta: Mapping[str, Any]) -> bytes:
        events = b"" if self._open == kind else self._start({"type": kind, kind: ""})
        return events + _event(
            {"type": "content_block_delta", "index": self._index, "delta": delta}
        )

    def _stop(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _event({"type": "content_block_stop", "index": self._index})


def _event(value: Mapping[str, Any]) -> bytes:
    return f"event: {value['type']}\ndata: {go_json(value)}\n\n".encode()
