"""Watches an answer pass by: is it complete, did it fail, what does it say of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hydra_llm.ollama.calls import Framing
from hydra_llm.types import Usage

NANOSECONDS = 1e9

MAX_LINE_BYTES = 8 * 1024 * 1024
"""A line longer than this is nothing that Ollama sends."""

MOST_NANOSECONDS = 10**17
"""Three years: no answer took as long."""

MOST_TOKENS = 10**9

MOST_BETWEEN_BYTES = 256 * 1024
"""Comments and empty lines between two parts; a proxy sends some to keep a stream alive."""

_MORE_TO_COME = b'"done":false}'
"""How all native parts but the last end: the outermost object's last field."""

_END_MARKS = (
    b'"type":"message_stop"',
    b'"type":"response.completed"',
    b'"type":"response.incomplete"',
    b'"type":"response.failed"',
)


class AnswerReader:
    """
    Fed with an answer's bytes, says what they mean.

    Only a part with ``done: true`` proves a complete answer: a stream may end cleanly
    without one (BEHAVIOUR section 1, rules 1 to 3).

    Attributes:
        parts: complete lines seen.
        is_complete: the end mark has been seen.
        error: text of an error inside the answer.
        usage: what the last part said of tokens and times.
        is_too_long: a line had more than :data:`MAX_LINE_BYTES`, or what stands between two
            parts more than :data:`MOST_BETWEEN_BYTES`; no more is read.
        is_no_json: a line cannot be one of Ollama's; no more is read.
    """

    __slots__ = (
        "_between",
        "_framing",
        "_rest",
        "error",
        "is_complete",
        "is_no_json",
        "is_too_long",
        "parts",
        "usage",
    )

    def __init__(self, framing: Framing) -> None:
        self._framing = framing
        self._rest = bytearray()  # a line may come byte by byte
        self._between = 0
        """Bytes of comments and empty lines since the last part: those never end either."""
        self.parts = 0
        self.is_complete = False
        self.is_too_long = False
        self.is_no_json = False
        self.error: str | None = None
        self.usage: Usage | None = None

    @property
    def is_bad(self) -> bool:
        """Whether what has come so far is no good answer."""
        return self.error is not None or self.is_too_long or self.is_no_json

    def feed(self, data: bytes) -> None:
        """Take in some bytes; lines may be cut anywhere."""
        if self.is_too_long or self.is_no_json:
            return
        if b"\n" in data:
            if self._rest:
                data = bytes(self._rest) + data
                self._rest.clear()
            *lines, data = data.split(b"\n")
            for line in lines:
                self._line(line)
            if self.is_too_long or self.is_no_json:
                return
        self._rest += data
        if len(self._rest) > MAX_LINE_BYTES:
            self.is_too_long = True

    @property
    def rest(self) -> bytes:
        """Bytes of a line that is not whole yet."""
        return bytes(self._rest)

    def end(self) -> None:
        """No more bytes will come."""
        rest = bytes(self._rest)
        self._rest.clear()
        if rest.strip():
            self._line(rest)

    def _line(self, line: bytes) -> None:
        if self.is_too_long or self.is_no_json:
            return
        if len(line) > MAX_LINE_BYTES:
            self.is_too_long = True
            return
        before = self.parts
        if self._framing is Framing.SSE:
            self._event(line)
        elif line and line != b"\r":
            self._native(line)
        self._between = 0 if self.parts > before else self._between + len(line) + 1
        self.is_too_long = self._between > MOST_BETWEEN_BYTES

    def _native(self, line: bytes) -> None:
        if not line.startswith(b"{"):
            self.is_no_json = True
            return
        self.parts += 1
        if line.endswith(_MORE_TO_COME):
            return
        # Quotes inside JSON strings are escaped, so these bytes are never part of the text.
        if b'"done":true' in line or b'"done": true' in line:
            document = object_of(line)
            if document is not None and document.get("done") is True:
                self.is_complete = True
                self.usage = usage_of(document)
        elif b'"error"' in line[:16]:
            self.error = error_text(line)
        elif b'"status":"success"' in line or b'"status": "success"' in line:
            # A tool's arguments are no string: they may hold the very same bytes.
            document = object_of(line)
            self.is_complete |= document is not None and document.get("status") == "success"

    def _event(self, line: bytes) -> None:
        if not line.startswith(b"data:"):
            return
        self.parts += 1
        # Nothing in it is escaped, so it is the end only where it stands alone.
        if line[5:].strip() == b"[DONE]" or any(mark in line for mark in _END_MARKS):
            self.is_complete = True
        if b'"usage":{' in line or b'"usage": {' in line:
            document = object_of(line[5:])
            usage = document.get("usage") if document is not None else None
            if isinstance(usage, Mapping):
                self.usage = _openai_usage(usage)
        elif b'"error"' in line[:24]:
            self.error = error_text(line[5:])


def object_of(data: bytes) -> dict[str, Any] | None:
    """The JSON object that a line or a body is; None if it is none."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def error_text(data: bytes) -> str | None:
    """The text of Ollama's error body, native or ``/v1``; None if it is none."""
    document = object_of(data)
    if document is None:
        return None
    error = document.get("error")
    if isinstance(error, Mapping):
        error = error.get("message")
    return error if isinstance(error, str) else None


def usage_of(document: Mapping[str, Any]) -> Usage:
    """Counts and times of the last part of a native answer; fields that are 0 may be missing."""

    def seconds(name: str) -> float | None:
        value = _number(document.get(name))
        return None if value is None else value / NANOSECONDS

    def count(name: str) -> int | None:
        return _count(document.get(name))

    total, load = seconds("total_duration"), seconds("load_duration")
    prefill = seconds("prompt_eval_duration")
    if "embeddings" in document and total is not None:
        # Embedding is reading and nothing else (recordings embed-*).
        prefill = max(0.0, total - (load or 0.0))
    return Usage(
        total_seconds=total,
        load_seconds=load,
        prefill_seconds=prefill,
        decode_seconds=seconds("eval_duration"),
        prompt_tokens=count("prompt_eval_count"),
        output_tokens=count("eval_count"),
    )


def _openai_usage(usage: Mapping[str, Any]) -> Usage:
    return Usage(
        prompt_tokens=_count(usage.get("prompt_tokens")),
        output_tokens=_count(usage.get("completion_tokens")),
    )


# What follows is learned from, so what cannot be (a NaN, a year, less than nothing) is unknown.


def _number(value: object) -> int | float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if 0 <= value <= MOST_NANOSECONDS else None


def _count(value: object) -> int | None:
    number = _number(value)
    return number if isinstance(number, int) and number <= MOST_TOKENS else None


_ANSWER_KEYS = frozenset(
    {"done", "embedding", "embeddings", "choices", "data", "output", "content", "answers"}
)
_KINDS: dict[str, type] = {
    "choices": list,
    "data": list,
    "embedding": list,
    "embeddings": list,
    "message": dict,
    "response": str,
}


def is_answer(document: Mapping[str, Any]) -> bool:
    """Whether a document has a key that some answer of Ollama's has, and what belongs there."""
    return not _ANSWER_KEYS.isdisjoint(document) and all(
        isinstance(document[key], kind) for key, kind in _KINDS.items() if key in document
    )


def read_whole(document: Mapping[str, Any]) -> tuple[bool, Usage | None]:
    """Whether an answer that came in one piece is complete, and its usage."""
    usage = document.get("usage")
    if isinstance(usage, Mapping):
        return True, _openai_usage(usage)
    if "done" in document:
        return document.get("done") is True, usage_of(document)
    return True, usage_of(document) if "total_duration" in document else None
