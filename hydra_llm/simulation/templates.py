"""The prompt as the model sees it: ChatML, in the three ways a last assistant turn can end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Message", "render", "text_of"]

Message = Mapping[str, Any]  # JSON of the caller's making


def text_of(message: Message) -> str:
    """Give the text of a message, also where it is a list of parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def render(
    messages: Sequence[Message],
    *,
    system: str = "",
    tools: Sequence[Mapping[str, Any]] = (),
    leaves_open: bool,
    go_token: str = "",
) -> str:
    """
    Write out a conversation.

    Args:
        leaves_open: whether a last assistant message is left open, to be continued.
        go_token: what the template puts where an answer begins.
    """
    parts: list[str] = []
    if system and not any(message.get("role") == "system" for message in messages):
        parts.append(_turn("system", system))
    if tools:
        listed = "\n".join(json.dumps(tool) for tool in tools)
        parts.append(_turn("system", f"You may call one or more tools.\n{listed}"))
    for index, message in enumerate(messages):
        role, text = str(message.get("role", "")), text_of(message)
        if role == "assistant":
            text = text or _calls(message)
            if leaves_open and index == len(messages) - 1:
                return "".join(parts) + f"<|im_start|>assistant\n{text}"
        elif role == "tool":
            role, text = "user", f"<tool_response>{text}</tool_response>"
        images = "".join(f"[img-{n}]" for n, _ in enumerate(message.get("images") or ()))
        parts.append(_turn(role, images + text))
    return "".join(parts) + f"<|im_start|>assistant\n{go_token}"


def _turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def _calls(message: Message) -> str:
    calls = message.get("tool_calls") or ()
    return "".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)
