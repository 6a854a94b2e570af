"""What happened, as frozen records, for logs, metrics and dashboards.

No event holds a word of a prompt or an answer, nor a credential.
"""

from __future__ import annotations

from dataclasses import dataclass

from hydra_llm.types import Health

__all__ = [
    "AttemptFailed",
    "CircuitClosed",
    "CircuitOpened",
    "Event",
    "LeaseExpired",
    "LoadPathStuck",
    "NodeDiscovered",
    "NodeHealthChanged",
    "PanicBegan",
    "PanicEnded",
    "SharingLost",
    "SharingRestored",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something happened at ``at`` (monotonic seconds) on ``node_id``."""

    at: float
    node_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeHealthChanged(Event):
    """Probes or requests see the node differently now."""

    before: Health
    after: Health
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDiscovered(Event):
    """A search of the configured networks has found the node, and the router has taken it in."""

    url: str
    version: str = ""
    exporter: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitOpened(Event):
    """The node, or loading ``model`` there, has failed too often and is left alone."""

    model: str | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitClosed(Event):
    """It works again."""

    model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PanicBegan(Event):
    """
    The node would be left alone like others, but then more than half of them would be.

    So it is used as the others fail, in the order of their prices, until fewer do.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class PanicEnded(Event):
    """No node is used any more that would be left alone otherwise. It is about no node."""

    node_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFailed(Event):
    """A request failed on the node and is tried elsewhere if it can be."""

    model: str
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPathStuck(Event):
    """Loads hang on the node although it answers."""

    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseExpired(Event):
    """A request's owner went away without a word; its place is free again."""

    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SharingLost(Event):
    """Redis is away: this router goes on without knowing of others. It is about no node."""

    node_id: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharingRestored(Event):
    """Redis is back: routers share their leases again. It is about no node."""

    node_id: str = ""
