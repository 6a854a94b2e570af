"""
The routing words of a LiteLLM request, out of the places where they may stand.

The nearest to the call wins:

1. keys of the call or body, also by ``extra_body`` (``node_id``, ``min_vram_gb`` ...);
2. ``hydra={...}`` in the call, body or ``extra_body``;
3. ``metadata={"hydra": {...}}``, for endpoints whose metadata holds strings also as JSON text;
4. headers ``x-hydra-node-id``, ``x-hydra-min-vram-gb`` ...;
5. ``model_info: {hydra: {...}}`` of the deployment.

``priority`` as a key of the call is LiteLLM's own word, and is left to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hydra_llm import RoutingWordError, RoutingWords

__all__ = ["buckets", "default_words", "parted_call", "words_of", "without_words"]

_PREFIX = "x-hydra-"
_WORDS = frozenset(RoutingWords.model_fields)
_TOP_LEVEL = _WORDS - {"priority"}
_OF_THE_NODE = frozenset({"node_id", "vram_gb", "vram_reserved_gb", "ram_gb", "exporter",
                          "exporter_headers", "labels", "headers", "slots", "local"})  # fmt: skip
"""What ``model_info.hydra`` says of the node itself; all else there are words."""
_HIGHEST = 10


def words_of(
    request: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """
    Read the words of a request, the limits of its key and team applied.

    Args:
        request: the keyword arguments of the call.
        defaults: words of the deployment.

    Raises:
        RoutingWordError: a word is misspelt or its value is wrong; the message names it.
    """
    words: dict[str, Any] = dict(defaults or {})
    words |= _words_of_headers(request)
    for bucket in buckets(request):
        words |= _mapping(bucket.get("hydra"), "metadata.hydra")
    extra = request.get("extra_body")
    extra = extra if isinstance(extra, Mapping) else {}
    words |= _mapping(extra.get("hydra"), "extra_body.hydra")
    words |= _mapping(request.get("hydra"), "hydra")
    words |= {name: extra[name] for name in _TOP_LEVEL & extra.keys()}
    words |= {name: request[name] for name in _TOP_LEVEL & request.keys()}
    limit = _priority_limit(request)
    if not words and limit is None:
        return words
    checked = RoutingWords.read(words)
    if limit is not None:
        words["priority"] = min(checked.priority, limit)
    return words


def without_words(request: Mapping[str, Any]) -> dict[str, Any]:
    """Give the keyword arguments without what is not for Ollama."""
    kept = {name: value for name, value in request.items()
            if name not in _TOP_LEVEL and name != "hydra"}  # fmt: skip
    extra = kept.get("extra_body")
    if isinstance(extra, Mapping):
        rest = {k: v for k, v in extra.items() if k not in _TOP_LEVEL and k != "hydra"}
        if rest:
            kept["extra_body"] = rest
        else:
            del kept["extra_body"]
    return kept


def parted_call(
    optional_params: Mapping[str, Any], litellm_params: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Part what LiteLLM hands to a provider into routing words and the rest, which is for Ollama.

    Raises:
        RoutingWordError: a word is misspelt or its value is wrong; the message names it.
    """
    about = {
        name: litellm_params[name]
        for name in ("metadata", "litellm_metadata", "proxy_server_request")
        if litellm_params.get(name) is not None
    }
    rest = without_words(optional_params)
    extra = rest.pop("extra_body", None)
    rest = {**(extra if isinstance(extra, Mapping) else {}), **rest}
    rest.pop("priority", None)  # LiteLLM's own word, and nothing for Ollama
    return words_of({**optional_params, **about}), rest


def default_words(about: Mapping[str, Any]) -> dict[str, Any]:
    """Give the words that ``model_info.hydra`` says for every request to its group."""
    return {name: value for name, value in about.items() if name not in _OF_THE_NODE}


def buckets(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give the metadata of a request: which of the two it is depends on the endpoint."""
    found = (request.get("metadata"), request.get("litellm_metadata"))
    return [bucket for bucket in found if isinstance(bucket, dict)]


def _mapping(said: Any, where: str) -> dict[str, Any]:
    if said is None:
        return {}
    if isinstance(said, str):
        try:
            said = json.loads(said)
        except ValueError:
            said = None
    if not isinstance(said, Mapping):
        raise RoutingWordError(f"{where} should be an object of routing words")
    return dict(said)


def _words_of_headers(request: Mapping[str, Any]) -> dict[str, Any]:
    incoming = request.get("proxy_server_request")
    headers = incoming.get("headers") if isinstance(incoming, Mapping) else None
    found: dict[str, Any] = {}
    for group in (headers, request.get("extra_headers")):
        if not isinstance(group, Mapping):
            continue
        for name, value in group.items():
            lower = str(name).lower()
            if lower.startswith(_PREFIX):
                found[lower.removeprefix(_PREFIX).replace("-", "_")] = value
    return found


def _priority_limit(request: Mapping[str, Any]) -> int | None:
    """What the proxy's operator lets this key or team ask for; it only ever lowers."""
    limits: list[int] = []
    for bucket in buckets(request):
        for owner in ("user_api_key_metadata", "user_api_key_team_metadata"):
            said = bucket.get(owner)
            hydra = said.get("hydra") if isinstance(said, Mapping) else None
            limit = hydra.get("max_priority") if isinstance(hydra, Mapping) else None
            if isinstance(limit, int) and not isinstance(limit, bool):
                limits.append(max(1, min(limit, _HIGHEST)))
    return min(limits, default=None)
