"""One router of a fleet, without its thread: a ledger, and its side of the talk."""

from __future__ import annotations

from typing import Any

from hydra_llm.cluster import Claim, Lease, RedisStore, Sharing, Waiter
from hydra_llm.events import Event
from hydra_llm.scheduling import Choice
from hydra_llm.types import InferenceRequest, RunningRequest
from tests.cluster.ledgers import Clock, ledger, node, seen, snapshot_of
from tests.helpers import LLAMA, request
from tests.sharing.servers import RedisServer


class Member:
    """
    A router over nodes that have the model loaded, with one slot and so room for two.

    Its clock stands where no other's does.
    """

    def __init__(
        self, server: RedisServer, *node_ids: str, slots: int = 1, at: float = 0.0, **about: Any
    ) -> None:
        ids = node_ids or ("a",)
        self.clock = Clock()
        self.clock.now = at
        self.events: list[Event] = []
        self.refreshed: list[str] = []
        self.nodes = [node(each, slots=slots) for each in ids]
        self.cluster = ledger(
            *(seen(each, at=at, **{"warm": (LLAMA,), **about}) for each in ids),
            clock=self.clock,
            nodes=self.nodes,
            on_event=self.events.append,
        )
        self.sharing = Sharing(
            lambda: RedisStore(server.url),
            self.cluster,
            self.nodes,
            refresh=self.refreshed.append,
            clock=self.clock,
        )
        self.events.clear()
        self.beat()

    def beat(self) -> float | None:
        return self.sharing.beat()

    def hear(self) -> None:
        """Catch up with what the others have said."""
        self.beat()

    def chosen(self, asked: InferenceRequest | None = None) -> Lease:
        held = self.cluster.acquire(asked or request())
        assert isinstance(held, Lease)
        return held

    def claim(self, lease: Lease) -> Claim | None:
        choice = lease.placement.choice
        assert isinstance(choice, Choice)
        return self.sharing.claim(lease, choice.room)

    def take(self, asked: InferenceRequest | None = None) -> Lease | None:
        """Choose and claim, as a door does; None if the others were faster."""
        lease = self.chosen(asked)
        claim = self.claim(lease)
        if claim is not None:
            self.beat()
            if not claim.answer.result(0):
                self.cluster.release(lease)
                return None
        return lease

    def waits(self, asked: InferenceRequest | None = None) -> Waiter:
        held = self.cluster.acquire(asked or request())
        assert isinstance(held, Waiter)
        return held

    def running(self, node_id: str = "a") -> tuple[RunningRequest, ...]:
        return snapshot_of(self.cluster, node_id).running
