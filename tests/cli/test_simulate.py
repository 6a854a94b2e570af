"""``hydra-llm simulate``: tables, JSON, pictures, and a sentence on what another GPU brings."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Run

SHORT = ("--requests", "20", "--seeds", "2", "--cluster", "24+12")


def test_it_compares_with_what_others_do(run: Run) -> None:
    result = run("simulate", *SHORT)

    assert result.exit_code == 0, result.output
    for word in ("hydra", "least-connections", "hand-placed", "±", "loads", "in 5 s", "2 seeds"):
        assert word in result.stdout
    assert "20 requests" in result.stdout


def test_it_says_what_another_gpu_brings(run: Run) -> None:
    result = run("simulate", *SHORT, "--cluster", "12", "--add", "gpu24=24", "--slo", "10")

    assert result.exit_code == 0, result.output
    told = " ".join(result.stdout.split())
    assert re.search(
        r"with gpu24, hydra: 95 % of first tokens within [\d.]+ s instead of [\d.]+ s "
        r"\(−\d+%\), sooner with 2 of 2 seeds; [\d.]+% in 10 s instead of [\d.]+%",
        told,
    )


def test_json_has_every_seed(run: Run) -> None:
    result = run("simulate", *SHORT, "--policy", "hydra,random", "--first-seed", "5", "--json")

    document = json.loads(result.stdout)
    assert document["seeds"] == [5, 6]
    assert [one["policy"] for one in document["results"]] == ["hydra", "random"]
    figures = document["results"][0]["figures"]
    assert len(figures["first_p95"]["values"]) == 2
    assert figures["first_p95"]["half"] is not None
    assert figures["errors"]["mean"] == 0.0
    assert document["results"][0]["priorities"]["5"]["requests"]["mean"] == 20.0


def test_priorities_have_a_table(run: Run) -> None:
    result = run(
        *("simulate", *SHORT, "--policy", "hydra", "--priorities", "10=1,2=1", "--by-priority")
    )

    assert re.search(r"hydra +10 +\d+ ", result.stdout)
    assert re.search(r"hydra +2 +\d+ ", result.stdout)


def test_a_trace_of_ones_own_and_a_cluster_from_a_file(run: Run, tmp_path: Path) -> None:
    trace, cluster = tmp_path / "trace.csv", tmp_path / "mine.toml"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,10,20\n9,10,20\n", encoding="utf-8")
    cluster.write_text(
        '[[node]]\nid = "a"\nvram_gb = 8\n[[model]]\nname = "llama3.2:3b"\n', encoding="utf-8"
    )
    result = run(
        *("simulate", "--trace", str(trace), "--cluster", str(cluster)),
        *("--seeds", "1", "--policy", "round-robin"),
    )

    assert result.exit_code == 0, result.output
    assert "trace.csv, its own pace, 2 requests; 1 seed, from cold" in result.stdout
    assert "±" not in result.stdout


def test_it_goes_over_sockets_too(run: Run) -> None:
    one = ("--requests", "1", "--seeds", "1", "--policy", "hydra")
    arguments = ("simulate", *one, "--sockets", "10")
    result, replayed = run(*arguments, "--json"), run(*arguments[:-2], "--json")

    assert result.exit_code == 0, result.output
    found, expected = json.loads(result.stdout), json.loads(replayed.stdout)
    assert (found["sockets"], expected["sockets"]) == (10.0, None)
    firsts = [each["results"][0]["figures"]["first_mean"]["mean"] for each in (found, expected)]
    # Computing takes its time, which is ten times as long here: it cannot be less than replayed.
    assert firsts[0] > firsts[1]
    told = " ".join(run(*arguments).stdout.split())
    assert "1 seed, from cold; over sockets, 10 times as fast as in life" in told


@pytest.mark.usefixtures("matplotlib_fonts")
def test_a_picture_is_written(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    result = run("simulate", *SHORT, "--policy", "random", "--plot", str(path))

    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "wrote" in result.stderr


def test_a_missing_matplotlib_is_told_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("simulate", "--plot", str(tmp_path / "a.png"))

    assert result.exit_code == 1
    assert "pip install 'hydra-llm[plot]'" in result.stderr
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--policy", "hydraa"), "--policy 'hydraa': there are hydra, hydra-knowing, random"),
        (("--cluster", "nowhere.toml"), "no cluster 'nowhere.toml'"),
        (("--trace", "nowhere.csv"), "no trace 'nowhere.csv'"),
        (("--add", "24"), "write NAME=GB, as gpu24=24"),
        (("--priorities", "high"), "--priorities should be like 10=1,5=7,2=2"),
    ],
)
def test_a_wrong_option_is_one_line_and_code_2(
    run: Run, arguments: tuple[str, ...], says: str
) -> None:
    result = run("simulate", *arguments)

    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())
