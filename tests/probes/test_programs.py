from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from hydra_llm.probes.programs import Program, Programs

linux = pytest.mark.skipif(sys.platform != "linux", reason="links to files that are not there")


class Proc:
    """A ``/proc`` of our own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, pid: int, comm: str, parent: int = 1, command: str = "") -> None:
        folder = self.root / "proc" / str(pid)
        folder.mkdir(parents=True)
        # As the kernel does it.
        comm = comm[:15]
        (folder / "comm").write_bytes(f"{comm}\n".encode("utf-8", "surrogateescape"))
        stat = f"{pid} ({comm}) S {parent} 1 1 0"
        (folder / "stat").write_bytes(stat.encode("utf-8", "surrogateescape"))
        (folder / "cmdline").write_text(command.replace(" ", "\0") + "\0")

    def program(self, pid: int) -> Program:
        return Programs(self.root).program(pid)


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path)


def test_the_runner_of_today_is_ollamas(proc: Proc) -> None:
    proc.add(1203, "ollama", command="/usr/local/bin/ollama serve")
    proc.add(4711, "llama-server", parent=1203)

    assert proc.program(4711) == ("llama-server", "ollama")


def test_the_runner_of_05_is_the_server_itself(proc: Proc) -> None:
    proc.add(4711, "ollama", command="/usr/local/bin/ollama runner --model x")

    assert proc.program(4711) == ("ollama", "ollama")


def test_the_runner_before_that_has_a_name_longer_than_the_kernel_keeps(proc: Proc) -> None:
    proc.add(4711, "ollama_llama_server", command="/tmp/ollama1/ollama_llama_server --port 1")

    assert proc.program(4711) == ("ollama_llama_server", "ollama")


def test_whatever_ollama_has_started_is_ollamas(proc: Proc) -> None:
    proc.add(10, "ollama")
    proc.add(11, "a shell) S 9 (", parent=10)
    proc.add(12, "runner", parent=11)

    assert proc.program(12) == ("runner", "ollama")


def test_another_program_is_another_program(proc: Proc) -> None:
    proc.add(10, "bash")
    proc.add(11, "python3", parent=10, command="python3 /opt/ollama/ollama train.py")
    proc.add(12, "ollama-exporter")

    assert proc.program(11) == ("python3", "other")
    assert proc.program(12) == ("ollama-exporter", "other")


def test_who_has_ended_meanwhile_has_no_name(proc: Proc) -> None:
    assert proc.program(4711) == ("", "other")


def test_a_long_name_that_the_command_does_not_begin_with_stays_as_it_is(proc: Proc) -> None:
    proc.add(1, "a-name-that-was-set", command="/usr/bin/python3 x")

    assert proc.program(1).name == "a-name-that-was"


def test_a_name_that_is_no_text_is_shown_as_far_as_it_is(proc: Proc) -> None:
    proc.add(7, "b\udcffd")

    assert proc.program(7).name == "b�d"


def test_parents_that_go_in_a_circle_end(proc: Proc) -> None:
    proc.add(7, "a", parent=8)
    proc.add(8, "b", parent=7)

    assert proc.program(7) == ("a", "other")


@pytest.mark.parametrize(
    ("told", "program"),
    [
        ("/usr/local/lib/ollama/llama-server", ("llama-server", "ollama")),
        (r"C:\Programs\Ollama\ollama.exe", ("ollama", "ollama")),
        (r"C:\Windows\explorer.EXE", ("explorer", "other")),
        ("", ("", "other")),
    ],
)
def test_without_proc_what_the_driver_says_must_do(
    proc: Proc, told: str, program: tuple[str, str]
) -> None:
    assert Programs(proc.root).program(4711, told) == program


@linux
@pytest.mark.parametrize(("namespace", "expected"), [("4026531836", True), ("4026532201", False)])
def test_pids_are_those_of_the_host_in_its_own_namespace_alone(
    tmp_path: Path, namespace: str, expected: bool
) -> None:
    (tmp_path / "proc/self/ns").mkdir(parents=True)
    (tmp_path / "proc/self/ns/pid").symlink_to(f"pid:[{namespace}]")

    assert Programs(tmp_path).are_the_hosts() is expected


def test_where_there_are_no_namespaces_pids_are_those_of_the_host(tmp_path: Path) -> None:
    assert Programs(tmp_path).are_the_hosts() is True


@linux
def test_this_process_has_a_name() -> None:
    assert Programs().program(os.getpid()).name
