"""Ledgers of one process that know the same nodes."""

from __future__ import annotations

import gc
import random
from dataclasses import replace
from typing import Any

from hydra_llm.cluster import Waiter
from hydra_llm.scheduling import Scheduler
from hydra_llm.types import InferenceRequest, Placement, Usage
from tests.cluster.ledgers import Clock, granted, ledger, node, placing, seen, snapshot_of
from tests.helpers import BIG, LLAMA, request

WARM = seen("a", warm=(LLAMA,))


def test_a_runner_is_filled_once_by_all_of_them() -> None:
    clock = Clock()
    one, other = ledger(WARM, clock=clock), ledger(WARM, clock=clock)

    held = [granted(one, request()), granted(other, request())]
    waiting = [one.acquire(request()), other.acquire(request())]
    assert all(isinstance(each, Waiter) for each in waiting)
    assert len(snapshot_of(one).running) == len(snapshot_of(other).running) == 2
    assert (one.in_flight, other.in_flight) == (1, 1)

    assert one.release(held[0])
    assert [each.state for each in waiting if isinstance(each, Waiter)].count("granted") == 1


def test_whoever_is_more_urgent_is_served_first_wherever_the_place_became_free() -> None:
    clock = Clock()
    one, other = ledger(WARM, clock=clock), ledger(WARM, clock=clock)
    held = [granted(one, request()), granted(one, request())]
    patient = one.acquire(request())
    urgent = other.acquire(request(priority=6))
    assert isinstance(patient, Waiter)
    assert isinstance(urgent, Waiter)

    one.release(held[0])
    assert (urgent.state, patient.state) == ("granted", "waiting")
    one.release(held[1])
    assert patient.state == "granted"


def test_one_who_was_passed_over_is_looked_at_again_after_a_grant_elsewhere() -> None:
    clock = Clock()
    choose = placing(Scheduler(), random.Random(0))
    is_closed = [True]

    def gated(asked: InferenceRequest, nodes: Any, *more: Any) -> Placement:
        """The urgent one has room once the patient one has got a place."""
        placement = choose(asked, nodes, *more)
        others = any(running.priority == 5 for node in nodes for running in node.running)
        has_room = not is_closed[0] if asked.priority == 5 else others
        return replace(placement, has_room=has_room)

    one = ledger(WARM, clock=clock, choose=gated)
    other = ledger(WARM, clock=clock, choose=gated)
    urgent = one.acquire(request(priority=6))
    patient = other.acquire(request(priority=5))
    assert isinstance(urgent, Waiter)
    assert isinstance(patient, Waiter)
    assert (urgent.state, patient.state) == ("waiting", "waiting")

    is_closed[0] = False
    one.tick()
    assert (urgent.state, patient.state) == ("granted", "granted")


def test_one_that_is_gone_counts_no_longer() -> None:
    clock = Clock()
    one, other = ledger(WARM, clock=clock), ledger(WARM, clock=clock)
    held = granted(other, request())
    assert len(snapshot_of(one).running) == 1

    del other, held
    gc.collect()
    granted(one, request())
    assert len(snapshot_of(one).running) == 1


def test_other_nodes_and_other_clocks_are_none_of_theirs() -> None:
    clock = Clock()
    one = ledger(WARM, clock=clock)
    granted(ledger(WARM), request())
    granted(ledger(seen("b", warm=(LLAMA,)), clock=clock), request())

    assert not snapshot_of(one).running


def test_a_node_may_have_another_name_there() -> None:
    clock = Clock()
    one = ledger(WARM, clock=clock)
    other = ledger(
        seen("rig", warm=(LLAMA,)), nodes=[node("rig", url="http://a:11434")], clock=clock
    )
    held = granted(one, request())
    assert len(snapshot_of(other, "rig").running) == 1
    one.release(held)
    assert not snapshot_of(other, "rig").running


def test_what_one_has_loaded_the_others_know() -> None:
    clock = Clock()
    one, other = ledger(seen("a"), clock=clock), ledger(seen("a"), clock=clock)
    held = granted(one, request())
    assert held.placement.causes_load
    one.first_byte(held)
    one.succeeded(held, Usage())

    assert not granted(other, request()).placement.causes_load


def test_where_redis_tells_both_nothing_is_counted_twice() -> None:
    clock = Clock()
    one, other = ledger(WARM, clock=clock), ledger(WARM, clock=clock)
    one.share(lambda: None)
    granted(one, request())
    assert len(snapshot_of(other).running) == 1
    other.share(lambda: None)
    granted(one, request())
    assert not snapshot_of(other).running


def test_an_eviction_is_seen_from_beside() -> None:
    clock = Clock()
    full = seen("a", models=(LLAMA, BIG), warm=(LLAMA,), total_gb=20.0)
    one, other = ledger(full, clock=clock), ledger(full, clock=clock)
    held = granted(one, request(BIG))
    assert held.placement.evicts
    assert isinstance(other.acquire(request()), Waiter)
    assert snapshot_of(other).running[0].loading
