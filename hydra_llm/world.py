"""What a router stands on: the time, and the way to its nodes."""

from __future__ import annotations

import asyncio
from typing import Protocol

import httpx

__all__ = ["World"]


class World(Protocol):
    """
    A stand-in for the machine, the network and the clocks under a router.

    A router that is given one opens no socket and starts no thread: requests and probes go
    through ``transport``, and the probes run on ``loop``. So it can live in virtual time, as
    in :class:`hydra_llm.testing.VirtualCluster`.
    """

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that everything runs on."""
        ...

    @property
    def transport(self) -> httpx.AsyncBaseTransport:
        """Carries requests and probes to the nodes. Routers do not close it."""
        ...

    def clock(self) -> float:
        """Seconds that never go back."""
        ...

    def wall_clock(self) -> float:
        """Seconds since 1970, in which nodes say when a model will go."""
        ...
