"""A lease that may be used once the other routers have left room for it.

::

    asked ──settle(True)───▶ granted    the others count it
      ├─────settle(False)──▶ refused    the door gives the lease back and chooses again
      ├──patience is over──▶ granted    nobody can say; the router is alone then
      └───────interrupted──▶ given back
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import Protocol

from hydra_llm.cluster.lease import Lease

PATIENCE_SECONDS = 0.5
"""A door waits no longer for the others' word, whatever the thread that asks them does."""


class Hands(Protocol):
    """Where a claim ends up that the others have not settled."""

    def give_back(self, lease: Lease) -> object:
        """Whoever wanted the lease has gone."""
        ...

    def go_on_alone(self, lease: Lease) -> object:
        """The others' word has not come in time."""
        ...


class Claim:
    """One lease, and the future word of the others on it."""

    __slots__ = ("_hands", "answer", "lease", "room")

    def __init__(self, lease: Lease, room: int, hands: Hands) -> None:
        self.lease = lease
        self.room = room
        """Requests for its model that the runner may hold together with this one."""
        self.answer: Future[bool] = Future()
        self._hands = hands

    def settle(self, is_granted: bool) -> None:
        """The others have spoken."""
        settle(self.answer, is_granted)

    def wait(self) -> bool:
        """Whether the lease may be used."""
        try:
            return self.answer.result(PATIENCE_SECONDS)
        except FutureTimeoutError:
            self._hands.go_on_alone(self.lease)
            return True
        except BaseException:
            self._hands.give_back(self.lease)
            raise

    async def wait_async(self) -> bool:
        """As :meth:`wait`, without blocking the event loop."""
        word = asyncio.wrap_future(self.answer)
        try:
            # Not wait_for(): before Python 3.12 it may swallow a cancellation (bpo-37658).
            await asyncio.wait({word}, timeout=PATIENCE_SECONDS)
            if word.done():
                return word.result()
        except BaseException:
            self._hands.give_back(self.lease)
            raise
        finally:
            word.cancel()
        self._hands.go_on_alone(self.lease)
        return True


def settle(future: Future[bool], value: bool) -> None:
    """Set its result, unless whoever asked has gone."""
    with suppress(InvalidStateError):
        future.set_result(value)
