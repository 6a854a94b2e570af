"""What a check says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hydra_llm.config import HydraSettings
from hydra_llm.types import NodeSnapshot

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at: what it is, and what to do about it."""

    level: Level
    check: str
    """What was looked at: ``settings``, ``reachable``, ``version``, ``models``, ``memory``,
    ``contexts``."""
    says: str
    do: str = ""
    nodes: tuple[str, ...] = ()
    """Ids of the nodes it is about; none where it is about them all."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "level": self.level,
            "check": self.check,
            "nodes": list(self.nodes),
            "says": self.says,
            "do": self.do,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the checks judge by."""

    settings: HydraSettings
    nodes: tuple[NodeSnapshot, ...] = ()
    addresses: Mapping[str, str] = field(default_factory=dict)
    """Where each node's name leads, by node id: the same text for the same listener."""
    gpu_extra_installed: bool = True
    local_reasons: tuple[str, ...] = ()
    """Why this machine's GPUs tell nothing, where a node on it would need them."""
    rates_file: Path | None = None
    """Where what is learned is kept; None if it is not."""
    rates_reason: str = ""
    """Why it cannot be written there; empty if it can."""

    @property
    def up(self) -> tuple[NodeSnapshot, ...]:
        """Nodes that answered."""
        return tuple(node for node in self.nodes if node.health == "up")
