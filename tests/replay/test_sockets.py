"""Over real HTTP comes what the replay says. ``python -m tests.replay.sockets`` measures it."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import datetime

import httpx
import pytest

from hydra_llm.replay.clusters import find_cluster
from hydra_llm.replay.running import HYDRA
from hydra_llm.replay.sockets import SocketCluster
from tests.replay import sockets
from tests.replay.sockets import Both, Case, both, main

SPEED = 4.0
LATE_S = 0.04 * SPEED
"""
What a first token may come late, in simulated seconds, on a machine that does other things.

Computing takes its time in real seconds: 2 ms a request on a quiet machine, and each counts
SPEED times. Clocks or rules that differed would show in the seconds of the loads, as in p95.
"""


def compared(policy: str) -> Both:
    # Of these requests the figures hardly depend on what a router draws: 1.1 to 1.3 s in the mean,
    # 4.7 to 4.9 s at p95, 6 or 7 loads.
    case = Case(
        cluster="24+24+12+8", rate=0.5, requests=25, policy=policy, seed=0, speed=SPEED
    )  # fmt: skip
    return both(case)


def check_seconds(one: Both) -> None:
    for what in ("mean", "p95"):
        assert one.sent[what] == pytest.approx(one.replayed[what], rel=0.1, abs=LATE_S)
        assert one.replayed[what] > 2.0 * LATE_S  # else the bound would say nothing


def test_models_placed_by_hand_do_over_sockets_as_in_replay() -> None:
    one = compared("hand-placed")

    assert one.sent["errors"] == 0.0
    assert one.sent["loads"] == one.replayed["loads"]
    assert one.same_node >= 0.9
    check_seconds(one)


def test_the_router_does_over_sockets_as_in_replay() -> None:
    one = compared(HYDRA)

    assert one.sent["errors"] == 0.0
    # Nodes need not be the same: two are equal, and a hair decides between them.
    assert abs(one.sent["loads"] - one.replayed["loads"]) <= 1.0
    check_seconds(one)


def test_all_clocks_are_fast_and_dates_are_true_on_them() -> None:
    began = time.time()
    with SocketCluster(find_cluster("24").simulated(), speed=1000.0) as world:
        before = world.clock()
        world.run(asyncio.sleep(600.0))
        after, wall = world.clock(), world.wall_clock()
        [node] = world
        node.preload("llama3.1:8b", keep_alive=3600.0)
        expires = world.run(_expires(world, f"{node.url}/api/ps"))

    assert after - before >= 600.0
    assert wall - began >= 600.0
    # At a thousand times the pace, a minute is 60 ms.
    assert wall + 3600.0 <= expires + 1.0 < wall + 3600.0 + 5000.0


async def _expires(world: SocketCluster, url: str) -> float:
    response = await world.transport.handle_async_request(httpx.Request("GET", url))
    text = json.loads(await response.aread())["models"][0]["expires_at"]
    return datetime.strptime(f"{text[:19]}+0000", "%Y-%m-%dT%H:%M:%S%z").timestamp()


@pytest.mark.parametrize(("more", "code"), [(1.09, 0), (0.91, 0), (1.11, 1), (0.89, 1)])
def test_the_comparison_fails_if_they_are_more_than_a_tenth_apart(
    more: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def made_up(case: Case) -> Both:
        replayed = {"mean": 2.0 + case.seed, "p95": 9.0, "loads": 7.0, "errors": 0.0}
        sent = replayed | {"p95": 9.0 * more}
        return Both(replayed=replayed, sent=sent, same_node=0.9, late_ms=1.5)

    monkeypatch.setattr(sockets, "both", made_up)

    assert main(["--seeds=2", "--rate=0.5", "--policy=hydra"]) == code
    told = capsys.readouterr().out
    assert "hydra, 0.5 requests/s, 10 times as fast" in told
    assert f"ratio {more:.3f} ±0.000: {'DIFFER' if code else 'agree'}" in told
    assert "mean: replay 2.500 ±6.353, sockets 2.500 ±6.353, ratio 1.000 ±0.000: agree" in told
