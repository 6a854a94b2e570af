"""What was foreseen beside what happened: which durations belong to which term."""

import json
import random
import re
from typing import Any

import pytest

from hydra_llm.scheduling import (
    Choice,
    Ended,
    Moment,
    Outcome,
    Prospect,
    RoutingDecision,
    Scheduler,
)
from hydra_llm.scheduling.outcome import outcome_of
from hydra_llm.types import Demand, InferenceRequest, NodeSnapshot, Speed, Usage
from tests.helpers import LLAMA, request, running, snapshot

SPEED = Speed(
    prefill_seconds_per_token=0.001, decode_seconds_per_token=0.01, load_seconds=4.0, slots=1
)
ASKED = request(input_tokens=1000, output_tokens=200, interactive=True)
USAGE = Usage(
    total_seconds=5.505,
    load_seconds=0.005,
    prefill_seconds=1.5,
    decode_seconds=3.0,
    prompt_tokens=1100,
    output_tokens=250,
)
DEMAND = {LLAMA: Demand(output_tokens=150.0)}


def node(**state: Any) -> NodeSnapshot:
    return snapshot(**{"warm": (LLAMA,), "speeds": {LLAMA: SPEED}, **state})


def chosen(
    *nodes: NodeSnapshot, asked: InferenceRequest = ASKED, now: float = 10.0, ahead: int = 0
) -> Choice:
    moment = Moment(now=now, demand=DEMAND, queue_ahead=ahead)
    return Scheduler().schedule(asked, nodes, moment, random.Random(0))


def ended(**given: Any) -> Ended:
    return Ended(
        **{
            "prospect": None,
            "sent_at": 10.0,
            "first_token_at": 12.0,
            "ended_at": 15.6,
            "usage": USAGE,
            **given,
        }
    )


def test_each_duration_stands_beside_the_term_that_foresaw_it() -> None:
    outcome = outcome_of(chosen(node()), ended())

    assert outcome.node_id == "a"
    assert outcome.predicted == pytest.approx(
        {
            **{"wait": 0.0, "load": 0.0, "prefill": 1.0, "decode": 1.5},
            **{"first_token": 1.01, "total": 2.5, "prompt_tokens": 1000, "output_tokens": 150},
        }
    )
    assert outcome.actual == pytest.approx(
        {
            # 5.505 s in Ollama, of which it tells 4.505 s: the rest was for a slot.
            **{"wait": 1.0, "load": 0.005, "prefill": 1.5, "decode": 3.0},
            **{"first_token": 2.0, "total": 5.6, "prompt_tokens": 1100, "output_tokens": 250},
        }
    )


def test_too_little_expected_is_an_error_below_zero() -> None:
    errors = outcome_of(chosen(node()), ended()).errors()

    assert errors["decode"] == pytest.approx(-1.5)
    assert errors["total"] == pytest.approx(2.5 - 5.6)


def test_a_load_of_its_own_is_one() -> None:
    usage = Usage(total_seconds=8.0, load_seconds=4.5, prefill_seconds=1.5, decode_seconds=2.0)
    outcome = outcome_of(chosen(node(loaded={})), ended(usage=usage))

    assert (outcome.predicted["wait"], outcome.predicted["load"]) == (0.0, 4.0)
    assert (outcome.actual["wait"], outcome.actual["load"]) == (0.0, 4.5)


def test_the_rest_of_a_load_under_way_is_waiting_on_both_sides() -> None:
    # Ollama counts it as this request's own load; we foresee it as waiting for another's.
    loads = running(seconds=0.0, load_seconds=4.0, loading=True, started_at=8.0)
    usage = Usage(total_seconds=6.0, load_seconds=2.5, prefill_seconds=1.5, decode_seconds=2.0)
    outcome = outcome_of(chosen(node(loaded={}, running=(loads,))), ended(usage=usage))

    assert (outcome.predicted["wait"], outcome.predicted["load"]) == (2.0, 0.0)
    assert (outcome.actual["wait"], outcome.actual["load"]) == (2.5, 0.0)


