"""What a router has learned of real servers is known to the next one before any request."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hydra_llm import AsyncClient, Client, Router
from hydra_llm.testing import SimulatedCluster
from hydra_llm.types import Speed
from tests.router.conftest import MODEL, make_nodes, make_router

HELLO = [{"role": "user", "content": "Why is the sky blue? " * 40}]


@pytest.fixture
def lone() -> Iterator[SimulatedCluster]:
    """One node, at a speed at which a load still counts as one; nothing is loaded."""
    with SimulatedCluster(make_nodes("a", speed=2.0)) as cluster:
        yield cluster


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "rates.json"


def keeping(cluster: SimulatedCluster, file: Path, **settings: Any) -> Router:
    return make_router(cluster, state_dir=file.parent, **settings)


def speed(router: Router) -> Speed:
    return router.nodes()[0].speeds.get(MODEL, Speed())


def version(file: Path) -> int | None:
    return json.loads(file.read_text("utf-8"))["hydra_llm_rates"] if file.exists() else None


def answer(router: Router) -> None:
    Client(router=router).chat(MODEL, HELLO, options={"num_predict": 8})


def test_the_next_router_has_the_same_speeds_before_any_request(
    lone: SimulatedCluster, file: Path
) -> None:
    with keeping(lone, file) as router:
        answer(router)
        before, node = speed(router), router.nodes()[0]
    assert before.load_seconds is not None
    assert before.prefill_seconds_per_token is not None
    assert before.decode_seconds_per_token is not None

    with keeping(lone, file) as router:
        after = router.nodes()[0]

    for name in (
        *("prefill_seconds_per_token", "decode_seconds_per_token", "load_seconds"),
        "output_tokens",
    ):
        assert getattr(after.speeds[MODEL], name) == pytest.approx(getattr(before, name), rel=1e-5)
    assert after.bytes_per_second == pytest.approx(node.bytes_per_second, rel=1e-5)
    assert after.load_bytes_per_second == pytest.approx(node.load_bytes_per_second, rel=1e-5)
    assert after.need_ratios == pytest.approx(node.need_ratios, rel=1e-5)


async def test_it_is_written_at_the_end_in_an_event_loop_too(
    cluster: SimulatedCluster, file: Path
) -> None:
    async with keeping(cluster, file) as router:
        await AsyncClient(router=router).chat(MODEL, HELLO)
        assert version(file) is None

    assert version(file) == 1


def test_it_can_be_switched_off(lone: SimulatedCluster, file: Path) -> None:
    with keeping(lone, file) as router:
        answer(router)
    kept = file.read_bytes()

    with keeping(lone, file, keep_rates=False) as router:
        assert speed(router) == Speed()
        answer(router)

    assert file.read_bytes() == kept


def test_a_file_deleted_while_running_is_written_again(lone: SimulatedCluster, file: Path) -> None:
    with keeping(lone, file) as router:
        answer(router)
    with keeping(lone, file) as router:
        router.nodes()
        file.unlink()
        answer(router)

    assert file.exists()


def test_a_file_that_cannot_be_costs_no_answer(cluster: SimulatedCluster, file: Path) -> None:
    file.mkdir(parents=True)

    with keeping(cluster, file) as router:
        answer(router)
        assert max(node.speeds[MODEL].samples for node in router.nodes() if node.speeds) == 1


def test_nothing_is_written_where_nothing_was_learned(lone: SimulatedCluster, file: Path) -> None:
    with keeping(lone, file) as router:
        router.refresh()
    with keeping(lone, file):
        pass

    assert not file.parent.exists()


def test_a_router_that_nobody_closes_writes_when_its_process_ends(
    lone: SimulatedCluster, file: Path
) -> None:
    script = f"""
        from hydra_llm import Client, HydraSettings, Router

        settings = HydraSettings({lone.urls!r}, state_dir={str(file.parent)!r})
        router = Router(settings=settings)
        Client(router=router).chat({MODEL!r}, {HELLO!r}, options={{"num_predict": 8}})
    """

    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=50)

    assert "decode" in file.read_text(encoding="utf-8")


def test_nothing_looks_at_the_file_before_a_node_is_probed(file: Path) -> None:
    script = f"""
        import sys

        touched = []
        folder = {str(file.parent)!r}
        sys.addaudithook(lambda event, args: folder in repr(args) and touched.append(event))
        from hydra_llm import HydraSettings, Router

        with Router(settings=HydraSettings("http://127.0.0.1:9", state_dir=folder)) as router:
            pass
        print(touched)
    """

    told = subprocess.check_output(
        [sys.executable, "-c", textwrap.dedent(script)], text=True, timeout=50
    )

    assert told.strip() == "[]"
    assert not file.parent.exists()
