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

__all__ = ["parse_ps", "parse_show", "parse_tags", "parse_version"]

F16_BYTES = 2


def parse_version(data: object) -> str | None:
    """The version in ``/api/version``; None where it gives none."""
    return _text(_document(data), "version") or None


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
    info = _object(document, "model_info")
    about = _Metadata(info)
    capabilities = _capabilities(document)
    kv_bytes = _kv_bytes_per_token(about, document)
    return replace(
        installed,
        capabilities=installed.capabilities if capabilities is None else capabilities,
        context_length=about.whole("context_length") or installed.context_length,
        kv_bytes_per_token=installed.kv_bytes_per_token if kv_bytes is None else kv_bytes,
    )


# ---------------------------------------------------------------- key/value cache


class _Metadata:
    """GGUF metadata of one model, by the names that follow its architecture's."""

    def __init__(self, info: Mapping[str, Any]) -> None:
        self._info = info
        self._prefix = f"{_text(info, 'general.architecture')}."

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self._info

    def get(self, key: str) -> Any:
        return self._info.get(self._prefix + key)

    def whole(self, key: str) -> int | None:
        """A number, or the largest of a list of one per layer (others hold zeros)."""
        value = self.get(key)
        if isinstance(value, list):
            numbers = [n for one in value if (n := _as_whole(one)) is not None]
            return max(numbers, default=None)
        return _as_whole(value)


def _kv_bytes_per_token(about: _Metadata, document: Mapping[str, Any]) -> int | None:
    """
    Key/value cache per token of context at 16 bits (BEHAVIOUR section 11).

    Too high for models whose layers partly look back over a window only; None where the
    metadata does not tell.
    """
    if about.get("attention.causal") is False:
        return 0  # encoders keep no cache
    heads = about.whole("attention.head_count")
    width = about.whole("embedding_length")
    per_head = width // heads if heads and width else None
    key = about.whole("attention.key_length") or per_head
    value = about.whole("attention.value_length") or per_head
    kv_heads = _kv_heads(about)
    if kv_heads is None:
        kv_width = _kv_width_of_tensors(document)
    elif key is None or value is None:
        return None
    elif kv_heads == 1 and about.whole("attention.kv_lora_rank"):
        # Latent attention keeps one row, which the values are a part of.
        kv_width = _layers_sum(about, kv_heads) * key
    else:
        kv_width = _layers_sum(about, kv_heads) * (key + value)
    return kv_width * F16_BYTES if kv_width else None


def _kv_heads(about: _Metadata) -> int | None:
    """Key/value heads of a layer; as many as there are heads where nothing is said."""
    if "attention.head_count_kv" in about:
        return about.whole("attention.head_count_kv")
    return about.whole("attention.head_count")


def _layers_sum(about: _Metadata, kv_heads: int) -> int:
    per_layer = about.get("attention.head_count_kv")
    if isinstance(per_layer, list):
        return sum(_as_whole(one) or 0 for one in per_layer)
    return (about.whole("block_count") or 0) * kv_heads


_KV_TENSOR = re.compile(r"blk\.(\d+)\.attn_([kv])\.weight")


def _kv_width_of_tensors(document: Mapping[str, Any]) -> int | None:
    """
    Width of all layers' keys and values, from the shapes of what projects onto them.

    The heads of each layer are an array, and arrays are ``null`` unless asked for.
    """
    widths: dict[tuple[str, str], int] = {}
    tensors = document.get("tensors")
    for tensor in tensors if isinstance(tensors, list) else ():
        if not isinstance(tensor, dict):
            continue
        match = _KV_TENSOR.fullmatch(_text(tensor, "name"))
        shape = tensor.get("shape")
        if match and isinstance(shape, list) and len(shape) == 2:
            widths[match[1], match[2]] = _as_whole(shape[1]) or 0
    layers = {layer for layer, _ in widths}
    keys = {layer: widths.get((layer, "k"), 0) for layer in layers}
    # Some layers use their keys as values.
    return sum(keys[layer] + widths.get((layer, "v"), keys[layer]) for layer in layers) or None


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
    for entry in entries:
        if isinstance(entry, dict):
            name = _text(entry, "name").strip() or _text(entry, "model").strip()
            if name:
                yield canonical_model_name(name), entry


def _object(entry: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = entry.get(key)
    return value if isinstance(value, dict) else {}


def _text(entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    return value if isinstance(value, str) else ""


def _digest(entry: Mapping[str, Any]) -> str:
    return _text(entry, "digest").removeprefix("sha256:")


def _capabilities(entry: Mapping[str, Any]) -> frozenset[str] | None:
    """What a model can do; None, not nothing, where the server does not say."""
    value = entry.get("capabilities")
    if not isinstance(value, list):
        return None
    return frozenset(one for one in value if isinstance(one, str)) or None


def _whole(entry: Mapping[str, Any], key: str) -> int | None:
    return _as_whole(entry.get(key))


def _as_whole(value: object) -> int | None:
    """A whole number that is not negative; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float) and not value.is_integer():  # inf and NaN are none either
        return None
    return int(value) if value >= 0 else None


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
