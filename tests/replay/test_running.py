"""Runs in virtual time: the same for one seed, cold at first, and true to what nodes do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hydra_llm.replay.clusters import Machine, Machines, Weights, find_cluster
from hydra_llm.replay.running import HYDRA, KNOWING, POLICIES, Run, replay, wanted_of
from hydra_llm.replay.workload import Asked, Shared, read_load
from tests.replay.ablation import without
from tests.replay.strange import figures

MODEL = "llama3.1:8b"


def one_node(**given: float) -> Machines:
    machine = Machine(id="rig", vram_gb=24.0, bandwidth_gb_s=490.0, **given)  # type: ignore[arg-type]
    return Machines(name="one", machines=(machine,), models=(Weights(name=MODEL, size_gb=4.9),))


def asked(number: int = 0, at: float = 0.0, **given: object) -> Asked:
    fields = {"model": MODEL, "input_tokens": 300, "output_tokens": 100, **given}
    return Asked(number=number, at=at, **fields)  # type: ignore[arg-type]


def played(policy: str, *, requests: int = 30, seed: int = 3, rate: float = 0.5) -> Run:
    cluster = find_cluster("24+12")
    load = read_load("poisson", rate=rate, requests=requests)
    return replay(
        cluster, load.requests(cluster.shares, seed=seed, num_ctx=4096), policy, seed=seed
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_has_every_request_answered(policy: str) -> None:
    run = played(policy)

    assert [answer.asked.number for answer in run.answers] == list(range(30))
    assert all(answer.is_ok for answer in run.answers)
    assert all(0.0 < (a.first_s or 0.0) <= a.whole_s for a in run.answers)
    assert run.loads == sum(run.loads_of.values()) >= 5
    assert run.load_s > 0.0
    assert run.seconds >= run.answers[-1].asked.at


@pytest.mark.parametrize("policy", [HYDRA, "random"])
def test_a_run_can_be_repeated_to_the_last_digit(policy: str) -> None:
    assert played(policy) == played(policy)
    assert played(policy) != played(policy, seed=4)


@pytest.mark.parametrize("policy", [HYDRA, "round-robin"])
def test_a_first_token_takes_the_load_the_prompt_and_itself(policy: str) -> None:
    # 4.9 GB at 490 GB/s: 10 ms a token, 30 prompt tokens in as much; 2 GB/s and half a second.
    run = replay(one_node(), [asked(at=5.0), asked(1, at=60.0)], policy, seed=1)
    cold, warm = run.answers

    assert cold.first_s == pytest.approx(4.9 / 2.0 + 0.5 + 0.10 + 0.01, abs=0.02)
    assert warm.first_s == pytest.approx(0.10 + 0.01, abs=0.02)
    assert warm.whole_s == pytest.approx(0.10 + 1.0, abs=0.02)
    assert (run.loads, run.evictions) == (1, 0)


@pytest.mark.parametrize("policy", [HYDRA, "round-robin"])
def test_a_conversation_finds_its_prompt_in_the_cache(policy: str) -> None:
    begun = asked(input_tokens=2000, session="talk")
    goes_on = asked(1, at=30.0, input_tokens=2000, session="talk", shared=Shared(0, 1900))
    run = replay(one_node(), [begun, goes_on], policy, seed=1)

    assert run.answers[1].first_s == pytest.approx(0.045, abs=0.02)


def test_evictions_are_those_for_want_of_room() -> None:
    cluster = replace(
        one_node(),
        machines=(Machine(id="small", vram_gb=8.0),),
        models=(Weights(name="a:7b", size_gb=5.0), Weights(name="b:7b", size_gb=5.0)),
    )
    turns = [asked(n, at=40.0 * n, model="ab"[n % 2] + ":7b") for n in range(4)]
    run = replay(cluster, turns, "random", seed=1)

    assert (run.loads, run.evictions) == (4, 3)
    assert run.loads_of == {"a:7b": 2, "b:7b": 2}


def test_a_model_that_was_not_asked_for_goes_and_that_is_no_eviction() -> None:
    run = replay(one_node(), [asked(), asked(1, at=1000.0)], "random", seed=1)

    assert (run.loads, run.evictions) == (2, 0)


def test_who_places_by_hand_has_models_stay() -> None:
    run = replay(one_node(), [asked(), asked(1, at=1000.0)], "hand-placed", seed=1)

    assert run.loads == 1


def test_a_router_that_is_told_no_memory_finds_out() -> None:
    cluster = find_cluster("24+24+12+8").untold()
    load = read_load("poisson", rate=0.5, requests=100)

    def loads() -> int:
        runs = (load.requests(cluster.shares, seed=seed, num_ctx=4096) for seed in (2, 3))
        return sum(replay(cluster, run, HYDRA, seed=seed).loads for seed, run in enumerate(runs))

    finding_out = loads()
    with without("what nobody tells is guessed"):
        assert 2 * finding_out < 1.5 * loads()


def test_what_loads_show_is_worth_more_than_the_first_guess() -> None:
    found_out, _, loads = figures((24, HYDRA, 1, "none"))
    guessed, _, loads_guessed = figures((24, HYDRA, 1, "none"), "loads show what a node holds")

    assert 2.5 * loads < loads_guessed
    assert 1.5 * found_out < guessed


def test_nodes_that_nobody_tells_of_are_used_beside_those_that_are_told() -> None:
    found_out, _, _ = figures((15, HYDRA, 1, "half"))
    shunned, _, _ = figures((15, HYDRA, 1, "half"), "what is unknown is found out")

    assert 2 * found_out < shunned


def test_the_real_router_keeps_all_but_one_more_than_the_slots_to_itself() -> None:
    waiting = [asked(n, at=0.01 * n, priority=10 if n == 9 else 5) for n in range(10)]
    run = replay(one_node(), waiting, HYDRA, seed=1)

    firsts = sorted(run.answers, key=lambda answer: answer.first_s or 0.0)
    # The last to come has the highest priority: only what had been handed over goes before it.
    assert [answer.asked.number for answer in firsts].index(9) <= 3


def test_a_line_of_baselines_is_ollamas_own() -> None:
    waiting = [asked(n, at=0.01 * n, priority=10 if n == 9 else 5) for n in range(10)]
    run = replay(one_node(), waiting, "random", seed=1)

    assert max(run.answers, key=lambda answer: answer.first_s or 0.0).asked.number == 9


def test_only_who_knows_lengths_expects_them() -> None:
    requests = [asked(n, at=20.0 * n, output_tokens=20 if n % 2 else 900) for n in range(6)]
    knowing, usual = (replay(one_node(), requests, p, seed=1) for p in (KNOWING, HYDRA))

    told = [answer.predicted["decode"] for answer in knowing.answers[-2:]]
    assert told[0] == pytest.approx(9.0, rel=0.1)
    assert told[1] == pytest.approx(0.2, rel=0.1)
    guessed = [answer.predicted["decode"] for answer in usual.answers[-2:]]
    assert guessed[0] == pytest.approx(guessed[1], rel=0.5)
    assert all(a.actual["total"] == pytest.approx(a.whole_s, abs=0.01) for a in usual.answers)


def test_settings_of_the_router_can_be_given() -> None:
    waiting = [asked(number) for number in range(6)]
    run = replay(one_node(), waiting, HYDRA, seed=1, settings={"max_queue": 0})

    assert {answer.error for answer in run.answers} == {None, "QueueFullError"}


def test_who_knows_the_load_knows_its_rates_and_lengths() -> None:
    cluster = find_cluster("24")
    load = wanted_of(cluster, [asked(0, at=0.0), asked(1, at=10.0), asked(2, at=20.0)])

    assert set(load) == {MODEL}
    assert load[MODEL].rate == pytest.approx(0.15)
    assert (load[MODEL].input_tokens, load[MODEL].output_tokens) == (300, 100)
