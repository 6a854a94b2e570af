"""The rounds at one node, on a clock that the test moves."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from hydra_llm.probes.watch import SHOWS_PER_ROUND, NodeWatch
from hydra_llm.types import Health, Observation


class Script:
    """A probe and a clock: every round takes ``takes`` seconds, every sleep what it asks for."""

    def __init__(self, rounds: int = 3, *, takes: float = 0.0, health: Health = "up") -> None:
        self.now = 0.0
        self.rounds = rounds
        self.takes = takes
        self.health: Health = health
        self.began: list[float] = []
        self.sleeps: list[float] = []
        self.seen: list[Observation] = []
        self.shows = 0
        self.models = 0
        self.during: Callable[[int], None] = lambda number: None
        self.watch = NodeWatch(
            "a",
            self.seen.append,
            interval_seconds=10.0,
            rng=random.Random(1),
            now=lambda: self.now,
            sleep=self.sleep,
        )

    async def sleep(self, wanted: asyncio.Event, seconds: float) -> None:
        if len(self.began) >= self.rounds:
            raise asyncio.CancelledError
        if not wanted.is_set():
            self.now += seconds
            self.sleeps.append(seconds)

    async def probe(self) -> Observation:
        self.began.append(self.now)
        self.now += self.takes
        self.during(len(self.began))
        return Observation(node_id="a", observed_at=self.now, health=self.health)

    async def learn(self) -> bool:
        if self.shows >= self.models:
            return False
        self.shows += 1
        return True

    def with_what_was_learned(self) -> Observation | None:
        return self.seen[-1] if self.shows else None

    async def run(self) -> Script:
        with pytest.raises(asyncio.CancelledError):
            await self.watch.run(self)
        return self


async def test_rounds_begin_an_interval_apart_give_or_take_a_tenth() -> None:
    script = await Script(100).run()

    assert all(9.0 <= one <= 11.0 for one in script.sleeps)
    assert len({round(one, 3) for one in script.sleeps}) > 50


async def test_the_time_a_round_takes_is_part_of_the_interval() -> None:
    script = await Script(takes=4.0).run()

    assert all(5.0 <= one <= 7.0 for one in script.sleeps)


async def test_a_round_longer_than_the_interval_is_followed_at_once() -> None:
    script = await Script(takes=30.0).run()

    assert script.sleeps == [0.0, 0.0]


async def test_a_node_that_is_down_is_probed_just_as_often() -> None:
    assert (await Script(health="down").run()).began == (await Script(health="up").run()).began


async def test_a_refresh_during_a_round_has_another_begin_right_after_it() -> None:
    script = Script(3, takes=1.0)
    script.during = lambda number: script.watch.refresh() if number == 1 else None

    await script.run()

    assert script.began[:2] == [0.0, 1.0]
    assert script.began[2] > 9.0


async def test_who_asks_during_a_round_is_served_by_the_next() -> None:
    script, seen = Script(2), Future[bool]()
    was_done: list[bool] = []

    def during(number: int) -> None:
        if number == 1:
            script.watch.refresh(seen)
        was_done.append(seen.done())

    script.during = during
    await script.run()

    assert was_done == [False, False]
    assert seen.result(0) is True


async def test_who_waits_for_a_round_that_will_not_come_is_told() -> None:
    watch, seen = Script().watch, Future[bool]()

    watch.refresh(seen)
    watch.end()

    assert seen.result(0) is False


async def test_who_waits_no_longer_is_no_trouble() -> None:
    script, seen = Script(1), Future[bool]()
    script.watch.refresh(seen)
    seen.cancel()

    await script.run()

    assert len(script.seen) == 1


async def test_a_round_asks_about_few_models_and_tells_of_them_once() -> None:
    script = Script(1)
    script.models = 100

    await script.run()

    assert (script.shows, len(script.seen)) == (SHOWS_PER_ROUND, 2)


async def test_a_refresh_comes_before_further_models() -> None:
    script = Script(1)
    script.models = 100
    script.during = lambda number: script.watch.refresh()

    await script.run()

    assert script.shows == 0


async def test_a_node_that_is_not_up_is_asked_about_no_model() -> None:
    script = Script(1, health="misconfigured")
    script.models = 100

    assert (await script.run()).shows == 0


async def test_a_fault_of_ours_does_not_end_the_probing_nor_show_what_it_says(
    caplog: pytest.LogCaptureFixture,
) -> None:
    script, seen = Script(2), Future[bool]()
    script.watch.refresh(seen)

    def fail(number: int) -> None:
        if number == 1:
            raise ValueError("sesame")

    script.during = fail
    with caplog.at_level(logging.DEBUG):
        await script.run()

    assert len(script.seen) == 1
    assert seen.result(0) is False
    assert "probing node a: ValueError" in caplog.text
    assert "sesame" not in caplog.text.replace('raise ValueError("sesame")', "")
