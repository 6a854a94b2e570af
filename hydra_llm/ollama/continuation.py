"""Goes on with a stream that broke off, on another node: what that takes, and when it is wrong.

The text so far is sent as the beginning of the answer. What Ollama makes of that depends on the
model's template and the node's version (BEHAVIOUR section 10): it goes on with the text, it
begins a new turn, or it goes on and repeats the text first. Only the first is a continuation.
The first two are told apart by the prompt that ``_debug_render_only`` shows, the third by how
its answer begins: its prompt looks like the first one's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hydra_llm.ollama.answers import object_of
from hydra_llm.ollama.calls import Call, Framing

__all__ = [
    "NotContinued",
    "Told",
    "beginning_of",
    "check_call",
    "check_first_part",
    "check_prompt",
    "continued",
    "marked",
    "render_request",
]

MARK = "continued_from"
"""Field of the first part that another node has written: the node that began the answer."""


class Told:
    """What the caller of a stream has been told so far, in whole lines."""

    def __init__(self) -> None:
        self.text = ""
        self.parts = 0
        self.tokens = 0
        """Parts with text: Ollama sends one a token."""
        self.has_thought = False
        self.has_called = False
        self._rest = b""

    def whole(self, data: bytes) -> bytes:
        """Take some bytes, and give back what may be handed on: up to the end of a line."""
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest
        for line in lines:
            self._line(line)
        return b"".join(line + b"\n" for line in lines)

    def rest(self) -> bytes:
        """A line that has no end, at the end of a stream."""
        rest, self._rest = self._rest, b""
        return rest

    def forget_rest(self) -> None:
        """The line that was under way will not be ended."""
        self._rest = b""

    def _line(self, line: bytes) -> None:
        part = object_of(line)
        if part is None:
            return
        self.parts += 1
        text, thinks, calls = _said(part)
        self.text += text
        self.tokens += bool(text)
        self.has_thought |= thinks
        self.has_called |= calls


def _said(part: Mapping[str, Any]) -> tuple[str, bool, bool]:
    """The text of a part, whether it thinks, and whether it calls a tool."""
    message = part.get("message")
    source: Mapping[str, Any] = message if isinstance(message, Mapping) else part
    text = source.get("content" if source is message else "response")
    thinks, calls = bool(source.get("thinking")), bool(source.get("tool_calls"))
    return (text if isinstance(text, str) else ""), thinks, calls


class NotContinued(Exception):  # noqa: N818  # nothing has gone wrong, but for what had before
    """Nobody goes on with the stream; its text says why."""


def check_call(call: Call, told: Told) -> None:
    """
    Raise if a broken answer cannot be gone on with on any node, as far as one knows.

    A tool's call is held back by Ollama until it is whole, a format begins anew with each
    answer, and thinking has no place in the text (BEHAVIOUR section 10).

    Raises:
        NotContinued: it cannot.
    """
    payload = call.payload or {}
    messages = payload.get("messages")
    limit = call.output_limit
    why = None
    if call.framing is not Framing.NDJSON or call.path not in ("/api/chat", "/api/generate"):
        why = f"{call.path} cannot be continued"
    elif call.path == "/api/generate" and payload.get("raw") is not True:
        why = "of /api/generate only raw prompts can be continued"
    elif call.path == "/api/chat" and not (isinstance(messages, list) and messages):
        why = "there is no conversation"
    elif payload.get("tools") or told.has_called:
        why = "an answer that may call tools cannot be"
    elif payload.get("format"):
        why = "an answer in a format cannot be"
    elif told.has_thought:
        why = "thinking cannot be carried over"
    elif limit is not None and told.tokens >= limit:
        why = "num_predict leaves nothing to be written"
    if why is not None:
        raise NotContinued(why)


def continued(call: Call, told: Told) -> dict[str, Any]:
    """The request for the rest of the answer, with what is left of ``num_predict``."""
    payload = dict(call.payload or {})
    if not told.text:
        return payload
    if call.path == "/api/generate":
        payload["prompt"] = f"{payload.get('prompt') or ''}{told.text}"
    else:
        messages = list(payload["messages"])
        last = messages[-1]
        if isinstance(last, Mapping) and last.get("role") == "assistant":
            # The caller has begun the answer himself: two of them in a row are refused.
            messages[-1] = {**last, "content": f"{last.get('content') or ''}{told.text}"}
        else:
            messages.append({"role": "assistant", "content": told.text})
        payload["messages"] = messages
    if call.output_limit is not None:
        left = call.output_limit - told.tokens
        payload["options"] = {**(payload.get("options") or {}), "num_predict": left}
    return payload


def beginning_of(call: Call, told: Told, payload: Mapping[str, Any]) -> str:
    """The answer's beginning as a :func:`continued` chat gives it; nothing where none is given."""
    if call.path != "/api/chat" or not told.text:
        return ""
    return str(payload["messages"][-1]["content"])


def render_request(body: bytes) -> dict[str, Any]:
    """A request for the prompt only: nothing is generated (since Ollama 0.11.5)."""
    return {**json.loads(body), "stream": False, "_debug_render_only": True}


def check_prompt(rendered: bytes, beginning: str, node_id: str) -> None:
    """
    Raise if the prompt that a node shows does not end in the answer's beginning.

    Raises:
        NotContinued: it would not go on with it.
    """
    debug = (object_of(rendered) or {}).get("_debug_info")
    prompt = debug.get("rendered_template") if isinstance(debug, Mapping) else None
    if not isinstance(prompt, str):
        raise NotContinued(f"{node_id} does not show how it would go on")
    if not prompt.endswith(beginning):
        raise NotContinued(f"on {node_id} the model's template would begin a new turn")


def check_first_part(line: bytes, beginning: str, node_id: str) -> None:
    """
    Raise if the other node's answer begins in a way that does not go on with the first one's.

    Raises:
        NotContinued: it gives the beginning once more, thinks, or calls a tool.
    """
    text, thinks, calls = _said(object_of(line) or {})
    if beginning.strip() and text.lstrip().startswith(beginning.strip()):
        raise NotContinued(f"{node_id} repeats the text so far")
    if thinks or calls:
        raise NotContinued(f"{node_id} does not go on with the text")


def marked(line: bytes, node_id: str) -> bytes:
    """A part of an answer, with the node that began the answer."""
    mark = json.dumps({MARK: node_id}).encode()
    start = line.find(b"{")
    return mark[:-1] + b"," + line[start + 1 :]
