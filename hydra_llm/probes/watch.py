"""The rounds of probes at one node, without a thread of their own."""

from __future__ import annotations

import asyncio
import logging
import random
import time
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Protocol

from hydra_llm.probes.futures import settle
from hydra_llm.types import Observation

__all__ = ["NodeWatch", "Probe"]

log = logging.getLogger("hydra_llm")

JITTER = 0.1
"""Share by which the interval varies, so that routers and nodes do not fall into step."""

SHOWS_PER_ROUND = 4
"""Models a node is asked about after a round, as the answers are long."""


class Probe(Protocol):
    """Looks at one node: see :class:`NodeProbe`."""

    async def probe(self) -> Observation:
        """Look once."""
        ...

    async def learn(self) -> bool:
        """Learn one more thing of less urgency; whether there may be another."""
        ...

    def with_what_was_learned(self) -> Observation | None:
        """The last observation with what was learned since, if anything was."""
        ...


class NodeWatch:
    """
    The rounds at one node; everything but the making happens on one event loop.

    Args:
        node_id: for the log.
        on_observation: called with each observation.
        interval_seconds: from the beginning of a round to the next, give or take a tenth.
        rng: draws the jitter.
        now: what the interval is measured with.
        sleep: ends after so many seconds, or when the event is set.
    """

    def __init__(
        self,
        node_id: str,
        on_observation: Callable[[Observation], None],
        *,
        interval_seconds: float,
        rng: random.Random,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[asyncio.Event, float], Awaitable[None]] | None = None,
    ) -> None:
        self._node_id = node_id
        self._on_observation = on_observation
        self._interval = interval_seconds
        self._rng = rng
        self._now = now
        self._sleep = _set_within if sleep is None else sleep
        self._wanted = asyncio.Event()
        self._waiting: list[Future[bool]] = []
        """Who asked for the next round."""
        self._served: list[Future[bool]] = []
        """Who asked for the one under way."""

    def refresh(self, seen: Future[bool] | None = None) -> None:
        """Have another round begin at once, or right after the one under way."""
        if seen is not None:
            self._waiting.append(seen)
        self._wanted.set()

    def end(self) -> None:
        """Let nobody wait for what will not come."""
        self._waiting, waiting = [], self._served + self._waiting
        for one in waiting:
            settle(one, False)

    async def run(self, probe: Probe) -> None:
        """Round after round, until cancelled."""
        while True:
            began = self._now()
            self._wanted.clear()
            await self._round(probe)
            # The first rounds begin together; this spreads the later ones.
            period = self._interval * self._rng.uniform(1.0 - JITTER, 1.0 + JITTER)
            await self._sleep(self._wanted, max(0.0, began + period - self._now()))

    async def _round(self, probe: Probe) -> None:
        self._served, self._waiting = self._waiting, []
        try:
            seen = await probe.probe()
            self._on_observation(seen)
            for one in self._served:
                settle(one, True)
            if seen.health == "up":
                await self._learn(probe)
        except Exception as error:
            # A fault of ours must not end the probing. Only where it was: an error's own text
            # may quote a header.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("probing node %s: %s\n%s", self._node_id, type(error).__name__, where)  # noqa: TRY400
            for one in self._served:
                settle(one, False)

    async def _learn(self, probe: Probe) -> None:
        for _ in range(SHOWS_PER_ROUND):
            if self._wanted.is_set() or not await probe.learn():
                break
        learned = probe.with_what_was_learned()
        if learned is not None:
            self._on_observation(learned)


async def _set_within(event: asyncio.Event, seconds: float) -> None:
    # Not wait_for: before Python 3.12 it swallows a cancellation that comes with the event, as
    # when a router is closed right after the request that asked for a probe.
    timer = asyncio.get_running_loop().call_later(seconds, event.set)
    try:
        await event.wait()
    finally:
        timer.cancel()
