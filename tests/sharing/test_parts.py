"""The parts that need no Redis: turns, names, messages, claims and the states of the thread."""

from __future__ import annotations

import asyncio
import builtins
import json
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import pytest

from hydra_llm import ConfigurationError, HydraSettings, Router
from hydra_llm.cluster import Cluster, Lease, Sharing, claims, redis_store
from hydra_llm.cluster.exchange import Exchange, name_of
from hydra_llm.cluster.others import TURN_SECONDS, Others
from hydra_llm.cluster.rates import Rate, rates_in
from hydra_llm.cluster.redis_store import StoreError, shown
from hydra_llm.cluster.sharing import (
    BEAT_SECONDS,
    IDLE_BEAT_SECONDS,
    RETRY_SECONDS,
    WAITING_BEAT_SECONDS,
)
from hydra_llm.cluster.waiting import AGEING_SECONDS, Wish
from hydra_llm.events import Event, SharingLost
from hydra_llm.types import Node
from tests.cluster.ledgers import granted, ledger, node, seen
from tests.docs.pages import ROOT, table, text_of
from tests.helpers import BIG, LLAMA, request

SHARING = ROOT / "docs" / "sharing.md"

# --------------------------------------------------------------------------- turns


def others(**wishes: Wish) -> Others:
    found = Others(lambda: None)
    found.wishes = wishes
    return found


ELDER = Wish(priority=5, since=0.0)
YOUNGER = Wish(priority=5, since=50.0)


def test_after_giving_a_place_back_the_elder_elsewhere_goes_first() -> None:
    found = others(m=ELDER)
    found.released("m", 100.0)

    assert found.go_first(YOUNGER, "m", 100.0)
    assert not found.go_first(YOUNGER, "another model", 100.0)
    assert not found.go_first(YOUNGER, "m", 100.1 + TURN_SECONDS)


def test_the_others_are_told_at_once_if_one_of_them_waits_for_the_place() -> None:
    told: list[bool] = []
    found = Others(lambda: told.append(True))
    found.released("m", 100.0)
    assert not told

    found.wishes = {"m": ELDER}
    found.released("another model", 100.0)
    assert not told
    found.released("m", 100.0)
    assert told


def test_nobody_goes_first_who_is_less_urgent() -> None:
    found = others(m=YOUNGER)
    found.released("m", 100.0)

    assert not found.go_first(ELDER, "m", 100.0)
    assert not found.go_first(Wish(priority=9, since=100.0), "m", 100.0)


def test_places_given_back_one_after_the_other_leave_half_the_time_to_us() -> None:
    found = others(m=ELDER)
    step = TURN_SECONDS / 10
    held_back = 0
    for n in range(100):
        found.released("m", n * step)
        held_back += found.go_first(YOUNGER, "m", n * step)

    assert held_back == pytest.approx(50, abs=5)


def test_a_wish_grows_as_a_waiter_does() -> None:
    assert Wish(priority=5, since=0.0).urgency(AGEING_SECONDS) == 6.0


# --------------------------------------------------------------------------- names


@pytest.mark.parametrize("url", ["http://localhost:11434", "http://127.0.0.1", "http://[::1]:1"])
def test_localhost_is_another_machine_for_everybody(url: str) -> None:
    node = Node(url)

    assert name_of(node) == f"{platform.node().lower()}@{node.url}"


def test_a_node_is_called_by_its_url_and_without_its_password() -> None:
    assert name_of(Node("http://me:secret@rig:11434", id="x")) == "http://rig:11434"


def test_a_store_is_shown_without_its_password() -> None:
    assert shown("redis://me:secret@host:6379/3?password=x") == "redis://host:6379/3"


# ------------------------------------------------------------------------- messages


def two_leases() -> tuple[Cluster, Lease, Lease]:
    cluster = ledger(seen("a", warm=(LLAMA,)))
    one, two = granted(cluster, request()), granted(cluster, request())
    for lease in (one, two):
        lease.shared_by = "r"
    return cluster, one, two


