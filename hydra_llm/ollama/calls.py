"""Reads a request of Ollama's API: what it asks for, and how its answer will come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from hydra_llm.types import NO_OPTIONS, RunnerOptions, canonical_model_name

CHARACTERS_PER_TOKEN = 4
IMAGE_TOKENS = 800
"""A picture's share of the prompt; it varies by model between some 250 and 1600."""


class Route(Enum):
    """What becomes of a request."""

    INFERENCE = "inference"
    """Goes to the node that will answer it soonest."""
    MODEL = "model"
    """About one model: goes to any node that has it."""
    CATALOGUE = "catalogue"
    """Answered from all nodes together."""
    ANY = "any"
    """Goes to any node that is up."""
    ADMIN = "admin"
    """Changes a node: the caller has to name it."""


class Framing(Enum):
    """How an answer comes, and how its end is recognised."""

    JSON = "json"
    NDJSON = "ndjson"
    SSE = "sse"


@dataclass(frozen=True, slots=True)
class _Endpoint:
    route: Route
    streams_by_default: bool = False
    native: bool = True
    generates: bool = True


_ENDPOINTS = {
    "/api/chat": _Endpoint(Route.INFERENCE, streams_by_default=True),
    "/api/generate": _Endpoint(Route.INFERENCE, streams_by_default=True),
    "/api/embed": _Endpoint(Route.INFERENCE, generates=False),
    "/api/embeddings": _Endpoint(Route.INFERENCE, generates=False),
    "/v1/chat/completions": _Endpoint(Route.INFERENCE, native=False),
    "/v1/completions": _Endpoint(Route.INFERENCE, native=False),
    "/v1/responses": _Endpoint(Route.INFERENCE, native=False),
    "/v1/messages": _Endpoint(Route.INFERENCE, native=False),
    "/v1/embeddings": _Endpoint(Route.INFERENCE, native=False, generates=False),
    "/v1/systemone": _Endpoint(Route.INFERENCE, native=False, generates=False),
    "/api/show": _Endpoint(Route.MODEL),
    "/api/tags": _Endpoint(Route.CATALOGUE),
    "/api/ps": _Endpoint(Route.CATALOGUE),
    "/v1/models": _Endpoint(Route.CATALOGUE, native=False),
    "/api/version": _Endpoint(Route.ANY),
    "/api/status": _Endpoint(Route.ANY),
    "/": _Endpoint(Route.ANY),
}

_ADMIN = _Endpoint(Route.ADMIN)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPart:
    """One message, or one block of a prompt, as far as prompt caches care."""

    hash: int
    """Of everything up to and with this part."""
    tokens: int
    """Up to and with this part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request, read. It holds no word of the prompt but in ``payload``."""

    method: str
    path: str
    route: Route
    framing: Framing
    native: bool
    generates: bool
    model: str = ""
    """As the caller wrote it."""
    payload: Mapping[str, Any] | None = None
    capabilities: frozenset[str] = frozenset()
    options: RunnerOptions = NO_OPTIONS
    input_tokens: int = 0
    output_limit: int | None = None
    parts: tuple[PromptPart, ...] = ()
    unloads: bool = False
    """The model leaves the memory after the answer (``keep_alive: 0``)."""

    @property
    def model_name(self) -> str:
        """Its canonical name."""
        return canonical_model_name(self.model) if self.model else ""


def read_call(method: str, path: str, payload: Mapping[str, Any] | None) -> Call:
    """
    Read a request.

    Args:
        method: the HTTP method.
        path: without host and query.
        payload: the JSON body, or None if there is none or it is no JSON object; Ollama's
            own error then goes back to the caller.
    """
    path = "/" + path.strip("/")
    endpoint = _ENDPOINTS.get(path, _ADMIN)
    model = ""
    if path.startswith("/v1/models/"):
        endpoint = _Endpoint(Route.MODEL, native=False)
        model = path.removeprefix("/v1/models/")
    if payload is None:
        return Call(
            method=method,
            path=path,
            route=endpoint.route,
            framing=Framing.JSON,
            native=endpoint.native,
            generates=endpoint.generates,
            model=model,
        )
    named = payload.get("model") or payload.get("name") or model
    if endpoint.route is not Route.INFERENCE:
        streams = endpoint.route is Route.ADMIN and payload.get("stream") is True
        return Call(
            method=method,
            path=path,
            route=endpoint.route,
            framing=Framing.NDJSON if streams else Framing.JSON,
            native=endpoint.native,
            generates=False,
            model=named if isinstance(named, str) else "",
            payload=payload,
        )
    asked = payload.get("stream")
    streaming = endpoint.streams_by_default if asked is None else asked is True
    framing = Framing.JSON
    if streaming and endpoint.generates:
        framing = Framing.NDJSON if endpoint.native else Framing.SSE
    parts = _prompt_parts(payload)
    options = payload.get("options")
    return Call(
        method=method,
        path=path,
        route=endpoint.route,
        framing=framing,
        native=endpoint.native,
        generates=endpoint.generates,
        model=named if isinstance(named, str) else "",
        payload=payload,
        capabilities=_capabilities(payload),
        options=_runner_options(options) if isinstance(options, Mapping) else NO_OPTIONS,
        input_tokens=parts[-1].tokens if parts else 0,
        output_limit=_output_limit(payload, options) if endpoint.generates else 0,
        # What is only embedded leaves nothing in a prompt cache.
        parts=parts if endpoint.generates else (),
        unloads=str(payload.get("keep_alive")) in ("0", "0.0", "0s", "0m"),
    )


