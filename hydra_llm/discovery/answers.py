"""What an address tells of the Ollama server there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

from hydra_llm.discovery.calling import Caller, NoAnswerError, url_host
from hydra_llm.networks import Address
from hydra_llm.ollama.catalogue import parse_tags
from hydra_llm.tables import printable

__all__ = ["Model", "Place", "Server", "ask_loaded", "ask_server", "plain"]

VERSION_BYTES = 4096
LIST_BYTES = 4 << 20
NAME_LENGTH = 200
MOST_MODELS = 2000


class Place(NamedTuple):
    """Where a server listens."""

    address: Address
    port: int

    @property
    def url(self) -> str:
        """As a node's URL has it."""
        return f"http://{url_host(self.address, self.port)}"


class Model(NamedTuple):
    """A line of ``/api/tags``, as far as it tells one server from another."""

    name: str
    digest: str
    modified_at: str
    """When this server got it, as a rule to the nanosecond; empty where it does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """An Ollama server at one place."""

    place: Place
    version: str
    models: tuple[Model, ...]
    """By name."""


async def ask_server(caller: Caller, place: Place) -> Server | None:
    """The Ollama server at a place; None where there is none, or one that wants a login."""
    version = await _ask(caller, place, "/api/version", VERSION_BYTES)
    # Not by the catalogue's rules: who searches is shown odd names too, made plain.
    told = _text(version, "version") if isinstance(version, dict) else ""
    if not told:
        return None
    try:
        tags = await _ask(caller, place, "/api/tags", LIST_BYTES)
        parse_tags(tags)
    except ValueError:
        return None
    models = sorted(
        {Model(*(_text(entry, key) for key in Model._fields)) for entry in _entries(tags)}
    )
    return Server(
        place=place,
        version=told,
        models=tuple(model for model in models if model.name)[:MOST_MODELS],
    )


async def ask_loaded(caller: Caller, place: Place) -> frozenset[tuple[str, str, str]] | None:
    """Name, digest and expiry of what is loaded there; None where that is not told."""
    document = await _ask(caller, place, "/api/ps", LIST_BYTES)
    if not isinstance(document, dict) or "models" not in document:
        return None
    keys = ("name", "digest", "expires_at")
    return frozenset(
        (_text(one, keys[0]), _text(one, keys[1]), _text(one, keys[2]))
        for one in _entries(document)
    )


def plain(text: str) -> str:
    """What a stranger says, on one line and without anything that a terminal would obey."""
    shown = printable(text)
    return shown if len(shown) <= NAME_LENGTH else f"{shown[: NAME_LENGTH - 1]}…"


async def _ask(caller: Caller, place: Place, path: str, most_bytes: int) -> object:
    try:
        reply = await caller.get(place.address, place.port, path, most_bytes=most_bytes)
        return json.loads(reply.body) if reply.status == 200 else None
    except (NoAnswerError, ValueError, RecursionError):
        return None


def _entries(document: object) -> list[dict[str, object]]:
    models = document.get("models") if isinstance(document, dict) else None
    return [one for one in models if isinstance(one, dict)] if isinstance(models, list) else []


def _text(entry: dict[str, object], key: str) -> str:
    value = entry.get(key)
    return plain(value) if isinstance(value, str) else ""
