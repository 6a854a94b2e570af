import json
from pathlib import Path

import pytest

from hydra_llm.cli.demo.own import Pick, pick_model
from hydra_llm.cli.demo.simulated import STORIES
from hydra_llm.cli.demo.stage import Claim, Result, verdict
from hydra_llm.testing import SimulatedCluster, SimulatedModel, SimulatedNode
from tests.cli.conftest import Run
from tests.helpers import BIG, LLAMA, installed, snapshot


@pytest.mark.timeout(120)
def test_the_whole_demo_proves_what_it_claims(run: Run) -> None:
    result = run("demo", "--speed=2")

    assert "✗ " not in _claims(result.stdout)
    assert result.exit_code == 0, result.output
    for number in range(1, len(STORIES) + 1):
        assert f"\n{number}  " in result.stdout
    for shown in (
        "NoEligibleNodeError",
        "StreamBrokenError",
        "urgent 4",
        "has been started again",
        "18 of 18 claims held",
    ):
        assert shown in result.stdout
    assert "moons" not in result.output


def _claims(output: str) -> str:
    """The closing table; a ✗ above it is a node that was rejected."""
    return output.partition("What was proved")[2]


@pytest.mark.timeout(120)
def test_settings_of_the_machine_do_not_reach_the_simulated_demo(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    monkeypatch.setattr("hydra_llm.config._user_state_dir", lambda: state)
    monkeypatch.setenv("HYDRA_LLM_KEEP_RATES", "1")
    monkeypatch.setenv("HYDRA_LLM_MAX_QUEUE", "0")
    monkeypatch.setenv("HYDRA_LLM_HEALTH_CHECK_INTERVAL", "3600")
    monkeypatch.setenv("HYDRA_LLM_PREFER_LOCAL_SECONDS", "0")

    result = run("demo", "--speed=4", "--json")
    document = json.loads(result.stdout)
    assert document["held"], [claim for claim in document["claims"] if not claim["held"]]
    assert document["simulated"]
    assert result.exit_code == 0
    assert not state.exists(), "nodes that are gone in a moment are not worth keeping"


def test_one_claim_that_did_not_hold_is_enough() -> None:
    result = Result(simulated=True)
    assert not result.held

    result.claims.append(Claim(story="a", says="b", held=True, measured="c"))
    assert result.held
    result.claims.append(Claim(story="a", says="b", held=False, measured="c"))
    assert not result.held
    assert verdict(result).plain.startswith("1 of 2 claims held")


# ------------------------------------------------------------------- own nodes


def test_with_nodes_of_ones_own_only_harmless_things_are_done(
    run: Run, cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster["rack"].preload("qwen3:8b")
    monkeypatch.setenv("HYDRA_LLM_NODES", ",".join(cluster.urls))

    result = run("demo")
    assert result.exit_code == 0, result.output
    assert "Your own nodes, from HYDRA_LLM_NODES" in result.stdout
    assert "✗ " not in _claims(result.stdout)
    (asked,) = [r for node in cluster for r in node.requests if r.path == "/api/chat"]
    assert asked.model == "qwen3:8b"
    assert asked.body["options"]["num_predict"] <= 16
    assert not any(node.evictions for node in cluster)


def test_a_big_model_is_not_loaded_for_a_demo(run: Run) -> None:
    with SimulatedCluster([SimulatedNode("a", models=(BIG,))]) as cluster:
        result = run("demo", on=cluster)

        assert "Left out: no model is loaded" in result.stdout
        assert not cluster["a"].load_count
    assert result.exit_code == 0


def test_a_small_model_is_loaded_after_saying_so(run: Run) -> None:
    with SimulatedCluster([SimulatedNode("a", models=(LLAMA,), speed=20)]) as cluster:
        result = run("demo", on=cluster)

        assert "this loads the smallest" in result.stdout
        assert cluster["a"].load_count == 1
    assert result.exit_code == 0


def test_without_a_model_to_chat_with_the_demo_says_so(run: Run) -> None:
    embedding = SimulatedModel("nomic-embed-text", capabilities=("embedding",))
    with SimulatedCluster([SimulatedNode("a", models=(embedding,))]) as cluster:
        result = run("demo", on=cluster)

    assert result.exit_code == 1
    assert "ollama pull" in result.stderr


def test_without_a_node_up_the_demo_sends_to_the_doctor(run: Run) -> None:
    result = run("demo", "--node=http://127.0.0.1:9")

    assert result.exit_code == 1
    assert "0/1 nodes are up" in result.stderr
    assert "hydra-llm doctor" in result.stderr


def test_a_loaded_model_is_preferred_then_the_smallest() -> None:
    both = (LLAMA, BIG)

    assert pick_model([snapshot(models=both)]) == Pick(LLAMA, 2_000_000_000, False)
    picked = pick_model([snapshot("a", models=both), snapshot("b", models=both, warm=(BIG,))])
    assert picked is not None
    assert (picked.name, picked.is_loaded) == (BIG, True)


def test_embedding_models_are_not_chatted_with() -> None:
    said = installed("bge-m3", capabilities=frozenset({"embedding"}))
    unsaid = installed("nomic-embed-text")

    assert pick_model([snapshot(installed={**said, **unsaid})]) is None
