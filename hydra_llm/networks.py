"""Which networks may be searched, and for how many addresses."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import TypeAlias

from hydra_llm.exceptions import ConfigurationError

__all__ = [
    "MOST_ADDRESSES",
    "MOST_PORTS",
    "Address",
    "Network",
    "addresses_in",
    "is_public",
    "read_network",
]

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

MOST_ADDRESSES = 1024
"""Of one search: four home networks, and over in half a minute."""

MOST_PORTS = 16
"""On each address."""

_OWN_RANGES = tuple(
    ipaddress.ip_network(text)
    for text in (
        *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"),  # private
        *("127.0.0.0/8", "169.254.0.0/16", "::1/128"),  # loopback, link-local
        *("fc00::/7", "fe80::/10"),  # unique local, link-local
    )
)
"""Not Python's ``is_private``, which changes from version to version. 100.64.0.0/10 is left out:
Tailscale uses it, but so do providers for all their customers."""


def read_network(text: str) -> Network:
    """
    A network, or one address as a network of its own; host bits are dropped.

    Raises:
        ConfigurationError: it is none.
    """
    plain = text.strip()
    if "%" in plain or plain.lower().startswith("fe80:"):
        raise ConfigurationError(
            f"{text!r}: IPv6 addresses that begin with fe80 need a zone, which no node's URL can "
            "have; name the network's other addresses, as fd00::/120"
        )
    try:
        return ipaddress.ip_network(plain, strict=False)
    except ValueError:
        raise ConfigurationError(
            f"{text!r} is no network; write it like 192.168.1.0/24, fd00::/120 or 192.168.1.20"
        ) from None


def is_public(network: Network | Address) -> bool:
    """Whether any part of it may be somebody else's."""
    whole = ipaddress.ip_network(network)
    return not any(
        whole.version == own.version
        and own.network_address <= whole.network_address  # type: ignore[operator]
        and whole.broadcast_address <= own.broadcast_address  # type: ignore[operator]
        for own in _OWN_RANGES
    )


def addresses_in(networks: Iterable[Network], *, allow_public: bool = False) -> list[Address]:
    """
    All addresses that hosts can have, each once.

    Raises:
        ConfigurationError: a network is public, or they are too many.
    """
    networks = list(networks)
    for network in networks:
        if is_public(network) and not allow_public:
            raise ConfigurationError(
                f"{network} is not a private network, so other people's machines may be in it; "
                "only if all of it is yours, run `hydra-llm discover` with --allow-public"
            )
    apart: list[Network] = [
        *ipaddress.collapse_addresses(n for n in networks if isinstance(n, ipaddress.IPv4Network)),
        *ipaddress.collapse_addresses(n for n in networks if isinstance(n, ipaddress.IPv6Network)),
    ]
    # Counted before they are made: an IPv6 network has more than any memory.
    count = sum(network.num_addresses for network in apart)
    if count > MOST_ADDRESSES:
        told = f"{count:,}" if count < 10**9 else f"2^{count.bit_length() - 1} or more"
        raise ConfigurationError(
            f"{', '.join(map(str, networks))}: {told} addresses are too many, a search takes "
            f"{MOST_ADDRESSES:,}; name a part of it, a /22 at most (IPv6: a /118), or single "
            "addresses"
        )
    return [address for network in apart for address in network.hosts()]
