"""The decision log: what is in it, what is not, and how it is written."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hydra_llm import Client, Router, RoutingDecision, StreamBrokenError
from hydra_llm.calibration.log import MOST_WAITING, DecisionLog
from hydra_llm.calibration.records import Record, older_of, read_records
from hydra_llm.exceptions import ConfigurationError
from hydra_llm.scheduling import TERMS, Outcome
from hydra_llm.testing import TokenFault
from hydra_llm.types import Attempt
from tests.router.conftest import MODEL, make_nodes, make_router, preloaded
from tests.router.test_cordons import until

MESSAGES = [{"role": "user", "content": "Tell me about lighthouses."}]


class Told(RoutingDecision):
    """A finished request's decision, without a scheduler behind it."""

    def __init__(self, node: str = "a", ended: str = "ok") -> None:
        super().__init__(
            model=MODEL,
            attempts=(Attempt(node_id=node, node_url="http://a", outcome=ended, seconds=1.0),),
            actual={"total": 2.0, "queued": 0.5},
        )
        self._node = node
        if ended == "ok":
            self._outcome = Outcome(
                node_id=node, predicted={"total": 1.0}, actual={"total": 2.0}, samples=3
            )

    @property
    def selected_node(self) -> str:
        return self._node


def written(path: Path, decisions: Sequence[RoutingDecision], **about: Any) -> list[Record]:
    log = DecisionLog(path, wall_clock=lambda: 1_790_000_000.12345, **about)
    for decision in decisions:
        log.add(decision, 7)
    log.write()
    return read_records(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "decisions.jsonl"


def test_a_line_says_all_that_is_compared(path: Path) -> None:
    (record,) = written(path, [Told()])

    assert record == Record(
        at=1_790_000_000.123,
        node="a",
        model=MODEL,
        priority=7,
        ended="ok",
        attempts=1,
        answers_before=0,
        samples=3,
        foreseen_node="a",
        predicted={"total": 1.0},
        actual={"total": 2.0},
    )
    assert record.is_ok
    assert json.loads(path.read_text())["node"] == "a"


def test_the_answers_before_it_are_those_of_the_model_from_the_node(path: Path) -> None:
    nodes = [("a", "ok"), ("b", "ok"), ("a", "cancelled"), ("a", "ok"), ("a", "ok")]
    records = written(path, [Told(*each) for each in nodes])

    assert [record.answers_before for record in records] == [0, 0, 1, 1, 2]


def test_what_did_not_end_well_is_told_and_not_compared(path: Path) -> None:
    (record,) = written(path, [Told(ended="cancelled")])

    assert (record.ended, record.is_ok) == ("cancelled", False)
    assert record.actual == {"total": 2.0}


def test_nothing_is_written_before_it_is_time(path: Path) -> None:
    log = DecisionLog(path)
    log.add(Told(), 5)
    assert not path.exists()
    log.write()
    before = path.read_text()
    log.write()

    assert path.read_text() == before


def test_one_that_gets_too_long_is_set_aside_once(path: Path) -> None:
    log = DecisionLog(path, max_bytes=1000)
    for number in range(12):
        log.add(Told(str(number)), 5)
        log.write()
    sizes = [one.stat().st_size for one in (path, older_of(path))]

    assert sorted(path.parent.iterdir()) == [path, older_of(path)]
    assert max(sizes) <= 1000
    kept = [record.node for record in read_records(path)]
    assert kept == [str(number) for number in range(12)][-len(kept) :]
    assert len(kept) > 4


@pytest.mark.skipif(sys.platform == "win32", reason="files there have no such bits")
def test_only_its_owner_may_read_it(path: Path) -> None:
    written(path, [Told()])

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_file_that_cannot_be_written_is_said_once_and_harms_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    log = DecisionLog(tmp_path / "file" / "decisions.jsonl")
    for _ in range(2):
        log.add(Told(), 5)
        log.write()

    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        f"decision log {log.path}: it cannot be written"
    ]


