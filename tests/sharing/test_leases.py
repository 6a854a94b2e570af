"""Two routers and a real Redis, one word at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import redis

from hydra_llm.cluster import CORDONS_KEY, Lease, RedisStore, name_of, sharing
from hydra_llm.cluster.redis_store import StoreError
from hydra_llm.events import SharingLost, SharingRestored
from hydra_llm.types import GB, RunnerOptions
from tests.cluster.ledgers import node, seen, snapshot_of
from tests.helpers import BIG, LLAMA, request
from tests.sharing.members import Member
from tests.sharing.servers import RedisServer

Join = Callable[..., Member]


def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def stored(server: RedisServer) -> dict[str, dict[str, str]]:
    """Every lease in Redis, by key."""
    client: Any = redis.Redis(port=server.port, decode_responses=True)
    with client:
        return {key: client.hgetall(key) for key in client.keys("hydra:v1:leases:*")}


def count(server: RedisServer) -> int:
    return sum(len(leases) for leases in stored(server).values())


# ------------------------------------------------------------------------- one place


def test_a_runner_never_holds_more_than_its_slots_and_headroom_together(join: Join) -> None:
    one, other = join(), join()

    # Neither has heard of what the other takes meanwhile.
    chosen = [member.chosen() for member in (one, other, one, other)]
    claims = [m.claim(lease) for m, lease in zip((one, other, one, other), chosen, strict=True)]
    one.beat()
    other.beat()

    assert [claim.answer.result(0) for claim in claims if claim] == [True, False, True, False]


def test_headroom_is_that_of_the_request(join: Join) -> None:
    one, other, urgent = join(), join(), join()
    assert one.take(request(priority=5))

    assert other.take(request(priority=1)) is None
    other.waits(request(priority=1))  # by now it knows
    assert other.take(request(priority=5))
    # Of those that come to another router it does not know.
    assert urgent.take(request(priority=8))


def test_whoever_is_refused_sees_why_and_waits(join: Join) -> None:
    one, other = join(), join()
    asked = request()
    lease = other.chosen(asked)
    assert one.take()
    assert one.take()
    claim = other.claim(lease)
    other.beat()
    assert claim is not None
    assert not claim.answer.result(0)

    waiter = other.cluster.choose_again(lease, asked)

    assert len(other.running()) == 2
    assert not isinstance(waiter, Lease)
    assert other.cluster.in_flight == 0


def test_whoever_is_refused_takes_another_node_that_has_room(join: Join) -> None:
    one, other = join("a", "b"), join("a", "b")
    asked = request(node_id="a")
    lease = other.chosen(asked)
    for _ in range(2):
        assert one.take(request(node_id="a", strict_pin=True))
    claim = other.claim(lease)
    other.beat()
    assert claim is not None
    assert not claim.answer.result(0)

    again = other.cluster.choose_again(lease, request())

    assert isinstance(again, Lease)
    assert again.node_id == "b"


def test_who_waits_is_served_when_another_router_gives_a_place_back(join: Join) -> None:
    one, other = join(), join()
    first, _ = one.take(), one.take()
    other.hear()
    waiter = other.waits()

    assert first is not None
    one.cluster.release(first)
    one.beat()
    other.hear()

    assert waiter.lease is not None


def test_a_place_given_back_is_free_for_the_own_next_claim_at_once(join: Join) -> None:
    one = join()
    first, _ = one.take(), one.take()
    assert first is not None

    one.cluster.release(first)

    assert one.take() is not None


def test_many_claims_are_one_message(join: Join) -> None:
    one = join(slots=8)
    asked = 0
    exchange = one.sharing._store.exchange  # type: ignore[union-attr]

    def counted(*said: Any) -> Any:
        nonlocal asked
        asked += 1
        return exchange(*said)

    one.sharing._store.exchange = counted  # type: ignore[union-attr,method-assign]
    leases = [one.chosen() for _ in range(8)]
    claims = [one.claim(lease) for lease in leases]
    one.beat()

    assert all(claim and claim.answer.result(0) for claim in claims)
    assert asked == 1


# ------------------------------------------------------------------- what is seen


def test_others_are_seen_on_the_own_clock(join: Join) -> None:
    one, other = join(at=1000.0), join(at=5.0)
    lease = one.take(request(priority=7))
    assert lease is not None
    one.clock.now += 30.0
    one.sharing._exchange.forget()
    one.beat()
    other.clock.now += 1.0
    other.hear()

    [running] = other.running()
    assert (running.model, running.priority) == (LLAMA, 7)
    assert running.expected_seconds == lease.running.expected_seconds
    assert running.started_at == pytest.approx(6.0 - 30.0, abs=0.5)


def test_own_leases_are_not_taken_for_others(join: Join) -> None:
    one, other = join(), join()
    assert one.take()
    assert other.take()
    for _ in range(2):
        one.beat()
        other.beat()

    assert [len(member.running()) for member in (one, other)] == [2, 2]


def test_a_node_that_is_added_later_is_shared_too(join: Join) -> None:
    one, other = join("a"), join("a", "b")
    assert other.take(request(node_id="b", strict_pin=True))

    one.sharing.add_nodes([node("b")])
    one.beat()

    assert one.sharing.state == "together"
    assert one.sharing._exchange.keys[-1] == "hydra:v1:leases:http://b:11434"
    assert set(one.sharing._exchange.numbers) == {"a", "b"}


def test_a_pending_load_and_what_it_evicts_are_seen(join: Join) -> None:
    about = {"models": (LLAMA, BIG), "warm": (LLAMA,), "total_gb": 18.0}
    one, other = join(**about), join(**about)
    load = one.take(request(BIG, options=RunnerOptions(num_ctx=2048)))
    other.hear()

    [running] = other.running()
    snapshot = snapshot_of(other.cluster)
    assert load is not None
    assert running.loading
    assert running.options == RunnerOptions(num_ctx=2048)
    assert snapshot.reserved_bytes == load.running.reserved_bytes > 13 * GB
    assert snapshot.leaving == {LLAMA}
    assert not isinstance(other.cluster.acquire(request()), Lease)  # it is about to go


def test_a_finished_load_reserves_nothing_and_is_looked_at(join: Join) -> None:
    about = {"models": (LLAMA, BIG), "warm": ()}
    one, other = join(**about), join(**about)
    load = one.take(request(BIG))
    other.hear()
    assert other.refreshed == []

    assert load is not None
    one.cluster.first_byte(load)
    one.beat()
    other.hear()

    [running] = other.running()
    assert not running.loading
    assert snapshot_of(other.cluster).reserved_bytes == 0
    assert other.refreshed == ["a"]


def test_two_routers_do_not_load_on_one_node_without_knowing(join: Join) -> None:
    about = {"models": (LLAMA, BIG), "warm": ()}
    one, other = join(**about), join(**about)
    blind = other.chosen(request(LLAMA))
    assert one.take(request(BIG))
    claim = other.claim(blind)
    other.beat()

    assert claim is not None
    assert not claim.answer.result(0)
    # With both in view it may choose the same node once more.
    again = other.cluster.choose_again(blind, request(LLAMA))
    assert isinstance(again, Lease)
    claim = other.claim(again)
    other.beat()
    assert claim is not None
    assert claim.answer.result(0)


def test_no_request_goes_to_a_runner_that_another_router_is_pushing_out(join: Join) -> None:
    about = {"models": (LLAMA, BIG), "warm": (LLAMA,), "total_gb": 18.0}
    one, other = join(**about), join(**about)
    blind = other.chosen(request(LLAMA))
    assert one.take(request(BIG))
    claim = other.claim(blind)
    other.beat()

    assert claim is not None
    assert not claim.answer.result(0)


def test_only_amounts_are_stored(join: Join, server: RedisServer) -> None:
    one = join()
    assert one.take(request(node_id="a", require_labels=frozenset(), priority=6))

    [(key, leases)] = stored(server).items()
    [(_, value)] = leases.items()
    assert key == "hydra:v1:leases:http://a:11434"
    assert value.partition(" ")[2] == (
        '{"model":"llama3.2:3b","expected_seconds":'
        f"{one.running()[0].expected_seconds!r}"
        ',"priority":6,"load_seconds":0.0,"reserved_bytes":0,"cpu_share":0.0,"evicts":[],'
        '"loading":false,"served":true,"options":{}}'
    )


# ----------------------------------------------------------------------- who is gone


def test_leases_of_a_router_that_is_gone_expire(
    server: RedisServer, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "LEASE_SECONDS", 0.3)
    one, other = join(), join()
    assert one.take()
    assert one.take()
    other.hear()
    assert len(other.running()) == 2

    until(lambda: other.beat() and not other.running(), 3.0)

    assert count(server) == 0
    assert other.take() is not None


def test_leases_that_are_held_are_renewed(
    join: Join, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "LEASE_SECONDS", 0.6)
    one = join()
    assert one.take()
    began = time.monotonic()
    client: Any = redis.Redis(port=server.port)
    with client:
        while time.monotonic() - began < 0.9:
            one.beat()
            seconds, microseconds = client.time()
            [(_, good_until)] = client.zrange("hydra:v1:routers", 0, -1, withscores=True)
            assert good_until - (seconds * 1e3 + microseconds / 1e3) > 200.0
            time.sleep(0.01)


def test_a_router_thought_gone_counts_again_once_it_speaks(
    join: Join, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "LEASE_SECONDS", 0.2)
    one, other = join(), join()
    assert one.take()
    until(lambda: other.beat() and count(server) == 0)

    one.beat()
    other.hear()

    assert len(other.running()) == 1


def test_a_router_that_stops_takes_its_leases_along(join: Join, server: RedisServer) -> None:
    one, other = join(), join()
    assert one.take()

    one.sharing._leave()
    other.hear()

    assert count(server) == 0
    assert other.running() == ()


def test_nothing_stays_in_redis_for_good(join: Join, server: RedisServer) -> None:
    one = join()
    assert one.take()

    with redis.Redis(port=server.port, decode_responses=True) as client:
        assert all(client.pttl(key) > 0 for key in client.scan_iter("*"))


# --------------------------------------------------------------------- Redis is away


def test_away_each_goes_on_alone_and_says_so_once(
    join: Join, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = join(), join()
    assert other.take()
    one.hear()
    server.kill()

    claims = [one.claim(one.chosen()) for _ in range(1)]
    for _ in range(3):
        one.beat()

    assert claims[0] is not None
    assert claims[0].answer.result(0)  # nobody is left to say no
    assert one.claim(one.chosen()) is None  # nor is anybody asked again
    assert len(one.running()) == 2  # what the others hold is not known any more
    [event] = one.events
    assert isinstance(event, SharingLost)
    assert event.reason
    [record] = caplog.records
    assert "goes on alone" in record.message


def test_back_again_nothing_is_counted_twice(join: Join, server: RedisServer) -> None:
    one, other = join(slots=3), join(slots=3)
    kept, ended = one.take(), one.take()
    server.kill()
    one.beat()
    other.beat()
    assert ended is not None
    one.cluster.release(ended)
    late = one.chosen()
    assert one.claim(late) is None  # bound alone
    server.start()

    for _ in range(2):
        one.beat()
        other.beat()

    assert kept is not None
    assert [type(e) for e in one.events] == [SharingLost, SharingRestored]
    [leases] = [leases for leases in stored(server).values() if leases]
    assert set(leases) == {one.sharing._exchange.id_of(lease) for lease in (kept, late)}
    assert len(other.running()) == 2


def test_back_again_what_has_ended_meanwhile_is_gone(join: Join, server: RedisServer) -> None:
    one, other = join(), join()
    lease = one.take()
    one.sharing._lose("a test says so")
    assert lease is not None
    one.cluster.release(lease)

    one.beat()
    other.hear()

    assert count(server) == 0
    assert other.running() == ()


def test_a_claim_whose_answer_was_lost_is_not_left_over(join: Join, server: RedisServer) -> None:
    one = join()
    exchange = one.sharing._store.exchange  # type: ignore[union-attr]

    def lost(*said: Any) -> Any:
        exchange(*said)
        raise StoreError("the answer was lost")

    one.sharing._store.exchange = lost  # type: ignore[union-attr,method-assign]
    lease = one.take()
    assert count(server) == 1
    one.sharing._store.exchange = exchange  # type: ignore[union-attr,method-assign]
    assert lease is not None
    one.cluster.release(lease)

    one.beat()

    assert count(server) == 0


def test_a_server_that_has_forgotten_everything_is_told_at_once(
    join: Join, server: RedisServer
) -> None:
    one, other = join(), join()
    assert one.take()
    with redis.Redis(port=server.port) as client:
        client.flushall()

    one.beat()
    other.beat()
    other.beat()

    assert count(server) == 1
    assert len(other.running()) == 1
    assert one.events == []  # it was never away


def test_what_is_no_lease_is_passed_over(join: Join, server: RedisServer) -> None:
    one, other = join(), join()
    with redis.Redis(port=server.port) as client:
        client.hset("hydra:v1:leases:http://a:11434", f"{other.sharing._exchange.router}:9", "1 {}")
        client.incr("hydra:v1:changes")

    one.beat()

    assert one.running() == ()
    assert one.sharing.state == "together"


def test_keys_of_another_kind_are_no_end_of_routing(join: Join, server: RedisServer) -> None:
    one = join()
    with redis.Redis(port=server.port) as client:
        client.delete("hydra:v1:routers")
        client.set("hydra:v1:routers", "somebody else's")

    lease = one.chosen()
    claim = one.claim(lease)
    one.beat()

    assert claim is not None
    assert claim.answer.result(0)
    assert one.sharing.state == "alone"


# --------------------------------------------------------------------------- turns


def test_a_place_goes_first_to_whoever_has_waited_longest_in_any_line(join: Join) -> None:
    one, other = join(), join()
    first, _ = one.take(), one.take()
    other.hear()
    elder = other.waits()
    other.clock.now += 10.0
    other.beat()
    one.hear()
    younger = one.waits()

    assert first is not None
    one.cluster.release(first)
    assert younger.lease is None  # though the place is free
    one.beat()
    other.hear()

    assert elder.lease is not None


def test_a_place_that_nobody_else_takes_is_not_left_empty(join: Join) -> None:
    one, other = join(), join()
    first, _ = one.take(), one.take()
    other.hear()
    other.waits()
    other.clock.now += 10.0
    other.beat()
    one.hear()
    waiter = one.waits()
    assert first is not None
    one.cluster.release(first)

    one.clock.now += 0.2
    one.beat()

    assert waiter.lease is not None


def test_peers_of_other_routers_count_when_slots_are_learned(join: Join) -> None:
    one, other = join(slots=2), join(slots=2)
    assert one.take()
    other.hear()

    assert other.chosen().peers == 1


def test_a_probe_that_comes_later_keeps_the_others_in_view(join: Join) -> None:
    one, other = join(), join()
    assert one.take()
    other.hear()

    other.cluster.observe(seen("a", at=1.0, warm=(LLAMA,)))

    assert len(other.running()) == 1


# ------------------------------------------------------------------------- cordons


def test_a_node_is_cordoned_for_all_who_share(join: Join, server: RedisServer) -> None:
    one, other = join(), join()

    def cordoned(member: Member) -> list[str]:
        return [node.id for node in member.cluster.nodes() if node.cordoned]

    store = RedisStore(server.url)
    try:
        for is_cordoned, ids in ((True, ["a"]), (False, [])):
            store.cordon(CORDONS_KEY, name_of(node("a")), cordoned=is_cordoned)
            for member in (one, other):
                member.clock.now += sharing.CORDONS_SECONDS
                member.beat()
                assert cordoned(member) == ids
    finally:
        store.close()


def test_a_cordon_holds_while_redis_is_away(join: Join, server: RedisServer) -> None:
    one = join()
    store = RedisStore(server.url)
    store.cordon(CORDONS_KEY, name_of(node("a")), cordoned=True)
    store.close()
    one.clock.now += sharing.CORDONS_SECONDS
    one.beat()
    server.kill()
    one.beat()

    assert one.sharing.state == "alone"
    assert [n.id for n in one.cluster.nodes() if n.cordoned] == ["a"]
