"""``POST /v1/responses``: OpenAI's newer endpoint. Not held against any recording."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hydra_llm.simulation.answers import Token
from hydra_llm.simulation.exchange import Context, Writer
from hydra_llm.simulation.openai import arguments_of
from hydra_llm.simulation.records import Failure
from hydra_llm.simulation.wire import EVENTS, PLAIN_JSON, Reply, go_json, json_reply

__all__ = ["ResponsesExchange", "responses_body"]


def responses_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``/v1/responses`` into ``/api/chat``."""
    given = body.get("input") or []
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    messages = [_message(item) for item in items]
    if instructions := body.get("instructions"):
        messages.insert(0, {"role": "system", "content": instructions})
    options = {
        ours: body[theirs]
        for theirs, ours in (
            ("max_output_tokens", "num_predict"),
            ("temperature", "temperature"),
            ("top_p", "top_p"),
        )
        if body.get(theirs) is not None
    }
    native: dict[str, Any] = {
        "model": body.get("model"),
        "messages": messages,
        "stream": bool(body.get("stream")),
        "options": options,
    }
    if effort := (body.get("reasoning") or {}).get("effort"):
        native["think"] = effort
    form = (body.get("text") or {}).get("format") or {}
    if form.get("type") == "json_schema":
        native["format"] = form.get("schema")
    elif form.get("type") == "json_object":
        native["format"] = "json"
    if tools := body.get("tools"):
        native["tools"] = [{"type": "function", "function": tool} for tool in tools]
    return native


def _message(item: Mapping[str, Any]) -> dict[str, Any]:
    if item.get("type") == "function_call_output":
        return {"role": "tool", "content": str(item.get("output", ""))}
    if item.get("type") == "function_call":
        function = {"name": item.get("name"), "arguments": arguments_of({"function": item})}
        return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    content = item.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content)
    return {"role": item.get("role"), "content": content}


class ResponsesExchange(Writer):
    """An answer as items: reasoning, a message, calls."""

    is_v1 = True
    content_type = EVENTS

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._began = False
        self._sequence = 0

    def line(self, token: Token) -> bytes:
        """Give the events for a token."""
        if token.kind == "content":
            delta = {"item_id": self._id("msg"), "output_index": 0, "content_index": 0}
            return self._event("response.output_text.delta", {**delta, "delta": token.text})
        if token.kind == "thinking":
            where = {"item_id": self._id("rs"), "output_index": 0, "summary_index": 0}
            kind = "response.reasoning_summary_text.delta"
            return self._event(kind, {**where, "delta": token.text})
        if token.kind == "call":
            events = b""
            for index, item in enumerate(self._items(self.native_calls(token))):
                done = {"output_index": index, "item": item}
                events += self._event("response.output_item.done", done)
            return events
        return b""

    def finish(self) -> Reply | tuple[bytes, ...]:
        """Give the last event, or the whole answer."""
        whole = self._response("completed")
        if self.stream:
            return (self._event("response.completed", {"response": whole}),)
        return json_reply(whole, content_type=PLAIN_JSON)

    def fail(self, failure: Failure, *, begun: bool) -> Reply | tuple[bytes, ...]:
        """Give the error as an event, or as an answer of its own."""
        if not begun:
            return super().fail(failure, begun=False)
        error = {"code": "api_error", "message": failure.text, "param": None}
        return (self._event("error", error),)

    def _response(self, status: str) -> dict[str, Any]:
        prompt, made = self.context.prompt_tokens, len(self.context.answer.tokens)
        over = status == "completed"
        cut = over and self.context.answer.done_reason == "length"
        return {
            "id": self._id("resp"),
            "object": "response",
            "created_at": int(self.context.wall()),
            "status": "incomplete" if cut else status,
            "model": self.context.asked.model,
            "output": self._output() if over else [],
            "usage": {
                "input_tokens": prompt,
                "output_tokens": made,
                "total_tokens": prompt + made,
            }
            if over
            else None,
        }

    def _output(self) -> list[dict[str, Any]]:
        output: list[dict[str, Any]] = []
        if thinking := self.joined("thinking"):
            summary = [{"type": "summary_text", "text": thinking}]
            output.append({"type": "reasoning", "id": self._id("rs"), "summary": summary})
        if text := self.joined("content"):
            part = {"type": "output_text", "text": text, "annotations": []}
            output.append(
                {
                    "type": "message",
                    "id": self._id("msg"),
                    "status": "completed",
                    "role": "assistant",
                    "content": [part],
                }
            )
        return output + self._items(self.calls)

    def _items(self, calls: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [
            {
                "type": "function_call",
                "id": f"fc_{call['id']}",
                "call_id": call["id"],
                "name": call["function"]["name"],
                "arguments": go_json(call["function"]["arguments"]),
                "status": "completed",
            }
            for call in calls
        ]

    def _id(self, prefix: str) -> str:
        return f"{prefix}_{self.context.number:08d}"

    def _event(self, kind: str, fields: Mapping[str, Any]) -> bytes:
        before = b""
        if not self._began:
            self._began = True
            created = {"response": self._response("in_progress")}
            before = self._event("response.created", created)
        value = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return before + f"event: {kind}\ndata: {go_json(value)}\n\n".encode()
