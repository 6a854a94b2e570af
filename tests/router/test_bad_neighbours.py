"""A node that hangs, or that swallows packets, does not slow requests to the others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from hydra_llm import Client, Node, Router
from hydra_llm.testing import SimulatedCluster
from tests.helpers import full_queue
from tests.router.conftest import MODEL, make_router

MESSAGES = [{"role": "user", "content": "Hello"}]
PAIRS = 40
LIMIT_SECONDS = 0.005


@contextmanager
def black_hole() -> Iterator[Node]:
    """An address that answers no connection attempt: its queue of connections is full."""
    with full_queue() as port:
        yield Node(f"http://127.0.0.1:{port}", id="hole", vram_gb=80)


def wait_until_down(router: Router, node_id: str) -> None:
    while next(node for node in router.nodes() if node.id == node_id).health != "down":
        time.sleep(0.01)


def median_delay(plain: Client, beside_a_bad_node: Client) -> float:
    """The median of the differences, request by request."""
    differences: list[float] = []
    for number in range(PAIRS):
        times: dict[bool, float] = {}
        for is_beside in (number % 2 == 0, number % 2 == 1):
            began = time.perf_counter()
            (beside_a_bad_node if is_beside else plain).chat(MODEL, MESSAGES)
            times[is_beside] = time.perf_counter() - began
        differences.append(times[True] - times[False])
    return statistics.median(differences)


@pytest.mark.parametrize("kind", ["hung", "black hole"])
def test_requests_to_the_others_take_no_longer(cluster: SimulatedCluster, kind: str) -> None:
    good = [cluster["a"].node(), cluster["b"].node()]
    with ExitStack() as stack:
        if kind == "hung":
            bad = cluster["c"].node()
            cluster["c"].freeze()
        else:
            bad = stack.enter_context(black_hole())
        plain = stack.enter_context(
            Client(router=stack.enter_context(make_router(cluster, nodes=good)))
        )
        router = stack.enter_context(
            make_router(cluster, nodes=[*good, bad], health_check_timeout=0.5)
        )
        beside = stack.enter_context(Client(router=router))

        began = time.perf_counter()
        beside.chat(MODEL, MESSAGES)
        first = time.perf_counter() - began
        wait_until_down(router, bad.id)
        delay = median_delay(plain, beside)
        cluster["c"].thaw()

    # The very first request looks at all nodes, a quarter of a second longer at the most.
    assert first < 1.5
    assert delay < LIMIT_SECONDS


def test_a_request_sent_to_a_node_that_hangs_moves_on_when_its_time_is_over(
    cluster: SimulatedCluster,
) -> None:
    with (
        make_router(cluster, whole_answer_timeout=0.4) as router,
        Client(router=router) as client,
    ):
        router.nodes()
        cluster["a"].freeze()
        answer = client.chat(MODEL, MESSAGES, node_id="a")
        cluster["a"].thaw()

    assert [a.outcome for a in answer.routing_decision.attempts] == ["timeout", "ok"]
    assert answer.node_id in ("b", "c")
