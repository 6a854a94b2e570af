"""
The soak, half a virtual hour of it; ``python -m tests.soak`` runs a day (docs/soak.md).

One seed is new each time. If it fails, its number is in the report.
"""

from __future__ import annotations

import random

import pytest

from tests.soak.running import soak_in_virtual_time

NEW_SEED = random.SystemRandom().randrange(1_000_000)


@pytest.mark.parametrize("seed", [1, 2, pytest.param(NEW_SEED, id="new")])
def test_no_promise_is_broken_in_half_an_hour_of_faults(seed: int) -> None:
    report = soak_in_virtual_time(0.5, seed, say=lambda line: None)
    again = f"python -m tests.soak --hours 0.5 --seed {seed}"

    print(again, report.text(), sep="\n")
    assert report.is_good, f"{again}\n{report.text()}"
    assert report.outcomes["answered"] > 200
    assert report.troubles > 3


def test_a_soak_can_be_repeated() -> None:
    first, second = (soak_in_virtual_time(0.2, 5, say=lambda line: None) for _ in range(2))

    assert first.requests == second.requests
    assert first.outcomes == second.outcomes
    assert (first.attempts, first.loads) == (second.attempts, second.loads)
