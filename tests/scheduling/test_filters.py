"""Who may not take a request, and why."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.exceptions import NoEligibleNodeError
from hydra_llm.scheduling import REASONS, Choice, Moment, Scheduler
from hydra_llm.types import GB, InferenceRequest, NodeSnapshot, RunnerOptions
from tests.helpers import BIG, LLAMA, installed, loaded, request, running, snapshot

SCHEDULER = Scheduler()


def choose(
    asked: InferenceRequest, *nodes: NodeSnapshot, now: float = 0.0, **moment: Any
) -> Choice:
    return SCHEDULER.schedule(asked, nodes, Moment(now=now, **moment), random.Random(0))


def reason_against(node: NodeSnapshot, asked: InferenceRequest | None = None, **at: Any) -> str:
    with pytest.raises(NoEligibleNodeError) as caught:
        choose(asked or request(), node, **at)
    (rejection,) = caught.value.rejections
    assert rejection.node_id == node.id
    return rejection.reason


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"health": "down", "health_reason": "connection refused"}, "down"),
        ({"health": "misconfigured"}, "misconfigured"),
        ({"health": "unknown"}, "not seen yet"),
        ({"cordoned": True}, "cordoned"),
        ({"circuit": "open", "circuit_retry_at": 5.0}, "circuit open"),
        ({"circuit": "open", "circuit_retry_at": None}, "circuit open"),
        ({"paused_until": 3.0}, "busy, asked to wait"),
        ({"models": ()}, "without the model"),
        ({"load_path_stuck": True}, "load path stuck"),
        ({"load_retry_at": {LLAMA: 9.0}}, "failed to load it lately"),
    ],
)
def test_each_state_of_a_node_has_its_own_reason(state: dict[str, Any], reason: str) -> None:
    assert reason_against(snapshot(**state), now=1.0) == reason
    assert reason in REASONS


@pytest.mark.parametrize(
    "state",
    [
        {"circuit": "open", "circuit_retry_at": 5.0},
        {"paused_until": 5.0},
        {"load_retry_at": {LLAMA: 5.0}},
    ],
)
def test_what_was_to_last_until_five_is_over_at_five(state: dict[str, Any]) -> None:
    assert choose(request(), snapshot(**state), now=5.0).selected.id == "a"


@pytest.mark.parametrize("state", [{"load_path_stuck": True}, {"load_retry_at": {LLAMA: 9.0}}])
def test_a_node_whose_loads_fail_still_serves_what_is_loaded(state: dict[str, Any]) -> None:
    assert choose(request(), snapshot(warm=(LLAMA,), **state)).selected.id == "a"


def test_the_error_counts_the_reasons_so_the_user_knows_what_to_fix() -> None:
    nodes = [snapshot("a", models=()), snapshot("b", models=()), snapshot("c", health="down")]

    with pytest.raises(NoEligibleNodeError) as caught:
        choose(request(), *nodes)

    assert str(caught.value) == ("0/3 nodes can take 'llama3.2:3b': 2 without the model, 1 down")


def test_a_model_nobody_has_comes_with_the_command_that_fetches_it() -> None:
    with pytest.raises(NoEligibleNodeError, match=r"try 'ollama pull nobody:latest'"):
        choose(request("nobody"), snapshot("a"), snapshot("b"))


def test_excluded_and_already_tried_nodes_are_left_out() -> None:
    nodes = (snapshot("a"), snapshot("b"), snapshot("c"))

    choice = choose(
        request(exclude_nodes=frozenset({"http://a:11434"}), tried=frozenset({"b"})), *nodes
    )

    assert choice.selected.id == "c"
    assert {r.node_id: r.reason for r in choice.rejections} == {
        "a": "excluded by the caller",
        "b": "already tried",
    }


def test_only_the_nodes_of_the_group_are_chosen_from() -> None:
    nodes = (snapshot("a"), snapshot("b"), snapshot("c"))

    choice = choose(request(among=frozenset({"c", "nobody"})), *nodes)

    assert choice.selected.id == "c"
    assert {(r.node_id, r.reason, r.detail) for r in choice.rejections} == {
        (name, "excluded by the caller", "not among the nodes of this group") for name in "ab"
    }


def test_required_labels_must_all_be_there() -> None:
    nodes = (snapshot("a", labels=("fast",)), snapshot("b", labels=("fast", "eu")))

    choice = choose(request(require_labels=frozenset({"fast", "eu"})), *nodes)

    assert choice.selected.id == "b"
    assert choice.rejections[0].detail == "eu"


def test_a_missing_capability_sends_the_request_to_a_node_that_has_it() -> None:
    without = snapshot("a", installed=installed(LLAMA, capabilities=frozenset({"completion"})))
    with_tools = snapshot("b", installed=installed(LLAMA, capabilities=frozenset({"tools"})))

    assert choose(request(capabilities=frozenset({"tools"})), without, with_tools).selected.id == (
        "b"
    )


def test_if_nobody_has_the_capability_ollama_itself_gets_to_say_so() -> None:
    without = snapshot("a", installed=installed(LLAMA, capabilities=frozenset({"completion"})))

    choice = choose(request(capabilities=frozenset({"vision"})), without)

    assert choice.selected.id == "a"
    assert "vision" in choice.warnings[0]


def test_an_old_server_that_tells_no_capabilities_is_not_ruled_out() -> None:
    old = snapshot("a", installed=installed(LLAMA, capabilities=None))

    assert choose(request(capabilities=frozenset({"tools"})), old).warnings == ()


# ------------------------------------------------------------------------- pinning


@pytest.mark.parametrize("name", ["b", "http://b:11434", "http://b:11434/", "b:11434", "B"])
def test_a_pin_names_a_node_by_id_host_or_url(name: str) -> None:
    nodes = (snapshot("a", warm=(LLAMA,)), snapshot("b"))

    assert choose(request(node_id=name), *nodes).selected.id == "b"


def test_a_pin_on_a_node_that_is_down_is_routed_and_says_so() -> None:
    nodes = (snapshot("a"), snapshot("b", health="down", health_reason="connection refused"))

    choice = choose(request(node_id="b"), *nodes)

    assert choice.selected.id == "a"
    assert "'b' cannot take it (down: connection refused)" in choice.warnings[0]


@pytest.mark.parametrize("name", ["elsewhere", "http://elsewhere:11434", "http://u:secret@x:1"])
def test_a_pin_on_no_configured_node_is_routed_and_says_so(name: str) -> None:
    choice = choose(request(node_id=name), snapshot("a"), snapshot("b"))

    assert "is no configured node (a, b)" in choice.warnings[0]
    assert "secret" not in choice.warnings[0]


def test_a_required_pin_fails_and_names_the_reason() -> None:
    nodes = (snapshot("a"), snapshot("b", cordoned=True))

    with pytest.raises(NoEligibleNodeError, match=r"node_id='b': b: cordoned"):
        choose(request(node_id="b", strict_pin=True), *nodes)


# -------------------------------------------------------------------- min_vram_gb


def gb(value: float) -> int:
    return int(value * GB)


def test_only_nodes_with_enough_vram_available_are_considered() -> None:
    nodes = (
        snapshot("small", warm=(LLAMA,), free_vram_gb=4.0),
        snapshot("large", free_vram_gb=20.0),
    )

    choice = choose(request(min_vram_bytes=gb(10)), *nodes)

    assert choice.selected.id == "large"
    assert choice.rejections[0].detail == "6.8 GB VRAM available"


def test_what_is_loaded_for_this_very_model_counts_as_available() -> None:
    node = snapshot(models=(BIG,), warm=(BIG,), free_vram_gb=2.0)

    assert choose(request(BIG, min_vram_bytes=gb(16)), node).warnings == ()


def test_unknown_vram_is_not_taken_for_enough_while_another_node_is_known_to_have_it() -> None:
    nodes = (
        snapshot("unknown", warm=(LLAMA,), free_vram_gb=None, total_vram_gb=None),
        snapshot("known", free_vram_gb=12.0),
    )

    assert choose(request(min_vram_bytes=gb(10)), *nodes).selected.id == "known"


def test_if_nobody_has_it_the_best_is_taken_and_every_figure_named() -> None:
    nodes = (
        snapshot("a", free_vram_gb=1.5, local=True, warm=(LLAMA,)),
        snapshot("b", free_vram_gb=20.0),
        snapshot("c", free_vram_gb=None, total_vram_gb=None),
    )

    choice = choose(request(min_vram_bytes=gb(35)), *nodes)

    assert choice.selected.id == "b"
    (warning,) = choice.warnings
    assert "no node has 35.0 GB VRAM available (a 4.3 GB, b 20.0 GB, c unknown)" in warning


def test_what_no_node_could_hold_even_in_system_memory_is_an_error_with_every_figure() -> None:
    nodes = (snapshot("a", free_vram_gb=1.5), snapshot("b", free_vram_gb=20.0))

    with pytest.raises(NoEligibleNodeError) as caught:
        choose(request(min_vram_bytes=gb(1000)), *nodes)

    text = str(caught.value)
    assert "0/2 nodes" in text
    assert "min_vram_gb=1000.0" in text
    assert "a: 1.5 GB VRAM available" in text
    assert "b: 20.0 GB VRAM available" in text


def test_required_vram_that_nobody_has_is_an_error() -> None:
    with pytest.raises(NoEligibleNodeError, match=r"2 short of VRAM \(min_vram_gb=35.0: a: 1.5"):
        choose(
            request(min_vram_bytes=gb(35), strict_vram=True),
            snapshot("a", free_vram_gb=1.5),
            snapshot("b", free_vram_gb=20.0),
        )


def test_a_pinned_node_short_of_vram_is_still_taken_before_another() -> None:
    nodes = (snapshot("a", free_vram_gb=1.5), snapshot("b", free_vram_gb=20.0))

    choice = choose(request(node_id="a", min_vram_bytes=gb(35)), *nodes)

    assert choice.selected.id == "a"


# ----------------------------------------------------------------------- deadline


def test_a_node_that_cannot_make_the_deadline_is_left_out() -> None:
    nodes = (snapshot("cold"), snapshot("warm", warm=(LLAMA,)))

    choice = choose(request(deadline_seconds=2.5, output_tokens=10), *nodes, now=0.5)

    assert choice.selected.id == "warm"


def test_time_already_spent_counts_against_the_deadline() -> None:
    asked = request(deadline_seconds=10.0, output_tokens=10, submitted_at=0.0)

    assert reason_against(snapshot(), asked, now=9.5) == "too slow for the deadline"


# --------------------------------------------------------------------- properties


@given(
    now=st.integers(0, 5),
    states=st.lists(
        st.fixed_dictionaries(
            {
                "health": st.sampled_from(["up", "down", "unknown", "misconfigured"]),
                "cordoned": st.booleans(),
                "circuit": st.sampled_from(["closed", "open"]),
                "circuit_retry_at": st.sampled_from([None, 2.0]),
                "paused_until": st.sampled_from([None, 3.0]),
                "models": st.sampled_from([(), (LLAMA,)]),
                "warm": st.sampled_from([(), (LLAMA,)]),
                "free_vram_gb": st.sampled_from([None, 0.0, 3.0, 20.0]),
                "load_path_stuck": st.booleans(),
                "running": st.sampled_from([(), (running(),), (running(loading=True),)]),
            }
        ),
        min_size=1,
        max_size=4,
    ),
    words=st.fixed_dictionaries(
        {
            "node_id": st.sampled_from([None, "n0", "n9"]),
            "min_vram_bytes": st.sampled_from([None, 2 * GB, 30 * GB]),
            "priority": st.integers(1, 10),
            "prefer_local": st.booleans(),
            "strict_pin": st.booleans(),
            "strict_vram": st.booleans(),
            "options": st.sampled_from([RunnerOptions(), RunnerOptions(num_ctx=8192)]),
        }
    ),
)
def test_every_node_is_either_a_candidate_or_has_one_reason_from_the_closed_list(
    now: int, states: list[dict[str, Any]], words: dict[str, Any]
) -> None:
    for state in states:
        # A loaded model is an installed one.
        if state["warm"]:
            state["models"] = (LLAMA,)
    nodes = [snapshot(f"n{i}", **state) for i, state in enumerate(states)]

    try:
        choice = choose(request(**words), *nodes, now=float(now))
    except NoEligibleNodeError as error:
        assert {r.node_id for r in error.rejections} == {node.id for node in nodes}
        assert {r.reason for r in error.rejections} <= REASONS
        return

    eligible = {node.id for node in choice.eligible}
    rejected = {r.node_id for r in choice.rejections}
    assert eligible | rejected == {node.id for node in nodes}
    assert not eligible & rejected
    assert {r.reason for r in choice.rejections} <= REASONS
    assert choice.selected.id in eligible
    assert choice.selected.health == "up"
    assert not choice.selected.cordoned
    if words["strict_pin"] and words["node_id"]:
        assert choice.selected.id == words["node_id"]
    for candidate in choice.candidates():
        assert all(seconds >= 0.0 for seconds in candidate.costs.values())


def test_a_loaded_runner_with_another_context_is_not_the_one_that_was_asked_for() -> None:
    node = snapshot(
        loaded=loaded(LLAMA, context_length=4096), load_path_stuck=True, models=(LLAMA,)
    )

    asked = request(options=RunnerOptions(num_ctx=8192))

    assert reason_against(node, asked) == "load path stuck"
    assert choose(request(options=RunnerOptions(num_ctx=4096)), node).selected.id == "a"
    assert choose(request(), node).selected.id == "a"
