"""More is asked than the nodes can do: who waits, how long, and what is loaded meanwhile."""

from __future__ import annotations

from statistics import fmean

import pytest

from hydra_llm.replay.clusters import Machine, Machines, Weights
from hydra_llm.replay.measures import percentile
from hydra_llm.replay.running import HYDRA, replay
from hydra_llm.replay.workload import Asked
from tests.replay.overload import firsts, overload


def test_priority_10_hardly_notices_that_twice_too_much_is_asked() -> None:
    runs = [overload("24+24+12+8", count=250, seed=seed) for seed in (1, 2, 3)]
    mixed = [first for run, _ in runs for first in firsts(run, 10)]
    alone = [first for _, run in runs for first in firsts(run, 10)]
    others = [first for run, _ in runs for first in firsts(run, 5)]

    assert percentile(mixed, 95) <= 1.5 * percentile(alone, 95)
    assert percentile(mixed, 50) <= 2.0
    assert fmean(others) > 10 * fmean(mixed)


def test_nobody_waits_longer_than_queue_timeout() -> None:
    run, _ = overload("24", count=150, seed=1, queue_timeout=30.0)

    waited = [answer.actual["queued"] for answer in run.answers if "queued" in answer.actual]
    refused = [answer for answer in run.answers if not answer.is_ok]
    assert 20.0 < max(waited) <= 31.0
    assert {answer.error for answer in refused} == {"QueueFullError"}
    assert all(30.0 <= answer.whole_s <= 31.0 for answer in refused)
    assert all(answer.is_ok for answer in run.answers if answer.asked.priority == 10)


def test_a_full_line_refuses_low_priorities_and_never_the_highest() -> None:
    run, _ = overload("24", count=150, seed=1, max_queue=10)

    refused = [answer.asked.priority for answer in run.answers if not answer.is_ok]
    low = [answer for answer in run.answers if answer.asked.priority == 2]
    usual = [answer for answer in run.answers if answer.asked.priority == 5]
    assert 10 not in refused
    assert refused.count(2) / len(low) > refused.count(5) / len(usual) > 0


@pytest.mark.parametrize(("turns", "loads"), [("ABAAC", 3), ("ABABAB", 2), ("ABCABC", 3)])
def test_a_loaded_model_serves_all_that_wait_for_it_before_it_goes(turns: str, loads: int) -> None:
    """One node that holds one model; the first of them loads it."""
    models = tuple(Weights(name=f"{name}:7b", size_gb=5.0) for name in "ABC")
    cluster = Machines(name="one", machines=(Machine(id="small", vram_gb=8.0),), models=models)
    asked = [
        Asked(number=n, at=0.1 * n, model=f"{name}:7b", input_tokens=100, output_tokens=60)
        for n, name in enumerate(turns)
    ]

    assert replay(cluster, asked, HYDRA, seed=1).loads == loads
    assert replay(cluster, asked, "random", seed=1).loads >= 4


@pytest.mark.parametrize(("manages", "loads"), [(False, 2), (True, 1)])
def test_a_model_that_many_ask_for_stays_loaded_if_that_is_wished(
    manages: bool, loads: int
) -> None:
    machine = Machine(id="rig", vram_gb=24.0)
    cluster = Machines(name="one", machines=(machine,), models=(Weights(name="A:7b", size_gb=5.0),))
    settings = {"manage_keep_alive": manages}

    def loads_of(times: list[float]) -> int:
        asked = [
            Asked(number=n, at=at, model="A:7b", input_tokens=100, output_tokens=20)
            for n, at in enumerate(times)
        ]
        return replay(cluster, asked, HYDRA, seed=1, settings=settings).loads

    assert loads_of([*(10.0 * n for n in range(20)), 800.0]) == loads
    assert loads_of([0.0, 600.0]) == 2, "once in ten minutes is not often"
