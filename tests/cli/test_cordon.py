"""Nodes are taken out of use from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydra_llm.testing import SimulatedCluster
from tests.cli.conftest import Run
from tests.router.conftest import make_router


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HYDRA_LLM_STATE_DIR", str(tmp_path))
    return tmp_path


def test_a_running_router_obeys(run: Run, cluster: SimulatedCluster, state: Path) -> None:
    with make_router(cluster, state_dir=state) as router:
        told = run("cordon", "rack", on=cluster)
        assert told.exit_code == 0
        assert told.stdout == ("rack gets no new requests; hydra-llm uncordon rack ends that\n")
        assert [node.id for node in router.nodes() if node.cordoned] == ["rack"]
        assert "cordoned" in run("nodes", on=cluster).stdout

    assert run("uncordon", "rack", on=cluster).stdout == "rack gets requests again\n"
    assert "cordoned" not in run("nodes", on=cluster).stdout


def test_draining_without_redis_says_what_it_cannot_know(
    run: Run, cluster: SimulatedCluster
) -> None:
    told = run("drain", "rack", on=cluster)

    assert told.exit_code == 0
    assert "gets no new requests" in told.stdout
    assert "cannot be counted from here" in " ".join(told.stderr.split())


@pytest.mark.parametrize("command", ["cordon", "uncordon", "drain"])
def test_an_unknown_node_is_named(run: Run, cluster: SimulatedCluster, command: str) -> None:
    told = run(command, "nobody", on=cluster)

    assert told.exit_code == 2
    assert "no configured node is called 'nobody'" in " ".join(told.stderr.split())
