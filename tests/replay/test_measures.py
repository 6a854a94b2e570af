"""Figures over seeds: only whole answers count, and intervals are Student's."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from hydra_llm import ConfigurationError
from hydra_llm.replay import plotting
from hydra_llm.replay.measures import Figure, Measured, measured, percentile
from hydra_llm.replay.running import Answer, Run
from hydra_llm.replay.workload import Asked


def answer(first: float | None, *, error: str | None = None, priority: int = 5) -> Answer:
    asked = Asked(number=0, at=0.0, model="m", input_tokens=1, output_tokens=2, priority=priority)
    whole = 2.0 if first is None else first + 1.0
    return Answer(asked=asked, node="a", first_s=first, whole_s=whole, error=error)


def run(*answers: Answer, seed: int = 1) -> Run:
    return Run(
        policy="p", seed=seed, answers=answers, loads=3, load_s=9.0, evictions=1, seconds=10.0
    )


def test_failed_answers_are_errors_and_no_seconds() -> None:
    failed = answer(0.001, error="StreamBrokenError")
    found = measured([run(answer(1.0), answer(3.0), failed, failed)], cluster="c", slo_s=2.0)

    figures = found.figures
    assert figures["first_mean"].mean == 2.0
    assert figures["whole_mean"].mean == 3.0
    assert figures["errors"].mean == 2.0
    assert figures["in_time"].mean == 0.25
    assert figures["goodput"].mean == pytest.approx(0.1)
    assert (figures["loads"].mean, figures["evictions"].mean) == (3.0, 1.0)


def test_each_priority_has_its_figures_the_first_one_first() -> None:
    answers = (answer(1.0, priority=2), answer(5.0, priority=2), answer(0.5, priority=10))
    found = measured([run(*answers)], cluster="c", slo_s=2.0)

    assert list(found.priorities) == [10, 2]
    assert found.priorities[2]["first_mean"].mean == 3.0
    assert found.priorities[10]["in_time"].mean == 1.0


def test_a_run_without_any_answer_has_no_seconds() -> None:
    found = measured([run(answer(None, error="AllNodesFailedError"))], cluster="c", slo_s=2.0)

    assert math.isnan(found.figures["first_p95"].mean)
    assert found.to_dict()["figures"]["first_p95"]["mean"] is None
    assert found.figures["errors"].mean == 1.0


def test_percentiles_lie_between_the_nearest() -> None:
    assert percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5
    assert percentile([1.0, 2.0], 95) == pytest.approx(1.95)
    assert percentile([7.0], 99) == 7.0


def test_the_interval_is_students() -> None:
    # 1, 2, 3: deviation 1, so 4.303 / sqrt(3) with two degrees of freedom.
    assert Figure((1.0, 2.0, 3.0)).half == pytest.approx(4.303 / math.sqrt(3))
    assert Figure((1.0,)).half is None
    assert Figure(tuple(float(n % 2) for n in range(100))).half == pytest.approx(0.0985, abs=1e-3)


# --------------------------------------------------------------------------- pictures


def results(*names: tuple[str, str]) -> list[tuple[Measured, list[Run]]]:
    runs = [run(answer(1.0), answer(20.0), seed=seed) for seed in (1, 2)]
    found = measured(runs, cluster="c", slo_s=2.0)
    return [
        (Measured(policy, cluster, found.figures, found.priorities), runs)
        for policy, cluster in names
    ]


@pytest.mark.usefixtures("matplotlib_fonts")
@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([("hydra", "now"), ("random", "now")], ("hydra", "random")),
        ([("hydra", "now"), ("hydra", "with gpu24")], ("now", "with gpu24")),
        ([("hydra", "now"), ("random", "then")], ("hydra, now", "random, then")),
    ],
)
def test_a_picture_names_what_differs(
    tmp_path: Path, names: list[tuple[str, str]], told: tuple[str, ...]
) -> None:
    path = tmp_path / "a.svg"
    plotting.check_plot(path)
    plotting.draw(path, results(*names), title="a load")

    text = path.read_text(encoding="utf-8")
    for name in (*told, "a load", "3 loads"):
        assert f"<!-- {name} -->" in text


@pytest.mark.usefixtures("matplotlib_fonts")
def test_where_no_picture_can_go_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"should end in one of .*png"):
        plotting.check_plot(tmp_path / "a.xyz")
    with pytest.raises(ConfigurationError, match="there is no folder"):
        plotting.check_plot(tmp_path / "nowhere" / "a.png")


def test_matplotlib_is_imported_for_a_picture_only() -> None:
    program = "import sys, hydra_llm.cli.simulating; print('matplotlib' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE)
    assert told.stdout.split() == [b"False"]
