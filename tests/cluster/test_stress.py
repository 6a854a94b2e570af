"""Many threads at once: the choice and its booking are one step, and nothing is lost."""

from __future__ import annotations

import itertools
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest

from hydra_llm.cluster import Cluster, Lease, Waiter
from hydra_llm.exceptions import (
    NodeResponseError,
    NodeTimeoutError,
    NoEligibleNodeError,
    QueueFullError,
)
from hydra_llm.types import GB, Usage
from tests.cluster.ledgers import failure, granted, ledger, node, seen
from tests.helpers import LLAMA, installed, request, shape_of

THREADS = 16
PATIENCE_SECONDS = 20


@pytest.fixture(autouse=True)
def threads_take_turns_all_the_time() -> Iterator[None]:
    """A choice takes less than the 5 ms after which Python changes threads by itself."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(count: int, work: Callable[[int], None]) -> None:
    """``work(0)`` to ``work(count - 1)`` in threads that start together."""
    start = threading.Barrier(count)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        start.wait(PATIENCE_SECONDS)
        try:
            work(number)
        except BaseException as error:  # handed to the test below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    assert not errors, errors


def waited_for(cluster: Cluster, held: Lease | Waiter) -> Lease | None:
    if isinstance(held, Lease):
        return held
    ready = threading.Event()
    held.on_ready(ready.set)
    assert ready.wait(PATIENCE_SECONDS), "a waiter was never woken"
    return held.lease


def test_sixteen_threads_leave_nothing_behind() -> None:
    ticks = itertools.count()
    models = (LLAMA, "qwen3:8b", "gemma3:12b")
    cluster = ledger(
        *(seen(node_id, models=models) for node_id in "abc"),
        nodes=[node("a", slots=2), node("b"), node("c")],
        clock=lambda: next(ticks) * 0.001,
        max_queue=12,
    )
    endings: Counter[str] = Counter()

    def work(number: int) -> None:
        rng = random.Random(number)
        for _ in range(100):
            try:
                held = cluster.acquire(request(rng.choice(models), priority=rng.randint(1, 10)))
            except (NoEligibleNodeError, QueueFullError) as error:
                endings[type(error).__name__] += 1
                cluster.tick()
                continue
            if isinstance(held, Waiter) and rng.random() < 0.1:
                cluster.withdraw(held)
                endings["withdrawn"] += 1
                continue
            lease = waited_for(cluster, held)
            if lease is None:
                endings["refused"] += 1
                continue
            if rng.random() < 0.8:
                cluster.first_byte(lease)
            ending = rng.choice(["ok"] * 6 + ["released", "timeout", "500"])
            endings[ending] += 1
            if ending == "ok":
                cluster.succeeded(lease, Usage(output_tokens=20, decode_seconds=0.2))
            elif ending == "timeout":
                cluster.failed(lease, failure(NodeTimeoutError, lease.node_id))
            elif ending == "500":
                answer = failure(NodeResponseError, lease.node_id, status_code=500)
                cluster.failed(lease, answer)
            assert cluster.release(lease) == (ending == "released")

    at_once(THREADS, work)

    assert sum(endings.values()) == THREADS * 100
    assert endings["ok"] > 100
    assert cluster.in_flight == 0
    assert cluster.waiting == 0
    for snapshot in cluster.nodes():
        assert snapshot.running == ()
        assert snapshot.reserved_bytes == 0


def take_one(cluster: Cluster, models: list[str], number: int) -> None:
    # The highest priority does not wait until a model that has to go is idle.
    granted(cluster, request(models[number], priority=10))


def test_four_models_of_14_gb_at_once_go_two_to_each_of_two_nodes() -> None:
    models = [f"big{number}" for number in range(4)]
    disk = {
        name: replace(model, size_bytes=14 * GB, shape=shape_of(14 * GB))
        for name, model in installed(*models).items()
    }
    for _ in range(10):
        cluster = ledger(seen("a", installed=disk), seen("b", installed=disk))

        at_once(4, partial(take_one, cluster, models))

        assert [len(snapshot.running) for snapshot in cluster.nodes()] == [2, 2]
        for snapshot in cluster.nodes():
            first, second = snapshot.running
            # The second knows that the first will have to go.
            assert second.evicts == {first.model}
            assert second.load_seconds > first.load_seconds


def test_sixty_four_requests_at_once_never_exceed_slots_and_headroom() -> None:
    cluster = ledger(
        seen("a", warm=(LLAMA,)), seen("b", warm=(LLAMA,)), nodes=[node("a", slots=2), node("b")]
    )
    most: Counter[str] = Counter()
    lock = threading.Lock()

    def work(number: int) -> None:
        for _ in range(4):
            lease = waited_for(cluster, cluster.acquire(request(priority=5)))
            assert lease is not None
            with lock:
                for snapshot in cluster.nodes():
                    most[snapshot.id] = max(most[snapshot.id], len(snapshot.running))
            cluster.succeeded(lease, None)

    at_once(THREADS, work)

    assert most["a"] <= 3
    assert most["b"] <= 2
    assert cluster.in_flight == 0
