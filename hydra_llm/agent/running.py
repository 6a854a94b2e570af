"""The agent, from start to the signal that ends it."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from hydra_llm.agent import exposure
from hydra_llm.agent.page import CONTENT_TYPE, render
from hydra_llm.agent.server import AgentServer, Answer
from hydra_llm.exceptions import ConfigurationError
from hydra_llm.probes.host import read_host
from hydra_llm.probes.local import LocalMemory, LocalReading
from hydra_llm.probes.thread import Errands
from hydra_llm.types import GB, Device

__all__ = ["Agent", "Pages", "run_agent"]

FRESH_SECONDS = 0.25
"""How long a reading serves: who asks more often does not make the driver work more."""

READ_SECONDS = 5.0
"""How long a driver may take; well below the 10 s that Prometheus waits."""

Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Agent:
    """
    What it listens on and whom it answers.

    Args:
        host: name or address of this machine.
        port: 0 takes any that is free.
        token: what a question must bear; needed where other machines can ask.
        tls_certificate: in PEM; without it answers go in clear.
        tls_key: in PEM, if it is not in that file.
        version: what it says of itself.
    """

    host: str = "127.0.0.1"
    port: int = 9936
    token: SecretStr | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    version: str = ""


Announce = Callable[[Sequence[tuple[str, int]]], AbstractAsyncContextManager[None]]
"""Tells others of where it listens, for as long as the context lasts."""


def run_agent(
    agent: Agent, say: Say, *, warn: Say | None = None, announce: Announce | None = None
) -> None:
    """
    Serve until SIGTERM or Ctrl-C.

    Args:
        agent: how.
        say: is told where it listens.
        warn: is told what is not as it should be.
        announce: tells the network of it; by default nobody is told.

    Raises:
        ConfigurationError: it may not, or cannot, listen there; nothing is open then.
    """
    addresses = exposure.addresses_of(agent.host)
    exposure.check_exposure(agent.host, addresses, agent.token)
    tls = exposure.tls(agent.tls_certificate, agent.tls_key)
    warn = say if warn is None else warn
    if tls is None and not all(map(exposure.is_loopback, addresses)):
        warn("the token crosses the network in clear; --tls-cert FILE --tls-key FILE encrypt it")
    # Where Ctrl-C cannot be handled, it ends us this way.
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(agent, addresses, tls, say, warn, announce=announce))


async def _serve(
    agent: Agent,
    addresses: tuple[str, ...],
    tls: ssl.SSLContext | None,
    say: Say,
    warn: Say,
    *,
    announce: Announce | None,
) -> None:
    loop = asyncio.get_running_loop()
    # A driver that hangs keeps neither others waiting nor the process from ending.
    loop.set_default_executor(Errands())
    memory = LocalMemory(clock=time.monotonic, host=read_host, fresh_seconds=FRESH_SECONDS)
    pages = Pages(memory, version=agent.version)
    server = AgentServer(pages.metrics, token=agent.token)
    stopping = asyncio.Event()
    try:
        with _signals_set(stopping):
            try:
                bound = await server.listen(addresses, agent.port, tls)
            except OSError as error:
                raise ConfigurationError(_cannot_listen(agent, error)) from None
            for address, port in bound:
                name = f"[{address}]" if ":" in address else address
                say(f"listening on http{'' if tls is None else 's'}://{name}:{port}/metrics")
            for line in await pages.findings():
                warn(line)
            async with nullcontext() if announce is None else announce(bound):
                await stopping.wait()
    finally:
        await server.close()
        pages.close()


class Pages:
    """
    A page for each reading of this machine's devices.

    Args:
        memory: reads them.
        version: the agent's.
        clock: that of ``memory``.
        wall_clock: seconds since 1970.
    """

    def __init__(
        self,
        memory: LocalMemory,
        *,
        version: str,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._memory = memory
        self._version = version
        self._clock = clock
        self._wall_clock = wall_clock
        self._shown: LocalReading | None = None
        self._page = b""

    async def metrics(self) -> Answer:
        """What is read now, or was a moment ago; an error where a driver hangs."""
        reading = await self._memory.read(READ_SECONDS)
        if reading.devices is None or reading.observed_at is None:
            return Answer(503, b"the devices could not be read in time\n")
        if reading is not self._shown:
            # Its age is certain; the wall clock may have been set since.
            sampled_at = self._wall_clock() - (self._clock() - reading.observed_at)
            page = render(reading, sampled_at=sampled_at, version=self._version)
            self._shown, self._page = reading, page.encode()
        return Answer(200, self._page, CONTENT_TYPE)

    async def findings(self) -> list[str]:
        """What there is to tell of, for whoever starts it: a device a line, a reason a line."""
        reading = await self._memory.read(READ_SECONDS)
        if reading.devices is None:
            return ["the devices do not answer; /metrics says 503 as long as they do not"]
        lines = [_found(device) for device in reading.devices] or ["no GPU is found"]
        return lines + list(reading.reasons)

    def close(self) -> None:
        """Let go of the devices."""
        self._memory.close()


def _found(device: Device) -> str:
    name = device.name or device.key
    if device.total_bytes is None:
        return f"found {name}, which does not answer"
    return f"found {name}, {device.total_bytes / GB:.1f} GB"


@contextmanager
def _signals_set(stopping: asyncio.Event) -> Iterator[None]:
    """What would end the process asks it to stop instead, where the system has such signals."""
    loop = asyncio.get_running_loop()
    heeded: list[signal.Signals] = []
    with suppress(NotImplementedError, RuntimeError, ValueError):
        # Not on Windows, where Ctrl-C cancels us; nor away from the main thread.
        for number in (signal.SIGINT, signal.SIGTERM):
            # What nohup, or a shell with &, has us ignore is to be ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, stopping.set)
                heeded.append(number)
    try:
        yield
    finally:
        for number in heeded:
            loop.remove_signal_handler(number)


def _cannot_listen(agent: Agent, error: OSError) -> str:
    where = f"cannot listen on {agent.host}, port {agent.port}"
    if error.errno == errno.EADDRINUSE:
        return f"{where}: another program does; name another --port"
    # From Python 3.12.3 on asyncio tries the next address then, and at the end tells no number.
    if error.errno in (errno.EADDRNOTAVAIL, None):
        return f"{where}: --host is no address of this machine"
    # asyncio puts a sentence of its own into strerror.
    return f"{where}: {os.strerror(error.errno)}"
