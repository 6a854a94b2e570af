"""A search: every address once, then what stands beside each server, then who is who."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

from hydra_llm.discovery.answers import Place, Server, ask_loaded, ask_server
from hydra_llm.discovery.calling import Caller, Limits, Sleep
from hydra_llm.discovery.exporters import EXPORTER_PORTS, Beside, FoundExporter, exporters_beside
from hydra_llm.discovery.sameness import Evidence, Group, grouped
from hydra_llm.discovery.sockets import is_of_this_machine, listening_sockets, socket_behind
from hydra_llm.exceptions import ConfigurationError
from hydra_llm.networks import MOST_PORTS, Address, Network, addresses_in, is_public
from hydra_llm.types import DEFAULT_PORT, Node

__all__ = ["Announced", "FoundNode", "Progress", "Search", "SearchResult", "search"]

NAME_SECONDS = 2.0
"""For the system to say which addresses a configured name has."""

ADDRESSES_OF_A_NAME = 4

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced:
    """A server that an agent on its machine told of."""

    name: str
    addresses: tuple[Address, ...]
    port: int = DEFAULT_PORT
    agent_port: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """
    What to look for and where.

    Args:
        networks: where; private ones only, unless ``allow_public``.
        announced: single servers that were announced.
        ports: where Ollama may listen.
        exporter_ports: where an exporter may listen beside it, best first.
        known: nodes that are configured. They are asked too, so that one is known under any of
            its addresses.
        limits: pace, and time for an answer.
        timeout_seconds: for the whole; after it no further address is begun.
        allow_public: whether networks may be other people's.

    Raises:
        ConfigurationError: there are too many addresses or ports, or a network is public.
    """

    networks: Sequence[Network] = ()
    announced: Sequence[Announced] = ()
    ports: Sequence[int] = (DEFAULT_PORT,)
    exporter_ports: Sequence[int] = EXPORTER_PORTS
    known: Sequence[Node] = ()
    limits: Limits = field(default_factory=Limits)
    timeout_seconds: float = 60.0
    allow_public: bool = False

    def __post_init__(self) -> None:
        if len(set(self.ports)) > MOST_PORTS:
            raise ConfigurationError(
                f"{len(set(self.ports))} ports are too many, a search takes {MOST_PORTS}"
            )
        self.places()

    def with_announced(self, announced: Sequence[Announced]) -> Search:
        """The same with further single servers."""
        return replace(self, announced=(*self.announced, *announced))

    def places(self) -> list[Place]:
        """All that is to be asked."""
        addresses = addresses_in(self.networks, allow_public=self.allow_public)
        ports = dict.fromkeys(self.ports)
        scanned = [Place(address, port) for address in addresses for port in ports]
        told = [
            Place(one, each.port)
            for each in self.announced
            for one in each.addresses
            # Anybody on the network can announce anything.
            if self.allow_public or not is_public(one)
        ]
        return list(dict.fromkeys((*told, *scanned)))


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundNode:
    """An Ollama server, under all the addresses at which it was found."""

    urls: tuple[str, ...]
    """The one to configure first."""
    version: str
    models: tuple[str, ...]
    exporter: FoundExporter | None = None
    locked_exporters: tuple[str, ...] = ()
    """Exporters beside it that want a login, where there is no other."""
    known: tuple[Node, ...] = ()
    """Configured nodes that are this one; two, if one server is configured twice."""
    perhaps_same_as: tuple[str, ...] = ()
    """URLs of other finds of which this may be a further address: nothing tells."""

    @property
    def url(self) -> str:
        """The one to configure."""
        return self.urls[0]

    @property
    def known_as(self) -> str | None:
        """Id of the configured node that it is."""
        return self.known[0].id if self.known else None

    def node(self) -> Node:
        """As one would configure it."""
        return Node(self.url, exporter=None if self.exporter is None else self.exporter.url)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a search has found, and how far it came."""

    found: tuple[FoundNode, ...]
    asked: int
    """Addresses and ports that were asked."""
    planned: int
    seconds: float

    @property
    def is_complete(self) -> bool:
        """Whether there was time for all."""
        return self.asked == self.planned


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a search is."""

    asked: int
    planned: int
    found: int


async def search(
    plan: Search,
    *,
    on_progress: Callable[[Progress], object] = lambda _: None,
    clock: Clock = time.monotonic,
    sleep: Sleep = asyncio.sleep,
) -> SearchResult:
    """
    Search once.

    Args:
        plan: where.
        on_progress: told after every address.
        clock: in seconds.
        sleep: as :func:`asyncio.sleep`.
    """
    began = clock()
    caller = Caller(plan.limits, clock=clock, sleep=sleep)
    places = plan.places()
    known = await _places_of(plan.known)
    asking = _Asking(plan, caller, set(places), on_progress)
    # Those that are known first: there are few, and they may come to be compared.
    queue = iter([*(place for place in known if place not in asking.wanted), *places])
    workers = [
        asyncio.ensure_future(asking.work(queue, lambda: clock() - began < plan.timeout_seconds))
        for _ in range(_workers(plan.limits))
    ]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)

    async def loaded(doubtful: Sequence[Place]) -> Mapping[Place, frozenset[tuple[str, str, str]]]:
        told = await asyncio.gather(*(ask_loaded(caller, place) for place in doubtful))
        return {p: one for p, one in zip(doubtful, told, strict=True) if one is not None}

    about = _evidence(plan, asking, known)
    groups = await grouped(asking.servers.values(), about, loaded, known)
    return SearchResult(
        found=tuple(_found_nodes(groups, asking, known)),
        asked=asking.asked,
        planned=len(places),
        seconds=clock() - began,
    )


def _workers(limits: Limits) -> int:
    """
    As many as the pace keeps busy where nobody answers.

    More would only stand in line for their turn, and have to be waited for when the time is over.
    """
    return min(limits.concurrency, math.ceil(limits.rate * limits.connect_seconds) + 1)


class _Asking:
    """What has been found so far."""

    def __init__(
        self,
        plan: Search,
        caller: Caller,
        wanted: set[Place],
        on_progress: Callable[[Progress], object],
    ) -> None:
        self.wanted = wanted
        self.servers: dict[Place, Server] = {}
        self.beside: dict[Address, Beside] = {}
        self.asked = 0
        self._plan = plan
        self._caller = caller
        self._on_progress = on_progress

    async def work(self, queue: Iterator[Place], has_time: Callable[[], bool]) -> None:
        """Ask one place after the other; several of these share a queue."""
        for place in queue:
            if not has_time():
                return
            await self._ask(place)
            if place in self.wanted:
                self.asked += 1
                found = sum(1 for one in self.servers if one in self.wanted)
                self._on_progress(Progress(asked=self.asked, planned=len(self.wanted), found=found))

    async def _ask(self, place: Place) -> None:
        server = await ask_server(self._caller, place)
        if server is None:
            return
        self.servers[place] = server
        if place.address not in self.beside:
            self.beside[place.address] = Beside()
            ports = self._ports_beside(place.address)
            self.beside[place.address] = await exporters_beside(self._caller, place.address, ports)

    def _ports_beside(self, address: Address) -> list[int]:
        told = [
            one.agent_port
            for one in self._plan.announced
            if one.agent_port is not None and address in one.addresses
        ]
        return list(dict.fromkeys((*told, *self._plan.exporter_ports)))


def _evidence(plan: Search, asking: _Asking, known: Mapping[Place, Node]) -> dict[Place, Evidence]:
    sockets = listening_sockets() or ()
    found: dict[Place, Evidence] = {}
    for place in asking.servers:
        exporter = asking.beside[place.address].exporter
        is_own = is_of_this_machine(place.address)
        names = [f"node {known[place].url}"] if place in known else []
        names += [
            f"agent {one.name}"
            for one in plan.announced
            if place.port == one.port and place.address in one.addresses
        ]
        found[place] = Evidence(
            uuids=frozenset() if exporter is None else exporter.uuids,
            names=frozenset(names),
            is_own=is_own,
            socket=socket_behind(place.address, place.port, sockets) if is_own else None,
        )
    return found


def _found_nodes(
    groups: Iterable[Group], asking: _Asking, known: Mapping[Place, Node]
) -> Iterator[FoundNode]:
    for group in groups:
        places = [server.place for server in group.servers]
        # A node that is known, and was only asked to compare it, has not been found.
        seen = [place for place in places if place in asking.wanted]
        if not seen:
            continue
        nodes = [known[place] for place in places if place in known]
        beside = [asking.beside[place.address] for place in seen]
        exporter = next((one.exporter for one in beside if one.exporter is not None), None)
        locked = dict.fromkeys(url for one in beside for url in one.locked)
        yield FoundNode(
            urls=tuple(place.url for place in seen),
            version=group.servers[0].version,
            models=tuple(model.name for model in group.servers[0].models),
            exporter=exporter,
            locked_exporters=() if exporter is not None else tuple(locked),
            known=tuple(dict.fromkeys(nodes)),
            perhaps_same_as=tuple(place.url for place in group.perhaps),
        )


async def _places_of(nodes: Iterable[Node]) -> dict[Place, Node]:
    """Where the configured nodes are; what no search could find, by https or a path, is not."""
    found: dict[Place, Node] = {}
    for node in nodes:
        url = urlsplit(node.url)
        if url.scheme != "http" or url.path or url.port is None:
            continue
        for address in await _addresses_of(node.host):
            found.setdefault(Place(address, url.port), node)
    return found


async def _addresses_of(host: str) -> list[Address]:
    loop = asyncio.get_running_loop()
    try:
        return [ipaddress.ip_address(host)]
    except ValueError:
        pass
    try:
        asked = loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        told = await asyncio.wait_for(asked, NAME_SECONDS)
    except (OSError, UnicodeError, asyncio.TimeoutError):
        return []
    found = dict.fromkeys(str(one[4][0]) for one in told)
    # With a zone it is one that no search finds.
    return [ipaddress.ip_address(one) for one in found if "%" not in one][:ADDRESSES_OF_A_NAME]
