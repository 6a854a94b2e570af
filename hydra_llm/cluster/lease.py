"""One request's hold on one node.

::

    held ──release()──▶ released
      └──ttl passes───▶ expired

Both ends are final, and leaving `held` gives the place back exactly once. Every part that
is received renews the lease, so only one whose owner is gone expires.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from hydra_llm.types import InferenceRequest, Placement, RunningRequest


class Lease:
    """Held by the door that carries the request; the cluster keeps the books."""

    __slots__ = (
        "_ttl",
        "breaker_generation",
        "called_stuck",
        "company",
        "expires_at",
        "id",
        "known_loads",
        "later_loads_seconds",
        "load_generation",
        "peers",
        "placement",
        "request",
        "running",
        "shared_by",
        "started_at",
        "state",
    )

    def __init__(
        self,
        *,
        lease_id: int,
        request: InferenceRequest,
        placement: Placement,
        started_at: float,
        ttl: float,
        breaker_generation: int,
        load_generation: int,
        peers: int,
        known_loads: frozenset[str] = frozenset(),
    ) -> None:
        self.id = lease_id
        self.request = request
        self.placement = placement
        self.started_at = started_at
        self.breaker_generation = breaker_generation
        self.load_generation = load_generation
        self.peers = peers
        """Requests for the same model that were on the node when this one came."""
        self.known_loads = known_loads
        """Loads of other routers on the node that the choice has reckoned with."""
        self.shared_by: str | None = None
        """The name under which other routers are told of it; None while none need know."""
        self.company: Literal["none", "of its model", "of others"] = "none"
        """What else has run on the node since it came; the ledger says so."""
        self.later_loads_seconds = 0.0
        """Predicted loads that were begun on the node after its own: Ollama does one at a time, and
        it may do those first."""
        self.called_stuck = False
        """Its load has been reported as stuck; once is enough."""
        self.state: Literal["held", "released", "expired"] = "held"
        self._ttl = ttl
        self.expires_at = started_at + ttl
        self.running = RunningRequest(
            lease_id=lease_id,
            model=request.model,
            started_at=started_at,
            expected_seconds=placement.expected_seconds,
            priority=request.priority,
            load_seconds=placement.load_seconds if placement.causes_load else 0.0,
            reserved_bytes=placement.reserved_bytes,
            cpu_share=placement.cpu_share,
            evicts=placement.evicts,
            loading=placement.causes_load,
            options=placement.options,
        )

    @property
    def node_id(self) -> str:
        """The node it is held on."""
        return self.placement.node_id

    @property
    def is_held(self) -> bool:
        """Whether it still counts."""
        return self.state == "held"

    def renew(self, now: float) -> None:
        """A part has come: the owner is alive."""
        self.expires_at = now + self._ttl

    def renew_at(self, clock: Callable[[], float]) -> Callable[[], None]:
        """:meth:`renew` for every part of a stream, by this clock."""

        def received() -> None:
            self.expires_at = clock() + self._ttl

        return received

    def __repr__(self) -> str:
        return f"<Lease {self.id} {self.request.model} on {self.node_id}, {self.state}>"
