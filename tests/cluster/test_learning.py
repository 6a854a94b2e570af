"""How fast nodes turn out to be: what is learned, and from which answers nothing is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.cluster.learning import Average, NodeLearner
from hydra_llm.types import GB, UNKNOWN_SPEED, Speed, Usage
from tests.helpers import LLAMA

ANSWER = {
    "total_seconds": 3.0,
    "load_seconds": 0.005,
    "prefill_seconds": 1.0,
    "decode_seconds": 2.0,
    "prompt_tokens": 1000,
    "output_tokens": 100,
}


def learned(*answers: dict[str, Any]) -> Speed:
    return learner_of(*answers).speed(LLAMA)


def learner_of(*answers: dict[str, Any]) -> NodeLearner:
    learner = NodeLearner()
    for answer in answers:
        about: dict[str, Any] = {
            "caused_load": False,
            "cached_tokens": 0,
            "alone": True,
            "peers": 0,
            "size_bytes": 2 * GB,
            "on_gpu": True,
        }
        usage: dict[str, Any] = dict(ANSWER)
        for name, value in answer.items():
            (about if name in about else usage)[name] = value
        learner.learn(LLAMA, Usage(**usage), **about)
    return learner


# ------------------------------------------------------------------------- averages


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=50))
def test_an_average_stays_within_what_it_has_seen(samples: list[float]) -> None:
    average = Average()
    for sample in samples:
        average.add(sample)

    assert average.samples == len(samples)
    assert average.value is not None
    assert min(samples) * 0.999 <= average.value <= max(samples) * 1.001


@given(st.floats(1e-3, 1e3), st.sampled_from([1e-6, 1e6]))
def test_one_outlier_moves_a_settled_average_by_a_quarter_at_most(
    usual: float, factor: float
) -> None:
    average = Average()
    for _ in range(5):
        average.add(usual)

    average.add(usual * factor)

    assert average.value is not None
    assert usual / 1.25 <= average.value <= usual * 1.25


def test_an_average_follows_a_lasting_change() -> None:
    average = Average()
    for _ in range(10):
        average.add(1.0)
    for _ in range(40):
        average.add(10.0)

    assert average.value == pytest.approx(10.0, rel=0.05)


@pytest.mark.parametrize("sample", [0.0, -1.0, float("nan"), float("inf")])
def test_what_cannot_be_is_no_sample(sample: float) -> None:
    average = Average()
    average.add(sample)

    assert average.value is None


# ----------------------------------------------------------------------------- rates


def test_the_rates_come_from_ollamas_own_durations() -> None:
    speed = learned({})

    assert speed.decode_seconds_per_token == pytest.approx(0.02)
    assert speed.prefill_seconds_per_token == pytest.approx(0.001)
    assert speed.output_tokens == pytest.approx(100)
    assert speed.samples == 1


def test_cached_prompt_tokens_cost_no_time() -> None:
    speed = learned({"cached_tokens": 500})

    assert speed.prefill_seconds_per_token == pytest.approx(0.002)


@pytest.mark.parametrize("unclear", [{"cached_tokens": None}, {"cached_tokens": 990}])
def test_no_prefill_rate_is_learned_while_the_cached_share_is_unclear(
    unclear: dict[str, Any],
) -> None:
    assert learned(unclear).prefill_seconds_per_token is None


def test_no_rates_are_learned_while_something_else_runs_there() -> None:
    speed = learned({"alone": False})

    assert speed.decode_seconds_per_token is None
    assert speed.prefill_seconds_per_token is None
    assert speed.output_tokens == pytest.approx(100)


def test_a_load_is_learned_from_the_request_that_caused_it_alone() -> None:
    assert learned({"load_seconds": 4.0}).load_seconds is None
    assert learned({"load_seconds": 4.0, "caused_load": True}).load_seconds == pytest.approx(4.0)
    assert learned({"load_seconds": 0.01, "caused_load": True}).load_seconds is None


def test_what_is_short_tells_more_of_fixed_costs_than_of_rates() -> None:
    assert learned({"prompt_tokens": 63}).prefill_seconds_per_token is None
    assert learned({"prompt_tokens": 64}).prefill_seconds_per_token == pytest.approx(1 / 64)
    assert learned({"caused_load": True, "load_seconds": 0.49}).load_seconds is None
    assert learned({"caused_load": True, "load_seconds": 0.5}).load_seconds == pytest.approx(0.5)


def test_bandwidths_are_learned_over_all_models_wholly_on_the_gpu() -> None:
    on_gpu = learner_of({"caused_load": True, "load_seconds": 2.0})
    on_cpu = learner_of({"on_gpu": False})

    assert on_gpu.bytes_per_second == pytest.approx(2 * GB / 0.02)
    assert on_gpu.load_bytes_per_second == pytest.approx(1 * GB)
    assert on_cpu.bytes_per_second is None


def test_a_changed_file_is_another_model() -> None:
    learner = learner_of({})
    learner.forget(LLAMA)

    assert learner.speed(LLAMA) is UNKNOWN_SPEED


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                name: st.one_of(st.none(), st.sampled_from([0.0, 0.001, 1.0, 100.0]))
                for name in ("total_seconds", "load_seconds", "prefill_seconds", "decode_seconds")
            }
            | {
                "prompt_tokens": st.sampled_from([None, 0, 10, 5000]),
                "output_tokens": st.sampled_from([None, 0, 1, 500]),
                "cached_tokens": st.sampled_from([None, 0, 400, 9000]),
                "alone": st.booleans(),
                "peers": st.integers(0, 4),
                "caused_load": st.booleans(),
                "size_bytes": st.sampled_from([0, GB]),
            }
        ),
        max_size=12,
    )
)
def test_whatever_answers_say_the_rates_are_positive_or_unknown(
    answers: list[dict[str, Any]],
) -> None:
    speed = learned(*answers)

    for rate in (
        speed.prefill_seconds_per_token,
        speed.decode_seconds_per_token,
        speed.load_seconds,
        speed.output_tokens,
    ):
        assert rate is None or rate > 0.0
    assert speed.slots is None or speed.slots >= 1


# ----------------------------------------------------------------------------- slots

SIDE_BY_SIDE = {"total_seconds": 3.005}
WAITED = {"total_seconds": 6.0}


def test_one_slot_is_assumed_until_two_have_run_side_by_side() -> None:
    assert learned({**WAITED, "peers": 1}).slots == 1
    assert learned({**SIDE_BY_SIDE, "peers": 1}).slots == 2
    assert learned({**SIDE_BY_SIDE, "peers": 3}).slots == 4


def test_a_wait_among_fewer_than_the_slots_takes_slots_back() -> None:
    four = {**SIDE_BY_SIDE, "peers": 3}

    assert learned(four, {**WAITED, "peers": 2}).slots == 2
    assert learned(four, {**WAITED, "peers": 4}).slots == 4, "all four were taken"


def test_an_answer_without_company_says_nothing_about_slots() -> None:
    assert learned({**SIDE_BY_SIDE, "peers": 0}).slots is None


def test_an_answer_so_short_that_nobody_would_have_waited_for_it_says_nothing_about_slots() -> None:
    short = {"prefill_seconds": 0.002, "decode_seconds": 0.03, "total_seconds": 0.034}

    assert learned({**short, "peers": 3}).slots is None
    assert learned({**WAITED, "peers": 1}, {**short, "peers": 3}).slots == 1


def test_an_answer_that_began_with_a_load_says_nothing_about_slots() -> None:
    assert learned({**SIDE_BY_SIDE, "peers": 1, "caused_load": True}).slots is None