def test_a_message_holds_what_has_changed_since_the_last() -> None:
    cluster, one, _ = two_leases()
    talk = Exchange("r", [node("a")], lease_seconds=15.0)

    first = json.loads(talk.message(cluster.held(), [], {}, 0.0))
    talk.seen([b"ok", b"7", [], None, []], 0.0)
    second = json.loads(talk.message(cluster.held(), [], {}, 0.0))
    cluster.release(one)
    third = json.loads(talk.message(cluster.held(), [], {}, 0.0))

    assert (first["full"], [put["id"] for put in first["put"]]) == (True, ["r:1", "r:2"])
    assert (second["full"], second["seen"], second["put"], second["drop"]) == (False, "7", [], [])
    assert third["drop"] == [{"node": 1, "id": "r:1"}]


def test_a_message_that_got_no_answer_is_said_again_in_full() -> None:
    cluster, *_ = two_leases()
    talk = Exchange("r", [node("a")], lease_seconds=15.0)
    talk.message(cluster.held(), [], {}, 0.0)
    talk.seen([b"ok", b"7", [], None, []], 0.0)

    talk.forget()

    again = json.loads(talk.message(cluster.held(), [], {}, 0.0))
    assert (again["full"], [put["id"] for put in again["put"]]) == (True, ["r:1", "r:2"])


def test_others_are_told_how_much_of_a_load_goes_to_system_memory() -> None:
    cluster = ledger(seen("a", models=(BIG,), free_gb=8.0))
    lease = granted(cluster, request(BIG))
    lease.shared_by = "r"
    assert 0.3 < lease.running.cpu_share < 0.7

    [put] = json.loads(
        Exchange("r", [node("a")], lease_seconds=15.0).message(cluster.held(), [], {}, 0.0)
    )["put"]

    assert json.loads(put["lease"])["cpu_share"] == lease.running.cpu_share


def test_a_lease_that_changed_on_the_way_is_told_again() -> None:
    cluster = ledger(seen("a"))
    lease = granted(cluster, request())
    lease.shared_by = "r"
    talk = Exchange("r", [node("a")], lease_seconds=15.0)
    talk.message(cluster.held(), [], {}, 0.0)
    cluster.first_byte(lease)
    talk.seen([b"ok", b"7", [], None, []], 0.0)

    [put] = json.loads(talk.message(cluster.held(), [], {}, 0.0))["put"]

    assert json.loads(put["lease"])["loading"] is False


LEASE = {
    "model": LLAMA,
    "expected_seconds": 3.5,
    "priority": 5,
    "load_seconds": 2.0,
    "reserved_bytes": 4_000_000_000,
    "evicts": ["qwen3:8b"],
    "loading": True,
    "options": {"num_ctx": 4096},
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expected_seconds", float("nan")),
        ("load_seconds", float("inf")),
        ("priority", float("inf")),
        ("reserved_bytes", -1),
        ("cpu_share", float("nan")),
        ("reserved_bytes", 10**400),
        ("evicts", 7),
        ("options", {"num_ctx": "4096"}),
        ("options", {"no_such_option": 1}),
        ("options", 7),
    ],
)
def test_a_lease_that_nobody_could_reckon_with_is_none(key: str, value: Any) -> None:
    talk = Exchange("r", [node("a")], lease_seconds=15.0)
    told = [json.dumps(LEASE).encode(), json.dumps({**LEASE, key: value}).encode(), b"[" * 9000]
    flat = [part for n, text in enumerate(told) for part in (b"\xff%d" % n, 0, text)]
    wishes = [0, b"[" * 9000, 0, b'{"m":[1e999,0]}', 0, b'{"m":[5,NaN]}', 0, b'{"n":[5,0]}']

    found = talk.seen([b"ok", b"7", [], [flat], wishes], 0.0)

    assert found is not None
    assert found.leases is not None
    assert [running.model for running in found.leases["a"].values()] == [LLAMA]
    assert found.wishes == {"n": Wish(priority=5, since=0.0)}


@pytest.mark.parametrize(
    ("told", "share"), [({}, 0.0), ({"cpu_share": 0.25}, 0.25), ({"cpu_share": 7}, 1.0)]
)
def test_how_much_of_a_load_goes_to_system_memory_is_told(
    told: dict[str, float], share: float
) -> None:
    """An older version does not say so."""
    talk = Exchange("r", [node("a")], lease_seconds=15.0)
    lease = [b"x", 0, json.dumps({**LEASE, **told}).encode()]

    found = talk.seen([b"ok", b"7", [], [lease], []], 0.0)

    assert found is not None
    assert found.leases is not None
    assert [running.cpu_share for running in found.leases["a"].values()] == [share]


