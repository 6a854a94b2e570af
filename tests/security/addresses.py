"""Records whom this process speaks to: every connection, datagram and name that is looked up."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Spoken:
    """What was seen."""

    connected: set[tuple[str, int]] = field(default_factory=set)
    looked_up: set[str] = field(default_factory=set)
    datagrams: list[Any] = field(default_factory=list)
    bound: list[Any] = field(default_factory=list)


_watching: list[Spoken] = []


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or not event.startswith("socket."):
        return
    for spoken in _watching:
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            spoken.connected.add(arguments[1][:2])
        elif event == "socket.getaddrinfo":
            host = arguments[0]
            spoken.looked_up.add(host.decode() if isinstance(host, bytes) else str(host))
        elif event in ("socket.sendto", "socket.sendmsg") and arguments[1] is not None:
            spoken.datagrams.append(arguments[1])
        elif event == "socket.bind":
            spoken.bound.append(arguments[1])


sys.addaudithook(_heard)  # below Python: it sees what asyncio and extensions do as well


@contextmanager
def addresses() -> Iterator[Spoken]:
    """Watch all threads of this process for a while."""
    spoken = Spoken()
    _watching.append(spoken)
    try:
        yield spoken
    finally:
        _watching.remove(spoken)
