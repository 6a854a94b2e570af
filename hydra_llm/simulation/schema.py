"""JSON that obeys a JSON Schema, filled from the words of a prompt where they fit."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Hints", "UnusableSchemaError", "value_for"]

Schema = Mapping[str, Any]  # JSON of the caller's making

_TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")
_QUOTED = re.compile(r"\"([^\"]+)\"|'([^']+)'|`([^`]+)`|“([^”]+)”")
# A capital letter inside a sentence, or at its start where something is said of the word.
_NAME = re.compile(
    r"(?:(?<=[\w,:] )|(?<!\S)(?=[A-Z]\w+ (?:is|was|has|lives|are)\b))[A-Z][\w-]+(?: [A-Z][\w-]+)*"
)
_NO_NAMES = frozenset("What Who Which Where When Why How That This There It He She I".split())
_FORMATS = {
    "date": "2026-11-23",
    "time": "12:00:00Z",
    "date-time": "2026-11-23T12:00:00Z",
    "email": "ada@example.com",
    "uri": "https://example.com/",
    "uuid": "123e4567-e89b-42d3-a456-426614174000",
    "ipv4": "192.0.2.1",
}
_DEEP = 6


class UnusableSchemaError(ValueError):
    """A part of a schema that no grammar can be made of."""

    def __init__(self, part: object) -> None:
        super().__init__("unusable schema")
        self.part = part


class Hints:
    """What a prompt offers for values: numbers and names, each used once, in order."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        unquoted = _QUOTED.sub(" ", prompt)
        self.numbers = [_number(text) for text in _NUMBER.findall(unquoted)]
        self.quoted = ["".join(groups) for groups in _QUOTED.findall(prompt)]
        names = [name for name in _NAME.findall(unquoted) if name not in _NO_NAMES]
        self.names: list[str] = [*self.quoted, *names]

    def mentions(self, word: object) -> bool:
        """Whether the prompt has this word."""
        return re.search(rf"(?<!\w){re.escape(str(word))}(?!\w)", self.prompt, re.I) is not None

    def offers(self, schema: Schema) -> bool:
        """Whether there is something in the prompt for a property nobody insists on."""
        kinds = _types_of(schema)
        if any(self.mentions(option) for option in schema.get("enum", ())):
            return True
        if {"integer", "number"} & kinds:
            return bool(self.numbers)
        return "string" in kinds and "enum" not in schema and bool(self.names)


def value_for(schema: object, hints: Hints, rng: random.Random, *, sparing: bool = False) -> Any:
    """
    Make a value that obeys ``schema``.

    Args:
        sparing: leave out properties that are neither required nor in the prompt, as models do
            in tool calls.
    """
    return _Writer(schema, hints, rng, sparing=sparing).value(schema, 0)


