import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from hydra_llm import Router, __version__
from hydra_llm.cli import main
from hydra_llm.cli.watching import watch
from hydra_llm.testing import ResetFault, SimulatedCluster, StatusFault
from tests.cli.conftest import Run

NOWHERE = "--node=http://127.0.0.1:9"
"""The port for discarding: nobody listens there."""


# ------------------------------------------------------------------------- nodes


def test_nodes_shows_every_node(run: Run, cluster: SimulatedCluster) -> None:
    cluster["gaming"].preload("qwen3:8b")
    cluster["rack"].kill()

    result = run("nodes", on=cluster)
    assert result.exit_code == 0
    for word in ("workstation", "gaming", "qwen3:8b", "ctx 4096", "connection refused"):
        assert word in result.stdout
    assert "2 of 3 nodes up" in result.stdout


def test_nodes_as_json_is_one_document(run: Run, cluster: SimulatedCluster) -> None:
    result = run("nodes", "--json", on=cluster)

    assert [node["id"] for node in json.loads(result.stdout)] == ["workstation", "rack", "gaming"]


def test_watching_into_a_pipe_gives_a_line_of_json_each_time(
    cluster: SimulatedCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    with Router(cluster.nodes()) as router:
        watch(
            router,
            Console(),
            interval_seconds=7.0,
            as_json=True,
            rounds=3,
            sleep=slept.append,
        )

    lines = capsys.readouterr().out.splitlines()
    assert [len(json.loads(line)) for line in lines] == [3, 3, 3]
    assert slept == [7.0, 7.0]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_ctrl_c_ends_watching_without_a_word(
    cluster: SimulatedCluster, is_terminal: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    console = Console(force_terminal=is_terminal, width=100)
    with Router(cluster.nodes()) as router:
        watch(router, console, interval_seconds=1.0, sleep=interrupted)

    output = capsys.readouterr()
    assert "3 of 3 nodes up" in output.out
    assert ("Ctrl-C ends" in output.out) == is_terminal
    assert not output.err


# ----------------------------------------------------------------------- explain


def test_explain_shows_the_candidates_and_leaves_with_0(
    run: Run, cluster: SimulatedCluster
) -> None:
    cluster["gaming"].preload("qwen3:8b")

    result = run("explain", "qwen3:8b", "--no-prefer-local", on=cluster)
    assert result.exit_code == 0
    assert "→  gaming" in result.stdout
    assert "not loaded" in result.stdout
    assert "cheaper than" in result.stdout


def test_explain_leaves_with_1_if_nobody_can_take_it(run: Run, cluster: SimulatedCluster) -> None:
    result = run("explain", "llama9", on=cluster)

    assert result.exit_code == 1
    assert "0/3 nodes can take" in result.stdout
    assert "ollama pull" in result.stdout


def test_explain_as_json_is_the_decision(run: Run, cluster: SimulatedCluster) -> None:
    options = ["--json", "--node-id=rack", "--num-ctx=8192", "--input-tokens=500", "--session=s"]

    result = run("explain", "qwen3:8b", *options, on=cluster)
    decision = json.loads(result.stdout)
    assert decision["selected_node"] == "rack"
    assert decision["requested_node"] == "rack"
    assert {rejection["node_id"] for rejection in decision["rejections"]} == {
        "workstation",
        "gaming",
    }


def test_every_routing_option_reaches_the_router(run: Run, cluster: SimulatedCluster) -> None:
    excluded = ["--exclude-node=rack", "--exclude-node=gaming", "--json"]

    decision = json.loads(run("explain", "qwen3:8b", *excluded, on=cluster).stdout)
    assert decision["selected_node"] == "workstation"
    for option, word in {
        "--require-label=fast": "without the label",
        "--min-vram-gb=1000": "1000",
        "--deadline-s=0.001": "too slow for the deadline",
    }.items():
        result = run("explain", "qwen3:8b", option, on=cluster)
        assert result.exit_code == 1, option
        assert word in result.stdout
    for option in ("--priority=10", "--prefer-label=fast", "--pin=require", "--vram=require"):
        assert run("explain", "qwen3:8b", option, on=cluster).exit_code == 0, option


def test_a_wrong_value_is_told_in_one_line_with_exit_code_2(run: Run) -> None:
    for options in (["--pin=maybe"], ["--priority=11"], ["--min-vram-gb=-1"]):
        result = run("explain", "x", *options, NOWHERE)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1


# --------------------------------------------------------------------------- fit


@pytest.fixture
def configured(cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes with their memory, which --node cannot say."""
    told = ("id", "url", "vram_gb", "vram_reserved_gb")
    nodes = [{name: getattr(one, name) for name in told} for one in cluster.nodes()]
    monkeypatch.setenv("HYDRA_LLM_NODES", json.dumps(nodes))
    monkeypatch.setenv("HYDRA_LLM_VRAM_MONITORING", "0")


@pytest.mark.usefixtures("configured")
def test_fit_says_where_a_model_can_run_with_how_much_context(run: Run) -> None:
    result = run("fit", "mistral-small:24b", "--num-ctx=32768")

    assert result.exit_code == 1
    rack = next(line for line in result.stdout.splitlines() if line.startswith("rack"))
    assert re.search(r"rack +\d+% in system memory .*32768 +\d+ ", rack)
    told = re.search(r"only with --num-ctx (\d+) or less, on rack", result.stdout)
    assert told

    shorter = run("fit", "mistral-small:24b", f"--num-ctx={told[1]}")
    longer = run("fit", "mistral-small:24b", f"--num-ctx={int(told[1]) + 256}")
    assert (shorter.exit_code, longer.exit_code) == (0, 1)
    assert "on GPUs as a whole: rack" in shorter.stdout


@pytest.mark.usefixtures("configured")
def test_fit_as_json_is_what_the_router_says(run: Run) -> None:
    result = run("fit", "qwen3:8b", "--json")

    fits = {one["node"]: one for one in json.loads(result.stdout)}
    assert result.exit_code == 0
    assert fits["rack"]["verdict"] == "fits"
    assert fits["rack"]["need_gb"] < fits["rack"]["free_gb"]


def test_fit_of_a_model_that_nobody_has_names_the_way_to_get_it(
    run: Run, cluster: SimulatedCluster
) -> None:
    result = run("fit", "nobody:1b", on=cluster)

    assert result.exit_code == 1
    assert "ollama pull nobody:1b" in result.stdout


# -------------------------------------------------------------------------- chat


def test_chat_gives_the_answer_alone_on_stdout_and_the_reason_on_stderr(
    run: Run, cluster: SimulatedCluster
) -> None:
    result = run("chat", "llama3.2:3b", "What is a moon?", "--node-id=rack", on=cluster)

    assert result.exit_code == 0
    assert len(result.stdout.split()) > 20
    assert "rack" not in result.stdout
    assert "[rack: pinned by node_id" in result.stderr
    assert "moon" not in result.stderr


def test_a_dash_reads_the_prompt_from_stdin(run: Run, cluster: SimulatedCluster) -> None:
    result = run("chat", "llama3.2:3b", "-", "--system=Be brief.", on=cluster, input="Hello\n")

    assert result.exit_code == 0
    (asked,) = [r for node in cluster for r in node.requests if r.path == "/api/chat"]
    assert asked.body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello\n"},
    ]


def test_chat_with_json_ends_with_the_decision_on_stderr(
    run: Run, cluster: SimulatedCluster
) -> None:
    result = run("chat", "llama3.2:3b", "Hello", "--json", "--num-ctx=2048", on=cluster)

    decision = json.loads(result.stderr)
    assert decision["attempts"][0]["outcome"] == "ok"
    assert decision["actual"]["total"] > 0


def test_an_empty_prompt_is_not_sent(run: Run, cluster: SimulatedCluster) -> None:
    assert run("chat", "llama3.2:3b", " ", on=cluster).exit_code == 2
    assert run("chat", "llama3.2:3b", "-", on=cluster, input="").exit_code == 2
    assert not [r for node in cluster for r in node.requests if r.path == "/api/chat"]


def test_a_missing_model_is_told_with_the_command_that_gets_it(
    run: Run, cluster: SimulatedCluster
) -> None:
    result = run("chat", "llama9", "Hello", on=cluster)

    assert result.exit_code == 1
    assert "try 'ollama pull llama9:latest'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_dead_cluster_sends_to_the_doctor(run: Run) -> None:
    result = run("chat", "llama3.2:3b", "Hello", NOWHERE)

    assert result.exit_code == 1
    assert "hydra-llm doctor" in result.stderr
    assert "Traceback" not in result.output


def test_an_answer_that_breaks_off_keeps_what_came_and_leaves_with_3(
    run: Run, cluster: SimulatedCluster
) -> None:
    for node in cluster:
        node.inject(ResetFault(after=5))

    result = run("chat", "llama3.2:3b", "Hello", on=cluster)
    assert result.exit_code == 3
    assert result.stdout.strip()
    assert "broke off after" in result.stderr
    assert "ask again" in result.stderr


def test_what_a_node_says_to_a_bad_request_is_not_repeated(
    run: Run, cluster: SimulatedCluster
) -> None:
    for node in cluster:
        node.inject(StatusFault(status=400, text="bad: 'my secret prompt'"))

    result = run("chat", "llama3.2:3b", "my secret prompt", on=cluster)
    assert result.exit_code == 3
    assert "status 400" in result.stderr
    assert "secret" not in result.output


def test_debug_shows_the_traceback(run: Run, cluster: SimulatedCluster) -> None:
    result = run("chat", "llama9", "Hello", "--debug", on=cluster)

    assert result.exception is not None
    assert type(result.exception).__name__ == "NoNodeHasModelError"


# ------------------------------------------------------------------------ doctor


def test_the_doctor_is_content_with_healthy_nodes(run: Run, cluster: SimulatedCluster) -> None:
    result = run("doctor", on=cluster)

    assert result.exit_code == 0
    assert "✓ rack: answers at" in result.stdout


def test_the_doctor_s_warnings_count_with_strict(run: Run, cluster: SimulatedCluster) -> None:
    result = run("doctor", "--strict", "--json", on=cluster)

    document = json.loads(result.stdout)
    assert result.exit_code == document["exit_code"] == 1
    assert document["problems"] == 0
    assert document["warnings"] == sum(f["level"] == "warning" for f in document["findings"])


def test_the_doctor_leaves_with_2_on_a_problem(run: Run, cluster: SimulatedCluster) -> None:
    cluster["rack"].kill()

    result = run("doctor", on=cluster)
    assert result.exit_code == 2
    assert "✗ rack: connection refused" in result.stdout
    assert "1 problem" in result.stdout


def test_the_doctor_reads_the_settings_the_others_trip_over(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hydra.toml").write_text('node = ["http://rig"]\n')

    result = run("doctor")
    assert result.exit_code == 2
    assert "did you mean nodes?" in result.stdout
    result = run("nodes")
    assert result.exit_code == 2
    assert "did you mean nodes?" in result.stderr


def test_no_command_shows_a_credential(run: Run, cluster: SimulatedCluster) -> None:
    port = cluster["rack"].port
    node = f"--node=http://me:hunter2@127.0.0.1:{port}"
    dead = "--node=http://me:hunter2@127.0.0.1:9"

    for command in (["nodes"], ["nodes", "--json"], ["doctor"], ["explain", "qwen3:8b"]):
        result = run(*command, node, dead)
        assert "hunter2" not in result.output
        assert "me:" not in result.output


# ----------------------------------------------------------------------- the rest


def test_the_version_is_that_of_the_package(run: Run) -> None:
    assert run("--version").stdout == f"hydra-llm {__version__}\n"


@pytest.mark.parametrize("command", ["nodes", "explain", "chat", "doctor", "demo"])
def test_every_command_explains_itself_and_its_exit_codes(run: Run, command: str) -> None:
    result = run(command, "--help")

    assert result.exit_code == 0
    assert "Exit code" in result.stdout


def test_help_begins_with_what_to_try(run: Run) -> None:
    for arguments in (["--help"], []):
        assert "hydra-llm demo" in run(*arguments).output


def test_main_returns_the_exit_code(
    cluster: SimulatedCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--version"]) == 0
    assert main(["explain", "llama9", f"--node={cluster['rack'].url}"]) == 1
    assert main(["no-such-command"]) == 2


def test_without_its_extra_the_command_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)

    assert main([]) == 1
    assert capsys.readouterr().err == (
        "the command line needs typer and rich: pip install 'hydra-llm[cli]'\n"
    )
