"""Reading a request's JSON: what Ollama refuses, and with which words."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra_llm.simulation.records import Options
from hydra_llm.simulation.wire import RequestError, duration_s

__all__ = ["Asked", "read_asked", "read_json"]

_GO_TYPES = {
    "model": (str, "string"),
    "prompt": (str, "string"),
    "system": (str, "string"),
    "stream": (bool, "bool"),
    "raw": (bool, "bool"),
    "shift": (bool, "bool"),
    "truncate": (bool, "bool"),
    "logprobs": (bool, "bool"),
    "messages": (list, "[]api.Message"),
    "tools": (list, "api.Tools"),
    "options": (dict, "map[string]interface {}"),
}
_INTEGERS = frozenset(
    "num_ctx num_batch num_gpu main_gpu num_thread num_keep seed num_predict top_k "
    "repeat_last_n draft_num_predict".split()
)
_FLOATS = frozenset(
    "top_p min_p typical_p temperature repeat_penalty presence_penalty frequency_penalty".split()
)
_LEVELS = ("high", "medium", "low", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request to generate, chat or embed, with its fields checked."""

    model: str
    body: Mapping[str, Any]
    stream: bool = True
    messages: Sequence[Mapping[str, Any]] = ()
    prompt: str = ""
    tools: Sequence[Mapping[str, Any]] = ()
    format: object = None
    think: bool | str | None = None
    keep_alive: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def runner_options(self) -> Options:
        """What of the options decides about a reload."""
        chosen = self.options

        def integer(name: str) -> int | None:
            return int(chosen[name]) if chosen.get(name) is not None else None

        return Options(
            num_ctx=integer("num_ctx"),
            num_batch=integer("num_batch"),
            num_thread=integer("num_thread"),
            num_gpu=integer("num_gpu"),
            main_gpu=integer("main_gpu"),
            use_mmap=chosen.get("use_mmap"),
            no_shift=self.body.get("shift") is False,
        )

    @property
    def num_predict(self) -> int | None:
        """The limit of the answer in tokens; ``None`` for none."""
        limit = int(self.options.get("num_predict", -1))
        return limit if limit > 0 else None

    @property
    def stop(self) -> tuple[str, ...]:
        """Where to stop."""
        stop = self.options.get("stop") or ()
        return (stop,) if isinstance(stop, str) else tuple(stop)

    @property
    def has_images(self) -> bool:
        """Whether pictures came with it."""
        carriers = (self.body, *self.messages)
        return any(carrier.get("images") for carrier in carriers)


def read_json(body: bytes) -> dict[str, Any]:
    """Read the body as a JSON object."""
    if not body.strip():
        raise RequestError(400, "missing request body", in_binding=True)
    try:
        value = json.loads(body)
    except ValueError as exc:
        raise RequestError(400, _go_syntax_error(body, exc), in_binding=True) from exc
    if not isinstance(value, dict):
        text = f"json: cannot unmarshal {_go_kind(value)} into Go value of type api.ChatRequest"
        raise RequestError(400, text, in_binding=True)
    return value


def read_asked(body: Mapping[str, Any], struct: str) -> Asked:
    """Check a native request's fields; ``struct`` is Go's name for the request."""
    for name, (kind, go_type) in _GO_TYPES.items():
        value = body.get(name)
        if value is not None and not isinstance(value, kind):
            text = (
                f"json: cannot unmarshal {_go_kind(value)} into Go struct field "
                f"{struct}.{name} of type {go_type}"
            )
            raise RequestError(400, text, in_binding=True)
    messages = body.get("messages") or []
    for message in messages:
        _check_message(message)
    keep_alive = duration_s(body.get("keep_alive"))
    if keep_alive is not None and keep_alive < 0:
        keep_alive = -1.0
    think = body.get("think")
    if isinstance(think, str) and think not in _LEVELS:
        text = (
            f'invalid think value: "{think}" '
            '(must be "high", "medium", "low", "max", true, or false)'
        )
        raise RequestError(400, text, in_binding=True)
    return Asked(
        model=body.get("model") or "",
        body=body,
        stream=body.get("stream") is not False,
        messages=messages,
        prompt=body.get("prompt") or "",
        tools=body.get("tools") or (),
        format=body.get("format") or None,
        think=think,
        keep_alive=keep_alive,
        options=body.get("options") or {},
    )


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of the wrong type; unknown names are let through."""
    for name, value in options.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is None:
            continue
        if name in _INTEGERS and not is_number:
            raise RequestError(500, f'option "{name}" must be of type integer')
        if name in _FLOATS and not is_number:
            raise RequestError(500, f'option "{name}" must be of type float32')
        if name == "use_mmap" and not isinstance(value, bool):
            raise RequestError(500, f'option "{name}" must be of type boolean')
        if name == "stop" and not isinstance(value, list):
            raise RequestError(500, 'option "stop" must be of type array')


def _check_message(message: object) -> None:
    if not isinstance(message, dict):
        text = (
            f"json: cannot unmarshal {_go_kind(message)} into Go struct field "
            "ChatRequest.messages of type api.Message"
        )
        raise RequestError(400, text, in_binding=True)
    for index, image in enumerate(message.get("images") or ()):
        try:
            base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError, TypeError) as exc:
            text = (
                f"json: cannot unmarshal string into Alias.images.{index} of type "
                "api.ImageData: illegal base64 data at input byte 0"
            )
            raise RequestError(400, text, in_binding=True) from exc
    for call in message.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            text = "Value looks like object, but can't find closing '}' symbol"
            raise RequestError(400, text, in_binding=True)


def _go_kind(value: object) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)):
        return "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def _go_syntax_error(body: bytes, error: ValueError) -> str:
    at = getattr(error, "pos", 0)
    text = body.decode("utf-8", "replace")
    if at >= len(text.rstrip()) or "Unterminated" in str(error):
        return "unexpected EOF"
    return f"invalid character '{text[at]}' looking for beginning of value"