def _runner_options(options: Mapping[str, Any]) -> RunnerOptions:
    found: dict[str, Any] = {}
    for name in ("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread"):
        value = _whole(options.get(name))
        if value is not None:
            found[name] = value
    if isinstance(options.get("use_mmap"), bool):
        found["use_mmap"] = options["use_mmap"]
    return RunnerOptions(**found) if found else NO_OPTIONS


def _whole(value: object) -> int | None:
    """A number, cut as Ollama cuts it; None for what is none, which is Ollama's to refuse."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return int(value)
    except (ValueError, OverflowError):  # NaN and Infinity, which Python's JSON reads
        return None


def _output_limit(payload: Mapping[str, Any], options: object) -> int | None:
    limit = options.get("num_predict") if isinstance(options, Mapping) else None
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        if limit is None:
            limit = payload.get(name)
    limit = _whole(limit)
    # Negative means "until done".
    return limit if limit is not None and limit >= 0 else None


def _capabilities(payload: Mapping[str, Any]) -> frozenset[str]:
    """
    What the model has to be able to do, as Ollama checks it.

    ``completion`` and ``embedding`` are left to Ollama: versions differ in what they accept.
    """
    needed: set[str] = set()
    if payload.get("tools"):
        needed.add("tools")
    if payload.get("think"):
        needed.add("thinking")
    if payload.get("suffix"):
        needed.add("insert")
    if payload.get("images") or any(_images_of(m) for m in _messages(payload)):
        needed.add("vision")
    return frozenset(needed)


def _messages(payload: Mapping[str, Any]) -> Sequence[Any]:
    messages = payload.get("messages")
    if messages is None:
        messages = payload.get("input")
    return messages if isinstance(messages, list) else ()


def _images_of(message: Any) -> int:
    if not isinstance(message, Mapping):
        return 0
    images = message.get("images")
    count = len(images) if isinstance(images, list) else 0
    content = message.get("content")
    if isinstance(content, list):
        count += sum(
            1
            for part in content
            if isinstance(part, Mapping) and "image" in str(part.get("type", ""))
        )
    return count


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = (part.get("text") for part in content if isinstance(part, Mapping))
        return "".join(text for text in texts if isinstance(text, str))
    return ""


BLOCK_CHARACTERS = (1024, 4096, 16_384, 65_536)


def _prompt_parts(payload: Mapping[str, Any]) -> tuple[PromptPart, ...]:
    """The prompt's beginnings, shortest first. Only hashes and counts are kept."""
    parts: list[PromptPart] = []
    tools = payload.get("tools")
    count = len(tools) if isinstance(tools, list) else 0
    seed = hash(("tools", count, str(payload.get("system") or "")))
    tokens = 0
    messages = _messages(payload)
    if messages:
        for message in messages:
            if isinstance(message, Mapping):
                text = _text_of(message.get("content"))
                images = _images_of(message)
                seed = hash((seed, str(message.get("role")), text, images))
            else:
                text, images = str(message), 0
                seed = hash((seed, text))
            tokens += len(text) // CHARACTERS_PER_TOKEN + IMAGE_TOKENS * images + 4
            parts.append(PromptPart(hash=seed, tokens=tokens))
        return tuple(parts)
    prompt = payload.get("prompt") or payload.get("input")
    if not isinstance(prompt, str) or not prompt:
        return ()
    for size in (*(size for size in BLOCK_CHARACTERS if size < len(prompt)), len(prompt)):
        key = hash((seed, prompt[:size]))
        parts.append(PromptPart(hash=key, tokens=size // CHARACTERS_PER_TOKEN + 1))
    return tuple(parts)


def with_context(
    payload: Mapping[str, Any], body: bytes, context_length: int
) -> tuple[Mapping[str, Any], bytes | None]:
    """
    The request with ``num_ctx`` set to that of the loaded runner.

    A request without ``num_ctx`` makes Ollama restart a runner that was loaded with an
    explicit one (recorded scenario ``reload-triggers``); its own value is never a change.
    Returns the payload and, where it could be had without encoding all of it again, the body.
    """
    options = payload.get("options")
    if options is not None and not isinstance(options, Mapping):
        return payload, body  # a wrong type is Ollama's to refuse
    if options and options.get("num_ctx") is not None:
        return payload, body  # the caller's own, even one that Ollama will refuse
    if not options:
        changed = {**payload, "options": {"num_ctx": context_length}}
        start = body.find(b"{")
        if "options" in payload or start < 0 or len(payload) == 0:
            return changed, None
        head = b'{"options":{"num_ctx":%d},' % context_length
        return changed, head + body[start + 1 :]
    return {**payload, "options": {**options, "num_ctx": context_length}}, None
