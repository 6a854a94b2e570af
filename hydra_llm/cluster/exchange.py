"""What routers tell one another of their leases: a message, and the answer to it.

A message holds model names, times, sizes and options. It never holds a word of a prompt or an
answer, a session, a credential or a caller.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from hydra_llm.cluster.claims import Claim
from hydra_llm.cluster.lease import Lease
from hydra_llm.cluster.waiting import Wish
from hydra_llm.types import NO_OPTIONS, Node, RunnerOptions, RunningRequest

KEYS_PREFIX = "hydra:v1:"
"""Before every key; another number once the records change."""

CORDONS_KEY = KEYS_PREFIX + "cordoned"
"""The set of nodes that are cordoned for all routers, by name; it stays until it is emptied."""

MOST = 1 << 60
"""Nothing that is told of a lease is a larger number: bytes, seconds, milliseconds."""

NOT_OURS = 0
"""Stands for the lease's number where the lease is another router's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """An answer: what the others hold and want."""

    granted: Sequence[bool] = ()
    """One for each claim of the message."""
    leases: Mapping[str, Mapping[str, RunningRequest]] | None = None
    """By node id and lease id; None if they are as before."""
    wishes: Mapping[str, Wish] = field(default_factory=dict)
    """By model."""


def name_of(node: Node) -> str:
    """
    What a node is called between routers: its URL.

    ``localhost`` is another machine for everybody, so there the machine's name is added.
    """
    host = urlsplit(node.url).hostname or ""
    if host in ("localhost", "::1") or host.startswith("127.") or host.endswith(".localhost"):
        return f"{platform.node().lower()}@{node.url}"
    return node.url


_Told = dict[str, tuple[str, RunningRequest]]
"""By the lease's name: the node's id, and the lease as it was told."""


class Exchange:
    """
    One router's side of the talk; it remembers what it has told and seen.

    ::

        silent ──seen()──▶ told ──forget()──▶ silent

    Silent, the next message tells everything, so that nothing is counted twice or left over.

    Args:
        router: the router's name, unique among all; a lease is ``<router>:<number>``.
        nodes: as configured.
        lease_seconds: how long a lease outlives the last word of its router.
    """

    def __init__(self, router: str, nodes: Sequence[Node], *, lease_seconds: float) -> None:
        self.router = router
        self._lease_ms = int(lease_seconds * 1000)
        self._changes = ""
        self._told: _Told | None = None
        self._telling: tuple[_Told, _Told] = ({}, {})
        """The last message: what was held, what was claimed."""
        self.know(nodes)

    def know(self, nodes: Sequence[Node]) -> None:
        """These are the nodes from now on."""
        self.numbers = {node.id: number for number, node in enumerate(nodes, 1)}
        names = [name_of(node) for node in nodes]
        self.keys = _keys("routers", "changes", "lines", *(f"leases:{name}" for name in names))
        self.rates_keys = _keys(*(f"rates:{name}" for name in names))
        self.forget()

    def id_of(self, lease: Lease) -> str:
        """The lease's name among all routers."""
        return f"{self.router}:{lease.id}"

    def forget(self) -> None:
        """It is not known what the others know of this router: tell everything again."""
        self._told = None

    # ----------------------------------------------------------------- the message

    def message(
        self,
        held: Iterable[Lease],
        claims: Sequence[Claim],
        wishes: Mapping[str, Wish],
        now: float,
    ) -> str:
        """
        All that has changed since the last one.

        Args:
            held: the router's leases; those that no claim has settled yet are passed over.
            claims: leases that may be bound only if there still is room.
            wishes: who waits here, by model.
            now: the time of the leases' clock.
        """
        own = {
            self.id_of(lease): (lease.node_id, lease.running)
            for lease in held
            if lease.shared_by == self.router and lease.node_id in self.numbers
        }
        asked = [(self.id_of(one.lease), one, one.lease.running) for one in claims]
        told = self._told or {}
        self._telling = own, {name: (one.lease.node_id, run) for name, one, run in asked}
        put = [
            {
                "node": self.numbers[node_id],
                "id": name,
                "age_ms": max(0, int((now - running.started_at) * 1000)),
                "lease": _lease_json(running),
            }
            for name, (node_id, running) in own.items()
            if name not in told or told[name][1] is not running
        ]
        drop = [
            {"node": self.numbers[node_id], "id": name}
            for name, (node_id, _) in told.items()
            if name not in own
        ]
        claim = [
            {
                "node": self.numbers[one.lease.node_id],
                "id": name,
                "lease": _lease_json(running),
                "model": running.model,
                "room": one.room,
                "loads": running.loading,
                "known_loads": sorted(one.lease.known_loads),
            }
            for name, one, running in asked
        ]
        line = {
            model: [wish.priority, max(0, int((now - wish.since) * 1000))]
            for model, wish in wishes.items()
        }
        return self._message(put, drop, claim, line)

    def _message(
        self,
        put: Sequence[Any],
        drop: Sequence[Any],
        claim: Sequence[Any],
        line: Mapping[str, Any],
        *,
        leave: bool = False,
    ) -> str:
        return _json(
            {
                "router": self.router,
                "ttl_ms": self._lease_ms,
                "seen": self._changes,
                "full": self._told is None,
                "leave": leave,
                "put": put,
                "drop": drop,
                "claim": claim,
                "line": _json(line) if line else "",
            }
        )

    def farewell(self) -> str:
        """The last message: this router holds nothing more."""
        self.forget()
        return self._message([], [], [], {}, leave=True)

    # ------------------------------------------------------------------ the answer

    def seen(self, answer: Sequence[Any], now: float) -> Seen | None:
        """What the answer to the last message says; None if everything has to be told first."""
        if _text(answer[0]) == "unknown":
            self.forget()
            return None
        _, changes, granted, leases, lines = answer
        own, asked = self._telling
        won = [one for one, is_granted in zip(asked.items(), granted, strict=True) if is_granted]
        # As they were in the message: what has changed since is told with the next one.
        self._told = {**own, **dict(won)}
        self._changes = _text(changes)
        return Seen(
            granted=[bool(one) for one in granted],
            leases=None if leases is None else self._leases(leases, now),
            wishes=_wishes(lines, now),
        )

    def _leases(
        self, nodes: Sequence[Sequence[Any]], now: float
    ) -> dict[str, dict[str, RunningRequest]]:
        found: dict[str, dict[str, RunningRequest]] = {}
        for node_id, flat in zip(self.numbers, nodes, strict=True):
            leases = found[node_id] = {}
            for name, age_ms, text in _in_threes(flat):
                running = _running(text, started_at=now - age_ms / 1000)
                if running is not None:
                    leases[_text(name)] = running
        return found


