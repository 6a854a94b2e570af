"""What one router has measured helps all, and is counted once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import redis

from hydra_llm.cluster.learning import Average
from hydra_llm.types import Speed, Usage
from tests.cluster.ledgers import seen, snapshot_of
from tests.helpers import LLAMA, installed, request
from tests.sharing.members import Member
from tests.sharing.servers import RedisServer

Join = Callable[..., Member]


def answer(member: Member, *, token_seconds: float, tokens: int = 100) -> None:
    """One complete answer, alone on the node."""
    lease = member.chosen(request())
    usage = Usage(
        total_seconds=tokens * token_seconds,
        prefill_seconds=0.2,
        decode_seconds=tokens * token_seconds,
        prompt_tokens=100,
        output_tokens=tokens,
    )
    member.cluster.succeeded(lease, usage)


def exchange_rates(*members: Member) -> None:
    for member in members:
        member.clock.now += 10.0
        member.beat()


def speed(member: Member) -> Speed:
    return snapshot_of(member.cluster).speeds.get(LLAMA, Speed())


def expected(*samples: float) -> float:
    average = Average()
    for sample in samples:
        average.add(sample)
    assert average.value is not None
    return average.value


def test_a_fresh_router_starts_from_what_the_fleet_knows(join: Join) -> None:
    one = join()
    answer(one, token_seconds=0.02)
    answer(one, token_seconds=0.03)
    exchange_rates(one)

    fresh = join()

    assert speed(fresh).decode_seconds_per_token == pytest.approx(expected(0.02, 0.03))
    assert speed(fresh).output_tokens == pytest.approx(100.0)
    assert speed(fresh).samples == 2
    assert snapshot_of(fresh.cluster).bytes_per_second is not None
    assert snapshot_of(fresh.cluster).bytes_per_second == pytest.approx(
        snapshot_of(one.cluster).bytes_per_second
    )


def test_own_samples_do_not_come_back_as_somebody_elses(join: Join) -> None:
    one, other = join(), join()
    answer(one, token_seconds=0.02)

    for _ in range(5):
        exchange_rates(one, other)

    for member in (one, other):
        assert speed(member).samples == 1
        assert speed(member).decode_seconds_per_token == pytest.approx(0.02)


def test_samples_of_all_are_averaged_by_the_rule_of_one(join: Join) -> None:
    one, other = join(), join()
    samples = [0.02, 0.04, 0.03, 0.5, 0.02, 0.01, 0.03, 0.03]
    for n, sample in enumerate(samples):
        answer((one, other)[n % 2], token_seconds=sample)
        exchange_rates(one, other)
    exchange_rates(one)

    for member in (one, other):
        assert speed(member).samples == len(samples)
        assert speed(member).decode_seconds_per_token == pytest.approx(expected(*samples))


def test_a_sample_that_nobody_was_told_of_is_not_lost_on_the_way(join: Join) -> None:
    one, other = join(), join()
    answer(other, token_seconds=0.04)
    exchange_rates(other)
    rates = one.sharing._store.rates  # type: ignore[union-attr]

    def with_an_answer_meanwhile(*said: Any) -> Any:
        told = rates(*said)
        answer(one, token_seconds=0.02)
        return told

    one.sharing._store.rates = with_an_answer_meanwhile  # type: ignore[union-attr,method-assign]
    exchange_rates(one)

    assert speed(one).samples == 2
    assert speed(one).decode_seconds_per_token == pytest.approx(expected(0.04, 0.02))


def test_what_was_measured_alone_is_told_afterwards(join: Join, server: RedisServer) -> None:
    one = join()
    server.kill()
    one.beat()
    answer(one, token_seconds=0.02)
    answer(one, token_seconds=0.02)
    server.start()
    exchange_rates(one)

    assert speed(join()).samples == 2


def test_a_server_that_has_forgotten_the_rates_is_told_them_once(
    join: Join, server: RedisServer
) -> None:
    one, other = join(), join()
    answer(one, token_seconds=0.02)
    answer(one, token_seconds=0.02)
    exchange_rates(one, other)
    with redis.Redis(port=server.port) as client:
        client.flushall()

    for _ in range(4):
        exchange_rates(one, other)

    assert [speed(member).samples for member in (one, other, join())] == [2, 2, 2]


def test_what_is_less_is_not_gone_on_from(join: Join, server: RedisServer) -> None:
    one, other = join(), join()
    answer(one, token_seconds=0.02)
    exchange_rates(one, other)
    with redis.Redis(port=server.port) as client:
        client.flushall()
    exchange_rates(one, other)  # both find that theirs is more
    answer(one, token_seconds=0.02)
    exchange_rates(one, other)

    assert speed(join()).samples == 2


def test_slots_learned_by_one_are_known_to_all(join: Join) -> None:
    one, other = join(slots=None), join(slots=None)
    first = one.chosen()
    second = one.chosen()
    usage = Usage(total_seconds=2.0, prefill_seconds=0.1, decode_seconds=1.9, output_tokens=100)
    one.cluster.succeeded(second, usage)
    one.cluster.succeeded(first, usage)

    exchange_rates(one, other)

    assert speed(one).slots == speed(other).slots == 2


def test_a_changed_file_is_another_model(join: Join) -> None:
    one, other = join(), join()
    answer(one, token_seconds=0.02)
    changed = replace(installed(LLAMA)[LLAMA], digest="another")
    other.cluster.observe(seen("a", at=1.0, installed={LLAMA: changed}))

    exchange_rates(one, other)

    assert speed(other).samples == 0


def test_a_router_that_stops_leaves_what_it_has_measured(join: Join) -> None:
    one = join()
    answer(one, token_seconds=0.02)

    one.sharing._leave()

    assert speed(join()).samples == 1


def test_rates_that_make_no_sense_are_passed_over(join: Join, server: RedisServer) -> None:
    name = f"decode {installed(LLAMA)[LLAMA].digest} {LLAMA}"
    with redis.Redis(port=server.port) as client:
        client.hset(
            "hydra:v1:rates:http://a:11434", mapping={name: "inf 3", "x": "y", "z": "1 2 3"}
        )

    one = join()

    assert speed(one).samples == 0
    assert one.sharing.state == "together"