class _Writer:
    def __init__(self, root: object, hints: Hints, rng: random.Random, *, sparing: bool) -> None:
        self._root = root
        self._hints = hints
        self._rng = rng
        self._sparing = sparing

    def value(self, schema: object, depth: int) -> Any:
        if schema is True or schema == {}:
            return "anything"
        if not isinstance(schema, Mapping):
            raise UnusableSchemaError(schema)
        schema = self._resolved(schema)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self._one_of(schema["enum"])
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self.value(self._branch(schema[key], depth), depth + 1)
        return self._of_kind(self._kind(schema), schema, depth)

    def _of_kind(self, kind: str, schema: Schema, depth: int) -> Any:
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            return self._array(schema, depth)
        if kind == "string":
            return self._string(schema)
        if kind in {"integer", "number"}:
            return self._number(schema, whole=kind == "integer")
        return None if kind == "null" else not self._hints.mentions("not")

    def _resolved(self, schema: Schema) -> Schema:
        seen = 0
        while "$ref" in schema:
            target: Any = self._root
            for part in str(schema["$ref"]).removeprefix("#").strip("/").split("/"):
                step = part.replace("~1", "/").replace("~0", "~")
                if step and (not isinstance(target, Mapping) or step not in target):
                    raise UnusableSchemaError(dict(schema))
                target = target[step] if step else target
            schema, seen = target, seen + 1
            if seen > _DEEP:
                raise UnusableSchemaError(dict(schema))
        if "allOf" not in schema:
            return schema
        merged: dict[str, Any] = {k: v for k, v in schema.items() if k != "allOf"}
        for part in schema["allOf"]:
            for key, value in self._resolved(part).items():
                if key == "properties":
                    value = {**merged.get(key, {}), **value}  # noqa: PLW2901
                elif key == "required":
                    value = [*merged.get(key, []), *value]  # noqa: PLW2901
                merged[key] = value
        return merged

    def _branch(self, branches: Sequence[object], depth: int) -> object:
        if depth > _DEEP:
            for branch in branches:
                if isinstance(branch, Mapping) and _types_of(branch) == {"null"}:
                    return branch
        return branches[0]

    def _kind(self, schema: Schema) -> str:
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = next((name for name in kind if name != "null"), "null")
        if kind is None:
            if "properties" in schema:
                return "object"
            if "items" in schema or "prefixItems" in schema:
                return "array"
            return "string"
        if kind not in _TYPES:
            raise UnusableSchemaError(dict(schema))
        return str(kind)

    def _one_of(self, options: Sequence[Any]) -> Any:
        return next((option for option in options if self._hints.mentions(option)), options[0])

    def _object(self, schema: Schema, depth: int) -> dict[str, Any]:
        required = set(schema.get("required", ()))
        made: dict[str, Any] = {}
        for name, part in schema.get("properties", {}).items():
            if name not in required and self._may_leave_out(part, depth):
                continue
            made[name] = self.value(part, depth + 1)
        for name in sorted(required - set(made)):
            made[name] = self.value(schema.get("additionalProperties") or {}, depth + 1)
        return made

    def _may_leave_out(self, part: object, depth: int) -> bool:
        if depth > _DEEP:
            return True
        if not self._sparing:
            return False
        return not (isinstance(part, Mapping) and self._hints.offers(self._resolved(part)))

    def _array(self, schema: Schema, depth: int) -> list[Any]:
        fixed = [self.value(part, depth + 1) for part in schema.get("prefixItems", ())]
        items = schema.get("items", {})
        least, most = schema.get("minItems", 0), schema.get("maxItems", math.inf)
        if items is False or ("prefixItems" in schema and "items" not in schema):
            return fixed
        wanted = max(least, self._natural_length(items) if depth <= _DEEP else 0)
        made = fixed
        while len(made) < min(wanted, most):
            value = self.value(items, depth + 1)
            if schema.get("uniqueItems") and value in made:
                value = _another(value, made, items)
            made.append(value)
        return made

    def _natural_length(self, items: object) -> int:
        kinds = _types_of(items) if isinstance(items, Mapping) else frozenset[str]()
        if {"integer", "number"} & kinds and self._hints.numbers:
            return len(self._hints.numbers)
        if "string" in kinds and self._hints.names:
            return len(self._hints.names)
        return 1

    def _string(self, schema: Schema) -> str:
        if schema.get("format") in _FORMATS:
            return str(_FORMATS[schema["format"]])
        least, most = int(schema.get("minLength", 0)), schema.get("maxLength")
        if self._hints.names:
            text = self._hints.names.pop(0)
        else:
            words: list[str] = re.findall(r"\w+", self._hints.prompt) or ["text"]
            text = words[-1] if self._sparing else self._rng.choice(words)
        text += "x" * (least - len(text))
        return text if most is None else text[: int(most)]

    def _number(self, schema: Schema, *, whole: bool) -> float:
        low, high = _bounds(schema, whole=whole)
        value: float = self._rng.randint(1, 9)
        if self._hints.numbers:
            value = self._hints.numbers.pop(0)
        value = min(max(value, low), high)
        step = schema.get("multipleOf")
        if step:
            value = math.ceil(max(value, low) / step) * step
            value = value if value <= high else math.floor(high / step) * step
        if whole:
            return math.ceil(value) if value <= low else math.floor(value)
        return value


def _bounds(schema: Schema, *, whole: bool) -> tuple[float, float]:
    gap = 1 if whole else 0.5
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if above is not None and below is not None and not whole:
        gap = (below - above) / 4
    if above is not None:
        low = max(low, above + gap)
    if below is not None:
        high = min(high, below - gap)
    return low, high


def _types_of(schema: Schema) -> frozenset[str]:
    kind = schema.get("type")
    if kind is None:
        branches = schema.get("anyOf") or schema.get("oneOf") or ()
        parts = [_types_of(branch) for branch in branches if isinstance(branch, Mapping)]
        return frozenset().union(*parts)
    return frozenset(kind if isinstance(kind, list) else [kind])


def _another(value: Any, taken: Sequence[Any], items: object) -> Any:
    if isinstance(items, Mapping) and "enum" in items:
        return next((option for option in items["enum"] if option not in taken), value)
    number = 1
    fresh = value
    while fresh in taken:
        fresh = value + number if isinstance(value, (int, float)) else f"{value}{number}"
        number += 1
    return fresh


def _number(text: str) -> float:
    return float(text) if "." in text else int(text)
