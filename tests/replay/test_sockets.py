"""Over real HTTP comes what the replay says. ``python -m tests.replay.sockets`` measures it."""

from __future__ import annotations

import pytest

from hydra_llm.replay.running import HYDRA
from tests.replay import sockets
from tests.replay.sockets import Both, Case, both, main

SPEED = 10.0
LATE_S = 0.06 * SPEED
"""
What a first token may come late, in simulated seconds, on a machine that does other things.

Computing takes its time in real seconds: 2 ms a request on a quiet machine, and each counts
SPEED times. Had the two clocks, rates or rules that differ, loads alone would make it seconds.
"""


def compared(policy: str, *, seed: int = 1) -> Both:
    case = Case(cluster="24+24+12+8", rate=1.0, requests=30, policy=policy, seed=seed, speed=SPEED)
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
    # A hair's breadth decides between two nodes that are nearly as good, and all that follows
    # differs then; drawn at random, a third would be the same.
    assert one.same_node >= 0.6
    assert abs(one.sent["loads"] - one.replayed["loads"]) <= 3.0
    check_seconds(one)


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
    assert f"of each seed's {more:.3f} ±0.000: {'DIFFER' if code else 'agree'}" in told
    assert "mean: replay 2.500 ±6.353, sockets 2.500 ±6.353; of these 1.000" in told
