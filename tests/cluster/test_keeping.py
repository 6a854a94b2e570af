"""What one router has learned, the next one begins with; and a file that is bad harms nobody."""

from __future__ import annotations

import json
import logging
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.cluster import Cluster, Keeping, RatesFile
from hydra_llm.cluster.keeping import KEPT_SAMPLES, OLD_SECONDS, WRITE_SECONDS
from hydra_llm.cluster.rates_file import FORGOTTEN_SECONDS, MAX_ENTRIES
from hydra_llm.types import Node, NodeSnapshot, Observation, Speed, Usage
from tests.cluster.ledgers import Clock, granted, ledger, node, seen, snapshot_of
from tests.helpers import LLAMA, installed, loaded, request

URL = "http://a:11434"
DIGEST = installed(LLAMA)[LLAMA].digest
NOW = 1_790_000_000.0
DAY = 24 * 3600.0


class Life:
    """A router's ledger and what keeps its rates, from a start to an end."""

    def __init__(self, path: Path, *nodes: Node, at: float = NOW, **about: Any) -> None:
        self.clock, self.wall = Clock(), Clock()
        self.wall.now = at
        nodes = nodes or (node("a", slots=None),)
        self.cluster = ledger(nodes=nodes, clock=self.clock)
        self.file = RatesFile(path)
        self.keeping = Keeping(self.file, self.cluster, clock=self.clock, wall_clock=self.wall)
        for each in nodes:
            self.see(seen(each.id, **{"warm": (LLAMA,), **about}))

    def see(self, observation: Observation) -> None:
        self.keeping.recall(observation.node_id)
        self.cluster.observe(observation)

    def answer(self, token_seconds: float = 0.02, node_id: str = "a") -> None:
        """One complete answer, alone on its node."""
        usage = Usage(
            total_seconds=100 * token_seconds,
            decode_seconds=100 * token_seconds,
            prompt_tokens=100,
            output_tokens=100,
        )
        self.cluster.succeeded(granted(self.cluster, request(node_id=node_id)), usage)

    def end(self) -> None:
        self.keeping.write()

    @property
    def speed(self) -> Speed:
        return snapshot_of(self.cluster).speeds.get(LLAMA, Speed())

    @property
    def node(self) -> NodeSnapshot:
        return snapshot_of(self.cluster)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "made when needed" / "rates.json"


@pytest.fixture
def kept(path: Path) -> Path:
    """A file of one router that has seen four answers."""
    life = Life(path)
    for _ in range(4):
        life.answer(0.02)
    life.end()
    return path


