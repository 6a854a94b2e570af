"""Which of this machine's listening sockets a connection to one of its addresses reaches."""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from hydra_llm.networks import Address

__all__ = ["Listening", "is_of_this_machine", "listening_sockets", "socket_behind"]

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))

_LISTEN = "0A"


class Listening(NamedTuple):
    """One socket that listens, as the kernel lists it."""

    address: Address
    port: int
    inode: str
    """Which socket it is."""


def listening_sockets(tables: Iterable[Path] = _TABLES) -> list[Listening] | None:
    """Those of this machine; None where the system is no Linux."""
    found: list[Listening] = []
    seen = False
    for table in tables:
        with suppress(OSError, UnicodeError):
            found += _rows(table.read_text(encoding="ascii"))
            seen = True
    return found if seen else None


def socket_behind(address: Address, port: int, sockets: Iterable[Listening]) -> str | None:
    """The socket that takes connections to one of this machine's addresses, if that is certain."""
    there = [one for one in sockets if one.port == port]
    wildcards = [one for one in there if one.address.is_unspecified]
    for wanted in (
        [one for one in there if one.address == address],
        [one for one in wildcards if one.address.version == address.version],
        # One that listens on all of IPv6 takes IPv4 as well, unless told not to.
        [one for one in wildcards if one.address.version == 6 and address.version == 4],
    ):
        inodes = {one.inode for one in wanted}
        if inodes:
            # Several processes may share a port; then the kernel draws.
            return inodes.pop() if len(inodes) == 1 else None
    return None


def is_of_this_machine(address: Address) -> bool:
    """Whether the system would let us listen there; no packet is sent."""
    if address.is_loopback:
        return True
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as one:
            one.bind((str(address), 0))
    except OSError:
        return False
    return not (address.is_multicast or address.is_unspecified)


def _rows(table: str) -> Iterator[Listening]:
    for line in table.splitlines()[1:]:
        cells = line.split()
        if len(cells) < 10 or cells[3] != _LISTEN:
            continue
        host, _, port = cells[1].partition(":")
        with suppress(ValueError):
            yield Listening(_address(host), int(port, 16), cells[9])


def _address(text: str) -> Address:
    """Of the kernel's hexadecimal, in which each four bytes are a number of the processor's."""
    raw = bytes.fromhex(text)
    if sys.byteorder == "little":
        raw = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
    found = ipaddress.ip_address(raw)
    mapped = getattr(found, "ipv4_mapped", None)
    return mapped or found
