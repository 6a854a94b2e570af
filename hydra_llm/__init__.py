"""Routes requests over several Ollama nodes, to the one that will answer soonest.

::

    from hydra_llm import Client

    client = Client(["http://rig:11434", "http://gaming:11434"])
    answer = client.chat("llama3.2", [{"role": "user", "content": "Hello"}])
    print(answer.message.content, "-", answer.routing_decision.reason)

Importing this loads no framework, starts no thread and opens no socket; names are loaded
when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hydra_llm.client import AsyncClient, Client, NoNodeHasModelError
    from hydra_llm.config import HydraSettings
    from hydra_llm.dispatch import Dispatch
    from hydra_llm.exceptions import (
        AllNodesFailedError,
        ConfigurationError,
        DeadlineError,
        HydraError,
        ModelLoadError,
        ModelNotFoundError,
        NodeAuthError,
        NodeBusyError,
        NodeConnectError,
        NodeError,
        NodeProtocolError,
        NodeResponseError,
        NodeTimeoutError,
        NoEligibleNodeError,
        NoNodeUpError,
        QueueFullError,
        RoutingError,
        RoutingWordError,
        StreamBrokenError,
    )
    from hydra_llm.router import Router
    from hydra_llm.scheduling import RoutingDecision
    from hydra_llm.transport import AsyncHydraTransport, HydraTransport
    from hydra_llm.types import Node, NodeSnapshot
    from hydra_llm.words import RoutingWords

__all__ = [
    "AllNodesFailedError",
    "AsyncClient",
    "AsyncHydraTransport",
    "Client",
    "ConfigurationError",
    "DeadlineError",
    "Dispatch",
    "HydraError",
    "HydraSettings",
    "HydraTransport",
    "ModelLoadError",
    "ModelNotFoundError",
    "NoEligibleNodeError",
    "NoNodeHasModelError",
    "NoNodeUpError",
    "Node",
    "NodeAuthError",
    "NodeBusyError",
    "NodeConnectError",
    "NodeError",
    "NodeProtocolError",
    "NodeResponseError",
    "NodeSnapshot",
    "NodeTimeoutError",
    "QueueFullError",
    "Router",
    "RoutingDecision",
    "RoutingError",
    "RoutingWordError",
    "RoutingWords",
    "StreamBrokenError",
]

_HOMES = {
    "AsyncClient": "client",
    "AsyncHydraTransport": "transport",
    "Client": "client",
    "Dispatch": "dispatch",
    "HydraSettings": "config",
    "HydraTransport": "transport",
    "NoNodeHasModelError": "client",
    "Node": "types",
    "NodeSnapshot": "types",
    "Router": "router",
    "RoutingDecision": "scheduling",
    "RoutingWords": "words",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'exceptions')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
