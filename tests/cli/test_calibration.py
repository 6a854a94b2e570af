"""``hydra-llm calibration``: from a log, from a replayed load, and what is wrong shows as wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.calibration.records import Record
from hydra_llm.scheduling import costs
from tests.cli.conftest import Run

SHORT = ("--cluster", "24+12", "--requests", "60", "--seeds", "1", "--rate", "0.2")


def record(number: int, **given: Any) -> Record:
    """An answer that was foreseen exactly."""
    took = {"wait": 0.0, "load": 0.0, "prefill": 0.2, "decode": 2.0, "total": 2.2}
    return Record(
        **{
            "at": 1_790_000_000.0 + number,
            "node": "rig" if number % 2 else "pc",
            "model": "llama3.2:3b",
            "priority": 5,
            "ended": "ok",
            "attempts": 1,
            "answers_before": number,
            "samples": number,
            "foreseen_node": "rig",
            "predicted": took,
            "actual": took,
            **given,
        }
    )


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "decisions.jsonl"
    path.write_text("".join(record(number).line() for number in range(50)))
    return path


def terms_of(document: Any, stage: str = "known") -> Any:
    (group,) = [group for group in document["groups"] if group["stage"] == stage]
    return group["terms"]


def test_a_log_is_shown_in_two_tables(run: Run, log: Path) -> None:
    result = run("calibration", "--log", str(log))

    assert result.exit_code == 0, result.output
    assert "the first 20 answers of a model from a node (20 answers)" in result.stdout
    assert "after 20 answers of a model from a node (30 answers)" in result.stdout
    assert re.search(r"decode +30 +0% +0% +\+0% +0\.00 s +– +–", result.stdout)
    assert "wait" in result.stdout
    assert "first token" not in result.stdout  # nothing tells it


def test_a_term_that_was_foreseen_wrongly_is_shown_as_wrong(run: Run, log: Path) -> None:
    took = record(0).actual
    half = {**took, "decode": 1.0, "total": 1.2}
    log.write_text("".join(record(n, predicted=half).line() for n in range(20, 50)))
    result = run("calibration", "--log", str(log))

    assert re.search(r"decode +30 +50% +50% +−50% +1\.00 s", result.stdout)
    assert re.search(r"whole answer +30 +45% +45% +−45% +1\.00 s", result.stdout)
    assert re.search(r"prefill +30 +0% ", result.stdout)


def test_what_is_compared_in_milliseconds_has_its_columns(run: Run, log: Path) -> None:
    took = {**record(0).actual, "wait": 0.01}
    log.write_text("".join(record(n, actual=took).line() for n in range(20, 25)))
    result = run("calibration", "--log", str(log))

    assert re.search(r"wait +0 +– +– +– +0\.01 s +5 +10 ms", result.stdout)


def test_several_logs_nodes_and_models(run: Run, log: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(record(30, model="qwen3:8b").line() + record(31, ended="cancelled").line())
    logs = ("--log", str(log), "--log", str(other))
    document = json.loads(run("calibration", *logs, "--by-node", "--by-model", "--json").stdout)

    assert document["left_out"] == 1
    assert [(g["stage"], g["model"], g["node"], g["answers"]) for g in document["groups"]] == [
        ("cold", "llama3.2:3b", "pc", 10),
        ("cold", "llama3.2:3b", "rig", 10),
        ("known", "llama3.2:3b", "pc", 15),
        ("known", "llama3.2:3b", "rig", 15),
        ("known", "qwen3:8b", "pc", 1),
    ]
    shown = run("calibration", *logs, "--by-node", "--by-model").stdout
    assert "qwen3:8b, pc: after 20 answers of a model from a node (1 answer)" in shown
    assert "1 requests without an outcome left out" in shown


def test_a_load_is_replayed(run: Run) -> None:
    result = run("calibration", *SHORT, "--json")

    document = json.loads(result.stdout)
    assert "60 requests" in document["source"]
    assert sum(group["answers"] for group in document["groups"]) == 60
    cold = terms_of(document, "cold")
    assert cold["load"]["count"] > 0
    assert cold["first_token"]["count"] > 0
    assert cold["output_tokens"]["error"] > 0.1


def test_a_router_that_is_told_lengths_is_right_about_them(run: Run) -> None:
    result = run("calibration", *SHORT, "--knowing", "--json")
    cold = terms_of(json.loads(result.stdout), "cold")

    assert cold["output_tokens"]["error"] == 0.0
    assert cold["decode"]["error"] < 0.1
    assert "lengths of answers are told" in json.loads(result.stdout)["source"]


def test_a_router_that_is_wrong_about_a_term_is_shown_to_be(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = costs.prefill
    before = terms_of(json.loads(run("calibration", *SHORT, "--knowing", "--json").stdout), "cold")
    monkeypatch.setattr(costs, "prefill", lambda *about: 3.0 * right(*about))
    wrong = terms_of(json.loads(run("calibration", *SHORT, "--knowing", "--json").stdout), "cold")

    assert before["prefill"]["error"] < 0.2
    assert wrong["prefill"]["bias"] == pytest.approx(
        3.0 * (1.0 + before["prefill"]["bias"]) - 1.0, abs=0.3
    )
    assert wrong["decode"]["error"] == pytest.approx(before["decode"]["error"], abs=0.05)


def test_the_replay_leaves_a_log_of_ones_own_alone(
    run: Run, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = log.read_text()
    monkeypatch.setenv("HYDRA_LLM_DECISION_LOG", str(log))
    run("calibration", *SHORT, "--requests", "5")
    run("simulate", *SHORT, "--requests", "5", "--policy", "hydra")

    assert log.read_text() == before


def test_nothing_to_compare_is_said_and_code_1(run: Run, log: Path) -> None:
    log.write_text(record(0, ended="cancelled").line())
    result = run("calibration", "--log", str(log))

    assert result.exit_code == 1
    assert "no whole answer with a prediction to compare" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--log", "nowhere.jsonl"), "nowhere.jsonl: there is no such file"),
        (("--cluster", "nowhere.toml"), "no cluster 'nowhere.toml'"),
        (("--trace", "nowhere.csv"), "no trace 'nowhere.csv'"),
    ],
)
def test_a_wrong_option_is_one_line_and_code_2(
    run: Run, arguments: tuple[str, ...], says: str
) -> None:
    result = run("calibration", *arguments)

    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())
