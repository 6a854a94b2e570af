"""Spoils what a node or another router would send: seeds from the recordings, made absurd.

Everything is drawn from one :class:`random.Random`, which is Hypothesis' in the suite, and a plain
one by hand.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

TESTS = Path(__file__).parents[1]
RECORDINGS = TESTS / "recordings"
PAGES = TESTS / "probes" / "exporters" / "pages"

DEEP = 2000
"""Levels: more than Python's own limit."""

ABSURD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, -0.0, 1e308, -1e308),
    *(float("nan"), float("inf"), float("-inf")),
    *(2**31, 2**53 + 1, 2**63, -(2**63), 2**64, 10**400, -(10**400)),
    *("", " ", "\x00", "\ud800", "\u202e\x1b[2J", "NaN", "null", "😀" * 9, "x" * 3000, "9" * 5000),
    *(
        "0001-01-01T00:00:00Z",
        "9999-12-31T23:59:59.999999999+99:99",
        "\uff12\uff10-01-01T00:00:00Z",
    ),
    *([], {}, [[]], [None], {"": {}}, {"name": []}, [1e999, "a", {}], [0] * 500),
)


def spoilt_json(random: Random, document: Any, times: int = 3) -> bytes:
    """A document with some of its values replaced, renamed, doubled or left out, as JSON."""
    copy = json.loads(json.dumps(document))
    for _ in range(random.randint(0, times)):
        copy = _spoilt(random, copy)
    text = json.dumps(copy)
    if random.random() < 0.05:
        text = random.choice(('{"models":' * DEEP, "[" * DEEP, f'{text[:-1]},"models":[]}}', "NaN"))
    data = text.encode()
    return spoilt_bytes(random, data, times=1) if random.random() < 0.1 else data


def _spoilt(random: Random, value: Any) -> Any:
    if random.random() < 0.15 or not isinstance(value, dict | list) or not value:
        return random.choice(ABSURD)
    if isinstance(value, list):
        at = random.randrange(len(value))
        deed = random.random()
        if deed < 0.1:
            return value * random.randint(0, 5)
        return [*value[:at], _spoilt(random, value[at]), *value[at + 1 :]]
    key = random.choice(list(value))
    deed = random.random()
    if deed < 0.1:
        return {name: one for name, one in value.items() if name != key}
    if deed < 0.15:
        return {**value, random.choice(("", "\ud800", "error", "models", "done")): value[key]}
    return {**value, key: _spoilt(random, value[key])}


PIECES = (
    *(b"\n", b"\r\n", b"\n\n", b"{", b"}", b'"', b"\\", b"data: ", b": \n", b"data: [DONE]\n\n"),
    *(b'{"error":"x"}\n', b'{"done":true}\n', b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"1e999"),
    *(b"NaN", b"-1", b"[" * DEEP, b"x" * 3000, b"\n" * 3000, b"#", b"{}", b'{a="\\n"}', b" 1 1\n"),
)


def spoilt_bytes(random: Random, data: bytes, times: int = 5) -> bytes:
    """Bytes cut, flipped, doubled, and with pieces put in that mean something somewhere."""
    for _ in range(random.randint(0, times)):
        at = random.randint(0, len(data))
        to = min(len(data), at + random.choice((0, 1, 2, 8, 64, 4096)))
        piece = random.choice((b"", data[at:to] * 2, random.choice(PIECES)))
        if random.random() < 0.2:
            piece = bytes(random.randrange(256) for _ in range(random.randint(1, 8)))
        data = data[:at] + piece + data[to:]
    return data


# -------------------------------------------------------------------------- seeds


@lru_cache
def recorded(*words: str) -> tuple[Any, ...]:
    """The JSON bodies of all recordings that have one of the words in their names."""
    found = []
    for path in sorted(RECORDINGS.glob("v*.json")):
        response = json.loads(path.read_text()).get("response") or {}
        if any(word in path.stem for word in words) and isinstance(response.get("body"), dict):
            found.append(response["body"])
    return tuple(found)


@lru_cache
def recorded_streams() -> tuple[tuple[bool, bytes], ...]:
    """Whether it is an event stream, and the bytes, of every recorded stream; long ones are cut."""
    found = []
    for path in sorted(RECORDINGS.glob("v*.json")):
        response = json.loads(path.read_text()).get("response") or {}
        if not response.get("chunks"):
            continue
        is_sse = "event-stream" in response["headers"]["Content-Type"]
        lines = [chunk["line"] for chunk in response["chunks"]]
        lines = lines if len(lines) < 12 else [*lines[:6], *lines[-6:]]
        end = "\n\n" if is_sse else "\n"
        found.append((is_sse, "".join(line + end for line in lines).encode()))
    return tuple(found)


@lru_cache
def pages() -> tuple[bytes, ...]:
    """The exporters' pages."""
    return tuple(path.read_bytes() for path in sorted(PAGES.glob("*.prom")))
