"""A probe that was under way when a request found out better does not count."""

from __future__ import annotations

from hydra_llm.cluster import Lease
from hydra_llm.exceptions import NodeConnectError
from tests.cluster.ledgers import Clock, ledger, seen
from tests.helpers import LLAMA, request


def test_a_late_probe_does_not_bring_back_a_node_that_has_just_refused() -> None:
    clock = Clock()
    cluster = ledger(seen(warm=(LLAMA,)), clock=clock)
    lease = cluster.acquire(request())
    assert isinstance(lease, Lease)
    clock.now += 5
    where = {"node_id": lease.node_id, "node_url": "http://a:11434"}
    cluster.failed(lease, NodeConnectError("a cannot be reached", **where))

    cluster.observe(seen(warm=(LLAMA,), observed_at=clock.now - 1))
    assert cluster.nodes()[0].health == "down"

    cluster.observe(seen(warm=(LLAMA,), observed_at=clock.now))
    assert cluster.nodes()[0].health == "up"
