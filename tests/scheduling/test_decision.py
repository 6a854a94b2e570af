"""The explanation that goes back with an answer."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from hydra_llm.exceptions import NoEligibleNodeError
from hydra_llm.scheduling import COST_TERMS, Moment, RoutingDecision, Scheduler
from hydra_llm.types import (
    GB,
    Attempt,
    HostMemory,
    InferenceRequest,
    InstalledModel,
    Node,
    NodeSnapshot,
    RunnerOptions,
)
from tests.helpers import BIG, LLAMA, installed, loaded, request, shape_of, snapshot
from tests.scheduling.worlds import CLUSTERS, REQUESTS, moments


def decide(
    asked: InferenceRequest, *nodes: NodeSnapshot, moment: Moment | None = None, **about: Any
) -> RoutingDecision:
    try:
        choice = Scheduler().schedule(asked, nodes, moment or Moment(), random.Random(0))
    except NoEligibleNodeError as refusal:
        about["refusal"] = refusal
    else:
        about["choice"] = choice
    return RoutingDecision(model=asked.model, requested_node=asked.node_id, **about)


def failed(node_id: str, outcome: str = "connect") -> Attempt:
    return Attempt(
        node_id=node_id, node_url=f"http://{node_id}:11434", outcome=outcome, seconds=0.2
    )


def is_one_sentence(text: str) -> bool:
    return bool(text) and "\n" not in text and text == text.strip() and not text.endswith(".")


# --------------------------------------------------------------------------- reasons

WARM, COLD = snapshot("warm", warm=(LLAMA,)), snapshot("cold")
ASKED = request(output_tokens=150)

REASONS = {
    "pinned": (
        decide(request(node_id="cold"), WARM, COLD),
        "cold: pinned by node_id; not loaded, needs 2.8 GB",
    ),
    "fallback of a pin": (
        decide(request(node_id="gone", output_tokens=150), WARM),
        "warm: loaded, about 1.0 s expected; the only node that can take it; "
        "node_id 'gone' is no configured node (warm); routed instead",
    ),
    "only node": (
        decide(ASKED, WARM),
        "warm: loaded, about 1.0 s expected; the only node that can take it",
    ),
    "near tie": (
        decide(ASKED, snapshot("a", warm=(LLAMA,)), snapshot("b", warm=(LLAMA,))),
        "b: loaded, about 1.0 s expected; as good as a, drawn at random",
    ),
    "clear winner": (
        decide(ASKED, WARM, COLD),
        "warm: loaded, about 1.0 s expected; 2.3 s cheaper than cold (not loaded, needs 2.8 GB)",
    ),
    "after failed attempts": (
        decide(
            request(output_tokens=150, tried=frozenset({"x", "y"})),
            WARM,
            snapshot("x"),
            snapshot("y"),
            attempts=(failed("x"), failed("y", "timeout"), failed("warm", "ok")),
        ),
        "warm: loaded, about 1.0 s expected; the only node that can take it "
        "after x (connect), y (timeout) failed",
    ),
    "short of what was asked for": (
        decide(request(min_vram_bytes=30 * GB, output_tokens=150), WARM),
        "warm: loaded, about 1.0 s expected; the only node that can take it; no node has "
        "30.0 GB VRAM available (warm 22.8 GB); took the best that could run it",
    ),
    "refusal": (
        decide(request(), snapshot("a", health="down"), snapshot("b", models=())),
        "0/2 nodes can take 'llama3.2:3b': 1 down, 1 without the model",
    ),
    "nothing yet": (RoutingDecision(model=LLAMA), "nothing was decided"),
}


@pytest.mark.parametrize("case", list(REASONS))
def test_the_reason_is_one_sentence_that_says_what_mattered(case: str) -> None:
    decision, sentence = REASONS[case]

    assert decision.reason == sentence
    assert is_one_sentence(decision.reason)
    assert sentence in repr(decision)


def test_notes_say_what_a_node_would_have_to_do() -> None:
    def note(node: NodeSnapshot, asked: InferenceRequest) -> str:
        return decide(asked, node).candidates[0].note

    big: dict[str, Any] = {"models": (LLAMA, BIG), "warm": (LLAMA,)}
    half = loaded(LLAMA, size_bytes=4 * GB, size_vram_bytes=3 * GB)
    assert note(snapshot(loaded=half), request()) == "loaded, 75% on GPU"
    assert note(WARM, request(options=RunnerOptions(num_ctx=8192))) == (
        "not loaded, needs 3.2 GB, restarts its runner"
    )
    assert note(snapshot(free_vram_gb=14.0, **big), request(BIG)) == (
        f"not loaded, needs 14.7 GB, evicts {LLAMA}"
    )
    assert note(snapshot(free_vram_gb=8.0), request()) == "not loaded, needs 2.8 GB"
    assert note(snapshot(models=(BIG,), free_vram_gb=8.0), request(BIG)).endswith(
        "54% in system memory: about 4.78 tokens/s"
    )
    unknown = snapshot(free_vram_gb=None, total_vram_gb=None)
    assert note(unknown, request()) == "not loaded, VRAM unknown"
    shown = replace(unknown, learned_room_bytes=8 * GB)
    assert note(shown, request()) == "not loaded, needs 2.8 GB, by its loads so far"


def test_what_fits_nowhere_whole_goes_where_the_offload_hurts_least() -> None:
    """And it is said how slow that will be."""
    state: dict[str, Any] = {
        "installed": {
            "llama3.3:70b": InstalledModel(
                name="llama3.3:70b",
                size_bytes=42 * GB,
                context_length=32_768,
                shape=shape_of(42 * GB),
            )
        },
        "host": HostMemory(total_bytes=64 * GB),
    }
    asked = request("llama3.3:70b", output_tokens=200, prefer_local=False)
    small = snapshot("small", free_vram_gb=8.0, total_vram_gb=8.0, **state)
    large = snapshot("large", free_vram_gb=23.0, **state)
    slow = snapshot("slow", free_vram_gb=23.0, bytes_per_second=60e9, **state)

    decision = decide(asked, small, slow, large)

    assert decision.selected_node == "large"
    whole, share = 42 * GB, Moment().fit(asked, large).cpu_share
    assert 0.4 < share < 0.6
    per_token = whole * (1 - share) / 300e9 + whole * share / 40e9
    assert decision.reason.startswith(
        f"large: not loaded, needs 42.7 GB, {share:.0%} in system memory: "
        f"about {1 / per_token:.3g} tokens/s, about "
    )
    assert decision.predicted is not None
    assert decision.predicted["decode"] == pytest.approx(200 * per_token)


# --------------------------------------------------------------------------- mapping


@given(REQUESTS, CLUSTERS, moments())
def test_mapping_attributes_and_plain_data_agree(
    asked: InferenceRequest, nodes: list[NodeSnapshot], moment: Moment
) -> None:
    decision = decide(asked, *nodes, moment=moment, attempts=(failed("n0"),), actual={"total": 1.0})
    plain = decision.to_dict()

    assert isinstance(decision, Mapping)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert dict(decision) == plain
    assert len(decision) == len(plain) == len(list(decision))
    for key in decision:
        value = getattr(decision, key)
        if key in ("candidates", "rejections", "attempts"):
            assert decision[key] == [item.to_dict() for item in value]
        elif isinstance(value, (str, type(None))):
            assert decision[key] == value
    assert decision["node_id"] == decision.selected_node
    assert is_one_sentence(decision.reason)
    seen = [c["node_id"] for c in plain["candidates"]] + [r["node_id"] for r in plain["rejections"]]
    assert sorted(seen) == sorted(node.id for node in nodes)


def test_an_unknown_key_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        decide(request(), WARM)["headers"]
    assert decide(request(), WARM).get("headers") is None


def test_candidates_come_cheapest_first_with_every_term() -> None:
    decision = decide(ASKED, COLD, WARM)

    assert [c.node_id for c in decision.candidates] == ["warm", "cold"]
    for candidate in decision.candidates:
        assert list(candidate.costs) == list(COST_TERMS)
        assert candidate.total_seconds == pytest.approx(sum(candidate.costs.values()))


def test_the_prediction_adds_up() -> None:
    predicted = decide(request(output_tokens=150, input_tokens=3000), COLD).predicted

    assert predicted is not None
    before = predicted["wait"] + predicted["load"] + predicted["prefill"]
    assert predicted["first_token"] == pytest.approx(before + predicted["decode"] / 150)
    assert predicted["total"] == pytest.approx(before + predicted["decode"])


def test_a_refusal_has_neither_node_nor_prediction() -> None:
    decision = decide(request(), snapshot(health="down"))

    assert (decision.selected_node, decision.node_url, decision.predicted) == (None, None, None)
    assert decision.candidates == ()
    assert decision["rejections"][0]["reason"] == "down"


def test_an_explanation_is_the_same_whenever_one_asks() -> None:
    moment = Moment(now=3.0)
    decision = decide(ASKED, WARM, COLD, moment=moment)
    reason = decision.reason

    decision.table()
    assert decision.reason == reason
    assert decision.to_dict() == decision.to_dict()


# ----------------------------------------------------------------------------- tables


def test_the_table_has_a_line_for_every_node_chosen_first() -> None:
    lines = decide(ASKED, COLD, WARM, snapshot("c", health="down")).table().splitlines()

    assert [line.split()[:2] for line in lines[1:3]] == [["→", "warm"], ["cold", "3.33"]]
    assert lines[3].split() == ["c", "-", "down"]
    assert all(name in lines[0] for name in COST_TERMS)


def test_the_table_of_a_refusal_has_the_reasons() -> None:
    table = decide(request(), snapshot("a", models=()), snapshot("b", health="down")).table()

    assert "without the model: ollama pull llama3.2:3b" in table
    assert "down" in table


@given(REQUESTS, CLUSTERS, moments())
def test_both_tables_contain_every_node(
    asked: InferenceRequest, nodes: list[NodeSnapshot], moment: Moment
) -> None:
    decision = decide(asked, *nodes, moment=moment)

    assert len(decision.table().splitlines()) == 1 + len(nodes)
    html = decision._repr_html_()
    assert html.count("<tr") == 1 + len(nodes)
    for node in nodes:
        assert node.id in decision.table()
        assert f">{node.id}</td>" in html


def test_what_comes_from_outside_is_escaped_in_html() -> None:
    evil = "<script>alert(1)</script>"
    node = snapshot("a", installed=installed(evil), health="down", health_reason=evil)
    named = NodeSnapshot(node=Node("http://b:1", id=evil), health="up", installed=installed(evil))

    html = decide(request(evil), node, named)._repr_html_()

    assert "<script>" not in html
    assert html.count("&lt;script&gt;") >= 2


# ---------------------------------------------------------------------------- secrets


def test_credentials_of_a_node_show_nowhere() -> None:
    secret = "hunter2"
    node = Node(f"http://user:{secret}@rig:11434", id="rig", headers={"X-Api-Key": f"key-{secret}"})
    up = NodeSnapshot(node=node, health="up", installed=installed(LLAMA))
    down = NodeSnapshot(node=node, health="down")

    for decision in (decide(request(), up), decide(request(), down)):
        for text in (
            json.dumps(decision.to_dict()),
            decision.table(),
            decision._repr_html_(),
            repr(decision),
        ):
            assert secret not in text
            assert "X-Api-Key" not in text


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("url", ["http://u:hunter2@rig:11434", "http://u:hunter2@other:1"])
def test_credentials_in_a_pin_show_nowhere(url: str, strict: bool) -> None:
    nodes = (snapshot("rig", cordoned=True), snapshot("b", warm=(LLAMA,)))
    decision = decide(request(node_id=url, strict_pin=strict), *nodes)

    for text in (json.dumps(decision.to_dict()), decision.table(), repr(decision)):
        assert "hunter2" not in text
    assert decision.requested_node is not None


# ------------------------------------------------------------------------- plain data


@given(REQUESTS, CLUSTERS, moments())
def test_a_decision_can_be_read_back_from_plain_data(
    asked: InferenceRequest, nodes: list[NodeSnapshot], moment: Moment
) -> None:
    told = json.loads(json.dumps(decide(asked, *nodes, moment=moment).to_dict()))
    back = RoutingDecision.from_dict(told)

    assert back.to_dict() == told
    assert len(back.table().splitlines()) == 1 + len(nodes)
    assert back._repr_html_().count("<tr") == 1 + len(nodes)


@pytest.mark.parametrize(
    "nonsense", [{}, {"model": "m", "candidates": [1]}, {"model": "m", "attempts": [{}]}, None, 3]
)
def test_something_else_is_no_decision(nonsense: Any) -> None:
    with pytest.raises(ValueError, match="no routing decision's plain data"):
        RoutingDecision.from_dict(nonsense)
