"""Three simulated nodes, and the commands run in this process."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hydra_llm.cli.app import app
from hydra_llm.testing import SimulatedCluster

Run = Callable[..., Result]


@pytest.fixture
def cluster() -> Iterator[SimulatedCluster]:
    """A workstation, a rack and a gaming PC, twenty times as fast as real ones."""
    with SimulatedCluster.demo(speed=20) as cluster:
        yield cluster


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in 120 columns; options to name the nodes come from ``on``."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str, on: SimulatedCluster | None = None, **about: Any) -> Result:
        nodes = [f"--node={node.id}={node.url}" for node in on] if on is not None else []
        return CliRunner().invoke(app, [*arguments, *nodes], **about)

    return run
