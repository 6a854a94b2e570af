"""Which of the given tools a prompt asks for, and with what arguments."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra_llm.simulation.schema import Hints, value_for

__all__ = ["ToolCall", "choose_call", "parse_call"]

_WORD = re.compile(r"[a-z]+|\d+")
_DULL = frozenset("a an the of to for in is are and or it this that what which get".split())


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call, with the arguments as the object they are on ``/api``."""

    name: str
    arguments: Mapping[str, Any]


def choose_call(
    tools: Sequence[Mapping[str, Any]], prompt: str, rng: random.Random
) -> ToolCall | None:
    """Call the tool whose words the prompt has most of; the first one in doubt."""
    functions = [tool["function"] for tool in tools if isinstance(tool.get("function"), Mapping)]
    if not functions:
        return None
    asked = _words(prompt)
    best = max(functions, key=lambda function: _likeness(function, asked))
    schema = best.get("parameters") or {}
    if not schema.get("properties"):
        return ToolCall(str(best.get("name", "")), {})
    arguments = value_for(schema, Hints(prompt), rng, sparing=True)
    return ToolCall(str(best.get("name", "")), arguments)


def parse_call(text: str) -> ToolCall | None:
    """Read a call from the text a scripted model emits."""
    found = re.search(r"<tool_call>\s*(\{.*\})\s*</tool_call>", text, re.S)
    if found is None:
        return None
    call = json.loads(found.group(1))
    return ToolCall(call["name"], call["arguments"])


def _likeness(function: Mapping[str, Any], asked: frozenset[str]) -> float:
    name = _words(str(function.get("name", "")))
    about = _words(str(function.get("description", "")))
    parameters = (function.get("parameters") or {}).get("properties") or {}
    arguments = _words(" ".join(parameters))
    return 3 * len(asked & name) + 2 * len(asked & arguments) + len(asked & about)


def _words(text: str) -> frozenset[str]:
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).replace("_", " ").lower()
    words = {word[:-1] if len(word) > 3 and word.endswith("s") else word
             for word in _WORD.findall(spaced)}  # fmt: skip
    return frozenset(words) - _DULL