def _keys(*names: str) -> list[str]:
    return [KEYS_PREFIX + name for name in names]


def _in_threes(flat: Sequence[Any]) -> Iterable[tuple[Any, Any, Any]]:
    return zip(flat[::3], flat[1::3], flat[2::3], strict=True)


_OPTION_NAMES = tuple(each.name for each in fields(RunnerOptions))


def _lease_json(running: RunningRequest) -> str:
    options = {
        name: value
        for name in _OPTION_NAMES
        if (value := getattr(running.options, name)) is not None
    }
    return _json(
        {
            "model": running.model,
            "expected_seconds": running.expected_seconds,
            "priority": running.priority,
            "load_seconds": running.load_seconds,
            "reserved_bytes": running.reserved_bytes,
            "cpu_share": running.cpu_share,
            "evicts": sorted(running.evicts),
            "loading": running.loading,
            "served": running.serving_since is not None,
            "options": options,
        }
    )


def _running(text: bytes | str, *, started_at: float) -> RunningRequest | None:
    """None for what is no lease: another version may have written it, or another program."""
    try:
        told = json.loads(text)
        evicts, options = told["evicts"], told["options"]
        if not isinstance(evicts, list) or not isinstance(options, dict):
            return None
        load_seconds, loading = _number(told["load_seconds"]), bool(told["loading"])
        # An older version does not say so.
        is_served = bool(told.get("served", not loading))
        return RunningRequest(
            lease_id=NOT_OURS,
            model=str(told["model"]),
            started_at=started_at,
            expected_seconds=_number(told["expected_seconds"]),
            priority=int(_number(told["priority"])),
            load_seconds=load_seconds,
            reserved_bytes=int(_number(told["reserved_bytes"])),
            cpu_share=min(1.0, _number(told.get("cpu_share", 0.0))),
            evicts=frozenset(map(str, evicts)),
            loading=loading,
            options=_options(options),
            serving_since=started_at + load_seconds if is_served else None,
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _number(value: object) -> float:
    """A number that the scheduler can reckon with. Raises ValueError for anything else."""
    if isinstance(value, (int, float)) and 0 <= value <= MOST:  # which NaN is not
        return value
    raise ValueError("no number of ours")


def _options(told: Mapping[str, Any]) -> RunnerOptions:
    if not told:
        return NO_OPTIONS
    if not all(isinstance(value, int) and abs(value) <= MOST for value in told.values()):  # or bool
        raise ValueError("no options of ours")
    return RunnerOptions(**told)


def _wishes(flat: Sequence[Any], now: float) -> dict[str, Wish]:
    """The most urgent by model; its age is added to the age of the word itself."""
    found: dict[str, Wish] = {}
    for told_ms_ago, text in zip(flat[::2], flat[1::2], strict=True):
        try:
            for model, (priority, age_ms) in json.loads(text).items():
                since = now - (told_ms_ago + _number(age_ms)) / 1000
                wish = Wish(priority=int(_number(priority)), since=since)
                if model not in found or wish.urgency(now) > found[model].urgency(now):
                    found[model] = wish
        except (ValueError, TypeError, AttributeError, RecursionError):  # somebody else's
            continue
    return found


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