def test_of_too_many_that_wait_the_oldest_are_lost(path: Path) -> None:
    log = DecisionLog(path)
    for number in range(MOST_WAITING + 2):
        log.add(Told(str(number)), 5)
    log.write()

    assert read_records(path)[0].node == "2"


def test_threads_lose_nothing(path: Path) -> None:
    log = DecisionLog(path)

    def add_some(number: int) -> None:
        for _ in range(50):
            log.add(Told(str(number)), 5)
            log.write()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add_some, range(4)))
    log.write()

    assert len(read_records(path)) == 200


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_what_a_fork_has_copied_is_written_once(path: Path) -> None:
    log = DecisionLog(path)
    log.add(Told("parent"), 5)

    def child() -> None:
        log.add(Told("child"), 5)
        log.write()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(10)
    log.write()

    assert sorted(record.node for record in read_records(path)) == ["child", "parent"]


# ------------------------------------------------------------------------- reading


def test_lines_that_are_none_are_passed_over(path: Path) -> None:
    written(path, [Told("a"), Told("b")])
    with path.open("a") as file:
        file.write('{"at": 1790000000.1, "node"')

    assert [record.node for record in read_records(path)] == ["a", "b"]


@pytest.mark.parametrize("text", ["hello\n", "[1]\n2\n", '{"a": 1}\n', '{"predicted": 3}\n'])
def test_another_file_is_no_decision_log(tmp_path: Path, text: str) -> None:
    (tmp_path / "notes").write_text(text)
    with pytest.raises(ConfigurationError, match="notes: it is no decision log"):
        read_records(tmp_path / "notes")


def test_a_file_that_is_not_there_is_said_so(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no such file"):
        read_records(path)


# ---------------------------------------------------------------------- of a router


def test_a_router_writes_one_while_it_runs_and_the_rest_at_its_end(path: Path) -> None:
    with preloaded(make_nodes("a"), MODEL) as cluster:
        with make_router(cluster, decision_log=path) as router, Client(router=router) as client:
            client.chat(MODEL, MESSAGES, priority=8)
            until(path.exists)
            assert [record.priority for record in read_records(path)] == [8]
            list(client.chat(MODEL, MESSAGES, stream=True))
            cluster["a"].inject(TokenFault(after=2))
            with pytest.raises(StreamBrokenError):
                list(client.chat(MODEL, MESSAGES, stream=True))
        records = read_records(path)

    assert [record.ended for record in records] == ["ok", "ok", "reset"]
    assert [record.answers_before for record in records] == [0, 1, 2]
    assert set(records[1].predicted) == set(records[1].actual) == set(TERMS)
    assert set(records[0].actual) == set(TERMS) - {"first_token"}
    assert set(records[2].actual) == {"total"}
    assert "lighthouse" not in path.read_text().lower()
    assert "http" not in path.read_text()


def test_it_holds_no_credential(path: Path) -> None:
    with preloaded(make_nodes("a"), MODEL) as cluster:
        url = cluster["a"].url.replace("http://", "http://user:sesame@")
        with make_router(cluster, nodes=[f"a={url}"], decision_log=path) as router:
            with Client(router=router) as client:
                client.chat(MODEL, MESSAGES, node_id=url)

    assert [record.node for record in read_records(path)] == ["a"]
    assert "sesame" not in path.read_text()


async def test_an_event_loop_closes_it_too(path: Path) -> None:
    from hydra_llm import AsyncClient

    with preloaded(make_nodes("a"), MODEL) as cluster:
        router = make_router(cluster, decision_log=path)
        async with router, AsyncClient(router=router) as client:
            await client.chat(MODEL, MESSAGES)

    assert len(read_records(path)) == 1


def test_without_the_setting_nothing_is_kept() -> None:
    with preloaded(make_nodes("a"), MODEL) as cluster, make_router(cluster) as router:
        assert router.settings.decision_log is None
        assert isinstance(router, Router)
        assert router._decision_log is None
