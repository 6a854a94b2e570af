"""How far off each term was: shares, their sign, what is small, and the first answers apart."""

from typing import Any

import pytest

from hydra_llm.calibration.errors import COLD_ANSWERS, Calibration, TermErrors, calibrate
from hydra_llm.calibration.records import Record


def record(**given: Any) -> Record:
    return Record(
        **{
            "at": 1.0,
            "node": "a",
            "model": "m",
            "priority": 5,
            "ended": "ok",
            "attempts": 1,
            "answers_before": COLD_ANSWERS,
            "samples": 0,
            "foreseen_node": "a",
            "predicted": {},
            "actual": {},
            **given,
        }
    )


def of(name: str, *pairs: tuple[float, float], **given: Any) -> TermErrors:
    """The errors of one term, of what was predicted and what happened."""
    records = [
        record(predicted={name: told}, actual={name: found}, **given) for told, found in pairs
    ]
    (group,) = calibrate(records).groups
    return group.terms[name]


def test_shares_are_of_what_happened() -> None:
    errors = of("decode", (1.5, 1.0), (1.0, 2.0), (3.0, 1.0))

    assert errors.count == 3
    assert errors.error == 0.5  # of 0.5, 0.5 and 2
    assert errors.bias == 0.5  # of +0.5, -0.5 and +2
    assert errors.p90 == 2.0
    assert errors.off == pytest.approx((0.5 + 1.0 + 2.0) / 3)


def test_too_little_expected_is_a_bias_below_zero() -> None:
    assert of("wait", (1.0, 2.0), (1.0, 4.0)).bias == pytest.approx(-0.625)


def test_nine_of_ten_are_no_further_off_than_p90() -> None:
    errors = of("decode", *((1.0 + n / 10, 1.0) for n in range(1, 11)))

    assert errors.p90 == pytest.approx(0.9)


def test_what_took_next_to_nothing_is_compared_in_milliseconds() -> None:
    errors = of("wait", (0.1, 0.04), (3.0, 0.0), (0.02, 0.01))

    assert (errors.count, errors.error, errors.bias) == (0, None, None)
    assert errors.small == 3
    assert errors.small_off_ms == pytest.approx(60.0)
    # A wait that never came is in the mean all the same.
    assert errors.off == pytest.approx((0.06 + 3.0 + 0.01) / 3)


def test_where_there_was_nothing_to_foresee_nothing_is_counted() -> None:
    errors = of("wait", (0.0, 0.0), (0.0, 0.0005))

    assert (errors.count, errors.small, errors.small_off_ms) == (0, 0, None)


def test_tokens_are_always_compared_in_shares() -> None:
    errors = of("output_tokens", (4.0, 2.0), (9.0, 0.0))

    assert (errors.count, errors.error, errors.small) == (1, 1.0, 0)


def test_a_term_that_is_not_told_is_not_there() -> None:
    errors = of("total", (1.0, 2.0))

    assert errors.count == 1
    (group,) = calibrate([record(predicted={"total": 1.0}, actual={"load": 1.0})]).groups
    assert group.terms["total"].off is None


def mixed() -> list[Record]:
    """Cold ones are 100 % off, the later ones 10 %; and node b is worse than a."""
    records = []
    for node, factor in (("a", 1.0), ("b", 2.0)):
        for before in range(2 * COLD_ANSWERS):
            off = 1.0 if before < COLD_ANSWERS else 0.1
            told = {"total": 1.0 + factor * off}
            records.append(
                record(
                    node=node,
                    model="mn"[before % 2],
                    answers_before=before,
                    predicted=told,
                    actual={"total": 1.0},
                )
            )
    return records


def shown(found: Calibration) -> list[tuple[Any, ...]]:
    return [
        (g.stage, g.model, g.node, g.answers, round(g.terms["total"].bias or 0.0, 3))
        for g in found.groups
    ]


def test_the_first_answers_are_apart() -> None:
    assert shown(calibrate(mixed())) == [
        ("cold", None, None, 2 * COLD_ANSWERS, 1.5),
        ("known", None, None, 2 * COLD_ANSWERS, 0.15),
    ]


def test_each_node_and_each_model() -> None:
    assert shown(calibrate(mixed(), by_node=True)) == [
        ("cold", None, "a", COLD_ANSWERS, 1.0),
        ("cold", None, "b", COLD_ANSWERS, 2.0),
        ("known", None, "a", COLD_ANSWERS, 0.1),
        ("known", None, "b", COLD_ANSWERS, 0.2),
    ]
    assert len(calibrate(mixed(), by_node=True, by_model=True).groups) == 8


def test_what_did_not_end_well_is_left_out_and_counted() -> None:
    good = record(predicted={"total": 1.0}, actual={"total": 1.0})
    bad = record(ended="cancelled", predicted={"total": 1.0}, actual={"total": 9.0})
    found = calibrate([good, bad, record()])

    assert found.left_out == 2
    assert [group.answers for group in found.groups] == [1]


def test_of_nothing_there_is_nothing() -> None:
    assert calibrate([]) == Calibration(groups=(), left_out=0)
