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
        is_too_long: a line had more than :data:`MAX_LINE_BYTES`.
    """

    __slots__ = ("_framing", "_rest", "error", "is_complete", "is_too_long", "parts", "usage")

    def __init__(self, framing: Framing) -> None:
        self._framing = framing
        self._rest = b""
        self.parts = 0
        self.is_complete = False
        self.is_too_long = False
        self.error: str | None = None
        self.usage: Usage | None = None

    def feed(self, data: bytes) -> None:
        """Take in some bytes; lines may be cut anywhere."""
        if self._rest:
            data = self._rest + data
        *lines, self._rest = data.split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            self.is_too_long = True
        for line in lines:
            self._line(line)

    @property
    def rest(self) -> bytes:
        """Bytes of a line that is not whole yet."""
        return self._rest

    def end(self) -> None:
        """No more bytes will come."""
        rest, self._rest = self._rest, b""
        if rest.strip():
            self._line(rest)

    def _line(self, line: bytes) -> None:
        if self._framing is Framing.SSE:
            self._event(line)
            return
        if not line or line == b"\r":
            return
        self.parts += 1
        if line.endswith(_MORE_TO_COME):
            return
        # Quotes inside JSON strings are escaped, so these bytes are never part of the text.
        if b'"done":true' in line or b'"done": true' in line:
            document = _object(line)
            if document is not None and document.get("done") is True:
                self.is_complete = True
                self.usage = usage_of(document)
        elif b'"error"' in line[:16]:
            self.error = error_text(line)
        elif b'"status":"success"' in line or b'"status": "success"' in line:
            # A tool's arguments are no string: they may hold the very same bytes.
            document = _object(line)
            self.is_complete |= document is not None and document.get("status") == "success"

    def _event(self, line: bytes) -> None:
        if not line.startswith(b"data:"):
            return
        self.parts += 1
        # Nothing in it is escaped, so it is the end only where it stands alone.
        if line[5:].strip() == b"[DONE]" or any(mark in line for mark in _END_MARKS):
            self.is_complete = True
        if b'"usage":{' in line or b'"usage": {' in line:
            document = _object(line[5:])
            usage = document.get("usage") if document is not None else None
            if isinstance(usage, Mapping):
                self.usage = _openai_usage(usage)
        elif b'"error"' in line[:24]:
            self.error = error_text(line[5:])


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def error_text(data: bytes) -> str | None:
    """The text of Ollama's error body, native or ``/v1``; None if it is none."""
    document = _object(data)
    if document is None:
        return None
    error = document.get("error")
    if isinstance(error, Mapping):
        error = error.get("message")
    return error if isinstance(error, str) else None


def usage_of(document: Mapping[str, Any]) -> Usage:
    """Counts and times of the last part of a native answer; fields that are 0 may be missing."""

    def seconds(name: str) -> float | None:
        value = document.get(name)
        return value / NANOSECONDS if isinstance(value, (int, float)) else None

    def count(name: str) -> int | None:
        value = document.get(name)
        return value if isinstance(value, int) else None

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
    prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return Usage(
        prompt_tokens=prompt if isinstance(prompt, int) else None,
        output_tokens=output if isinstance(output, int) else None,
    )


_ANSWER_KEYS = frozenset(
    {"done", "embedding", "embeddings", "choices", "data", "output", "content", "answers"}
)


def is_answer(document: Mapping[str, Any]) -> bool:
    """Whether a document has a key that some answer of Ollama's has."""
    return not _ANSWER_KEYS.isdisjoint(document)


def read_whole(document: Mapping[str, Any]) -> tuple[bool, Usage | None]:
    """Whether an answer that came in one piece is complete, and its usage."""
    usage = document.get("usage")
    if isinstance(usage, Mapping):
        return True, _openai_usage(usage)
    if "done" in document:
        return document.get("done") is True, usage_of(document)
    return True, usage_of(document) if "total_duration" in document else None
