"""Bytes as Ollama writes them: JSON the Go way, error bodies, dates and durations."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

__all__ = ["FOREVER", "JSON", "NDJSON", "RequestError", "Reply", "date_text", "duration_s",
           "error_body", "go_json", "json_reply", "text_reply"]  # fmt: skip

JSON = "application/json; charset=utf-8"
PLAIN_JSON = "application/json"
NDJSON = "application/x-ndjson"
EVENTS = "text/event-stream"

FOREVER = "2319-03-05T08:39:07.297923185Z"
"""What ``expires_at`` shows for a keep-alive of -1."""

# Go's net/http gives a length to what fits its buffer, and sends the rest in chunks.
_BUFFER = 2048

_TYPES = {400: "invalid_request_error", 404: "not_found_error"}


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole HTTP answer."""

    status: int
    body: bytes = b""
    content_type: str | None = JSON
    headers: tuple[tuple[str, str], ...] = ()
    is_chunked: bool | None = None
    """``None`` leaves it to the length of the body."""

    @property
    def chunked(self) -> bool:
        """Whether it goes out in chunks, without a length."""
        return len(self.body) > _BUFFER if self.is_chunked is None else self.is_chunked


class RequestError(Exception):
    """A request that is answered with an error before any model is asked."""

    def __init__(self, status: int, text: str, *, in_binding: bool = False) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.in_binding = in_binding
        """Whether it was refused while its JSON was read."""


def go_json(value: object) -> str:
    """Write JSON as Go does: no spaces, and ``<``, ``>``, ``&`` escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for char, escape in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026"),
                         ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):  # fmt: skip
        text = text.replace(char, escape)
    return text


def json_reply(value: object, status: int = 200, content_type: str = JSON) -> Reply:
    """Answer with a JSON document."""
    return Reply(status, go_json(value).encode("utf-8", "surrogatepass"), content_type)


def text_reply(text: str, status: int = 200, content_type: str = "text/plain") -> Reply:
    """Answer with plain text."""
    return Reply(status, text.encode(), content_type)


def error_body(status: int, text: str, *, is_v1: bool) -> Mapping[str, Any]:
    """Shape an error as the native or the OpenAI-style endpoints do."""
    if not is_v1:
        return {"error": text}
    kind = _TYPES.get(status, "api_error")
    return {"error": {"message": text, "type": kind, "param": None, "code": None}}


def date_text(epoch: float) -> str:
    """Write a date with nanoseconds, as ``created_at``."""
    whole, part = divmod(round(epoch * 1e9), 1_000_000_000)
    date = datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=whole)
    return f"{date:%Y-%m-%dT%H:%M:%S}.{part:09d}Z"


_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def duration_s(value: object) -> float | None:
    """Read a ``keep_alive``: seconds as a number, or Go's ``1h30m``; negative is for ever."""
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, str):
        raise RequestError(400, "invalid duration", in_binding=True)
    rest = value.lstrip("+-")
    sign = -1.0 if value.startswith("-") else 1.0
    if rest == "0":
        return 0.0
    if not rest:
        raise RequestError(400, f'time: invalid duration "{value}"', in_binding=True)
    total = 0.0
    while rest:
        match = re.match(r"(\d+\.?\d*|\.\d+)([^\d.]*)", rest)
        if match is None:
            raise RequestError(400, f'time: invalid duration "{value}"', in_binding=True)
        number, unit = match.groups()
        if not unit:
            text = f'time: missing unit in duration "{value}"'
            raise RequestError(400, text, in_binding=True)
        if unit not in _UNITS:
            text = f'time: unknown unit "{unit}" in duration "{value}"'
            raise RequestError(400, text, in_binding=True)
        total += float(number) * _UNITS[unit]
        rest = rest[match.end() :]
    return sign * total
