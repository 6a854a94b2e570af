"""A loop whose timers go by a clock that is fast."""

from __future__ import annotations

import asyncio
import time

import pytest

from hydra_llm.simulation.fast_loop import FastClock, FastLoop

FAST = 200.0


def test_its_seconds_are_short_and_none_is_left_out() -> None:
    clock = FastClock(FAST)
    loop = FastLoop(clock)
    began, at = time.monotonic(), loop.time()
    try:
        loop.run_until_complete(asyncio.sleep(20.0))
    finally:
        loop.close()
    passed = time.monotonic() - began

    assert 20.0 / FAST <= passed < 10.0
    assert 20.0 <= clock.now() - at <= FAST * (time.monotonic() - began)


def test_timeouts_go_by_its_clock() -> None:
    loop = FastLoop(FastClock(FAST))
    began = time.monotonic()
    try:
        with pytest.raises(asyncio.TimeoutError):
            loop.run_until_complete(asyncio.wait_for(asyncio.Event().wait(), 20.0))
    finally:
        loop.close()

    assert 20.0 / FAST <= time.monotonic() - began < 10.0


def test_its_dates_are_as_fast() -> None:
    earliest = time.time()
    clock = FastClock(FAST)
    latest = time.time()
    loop = FastLoop(clock)
    loop.run_until_complete(asyncio.sleep(20.0))
    loop.close()

    before, wall, after = clock.now(), clock.wall_now(), clock.now()
    assert earliest + before - 0.001 <= wall <= latest + after + 0.001


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan")])
def test_a_clock_that_stands_or_goes_back_is_none(speed: float) -> None:
    with pytest.raises(ValueError, match="speed should be above 0"):
        FastClock(speed)
