"""The command line as its users run it: a process of its own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest

from hydra_llm.testing import SimulatedCluster


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "hydra_llm", *arguments]


def environment(**about: str) -> dict[str, str]:
    return {**os.environ, "PYTHONIOENCODING": "utf-8", **about}


def run(arguments: Sequence[str], **about: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*arguments),
        env=environment(**about),
        capture_output=True,
        encoding="utf-8",
        timeout=50,
        check=False,
    )


def named(cluster: SimulatedCluster) -> str:
    return ",".join(f"{node.id}={node.url}" for node in cluster)


def test_nodes_come_from_the_environment(cluster: SimulatedCluster) -> None:
    done = run(["nodes", "--json"], HYDRA_LLM_NODES=named(cluster))

    assert done.returncode == 0, done.stderr
    assert [node["health"] for node in json.loads(done.stdout)] == ["up"] * 3


def test_a_chat_can_be_piped(cluster: SimulatedCluster) -> None:
    done = run(["chat", "llama3.2:3b", "Hello"], HYDRA_LLM_NODES=named(cluster))

    assert done.returncode == 0
    assert done.stdout.endswith("\n")
    assert done.stderr.startswith("[")
    assert "\x1b" not in done.stdout + done.stderr


@pytest.fixture
def heeded_ctrl_c() -> Iterator[None]:
    """What a shell starts in the background ignores Ctrl-C, and so would all that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.usefixtures("heeded_ctrl_c")
def test_ctrl_c_ends_watching_with_0(cluster: SimulatedCluster) -> None:
    with subprocess.Popen(
        command("nodes", "--watch", "--json", "--interval=0.2"),
        env=environment(HYDRA_LLM_NODES=named(cluster)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        process.stdout.read()
        assert not process.stderr.read()
    assert len(json.loads(first)) == 3


def test_a_terminal_that_knows_no_arrows_gets_question_marks(cluster: SimulatedCluster) -> None:
    done = run(["explain", "qwen3:8b"], HYDRA_LLM_NODES=named(cluster), PYTHONIOENCODING="ascii")

    assert done.returncode == 0, done.stderr
    assert "?" in done.stdout


def test_nobody_reading_on_is_no_error(cluster: SimulatedCluster) -> None:
    with subprocess.Popen(
        command("nodes", "--watch", "--json", "--interval=0.2"),
        env=environment(HYDRA_LLM_NODES=named(cluster)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(20) == 0
        assert not process.stderr.read()
