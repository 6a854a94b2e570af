"""Whether two places are one server: addresses of one machine, or two machines much alike.

To take one for two costs a wrong count of free memory; to take two for one costs a machine.
So it takes evidence to make them one, equal models are none (a copied disk, a shared folder),
and where nothing decides, the answer is that nothing does.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import combinations

from hydra_llm.discovery.answers import Place, Server
from hydra_llm.networks import Address

__all__ = ["Evidence", "Group", "Verdict", "compare", "grouped", "look_alike"]

ROUNDS = 3
"""A request that ends between two questions makes one server look like two, once."""

Loaded = frozenset[tuple[str, str, str]]
"""Name, digest and expiry of what is loaded."""


class Verdict(Enum):
    """What can be said of two places."""

    SAME = "one server"
    DIFFERENT = "two servers"
    UNDECIDED = "nothing tells"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known of one place besides what its server answers."""

    uuids: frozenset[str] = frozenset()
    """Of the GPUs that an exporter at the same address tells of."""
    names: frozenset[str] = frozenset()
    """What names it: a configured node's host, an agent that announced itself."""
    is_own: bool = False
    """Whether it is an address of this machine."""
    socket: str | None = None
    """The listening socket behind it, on this machine."""


NO_EVIDENCE = Evidence()


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Places that are one server."""

    servers: tuple[Server, ...]
    perhaps: tuple[Place, ...] = ()
    """First places of groups before this one that may be the same server."""


def look_alike(a: Server, b: Server) -> bool:
    """
    Whether they could be one server.

    Another port is another server, as far as one can see: a port that is forwarded to
    another one looks the same from outside.
    """
    return a.place.port == b.place.port and a.version == b.version and a.models == b.models


def compare(
    a: Server, b: Server, about: Mapping[Place, Evidence], loaded: Sequence[Mapping[Place, Loaded]]
) -> Verdict:
    """
    What can be said of two places.

    Args:
        a: one server.
        b: another.
        about: what else is known of places.
        loaded: what was loaded, in some rounds in each of which all places were asked at once.
    """
    if not look_alike(a, b):
        return Verdict.DIFFERENT
    one, other = about.get(a.place, NO_EVIDENCE), about.get(b.place, NO_EVIDENCE)
    rounds = [(now[a.place], now[b.place]) for now in loaded if {a.place, b.place} <= now.keys()]
    if one.socket is not None and one.socket == other.socket:
        return Verdict.SAME
    if (
        (rounds and all(mine != its for mine, its in rounds))
        or (one.uuids and other.uuids and one.uuids.isdisjoint(other.uuids))
        or (_is_one_family(a, b) and one.socket is not None and other.socket is not None)
    ):
        return Verdict.DIFFERENT
    if (
        one.uuids & other.uuids
        or one.names & other.names
        or any(mine == its and _is_telling(mine) for mine, its in rounds)
        # One machine and one port, where the system does not list its sockets.
        or (one.is_own and other.is_own and None in (one.socket, other.socket) and a.models)
    ):
        return Verdict.SAME
    # Only what each server got at a time of its own makes them alike.
    has_dates = bool(a.models) and all(model.modified_at for model in a.models)
    return Verdict.UNDECIDED if has_dates else Verdict.DIFFERENT


def _is_one_family(a: Server, b: Server) -> bool:
    """Whether two sockets are two servers; one program often opens one for IPv4, one for IPv6."""
    return a.place.address.version == b.place.address.version


def _is_telling(loaded: Loaded) -> bool:
    """Whether no other server would say the same: a time to a fraction of a second does it."""
    return any(_FRACTION.search(until) and until[:4] < "2100" for _, _, until in loaded)


_FRACTION = re.compile(r"\.\d*[1-9]")


async def grouped(
    servers: Iterable[Server],
    about: Mapping[Place, Evidence],
    ask_loaded: Callable[[Sequence[Place]], Awaitable[Mapping[Place, Loaded]]],
    known: Collection[Place] = (),
) -> list[Group]:
    """
    The servers, each one once, in the order of their first places.

    Args:
        servers: what was found, at each place.
        about: what else is known of places.
        ask_loaded: what is loaded at places now, all asked at once.
        known: places of configured nodes. They come first, so that what may be one of them is
            seen to be so.
    """
    found = sorted(servers, key=lambda one: (one.place not in known, preference(one.place)))
    doubtful = sorted(
        {server.place for a, b in combinations(found, 2) if look_alike(a, b) for server in (a, b)},
        key=preference,
    )
    rounds: list[Mapping[Place, Loaded]] = []
    while doubtful and len(rounds) < ROUNDS:
        rounds.append(await ask_loaded(doubtful))
        if len(rounds) == 1 and not _differ(found, rounds[0]):
            break
    groups: list[list[Server]] = []
    perhaps: list[list[Place]] = []
    for server in found:
        near: list[Place] = []
        for group in groups:
            verdicts = {compare(server, other, about, rounds) for other in group}
            if Verdict.SAME in verdicts and Verdict.DIFFERENT not in verdicts:
                group.append(server)
                break
            if Verdict.DIFFERENT not in verdicts:
                near.append(group[0].place)
        else:
            groups.append([server])
            perhaps.append(near)
    return [
        Group(servers=tuple(group), perhaps=tuple(near))
        for group, near in zip(groups, perhaps, strict=True)
    ]


def _differ(found: Sequence[Server], loaded: Mapping[Place, Loaded]) -> bool:
    return any(
        look_alike(a, b) and loaded.get(a.place) != loaded.get(b.place)
        for a, b in combinations(found, 2)
    )


def preference(place: Place) -> tuple[bool, int, int, int]:
    """
    Sorts the place to configure to the front.

    Loopback first: a node there is known to be this machine. Then IPv4, then the lowest.
    """
    address: Address = place.address
    return (not address.is_loopback, address.version, int(address), place.port)