@pytest.mark.parametrize("rate", [b"nan 3", b"1e308 3", b"-1e308 3", b"0.1 0", b"x", b""])
def test_a_rate_that_nobody_could_reckon_with_is_none(rate: bytes) -> None:
    answer = [[b"decode d m", rate, b"load d m", b"0.5 3"]]

    assert rates_in(answer, ["a"]) == {"a": {"load d m": Rate(0.5, 3)}}


def test_leases_that_nobody_may_count_yet_are_not_told() -> None:
    cluster = ledger(seen("a", warm=(LLAMA,)))
    granted(cluster, request())
    talk = Exchange("r", [node("a")], lease_seconds=15.0)

    assert json.loads(talk.message(cluster.held(), [], {}, 0.0))["put"] == []


# --------------------------------------------------------------- the thread's states


class FakeStore:
    """Says what a test tells it to."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.grants = True
        self.messages: list[dict[str, Any]] = []
        self.is_closed = False
        self.on_message: Callable[[], object] = lambda: None

    def exchange(self, keys: Sequence[str], message: str) -> Sequence[Any]:
        self.on_message()
        if self.error is not None:
            raise self.error
        told = json.loads(message)
        self.messages.append(told)
        granted = [int(self.grants) for _ in told["claim"]]
        return [b"ok", b"1", granted, [[]] if told["full"] else None, []]

    def cordoned(self, key: str) -> set[str]:
        return set()

    def rates(self, keys: Sequence[str], message: str) -> Sequence[Any]:
        return [[]]

    def close(self) -> None:
        self.is_closed = True


class Talker:
    def __init__(self) -> None:
        self.store = FakeStore()
        self.events: list[Event] = []
        self.cluster = ledger(seen("a", warm=(LLAMA,)), on_event=self.events.append)
        self.events.clear()
        self.sharing = Sharing(lambda: self.store, self.cluster, [node("a")])


@pytest.fixture
def talker() -> Talker:
    return Talker()


def test_it_speaks_often_only_while_there_is_something_to_say(talker: Talker) -> None:
    assert talker.sharing.beat() == IDLE_BEAT_SECONDS
    lease = granted(talker.cluster, request())
    assert talker.sharing.beat() == BEAT_SECONDS
    for _ in range(2):
        talker.cluster.acquire(request())
    assert talker.cluster.waiting
    assert talker.sharing.beat() == WAITING_BEAT_SECONDS
    talker.store.error = StoreError("gone")
    talker.cluster.release(lease)
    assert talker.sharing.beat() == RETRY_SECONDS


def test_an_error_of_any_kind_ends_in_alone_and_is_logged(
    talker: Talker, caplog: pytest.LogCaptureFixture
) -> None:
    talker.sharing.beat()
    lease = granted(talker.cluster, request())
    claim = talker.sharing.claim(lease, 2)
    talker.store.error = ZeroDivisionError("a bug")

    talker.sharing.beat()

    assert claim is not None
    assert claim.answer.result(0)
    assert talker.sharing.state == "alone"
    assert [type(event) for event in talker.events] == [SharingLost]
    assert "a bug" in caplog.text


def test_a_claim_whose_caller_has_gone_is_not_made(talker: Talker) -> None:
    talker.sharing.beat()
    lease = granted(talker.cluster, request())
    talker.sharing.claim(lease, 2)
    talker.cluster.release(lease)

    talker.sharing.beat()

    assert talker.store.messages[-1]["claim"] == []


def test_a_refused_lease_is_told_to_nobody(talker: Talker) -> None:
    talker.sharing.beat()
    talker.store.grants = False
    talker.sharing.claim(granted(talker.cluster, request()), 2)
    talker.sharing.beat()
    talker.sharing._exchange.forget()

    talker.sharing.beat()

    assert talker.store.messages[-1]["put"] == []


def test_a_door_waits_no_longer_than_its_patience(
    talker: Talker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "PATIENCE_SECONDS", 0.01)
    talker.sharing.beat()
    lease = granted(talker.cluster, request())
    claim = talker.sharing.claim(lease, 2)

    assert claim is not None
    assert claim.wait()
    assert talker.sharing.state == "alone"
    assert talker.sharing.claim(lease, 2) is None
    talker.store.grants = False
    talker.sharing.beat()  # the word comes late: the lease is in use, and told of as such
    talker.sharing.beat()
    assert lease.is_held
    told = [put["id"] for message in talker.store.messages for put in message["put"]]
    assert told == [talker.sharing._exchange.id_of(lease)]


async def test_an_event_loop_waits_no_longer_either(
    talker: Talker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "PATIENCE_SECONDS", 0.01)
    talker.sharing.beat()
    claim = talker.sharing.claim(granted(talker.cluster, request()), 2)

    assert claim is not None
    assert await claim.wait_async()
    assert talker.sharing.state == "alone"


async def test_a_cancelled_claim_gives_its_lease_back(talker: Talker) -> None:
    talker.sharing.beat()
    lease = granted(talker.cluster, request())
    claim = talker.sharing.claim(lease, 2)
    assert claim is not None
    waiting = asyncio.create_task(claim.wait_async())
    await asyncio.sleep(0)

    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    assert not lease.is_held
    assert talker.cluster.in_flight == 0
    talker.sharing.beat()
    assert talker.store.messages[-1]["put"] == []


def test_an_interrupted_claim_gives_its_lease_back(
    talker: Talker, monkeypatch: pytest.MonkeyPatch
) -> None:
    talker.sharing.beat()
    lease = granted(talker.cluster, request())
    claim = talker.sharing.claim(lease, 2)
    assert claim is not None

    def interrupted(timeout: float | None = None) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(claim.answer, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        claim.wait()

    assert not lease.is_held


def test_stopping_settles_what_is_asked_and_says_goodbye(talker: Talker) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        go_on.wait(5.0)

    talker.sharing.start()
    talker.sharing.catch_up()
    talker.store.on_message = hold
    first = talker.sharing.claim(granted(talker.cluster, request()), 2)
    assert inside.wait(5.0)
    second = talker.sharing.claim(granted(talker.cluster, request()), 2)
    stopper = threading.Thread(target=talker.sharing.stop)
    stopper.start()

    assert second is not None
    assert second.wait()  # nobody is asked any more
    go_on.set()
    assert first is not None
    assert first.wait()
    stopper.join()
    assert talker.store.messages[-1]["leave"]
    assert talker.store.is_closed
    assert talker.sharing.state == "stopped"
    talker.sharing.stop()
    talker.sharing.start()
    assert talker.sharing.state == "stopped"


def test_a_forgotten_ledger_ends_the_talk(talker: Talker) -> None:
    talker.sharing.beat()
    del talker.cluster

    assert talker.sharing.beat() is None


# ------------------------------------------------------------------------- settings


def test_without_the_package_the_setting_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def without_redis(name: str, *about: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "redis":
            raise ImportError(name)
        return real(name, *about, **more)

    monkeypatch.setattr(builtins, "__import__", without_redis)
    settings = HydraSettings(["http://a"], redis_url="redis://localhost:6379/0")

    with pytest.raises(ConfigurationError, match=r'pip install "hydra-llm\[redis\]"'):
        Router(settings=settings)


def test_what_redis_cannot_use_is_told_without_the_password() -> None:
    pytest.importorskip("redis")
    settings = HydraSettings(["http://a"], redis_url="redis://me:secret@host:6379/0?db=x")

    with pytest.raises(ConfigurationError) as caught:
        Router(settings=settings)

    assert "redis://host:6379/0" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_redis_is_imported_only_where_it_is_used() -> None:
    code = (
        "import sys; from hydra_llm import Router; Router(['http://a']);"
        "sys.exit('redis' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_scripts_are_part_of_the_package() -> None:
    pytest.importorskip("redis")
    redis_store.RedisStore("redis://localhost:1/0").close()


# ---------------------------------------------------------------------------- page


@pytest.mark.parametrize(
    "row", [row for row in table(text_of(SHARING)) if "cluster." in row[-1]], ids=lambda row: row[0]
)
def test_a_constant_has_the_value_that_the_page_gives(row: list[str]) -> None:
    module, _, name = row[2].strip("`").rpartition(".")

    assert f"{getattr(import_module(f'hydra_llm.{module}'), name):g} s" == row[1]
