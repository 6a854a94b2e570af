"""How long a model stays when idle, from the time at which `/api/ps` says that it goes."""

from __future__ import annotations

import math

import pytest

from hydra_llm.probes.keepalive import with_keep_alive
from hydra_llm.types import LoadedModel

NOW = 1_000_000.0


def shown(expires_at: float | None) -> dict[str, LoadedModel]:
    return {"m": LoadedModel(name="m", expires_at=expires_at)}


def looks(*answers: tuple[float, float | None], keep_alive: float = 300.0) -> float | None:
    """What is known after looks at some times, each with when the last answer was."""
    before: dict[str, LoadedModel] | None = None
    last: float | None = None
    for at, answered_at in answers:
        model = shown(None if answered_at is None else NOW + answered_at + keep_alive)
        since = None if last is None else at - last
        before = with_keep_alive(model, before, now=NOW + at, since=since)
        last = at
    assert before is not None
    return before["m"].keep_alive_seconds


@pytest.mark.parametrize(
    ("left", "taken"),
    [(299.0, 300.0), (120.0, 300.0), (302.0, 600.0), (45.0, 60.0), (1700.0, 1800.0), (-3.0, 60.0)],
)
def test_at_first_sight_it_is_the_next_one_that_people_set(left: float, taken: float) -> None:
    model = with_keep_alive(shown(NOW + left), None, now=NOW, since=None)["m"]

    assert model.keep_alive_seconds == taken


@pytest.mark.parametrize("keep_alive", [5.0, 30.0, 60.0, 90.0, 300.0, 420.0, 3600.0, 86_400.0])
def test_after_an_answer_between_two_looks_it_is_exact(keep_alive: float) -> None:
    assert looks((0, -1.0), (5, 2.5), keep_alive=keep_alive) == keep_alive


def test_a_model_that_has_come_between_two_looks_was_just_used() -> None:
    nothing = with_keep_alive({}, None, now=NOW, since=None)
    model = with_keep_alive(shown(NOW + 4.0 + 120.0), nothing, now=NOW + 5.0, since=5.0)["m"]

    assert model.keep_alive_seconds == 120.0


def test_an_unusual_one_is_what_is_left_after_an_answer() -> None:
    found = looks((0, -1.0), (5, 2.5), keep_alive=107.0)

    assert found == pytest.approx(107.0, abs=3.0)


def test_what_is_known_stays_while_nobody_asks() -> None:
    assert looks((0, -1.0), (5, 2.0), (10, 2.0), (200, 2.0), keep_alive=90.0) == 90.0


def test_what_is_known_stays_when_more_answers_agree() -> None:
    assert looks((0, -1.0), (5, 2.0), (10, 9.9), (15, 10.1), keep_alive=90.0) == 90.0


def test_another_keep_alive_is_noticed() -> None:
    long = with_keep_alive(shown(NOW + 1800.0), None, now=NOW, since=None)
    short = with_keep_alive(shown(NOW + 3.0 + 60.0), long, now=NOW + 5.0, since=5.0)

    assert long["m"].keep_alive_seconds == 1800.0
    assert short["m"].keep_alive_seconds == 60.0


def test_for_ever_is_for_ever() -> None:
    """Ollama writes the year 2319 then."""
    assert looks((0, 0.0), keep_alive=9_223_372_036.0) == math.inf


def test_a_server_that_does_not_say_leaves_it_unknown() -> None:
    assert looks((0, None)) is None
    assert looks((0, None), (5, None)) is None


def test_a_clock_that_is_a_little_off_does_not_matter() -> None:
    model = with_keep_alive(shown(NOW + 300.6), None, now=NOW, since=None)
    again = with_keep_alive(shown(NOW + 5.0 + 300.6), model, now=NOW + 5.0, since=5.0)

    assert again["m"].keep_alive_seconds == 300.0