def test_what_waited_in_the_line_counts_from_when_it_joined_it() -> None:
    busy = node(running=(running(seconds=6.0, started_at=10.0),))
    prospect = Prospect(Scheduler(), ASKED, (busy,), Moment(now=10.0, demand=DEMAND, queue_ahead=2))
    outcome = outcome_of(
        chosen(node(), now=18.0),
        ended(prospect=prospect, sent_at=18.0, first_token_at=20.5, ended_at=23.6),
    )

    # 6 s of the one that runs, and twice 2.5 s of those in the line.
    assert outcome.predicted["wait"] == pytest.approx(6.0 + 2 * 2.5)
    assert outcome.actual["wait"] == pytest.approx(8.0 + 1.0)
    assert outcome.actual["first_token"] == pytest.approx(10.5)
    assert outcome.actual["total"] == pytest.approx(13.6)


def test_the_node_is_the_one_that_was_foreseen() -> None:
    then, now = node(node_id="then"), node(node_id="now")
    prospect = Prospect(Scheduler(), ASKED, (then,), Moment(now=10.0))

    assert outcome_of(chosen(now), ended(prospect=prospect)).node_id == "then"


def test_a_prospect_that_a_rule_now_denies_gives_way_to_the_choice() -> None:
    prospect = Prospect(Scheduler(), ASKED, (), Moment(now=10.0))

    assert outcome_of(chosen(node()), ended(prospect=prospect)).node_id == "a"


def test_what_is_not_told_is_not_compared() -> None:
    openai = Usage(prompt_tokens=1100, output_tokens=250)
    outcome = outcome_of(chosen(node()), ended(usage=openai, first_token_at=None))

    assert set(outcome.actual) == {"total", "prompt_tokens", "output_tokens"}
    assert set(outcome.errors()) == set(outcome.actual)
    assert set(outcome_of(chosen(node()), ended(usage=None)).actual) == {"first_token", "total"}


def test_what_only_embeds_tells_nothing_of_its_waiting() -> None:
    usage = Usage(total_seconds=2.0, load_seconds=0.1, prefill_seconds=1.9, prompt_tokens=1000)
    outcome = outcome_of(chosen(node()), ended(usage=usage))

    assert "wait" not in outcome.actual
    assert outcome.actual["prefill"] == 1.9


# ------------------------------------------------------------------ in the decision


def decision() -> RoutingDecision:
    choice = chosen(node(), node(node_id="b", loaded={}))
    return RoutingDecision(model=LLAMA, choice=choice, ended=ended())


def test_a_decision_shows_it_in_each_of_its_forms() -> None:
    told = decision()
    assert told.outcome is not None

    lines = told.table().splitlines()
    assert lines[-3].split("  ")[-1].strip() == "answer's length"
    assert re.fullmatch("expected .* 150", lines[-2])
    assert re.fullmatch("happened .* 250", lines[-1])
    assert "<td" in told.outcome._repr_html_()
    assert told.outcome._repr_html_() in told._repr_html_()
    assert told["outcome"] == told.outcome.to_dict()


def test_it_goes_through_json_and_back() -> None:
    told = json.loads(json.dumps(decision().to_dict()))

    assert told["outcome"]["actual"]["wait"] == 1.0
    back = RoutingDecision.from_dict(told)
    assert back.to_dict() == told
    assert back.table() == decision().table()


def test_an_older_decision_has_none() -> None:
    told = decision().to_dict()
    del told["outcome"]

    assert RoutingDecision.from_dict(told).outcome is None


def test_it_is_frozen_and_worked_out_once() -> None:
    told = decision()

    assert told.outcome is told.outcome
    with pytest.raises(AttributeError):
        told.outcome.node_id = "b"  # type: ignore[misc, union-attr]


def test_unknown_is_none() -> None:
    assert RoutingDecision(model=LLAMA, choice=chosen(node()))["outcome"] is None


def test_an_outcome_is_made_of_its_plain_data() -> None:
    outcome = Outcome(node_id="a", predicted={"total": 1.0}, actual={"total": 2.0})

    assert Outcome.from_dict(outcome.to_dict()) == outcome
