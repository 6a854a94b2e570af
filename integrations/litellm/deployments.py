"""LiteLLM's deployments as Ollama nodes: which are some, and which of them may be chosen."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import litellm

from hydra_llm import Node
from hydra_llm.integrations.litellm.words import default_words

__all__ = ["Deployment", "DeploymentReader", "by_order", "read_deployment", "still_allowed"]

PROVIDERS = frozenset({"ollama", "ollama_chat"})
_ENDINGS = ("/api/chat", "/api/generate", "/api/embed", "/api/embeddings", "/v1")
_DEFAULT_API_BASE = "http://localhost:11434"
_RUNNER_OPTIONS = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One line of a ``model_list`` that stands for a model on an Ollama node."""

    id: str
    provider: str
    model: str
    """As Ollama knows it."""
    node: Node
    order: int | None
    tags: frozenset[str]
    options: Mapping[str, Any]
    """Options in ``litellm_params`` that decide whether a loaded runner serves."""
    words: Mapping[str, Any]
    """Routing words for every request to its group."""

    @property
    def is_native(self) -> bool:
        """Whether LiteLLM speaks Ollama's own API with it."""
        return self.provider in PROVIDERS


def read_deployment(raw: Mapping[str, Any]) -> Deployment | None:
    """
    Read one of LiteLLM's deployments; None if it is no Ollama node.

    It is one by its provider (``ollama/``, ``ollama_chat/``), or, whatever the provider, by
    ``model_info: {hydra: {...}}``.

    Raises:
        ConfigurationError: its ``api_base`` or its ``model_info.hydra`` cannot be.
    """
    params = raw.get("litellm_params") or {}
    info = raw.get("model_info") or {}
    provider, _, model = str(params.get("model") or "").partition("/")
    if params.get("custom_llm_provider"):
        given = str(params["custom_llm_provider"])
        provider, model = given, model if provider == given else str(params.get("model"))
    about = info.get("hydra")
    if not isinstance(about, Mapping):
        if provider not in PROVIDERS:
            return None
        about = {}
    order = params.get("order")
    return Deployment(
        id=str(info.get("id") or ""),
        provider=provider,
        model=model,
        node=_node(params, about),
        order=order if isinstance(order, int) else None,
        tags=frozenset(params.get("tags") or ()),
        options={name: params[name] for name in _RUNNER_OPTIONS if params.get(name) is not None},
        words=default_words(about),
    )


class DeploymentReader:
    """Reads deployments once: LiteLLM gives the same ones anew for each request."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Any, Any, Deployment | None]] = {}

    def read(self, raw: Mapping[str, Any]) -> Deployment | None:
        """As :func:`read_deployment`; one and the same object until something about it changes."""
        params, info = raw.get("litellm_params") or {}, raw.get("model_info") or {}
        deployment_id = info.get("id")
        known = self._known.get(deployment_id)
        if known is not None and known[0] == params and known[1] == info.get("hydra"):
            return known[2]
        deployment = read_deployment(raw)
        # Copies: a caller may change its own.
        about = copy.deepcopy(info.get("hydra"))
        self._known[deployment_id] = (dict(params), about, deployment)
        return deployment


def runner_options(request: Mapping[str, Any], deployment: Deployment) -> dict[str, Any]:
    """Options of a request that decide whether a loaded runner serves; the deployment's too."""
    asked = {name: request[name] for name in _RUNNER_OPTIONS if request.get(name) is not None}
    return {**deployment.options, **asked}


def _node(params: Mapping[str, Any], about: Mapping[str, Any]) -> Node:
    url = str(params.get("api_base") or _default_api_base()).rstrip("/")
    for ending in _ENDINGS:
        url = url.removesuffix(ending)
    key = params.get("api_key")
    headers = dict(about.get("headers") or {})
    if key and not headers:
        headers["Authorization"] = f"Bearer {key}"
    return Node(
        url,
        id=str(about.get("node_id") or ""),
        vram_gb=about.get("vram_gb"),
        vram_reserved_gb=about.get("vram_reserved_gb") or 0.0,
        ram_gb=about.get("ram_gb"),
        exporter=about.get("exporter"),
        exporter_headers=about.get("exporter_headers"),
        labels=tuple(about.get("labels") or ()),
        headers=headers or None,
        local=about.get("local"),
        slots=about.get("slots"),
    )


def _default_api_base() -> str:
    """Where LiteLLM sends it; as in ``litellm.main``."""
    return litellm.api_base or litellm.get_secret_str("OLLAMA_API_BASE") or _DEFAULT_API_BASE


# ----------------------------------------------------------- what LiteLLM itself would drop


def still_allowed(
    deployments: Sequence[Deployment], request: Mapping[str, Any], tags: Iterable[str]
) -> list[Deployment]:
    """
    Leave out what LiteLLM drops after our turn: what has failed, other tags, another order.

    Its own filters for them run later; one that finds only a deployment it would have dropped
    says that there is none.
    """
    dropped = {
        *(request.get("_excluded_deployment_ids") or ()),
        *(request.get("_retry_skipped_deployment_ids") or ()),
    }
    left = list(deployments)
    if dropped:
        left = [d for d in deployments if d.id not in dropped] or left
    target = request.get("_target_order")
    if target is not None:
        left = [d for d in left if d.order == target] or left
    return _with_tags(left, frozenset(tags))


def _with_tags(deployments: list[Deployment], asked: frozenset[str]) -> list[Deployment]:
    """As LiteLLM's tag filter; if that is off, a request's tags still say what is meant."""
    if not any(d.tags for d in deployments):
        return deployments
    wanted = {tag for tag in asked if tag[:1] not in "!&"}
    matching = [d for d in deployments if d.tags & wanted] if wanted else []
    return matching or [d for d in deployments if "default" in d.tags] or deployments


def by_order(deployments: Sequence[Deployment]) -> list[list[Deployment]]:
    """Part deployments by their ``order``, the lowest first; those without one come last."""
    levels: dict[float, list[Deployment]] = {}
    for one in deployments:
        levels.setdefault(float("inf") if one.order is None else one.order, []).append(one)
    return [levels[order] for order in sorted(levels)]
