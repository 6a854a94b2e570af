"""Reads what a node says of its models: ``/api/version``, ``tags``, ``ps`` and ``show``.

A document that is not Ollama's at all is a :class:`ValueError`; an entry that makes no sense
is left out, and a field that makes none counts as not given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from hydra_llm.types import InstalledModel, LoadedModel, canonical_model_name
from hydra_llm.vram.metadata import whole
from hydra_llm.vram.shape import ModelShape

__all__ = ["parse_ps", "parse_show", "parse_tags", "parse_version"]


MOST_MODELS = 2000
"""Of one node; more are passed over."""

MOST_CAPABILITIES = 100
"""Of one model."""

MOST_CHARACTERS = 500
"""Of a name, a digest or a version: what is longer is none."""

MOST_NUMBER = 1 << 60
"""No size or count is above this; more could not be reckoned with as a ``float`` either."""


def parse_version(data: object) -> str | None:
    """The version in ``/api/version``; None where it gives none."""
    return _name(_document(data), "version") or None


def parse_tags(data: object) -> dict[str, InstalledModel]:
    """Installed models by canonical name, from ``/api/tags``."""
    found: dict[str, InstalledModel] = {}
    for name, entry in _models(data):
        details = _object(entry, "details")
        model = InstalledModel(
            name=name,
            digest=_digest(entry),
            # Models in the cloud have no size of their own here.
            size_bytes=_whole(entry, "size") or 0,
            capabilities=_capabilities(entry),
            context_length=_whole(details, "context_length") or None,
        )
        found.setdefault(name, model)
    return found


def parse_ps(data: object) -> dict[str, LoadedModel]:
    """Loaded models by canonical name, from ``/api/ps``."""
    found: dict[str, LoadedModel] = {}
    for name, entry in _models(data):
        in_vram = _whole(entry, "size_vram") or 0
        model = LoadedModel(
            name=name,
            digest=_digest(entry),
            size_bytes=max(_whole(entry, "size") or 0, in_vram),
            size_vram_bytes=in_vram,
            context_length=_whole(entry, "context_length") or None,
            expires_at=_unix_time(_text(entry, "expires_at")),
        )
        found.setdefault(name, model)
    return found


def parse_show(data: object, installed: InstalledModel) -> InstalledModel:
    """``installed`` with what ``/api/show`` adds to it; what it does not say stays."""
    document = _document(data)
    capabilities = _capabilities(document)
    shape = ModelShape.from_show(document, installed.size_bytes)
    return replace(
        installed,
        capabilities=installed.capabilities if capabilities is None else capabilities,
        context_length=shape.context_length or installed.context_length,
        shape=shape,
        weights_file=_weights_file(_text(document, "modelfile")) or installed.weights_file,
    )


def _weights_file(modelfile: str) -> str:
    """What the model was made from: a blob, in a folder that is another on every server."""
    found = _FROM.search(modelfile)
    name = found[1].strip(" \t").replace("\\", "/").rpartition("/")[2] if found else ""
    return name if len(name) <= MOST_CHARACTERS else ""


# Nothing here can be matched in two ways: the time it takes grows with the text, no faster.
_FROM = re.compile(r"^FROM[ \t]+([^ \t\n][^\n]*)$", re.MULTILINE)


# ------------------------------------------------------------------------ fields


def _document(data: object) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise ValueError("expected a JSON object")  # noqa: TRY004  # it is a value from the wire
    return data


def _models(data: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The entries of a list of models that have a name, and that name's canonical form."""
    document = _document(data)
    entries = document.get("models")
    # Go writes an empty list as null in places.
    if entries is None and "models" in document:
        entries = []
    if not isinstance(entries, list):
        raise ValueError("expected a list of models")  # noqa: TRY004  # as above
    count = 0
    for entry in entries:
        if isinstance(entry, dict):
            name = _name(entry, "name").strip() or _name(entry, "model").strip()
            if name:
                count += 1
                if count > MOST_MODELS:
                    return
                yield canonical_model_name(name), entry


def _object(entry: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = entry.get(key)
    return value if isinstance(value, dict) else {}


def _text(entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    return value if isinstance(value, str) else ""


def _name(entry: Mapping[str, Any], key: str) -> str:
    """A text that can stand in a line, a file and a terminal; empty for anything else."""
    value = _text(entry, key)
    return value if len(value) <= MOST_CHARACTERS and value.isprintable() else ""


def _digest(entry: Mapping[str, Any]) -> str:
    return _name(entry, "digest").removeprefix("sha256:")


def _capabilities(entry: Mapping[str, Any]) -> frozenset[str] | None:
    """What a model can do; None, not nothing, where the server does not say."""
    value = entry.get("capabilities")
    if not isinstance(value, list):
        return None
    words = (one for one in value[:MOST_CAPABILITIES] if isinstance(one, str))
    return frozenset(one for one in words if len(one) <= MOST_CHARACTERS) or None


def _whole(entry: Mapping[str, Any], key: str) -> int | None:
    return _as_whole(entry.get(key))


def _as_whole(value: object) -> int | None:
    """A whole number from 0 to :data:`MOST_NUMBER`; None for anything else."""
    return whole(value, MOST_NUMBER)


_RFC3339 = re.compile(
    r"(?P<seconds>\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d)(?:\.(?P<fraction>\d+))?"
    r"(?P<zone>[Zz]|[+-]\d\d:\d\d)"
)


def _unix_time(text: str) -> float | None:
    """RFC 3339 with Go's nanoseconds as Unix time; None for Go's zero time, the year 1."""
    match = _RFC3339.fullmatch(text)
    if match is None or match["seconds"].startswith("0001"):
        return None
    zone = match["zone"] if match["zone"] not in "Zz" else "+00:00"
    try:
        # Python 3.10 reads neither "Z" nor nine digits.
        moment = datetime.fromisoformat(match["seconds"].upper() + zone)
        whole = moment.astimezone(timezone.utc).timestamp()
    except (ValueError, OverflowError):
        return None
    return whole + float(f"0.{match['fraction'] or 0}")
