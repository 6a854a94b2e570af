"""The retry budget: failover yes, a storm no."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.cluster.retries import RetryBudget


@given(
    ratio=st.sampled_from([0.0, 0.2, 1.0]),
    floor=st.integers(1, 5),
    steps=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=200),
)
def test_retries_stay_below_the_share_of_requests_and_the_floor(
    ratio: float, floor: int, steps: list[tuple[int, bool]]
) -> None:
    budget = RetryBudget(ratio=ratio, floor=floor)
    now = requests = retries = 0
    for seconds, is_retry in steps:
        now += seconds
        if is_retry:
            retries += budget.withdraw(now)
        else:
            requests += 1
            budget.deposit(now)

    assert retries <= ratio * requests + floor * (1 + now / 60) + 1e-6


def test_a_quiet_cluster_may_fail_over_as_often_as_the_floor_says() -> None:
    budget = RetryBudget(ratio=0.2, floor=3)

    assert [budget.withdraw(0) for _ in range(4)] == [True, True, True, False]


def test_a_minute_of_rest_fills_the_purse_and_not_more() -> None:
    budget = RetryBudget(ratio=0.2, floor=3)
    for _ in range(3):
        budget.withdraw(0)

    assert not budget.withdraw(19)
    assert budget.withdraw(20)
    assert [budget.withdraw(1000) for _ in range(4)] == [True, True, True, False]


def test_five_requests_pay_for_one_retry() -> None:
    budget = RetryBudget(ratio=0.2, floor=1)
    assert budget.withdraw(0)

    for _ in range(4):
        budget.deposit(0)
    assert not budget.withdraw(0)
    budget.deposit(0)
    assert budget.withdraw(0)


def test_a_clock_that_goes_back_takes_nothing_away() -> None:
    budget = RetryBudget(ratio=0.2, floor=2)
    budget.withdraw(100)

    assert budget.withdraw(50)
