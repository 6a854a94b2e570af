"""A request to a node while it is answered, and what is kept of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hydra_llm.simulation.exchange import Exchange
from hydra_llm.simulation.faults import Fault
from hydra_llm.simulation.server import Connection

__all__ = ["Call", "Outcome", "RequestRecord"]

Outcome = Literal["open", "done", "error", "cut", "client left"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """
    One request a node got, as it stands when asked for.

    ``at`` and ``finished`` are seconds of ``time.monotonic``. ``outcome`` is the node's view:
    ``cut`` when it broke the answer off itself, ``client left`` when the other side did.
    """

    method: str
    path: str
    model: str | None
    body: Mapping[str, Any]
    headers: Mapping[str, str]
    status: int | None = None
    at: float
    finished: float | None = None
    outcome: Outcome = "open"
    tokens: int = 0
    """Counted where the answer is streamed, or a fault waits for one."""


@dataclass(slots=True, eq=False)
class Call:
    """A request being answered; only the loop's thread touches it."""

    connection: Connection
    record: RequestRecord
    number: int
    faults: list[Fault] = field(default_factory=list)
    exchange: Exchange | None = None
    begun: bool = False

    def note(self, **changes: Any) -> None:
        """Write down how it goes."""
        self.record = replace(self.record, **changes)
