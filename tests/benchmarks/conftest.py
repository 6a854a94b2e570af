"""Nodes in a process of their own, so that their work is not counted as ours."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hydra_llm import HydraSettings, Node, Router

SERVER = Path(__file__).with_name("serve.py")


@pytest.fixture(scope="module")
def urls() -> Iterator[list[str]]:
    """Three simulated nodes a, b, c with the model loaded, as fast as they can."""
    process = subprocess.Popen(
        [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    yield process.stdout.readline().split()
    process.stdin.close()
    process.wait(10)
    process.stdout.close()


@pytest.fixture(scope="module")
def router(urls: list[str]) -> Iterator[Router]:
    """Over these nodes, already seen, and quiet."""
    nodes = [Node(url, id=name, vram_gb=24) for name, url in zip("abc", urls, strict=True)]
    settings = HydraSettings(nodes=nodes, vram_monitoring=False, health_check_interval=60)
    with Router(settings=settings) as router:
        router.nodes()
        yield router


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The paired differences, which pytest-benchmark's table has no column for."""
    for line in PAIRED:
        terminalreporter.write_line(line)


PAIRED: list[str] = []