def content(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def entry(path: Path, digest: str = DIGEST, url: str = URL) -> Any:
    return content(path)["nodes"][url][digest]


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# ---------------------------------------------------------------------- what is kept


def test_a_router_begins_with_what_the_one_before_it_knew(kept: Path) -> None:
    life = Life(kept)

    assert life.speed.decode_seconds_per_token == pytest.approx(0.02)
    assert life.speed.output_tokens == pytest.approx(100.0)
    assert life.node.bytes_per_second == pytest.approx(2e9 / 0.02)
    assert not life.cluster.in_flight


def test_every_kind_of_rate_is_kept(path: Path) -> None:
    before = Life(path)
    learner = before.cluster._records["a"].learner
    usage = Usage(
        total_seconds=9.0, load_seconds=4.0, prefill_seconds=1.0, decode_seconds=4.0,
        prompt_tokens=1000, output_tokens=200,
    )  # fmt: skip
    about: dict[str, Any] = {"cached_tokens": 0, "size_bytes": 2_000_000_000, "on_gpu": True}
    learner.learn(LLAMA, usage, caused_load=True, alone=True, peers=0, **about)
    learner.learn(LLAMA, usage, caused_load=False, alone=False, peers=3, **about)
    before.cluster._records["a"].need_ratios = {LLAMA: 1.07}
    before.end()

    after = Life(path, warm=())

    speed = after.speed
    assert speed.decode_seconds_per_token == pytest.approx(0.02)
    assert speed.prefill_seconds_per_token == pytest.approx(0.001)
    assert speed.load_seconds == pytest.approx(4.0)
    assert speed.output_tokens == pytest.approx(200.0)
    assert speed.slots == 4
    assert after.node.load_bytes_per_second == pytest.approx(0.5e9)
    assert after.node.bytes_per_second == pytest.approx(100e9)
    assert after.node.need_ratios == {LLAMA: pytest.approx(1.07)}


def test_what_is_seen_of_a_loaded_model_beats_the_kept_need(path: Path) -> None:
    before = Life(path, warm=())
    before.cluster._records["a"].need_ratios = {LLAMA: 3.0}
    before.end()
    after = Life(path)

    after.see(seen("a", at=1.0, loaded=loaded(LLAMA)))

    assert after.node.need_ratios[LLAMA] < 2.0


def test_a_kept_need_stays_within_the_bounds_of_the_nodes_settings(path: Path) -> None:
    before = Life(path, warm=())
    before.cluster._records["a"].need_ratios = {LLAMA: 3.0}
    before.end()

    after = Life(path, node("a", slots=1, kv_cache_type="f16"), warm=())

    assert after.node.need_ratios == {LLAMA: 1.3}


def test_a_changed_file_is_another_model_and_the_old_one_is_known_when_it_returns(
    kept: Path,
) -> None:
    life = Life(kept)
    pulled = replace(installed(LLAMA)[LLAMA], digest="another")

    life.see(seen("a", at=1.0, installed={LLAMA: pulled}))
    assert life.speed == Speed()

    life.see(seen("a", at=2.0))
    assert life.speed.decode_seconds_per_token == pytest.approx(0.02)


def test_what_was_measured_since_is_not_undone_when_a_model_comes_back(path: Path) -> None:
    before = Life(path, warm=())
    before.cluster._records["a"].need_ratios = {LLAMA: 3.0}
    before.answer(0.02)
    before.end()
    life = Life(path)
    for _ in range(9):
        life.answer(0.2)
    needed = life.node.need_ratios

    life.see(seen("a", at=1.0, models=()))
    life.see(seen("a", at=2.0))

    assert life.speed.decode_seconds_per_token == pytest.approx(0.2, rel=0.5)
    assert life.speed.samples > 9
    assert life.node.need_ratios == needed


def test_another_node_of_that_name_is_another_node(kept: Path) -> None:
    elsewhere = Node("http://b:11434", id="a", local=False)

    assert Life(kept, elsewhere).speed == Speed()
    assert Life(kept, Node(URL, id="renamed", local=False)).keeping._shown


def test_a_node_that_is_added_later_is_known_too(path: Path) -> None:
    first = Life(path, node("a"), node("b"))
    first.answer(0.02, node_id="b")
    first.end()
    life = Life(path, node("a"))
    life.cluster.add_nodes([node("b")])

    life.see(seen("b", warm=(LLAMA,)))

    known = snapshot_of(life.cluster, "b").speeds[LLAMA]
    assert known.decode_seconds_per_token == pytest.approx(0.02)


def test_two_names_of_one_file_are_kept_as_one(path: Path) -> None:
    alias = replace(installed(LLAMA)[LLAMA], name="mine:latest")
    both = {LLAMA: installed(LLAMA)[LLAMA], "mine:latest": alias}
    life = Life(path, installed=both)
    life.answer()
    life.end()

    after = Life(path, installed=both)

    known = after.node.speeds["mine:latest"]
    assert known.decode_seconds_per_token == pytest.approx(0.02)


def test_no_credential_is_in_the_file(path: Path) -> None:
    secret = Node(
        "http://me:geheim@a:11434", id="a", headers={"X-Key": "geheim"},
        exporter="http://you:geheim@a:9400", exporter_headers={"X-Key": "geheim"},
    )  # fmt: skip
    life = Life(path, secret)
    life.answer()
    life.end()

    assert list(content(path)["nodes"]) == [URL]
    assert "geheim" not in path.read_text(encoding="utf-8")


# ------------------------------------------------------------------------- its worth


def test_a_kept_rate_is_overtaken_by_new_answers(kept: Path) -> None:
    life = Life(kept)
    assert life.speed.samples == KEPT_SAMPLES

    for _ in range(3):
        life.answer(0.2)

    assert life.speed.decode_seconds_per_token is not None
    assert life.speed.decode_seconds_per_token > 0.063, "most of the way, as factors go"


def test_an_old_rate_is_worth_less_and_a_very_old_one_nothing(kept: Path) -> None:
    fresh = Life(kept, at=NOW + OLD_SECONDS - 1)
    old = Life(kept, at=NOW + OLD_SECONDS)
    forgotten = Life(kept, at=NOW + FORGOTTEN_SECONDS)

    for life in (fresh, old):
        life.answer(0.2)
    assert fresh.speed.decode_seconds_per_token is not None
    assert old.speed.decode_seconds_per_token is not None
    assert fresh.speed.decode_seconds_per_token < old.speed.decode_seconds_per_token
    assert forgotten.speed == Speed()


def test_a_date_in_the_future_is_taken_for_now(kept: Path) -> None:
    life = Life(kept, at=NOW - 1000 * DAY)
    life.answer()
    life.end()

    assert life.speed.samples == KEPT_SAMPLES + 1
    assert entry(kept)["at"] == NOW - 1000 * DAY


def test_what_was_not_measured_for_long_leaves_the_file(kept: Path) -> None:
    life = Life(kept, node("b"), at=NOW + FORGOTTEN_SECONDS)
    life.answer(node_id="b")
    life.end()

    assert list(content(kept)["nodes"]) == ["http://b:11434"]


def test_of_too_many_entries_the_oldest_go(path: Path) -> None:
    nodes = {
        f"http://n{n}:1": {"": {"at": NOW - n - 1, "bandwidth": [1e9, 1]}}
        for n in range(MAX_ENTRIES)
    }
    written(path, json.dumps({"hydra_llm_rates": 1, "nodes": nodes}))
    life = Life(path)
    life.answer()
    life.end()

    kept = content(path)["nodes"]
    assert sum(map(len, kept.values())) == MAX_ENTRIES
    assert len(kept[URL]) == 2, "the node and the model"
    assert "http://n0:1" in kept
    assert f"http://n{MAX_ENTRIES - 2}:1" not in kept


# --------------------------------------------------------------------- when it is written


def test_it_is_written_every_few_minutes_and_only_if_there_is_news(path: Path) -> None:
    life = Life(path, warm=())
    life.keeping.tick()
    life.see(seen("a", at=1.0, warm=(LLAMA,)))
    life.answer()
    life.keeping.tick()
    assert not path.exists()

    life.clock.now += WRITE_SECONDS
    life.keeping.tick()
    assert entry(path)["decode"] == [0.02, 1]

    path.unlink()
    life.clock.now += WRITE_SECONDS
    life.keeping.tick()
    assert not path.exists(), "nothing has changed"


def test_a_file_that_is_only_read_is_not_written(kept: Path) -> None:
    before = kept.stat().st_mtime_ns, kept.read_bytes()

    for _ in range(3):
        Life(kept, at=NOW + DAY).end()

    assert (kept.stat().st_mtime_ns, kept.read_bytes()) == before


def test_a_file_deleted_while_running_is_made_anew_with_all_that_is_known(kept: Path) -> None:
    life = Life(kept, node("a"), node("b"), at=NOW + DAY)
    kept.unlink()
    life.answer(node_id="b")
    life.end()

    assert entry(kept)["decode"] == [0.02, KEPT_SAMPLES]
    assert entry(kept)["at"] == NOW, "the other's age is not lost"
    assert entry(kept, url="http://b:11434")["at"] == NOW + DAY


def test_two_routers_put_together_what_each_has_measured(path: Path) -> None:
    one, two = (Life(path, node("a"), node("b")) for _ in range(2))
    one.answer(0.02, node_id="a")
    two.answer(0.04, node_id="b")
    one.end()
    two.end()

    assert entry(path)["decode"] == [0.02, 1]
    assert entry(path, url="http://b:11434")["decode"] == [0.04, 1]


def test_of_two_that_measured_the_same_the_later_counts(kept: Path) -> None:
    one, two = Life(kept), Life(kept)
    one.answer(0.08)
    one.end()
    two.cluster._records["a"].need_ratios = {LLAMA: 1.9}
    two.end()
    assert entry(kept)["need"] == [1.9, 1]
    assert entry(kept)["decode"][0] > 0.02, "what the other has not measured it does not undo"

    two.answer(0.005)
    two.end()
    assert entry(kept)["decode"][0] < 0.02


def test_what_cannot_be_written_now_is_written_later(path: Path) -> None:
    life = Life(path)
    life.answer()
    written(path.parent, "a file where the folder should be")
    life.end()

    path.parent.unlink()
    life.end()
    assert entry(path)["decode"] == [0.02, 1]


def test_nothing_but_the_file_is_left_in_the_folder(kept: Path) -> None:
    life = Life(kept)
    life.answer()
    life.end()

    assert os.listdir(kept.parent) == [kept.name]  # noqa: PTH208  as a user sees it


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such modes")
def test_it_is_for_its_owner_alone(kept: Path) -> None:
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700


def test_a_ledger_whose_lock_is_held_is_not_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydra_llm.cluster.keeping.PATIENCE_SECONDS", 0.001)
    life = Life(path)
    life.answer()

    with life.cluster._lock:  # as a finalizer may find it, in this very thread
        life.end()

    assert not path.exists()


# ------------------------------------------------------------------------ bad files


def valid(**rates: object) -> str:
    about = {"at": NOW, "decode": [0.5, 9], **rates}
    return json.dumps({"hydra_llm_rates": 1, "nodes": {URL: {DIGEST: about}}})


BROKEN = {
    "empty": "",
    "cut": valid()[:40],
    "deep": "[" * 100_000,
    "an older version": valid().replace('"hydra_llm_rates": 1', '"hydra_llm_rates": 0'),
}
FOREIGN = {
    "a list": "[1, 2]",
    "another program's": json.dumps({"rates": {"EUR": 1.1}}),
    "a newer version": json.dumps({"hydra_llm_rates": 2, "nodes": [1, 2]}),
    "too long": " " * 4_000_001,
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_of_no_use_is_replaced(path: Path, text: str) -> None:
    life = Life(written(path, text))
    assert life.speed == Speed()

    life.answer()
    life.end()
    assert entry(path)["decode"] == [0.02, 1]


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_somebody_else_is_left_alone_and_told_of_once(
    path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "hydra_llm")
    life = Life(written(path, text))
    for _ in range(3):
        life.answer()
        life.end()

    assert path.read_text(encoding="utf-8") == text
    assert life.speed.samples == 3
    told = [record for record in caplog.records if str(path) in record.getMessage()]
    assert [record.levelno for record in told] == [logging.WARNING]


@pytest.mark.parametrize(
    "pair",
    [
        None, 0.5, "0.5", [], [0.5], [0.5, 9, 9], [0, 9], [-1, 9], [float("nan"), 9],
        [float("inf"), 9], [1e300, 9], [10**400, 9], [0.5, 0], [0.5, -3], [0.5, None],
        [True, 9], [0.5, True], [{}, []],
    ],
)  # fmt: skip
def test_a_rate_that_cannot_be_is_passed_over(path: Path, pair: object) -> None:
    life = Life(written(path, valid(decode=pair, output=[77, 3], colour=[1, 1])))

    assert life.speed.decode_seconds_per_token is None
    assert life.speed.output_tokens == pytest.approx(77.0)


@pytest.mark.parametrize("at", [None, "now", -1, float("nan"), [], True])
def test_an_entry_without_a_date_is_passed_over(path: Path, at: object) -> None:
    assert Life(written(path, valid(at=at))).speed == Speed()


@pytest.mark.parametrize("nodes", [None, [], {URL: None}, {URL: []}, {URL: {DIGEST: 3}}, "x"])
def test_a_node_of_another_shape_is_passed_over(path: Path, nodes: object) -> None:
    text = json.dumps({"hydra_llm_rates": 1, "nodes": nodes})

    assert Life(written(path, text)).speed == Speed()


def a_folder(path: Path) -> None:
    path.mkdir(parents=True)


def a_file_for_a_folder(path: Path) -> None:
    path.parent.write_text("", encoding="utf-8")


def a_pipe(path: Path) -> None:
    path.parent.mkdir()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "obstacle",
    [
        a_folder,
        a_file_for_a_folder,
        pytest.param(
            a_pipe, marks=pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
        ),
    ],
)
def test_what_is_no_file_stops_nobody(path: Path, obstacle: Callable[[Path], None]) -> None:
    obstacle(path)
    life = Life(path)
    life.answer()
    life.end()

    assert life.speed.samples == 1
    assert not path.is_file()


def test_a_path_that_can_be_none_stops_nobody() -> None:
    life = Life(Path("a\0b"))
    life.answer()
    life.end()

    assert life.speed.samples == 1


def refusing(*arguments: object, **about: object) -> Any:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("step", ["stat", "read_bytes", "mkdir", "replace"])
def test_whatever_the_system_refuses_stops_nobody_and_makes_no_noise(
    kept: Path, step: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = kept.read_bytes()
    monkeypatch.setattr(Path, step, refusing)
    life = Life(kept)
    for _ in range(2):
        life.answer()
        life.end()
    monkeypatch.undo()

    assert life.speed.samples >= 2
    assert kept.read_bytes() == before
    assert os.listdir(kept.parent) == [kept.name]  # noqa: PTH208  as a user sees it
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_write_that_is_interrupted_leaves_the_old_file(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> Any:
        raise KeyboardInterrupt

    before = kept.read_bytes()
    life = Life(kept)
    life.answer()
    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        life.end()

    assert kept.read_bytes() == before
    assert os.listdir(kept.parent) == [kept.name]  # noqa: PTH208  as a user sees it


def test_nothing_is_read_before_a_node_is_seen(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []

    def read_bytes(path: Path) -> bytes:
        reads.append(path)
        return b""

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    cluster: Cluster = ledger(nodes=[node("a"), node("b")])
    keeping = Keeping(RatesFile(kept), cluster, clock=Clock(), wall_clock=Clock())
    assert not reads

    for node_id in ("a", "b", "a"):
        keeping.recall(node_id)
    assert reads == [kept], "once for all nodes"
