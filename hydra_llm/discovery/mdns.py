"""Agents that announce themselves by mDNS, and how to hear them; needs zeroconf.

It goes as far as the local network does: mDNS is not routed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from hydra_llm.discovery.answers import plain
from hydra_llm.discovery.calling import Sleep
from hydra_llm.discovery.search import Announced
from hydra_llm.exceptions import ConfigurationError
from hydra_llm.networks import Address
from hydra_llm.types import DEFAULT_PORT

if TYPE_CHECKING:
    from zeroconf.asyncio import AsyncServiceInfo

__all__ = [
    "SERVICE",
    "MissingZeroconfError",
    "announced",
    "listen",
    "require_zeroconf",
    "understood",
]

SERVICE = "_hydra-llm._tcp.local."

OLLAMA_PORT = "ollama"
"""Of the TXT record: where Ollama listens on the same machine."""

LISTEN_SECONDS = 5.0
"""Who has just answered somebody else stays silent for a second or more."""

DETAILS_SECONDS = 1.5

MOST_AGENTS = 64
MOST_ADDRESSES = 8
"""Of one agent."""


class MissingZeroconfError(ImportError):
    """The package zeroconf is not installed."""

    def __init__(self) -> None:
        super().__init__("mDNS needs zeroconf: pip install 'hydra-llm[mdns]'")


def require_zeroconf() -> Any:
    """
    The package.

    Raises:
        MissingZeroconfError: it is missing.
    """
    try:
        import zeroconf.asyncio
    except ImportError:
        raise MissingZeroconfError from None
    return zeroconf


# -------------------------------------------------------------------------- hearing


async def listen(
    *,
    seconds: float = LISTEN_SECONDS,
    interfaces: Sequence[str] | None = None,
    sleep: Sleep = asyncio.sleep,
) -> list[Announced]:
    """
    The agents that announce themselves within some seconds.

    Args:
        seconds: how long to listen.
        interfaces: addresses of those to listen on; all by default.
        sleep: as :func:`asyncio.sleep`.

    Raises:
        MissingZeroconfError: the package is missing.
        ConfigurationError: the system does not let us listen.
    """
    package = require_zeroconf()
    names: dict[str, None] = {}

    def heard(name: str, state_change: Any, **_: Any) -> None:
        if state_change is not package.ServiceStateChange.Removed and len(names) < MOST_AGENTS:
            names[name] = None

    zeroconf = _opened(package, interfaces)
    try:
        browser = package.asyncio.AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[heard])
        await sleep(seconds)
        await browser.async_cancel()
        infos = [info for name in names if (info := _info_of(package, name)) is not None]
        await asyncio.gather(
            *(info.async_request(zeroconf.zeroconf, DETAILS_SECONDS * 1000) for info in infos)
        )
        found = [understood(info) for info in infos]
    finally:
        await zeroconf.async_close()
    return [one for one in found if one is not None]


def _info_of(package: Any, name: str) -> Any:
    try:
        return package.asyncio.AsyncServiceInfo(SERVICE, name)
    except package.Error:  # a name that none may have
        return None


def understood(info: AsyncServiceInfo) -> Announced | None:
    """What an announcement says; None for one that leads nowhere."""
    addresses = [ipaddress.ip_address(one) for one in info.addresses_by_version(_all_versions())]
    # Those with a zone cannot stand in a node's URL.
    usable = [one for one in addresses if one.version == 4 or not one.is_link_local]
    if not usable or not info.port:
        return None
    return Announced(
        name=plain(info.name.removesuffix(f".{SERVICE}")),
        addresses=tuple(usable[:MOST_ADDRESSES]),
        port=_port((info.properties or {}).get(OLLAMA_PORT.encode())),
        agent_port=info.port,
    )


def _port(text: bytes | None) -> int:
    try:
        port = int(text or b"")
    except ValueError:
        return DEFAULT_PORT
    return port if 0 < port < 65536 else DEFAULT_PORT


def _all_versions() -> Any:
    return require_zeroconf().IPVersion.All


# ----------------------------------------------------------------------- announcing


@asynccontextmanager
async def announced(
    listening: Sequence[tuple[str, int]], *, ollama_port: int, host_name: str | None = None
) -> AsyncIterator[None]:
    """
    Announce an agent for as long as the context lasts.

    Only on the interfaces where it listens, and with nothing but its name, addresses and ports.

    Args:
        listening: addresses and ports of the agent.
        ollama_port: where Ollama listens on this machine.
        host_name: this machine's name.

    Raises:
        MissingZeroconfError: the package is missing.
        ConfigurationError: the system does not let us announce it.
    """
    package = require_zeroconf()
    addresses = [ipaddress.ip_address(address.partition("%")[0]) for address, _ in listening]
    everywhere = any(address.is_unspecified for address in addresses)
    interfaces = None if everywhere else [str(address) for address in addresses]
    zeroconf = _opened(package, interfaces)
    try:
        # Machines may have one name, and their own services answer to it: were ours called so,
        # listeners would take the addresses of all of them for one machine's.
        host = (host_name or socket.gethostname()).partition(".")[0] or "agent"
        name = f"{host[:48]}-{secrets.token_hex(4)}"
        told = _own_addresses(package) if everywhere else addresses
        info = package.asyncio.AsyncServiceInfo(
            SERVICE,
            f"{name}.{SERVICE}",
            port=listening[0][1],
            parsed_addresses=[str(address) for address in told],
            properties={OLLAMA_PORT: str(ollama_port)},
            server=f"{name}.local.",
        )
        await zeroconf.async_register_service(info)
        yield
    finally:
        await zeroconf.async_unregister_all_services()
        await zeroconf.async_close()


def _own_addresses(package: Any) -> list[Address]:
    """Those of this machine, without loopback."""
    found = [ipaddress.ip_address(one) for one in package.get_all_addresses()]
    return [one for one in found if not one.is_loopback]


def _opened(package: Any, interfaces: Sequence[str] | None) -> Any:
    chosen = package.InterfaceChoice.All if interfaces is None else list(interfaces)
    try:
        return package.asyncio.AsyncZeroconf(interfaces=chosen)
    except OSError as error:
        raise ConfigurationError(
            f"mDNS cannot be used here ({error.strerror or 'no multicast'}); name the networks"
        ) from None
