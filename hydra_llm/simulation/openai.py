"""OpenAI-style requests, turned into the native ones they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hydra_llm.simulation.wire import RequestError

__all__ = ["chat_body", "completion_body", "embed_body"]

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
            {**call, "function": {**call["function"], "arguments": _arguments(call)}}
            for call in message["tool_calls"]
        ]
    return native


def _arguments(call: Mapping[str, Any]) -> Any:
    given = call["function"].get("arguments") or "{}"
    try:
        return json.loads(given) if isinstance(given, str) else given
    except ValueError as exc:
        raise RequestError(400, "invalid tool call arguments") from exc
