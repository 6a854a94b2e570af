"""Learned rates in a file, between one start and the next.

::

    {"hydra_llm_rates": 1,
     "nodes": {"http://rig:11434": {"": {"at": 1790000000, "load_bandwidth": [1.6e9, 5]},
                                    "<digest>": {"at": 1790000000, "decode": [0.0125, 40]}}}}

A node is known by its URL and a model by its file's digest, so a changed file is another model;
``""`` is the node as a whole. ``at`` is when the last of the entry's rates changed, each rate its
value and the samples behind it. Whatever cannot be read counts as not there: the file is only ever
worth a few samples, and no request may fail for it.

Several routers may have one file. It is replaced as a whole, and a router changes in it only what
it has measured itself; of two that write in the same moment one loses, and writes again once it has
measured more.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from hydra_llm.cluster.files import replace_file
from hydra_llm.cluster.learning import KINDS
from hydra_llm.cluster.rates import Rate

__all__ = ["NEED", "Entry", "Entries", "RatesFile", "RatesFileError"]

log = logging.getLogger("hydra_llm")

VERSION = 1
FORGOTTEN_SECONDS = 90 * 24 * 3600.0
"""What has not been measured for so long is forgotten."""
MAX_ENTRIES = 1000
"""Of all nodes and models together; the oldest go."""
MAX_BYTES = 4_000_000
"""A file this long is not ours."""

NEED = "need"
"""Memory that a model took, as a part of what was expected: kept with the rates."""
RATES = frozenset({*KINDS, NEED})
LEAST, MOST = 1e-12, 1e18
"""What a rate can be, in any of the units."""


class RatesFileError(Exception):
    """The file cannot be written, or should not be; the message says why."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept of one model on one node, or of the node."""

    at: float
    """Seconds since 1970 when the last of its rates changed."""
    rates: Mapping[str, Rate]
    """By kind; means as they are, not their logarithms."""
    changed: frozenset[str] = field(default=frozenset(), compare=False)
    """Kinds that this router has measured since it last read or wrote them."""


Entries: TypeAlias = dict[tuple[str, str], Entry]
"""By node URL and digest."""


class RatesFile:
    """
    The file, read and written as a whole.

    Args:
        path: where it is; its folder is made when it is first written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._complaints: set[str] = set()

    def __repr__(self) -> str:
        return f"<RatesFile {self.path}>"

    def read(self, now: float) -> Entries:
        """What is kept there and not yet forgotten; nothing if it cannot be read."""
        try:
            return _without_forgotten(self._entries(), now)
        except RatesFileError as error:
            self.complain(logging.WARNING, str(error))
        except (OSError, ValueError) as error:  # a path may be none
            self.complain(logging.DEBUG, f"it cannot be read ({_why(error)})")
        return {}

    def merge(self, own: Entries, now: float) -> None:
        """
        Put in what this router knows; what it has not measured stays as others have left it.

        Raises:
            RatesFileError: it is somebody else's file, or cannot be written.
        """
        try:
            merged = self._entries()
            for key, mine in own.items():
                merged[key] = _merged(mine, merged.get(key))
            replace_file(self.path, _text_of(_without_forgotten(merged, now)))
        except (OSError, ValueError) as error:
            raise RatesFileError(f"it cannot be written ({_why(error)})") from error

    def complain(self, level: int, text: str) -> None:
        """Log something about the file, once."""
        if text not in self._complaints:
            self._complaints.add(text)
            log.log(level, "learned rates in %s: %s", self.path, text)

    def _entries(self) -> Entries:
        try:
            if self.path.stat().st_size > MAX_BYTES:
                raise RatesFileError("it is too long to be hydra-llm's, and left alone")
            if not self.path.is_file():  # reading a pipe would never end
                raise RatesFileError("it is no file, and left alone")
            data = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        try:
            content = json.loads(data) if data.strip() else None
        except (ValueError, RecursionError):
            # Torn by something; it could be of use to nobody.
            self.complain(logging.WARNING, "it is broken, and will be replaced")
            return {}
        if content is None:
            return {}
        version = content.get("hydra_llm_rates") if isinstance(content, dict) else None
        if not isinstance(version, int):
            raise RatesFileError("it is no file of hydra-llm's, and left alone")
        if version > VERSION:
            raise RatesFileError("a newer hydra-llm has written it; it is left alone")
        return dict(_read(content)) if version == VERSION else {}


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _merged(mine: Entry, theirs: Entry | None) -> Entry:
    if theirs is None:
        return mine
    fresh = {kind: mine.rates[kind] for kind in mine.changed}
    at = mine.at if fresh else theirs.at
    return Entry(max(at, theirs.at), {**mine.rates, **theirs.rates, **fresh})


def _without_forgotten(entries: Entries, now: float) -> Entries:
    alive = {
        # The clock may have been wrong when it was written.
        key: Entry(min(entry.at, now), entry.rates)
        for key, entry in entries.items()
        if now - entry.at < FORGOTTEN_SECONDS
    }
    newest = sorted(alive.items(), key=lambda item: item[1].at, reverse=True)
    return dict(newest[:MAX_ENTRIES])


# --------------------------------------------------------------------------- format


def _text_of(entries: Entries) -> str:
    nodes: dict[str, dict[str, Any]] = {}
    for (url, digest), entry in sorted(entries.items()):
        rates = {kind: [rate.value, rate.samples] for kind, rate in entry.rates.items()}
        nodes.setdefault(url, {})[digest] = {"at": round(entry.at), **rates}
    return json.dumps({"hydra_llm_rates": VERSION, "nodes": nodes}, indent=1) + "\n"


# Any: whatever somebody may have written there.
def _read(content: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Entry]]:
    for url, models in _items(content.get("nodes")):
        for digest, told in _items(models):
            at = told.get("at") if isinstance(told, dict) else None
            rates = {kind: rate for kind, pair in _items(told) if (rate := _rate(kind, pair))}
            if rates and at is not None and _is_number(at, 0, MOST):
                yield (url, digest), Entry(float(at), rates)


def _items(value: object) -> Iterator[tuple[str, Any]]:
    yield from value.items() if isinstance(value, dict) else ()


def _rate(kind: str, pair: object) -> Rate | None:
    if kind not in RATES or not isinstance(pair, list) or len(pair) != 2:
        return None
    value, samples = pair
    if not _is_number(value, LEAST, MOST) or not _is_number(samples, 1, MOST):
        return None
    return Rate(float(value), int(samples))


def _is_number(value: object, least: float, most: float) -> bool:
    return isinstance(value, int | float) and value is not True and least <= value <= most
