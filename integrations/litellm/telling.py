"""What is put beside an answer of LiteLLM's, by the strategy and by the provider."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["as_header", "beside_an_answer", "headers_of"]


def beside_an_answer(decision: Mapping[str, Any]) -> dict[str, Any]:
    """What LiteLLM carries beside an answer; its proxy makes headers of `additional_headers`."""
    return {"routing_decision": decision, "additional_headers": headers_of(decision)}


def headers_of(decision: Mapping[str, Any]) -> dict[str, str]:
    """Give the node, the reason and the number of attempts, as headers of an answer."""
    headers = {
        "x-hydra-node": decision["selected_node"] or "",
        "x-hydra-reason": decision["reason"] or "",
        "x-hydra-attempts": str(len(decision["attempts"]) or 1),
    }
    return {name: as_header(value) for name, value in headers.items()}


def as_header(text: str) -> str:
    """On one line, in ASCII."""
    return " ".join(text.encode("ascii", "replace").decode().split())
