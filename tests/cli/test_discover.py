"""``hydra-llm discover``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hydra_llm.cli import discovering
from hydra_llm.config import HydraSettings
from hydra_llm.discovery import Announced, mdns
from hydra_llm.testing import HangFault, SimulatedNode
from tests.cli.conftest import Run

NOWHERE = "127.0.0.99"


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hydra.toml"


@pytest.fixture
def node() -> Iterator[SimulatedNode]:
    models = ("llama3.2:3b", "qwen3:8b", "gemma3:12b", "nomic-embed-text")
    with SimulatedNode("a", host="127.0.0.2", models=models) as node:
        yield node


@pytest.fixture
def somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    """In front of a terminal."""
    monkeypatch.setattr(discovering, "_is_somebody_there", lambda: True)


def found(run: Run, node: SimulatedNode, *more: str, say: str | None = None) -> tuple[int, str]:
    about = {} if say is None else {"input": say}
    done = run("discover", "127.0.0.2/31", "--port", str(node.port), "--rate=500", *more, **about)
    return done.exit_code, done.stdout + done.stderr


def test_what_is_found_is_shown_and_nothing_is_written(
    run: Run, node: SimulatedNode, path: Path
) -> None:
    code, said = found(run, node)

    assert code == 0
    assert f"127.0.0.2:{node.port}" in said
    assert "0.32.15" in said
    assert "4: gemma3:12b, llama3.2:3b, nomic-embed-text:latest, …" in said
    assert "found 1 Ollama server at 2 of 2 addresses" in said
    assert "nothing is written; --yes adds 1 node to hydra.toml" in said
    assert not path.exists()


def test_json_is_for_programs(run: Run, node: SimulatedNode, path: Path) -> None:
    done = run("discover", "127.0.0.2", f"-p{node.port}", "--json")

    told = json.loads(done.stdout)
    [one] = told["found"]
    assert one["url"] == node.url
    assert one["known_as"] is None
    assert (told["asked"], told["planned"], told["complete"], told["written"]) == (1, 1, True, None)
    assert done.stderr == ""
    assert not path.exists()


@pytest.mark.usefixtures("somebody")
@pytest.mark.parametrize(("answer", "written"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_it_asks_before_it_writes(
    run: Run, node: SimulatedNode, path: Path, answer: str, *, written: bool
) -> None:
    code, said = found(run, node, say=answer)

    assert code == 0
    assert "write hydra.toml with 1 node? [y/N]" in said
    assert path.exists() is written


@pytest.mark.usefixtures("somebody")
def test_json_never_asks(run: Run, node: SimulatedNode, path: Path) -> None:
    code, said = found(run, node, "--json", say="y\n")

    assert code == 0
    assert "[y/N]" not in said
    assert not path.exists()


@pytest.mark.parametrize("option", ["--yes", "--write", "-y"])
def test_told_so_it_writes(run: Run, node: SimulatedNode, option: str) -> None:
    code, said = found(run, node, option)

    assert code == 0
    assert "wrote 1 to hydra.toml" in said
    assert "take the place of http://localhost:11434" in said
    assert [one.url for one in HydraSettings().nodes] == [node.url]


def test_a_second_time_there_is_nothing_to_write(run: Run, node: SimulatedNode, path: Path) -> None:
    found(run, node, "--yes")
    before = path.read_bytes()

    code, said = found(run, node, "--yes")

    assert code == 0
    assert "wrote" not in said
    assert f"127.0.0.2:{node.port}  0.32.15" in said.replace("│", " ")
    assert path.read_bytes() == before


@pytest.mark.usefixtures("somebody")
def test_an_existing_file_is_added_to_only_when_agreed(
    run: Run, node: SimulatedNode, path: Path
) -> None:
    before = b"max_queue = 7  # mine\n"
    path.write_bytes(before)

    _, said = found(run, node, say="n\n")
    assert "add 1 node at the end of hydra.toml? [y/N]" in said
    assert path.read_bytes() == before

    found(run, node, say="y\n")
    assert path.read_bytes().startswith(before)
    assert HydraSettings().max_queue == 7


def test_another_file_may_be_named(run: Run, node: SimulatedNode, path: Path) -> None:
    code, _ = found(run, node, "--yes", "--output", "other.toml")

    assert code == 0
    assert not path.exists()
    assert node.url in (path.parent / "other.toml").read_text()


def test_the_file_that_is_read_is_the_one_that_is_written(
    run: Run, node: SimulatedNode, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = path.parent / "mine.toml"
    other.write_text("max_queue = 7\n")
    monkeypatch.setenv("HYDRA_LLM_CONFIG", str(other))

    found(run, node, "--yes")

    assert not path.exists()
    assert node.url in other.read_text()


def test_a_variable_that_goes_before_the_file_is_named(
    run: Run, node: SimulatedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_LLM_NODES", f"rig={node.url}")

    code, said = found(run, node, "--yes")

    assert code == 0
    assert "rig" in said
    assert "HYDRA_LLM_NODES is set and goes before the file" in said


def test_networks_and_ports_come_from_the_settings(
    run: Run, node: SimulatedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_LLM_DISCOVERY_NETWORKS", "127.0.0.2/32, 127.0.0.3")
    monkeypatch.setenv("HYDRA_LLM_DISCOVERY_PORTS", str(node.port))

    done = run("discover", "--json")

    assert [one["url"] for one in json.loads(done.stdout)["found"]] == [node.url]


def test_it_says_what_is_missing_to_read_exporters(
    run: Run, node: SimulatedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "exporters' pages" not in found(run, node)[1]
    monkeypatch.setattr(discovering, "find_spec", lambda name: None)
    assert "pip install 'hydra-llm[gpu]'" in found(run, node)[1]


# ---------------------------------------------------------------------- exit codes


def test_nothing_found_is_1(run: Run, node: SimulatedNode) -> None:
    done = run("discover", NOWHERE, "-p", str(node.port))

    assert done.exit_code == 1
    assert "found 0 Ollama servers at 1 of 1 address" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name one, as hydra-llm discover 192.168.1.0/24"),
        (["10.0.0.0/8"], "too many"),
        (["203.0.113.0/24"], "--allow-public"),
        (["rig"], "write it like"),
        (["127.0.0.1", "--port=0"], "--port"),
        (["127.0.0.1", "--rate=0"], "--rate"),
        (["127.0.0.1", "--timeout=0"], "--timeout"),
    ],
)
def test_what_is_wrong_is_told_and_leaves_with_2(run: Run, arguments: list[str], says: str) -> None:
    done = run("discover", *arguments)

    assert done.exit_code == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_is_broken_is_told_before_the_search(
    run: Run, node: SimulatedNode, path: Path
) -> None:
    (path.parent / "other.toml").write_text("nodes = [")

    code, said = found(run, node, "--output=other.toml")

    assert (code, node.requests) == (2, [])
    assert "other.toml: it is not TOML" in said


def test_a_search_out_of_time_says_so(run: Run, node: SimulatedNode) -> None:
    done = run("discover", "127.0.0.0/24", f"-p{node.port}", "--timeout=0.1", "--rate=20")

    assert "the time was over with" in done.stderr
    assert "raise --timeout, or --rate" in done.stderr


def test_a_search_in_the_background_is_not_for_commands(
    run: Run, node: SimulatedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_LLM_DISCOVERY_ENABLED", "yes")
    monkeypatch.setenv("HYDRA_LLM_DISCOVERY_NETWORKS", "127.0.0.2")
    monkeypatch.setenv("HYDRA_LLM_DISCOVERY_PORTS", str(node.port))
    monkeypatch.setattr("hydra_llm.discovery.watch.DiscoveryWatch.start", pytest.fail)

    for command in ("nodes", "doctor"):
        run(command, f"--node={node.url}")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_it_cleanly(node: SimulatedNode, path: Path) -> None:
    node.inject(HangFault(), paths=("/api/version",))
    arguments = ["discover", "127.0.0.0/24", f"-p{node.port}", "--yes", "--rate=5"]
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "hydra_llm", *arguments],
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        # What a shell starts in the background ignores Ctrl-C, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    try:
        while not node.requests:
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()

    assert process.returncode == 130
    assert (out, err) == ("", "")
    assert not path.exists()


# ---------------------------------------------------------------------------- mDNS


def test_agents_that_announce_themselves_are_looked_at(
    run: Run, node: SimulatedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ipaddress import ip_address

    async def listen() -> list[Announced]:
        return [Announced(name="rig", addresses=(ip_address("127.0.0.2"),), port=node.port)]

    monkeypatch.setattr(mdns, "listen", listen)

    done = run("discover", "--mdns", "--json")

    assert done.exit_code == 0, done.stderr
    assert [one["url"] for one in json.loads(done.stdout)["found"]] == [node.url]


def test_without_zeroconf_it_says_what_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zeroconf", None)
    monkeypatch.setitem(sys.modules, "zeroconf.asyncio", None)

    for arguments in (["discover", "--mdns"], ["agent", "--announce", "--port=0"]):
        done = run(*arguments)

        assert done.exit_code == 1
        assert "pip install 'hydra-llm[mdns]'" in done.stderr
