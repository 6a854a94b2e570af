"""Host names that exist in this process only."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["HostNames"]


class HostNames:
    """
    Host names that this process looks up here, and no DNS server ever sees.

    ::

        with HostNames({"rig.internal": "127.0.0.1"}) as names:
            names.lose("rig.internal")                # it does not resolve any more
            names.point("rig.internal", "127.0.0.2")  # it has moved to another address

    It stands in for `socket.getaddrinfo`, so it works for whatever looks names up through Python;
    all other names are looked up as ever. An address is one of this machine; those from 127.0.0.2
    on exist on Linux and Windows and not on macOS. A node that listens on loopback answers names
    that end in ``.localhost``, ``.local`` or ``.internal`` and refuses others, as Ollama does.
    """

    def __init__(self, addresses: Mapping[str, str] | None = None) -> None:
        self._addresses: dict[str, str | None] = {}
        for name, address in (addresses or {}).items():
            self.point(name, address)
        self._delays: dict[str, float] = {}
        self._asked: list[str] = []
        self._closed = threading.Event()
        self._real: Any = None

    def __repr__(self) -> str:
        known = [f"{name} -> {address or 'nothing'}" for name, address in self._addresses.items()]
        return f"<HostNames [{', '.join(known)}]>"

    def __enter__(self) -> Self:
        if self._real is not None:
            raise RuntimeError("these names are in use already")
        self._closed.clear()
        self._real, socket.getaddrinfo = socket.getaddrinfo, self._look_up
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        socket.getaddrinfo, self._real = self._real, None

    def point(self, name: str, address: str) -> None:
        """Have a name resolve to an address, from the next look-up on."""
        self._addresses[_plain(name)] = address

    def lose(self, name: str) -> None:
        """Have a name not resolve, as one that does not exist."""
        self._addresses[_plain(name)] = None

    def delay(self, name: str, seconds: float) -> None:
        """Have look-ups of a name take so many seconds, as where a DNS server is out of reach."""
        self._delays[_plain(name)] = seconds

    @property
    def asked(self) -> list[str]:
        """The names that were looked up here, oldest first."""
        return list(self._asked)

    def _look_up(self, host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        real = self._real or socket.getaddrinfo  # a look-up that outlived the names
        name = _plain(host.decode() if isinstance(host, bytes) else host or "")
        if name not in self._addresses:
            return real(host, port, *args, **kwargs)
        self._asked.append(name)
        if self._delays.get(name):
            self._closed.wait(self._delays[name])
        address = self._addresses[name]
        if address is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(address, port, *args, **kwargs)


def _plain(name: str) -> str:
    return name.rstrip(".").lower()
