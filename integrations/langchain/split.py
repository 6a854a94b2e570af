"""Shares a batch of texts out among nodes: pure, but for a lock."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

REQUEST_SECONDS = 0.02
"""What a further node has to save to be worth a further request."""
WORTH_IT = 0.9
"""Of the time that one node alone would need: more than this is not worth sharing for."""
PIECES_A_NODE = 4
"""So that a node that proves slow ends with less, not later."""
MAX_PIECE = 512
"""Texts in a request: 512 vectors of 4,096 numbers are some 25 MB of JSON."""


class Costed(Protocol):
    """A candidate of a :class:`hydra_llm.RoutingDecision`."""

    @property
    def node_id(self) -> str:
        """The node."""

    @property
    def costs(self) -> Mapping[str, float]:
        """In seconds, by term."""


def nodes_worth_using(candidates: Sequence[Costed], count: int) -> list[str]:
    """
    Choose the nodes that should share a batch so that it is done soonest, best first.

    Node i needs f seconds before it can begin (queue, load, what the choice costs others) and
    p for the whole batch. Shared out so that all end together, the nodes of a set are done
    after (1 + sum f/p) / sum 1/p seconds; a further node helps if it can begin before that.

    Args:
        candidates: with costs in seconds for the whole batch on each node.
        count: texts in the batch.
    """
    nodes = sorted(
        (
            sum(cost for name, cost in one.costs.items() if name not in ("prefill", "decode")),
            max(one.costs.get("prefill", 0.0), 1e-6),
            one.node_id,
        )
        for one in candidates
    )
    used: list[str] = []
    rates = shares = done = 0.0
    for before, whole, node_id in nodes[:count]:
        before = before + REQUEST_SECONDS * bool(used)  # noqa: PLW2901  the first one is sent anyway
        if used and before >= done:
            break
        used.append(node_id)
        rates += 1.0 / whole
        shares += before / whole
        done = (1.0 + shares) / rates
    if not nodes:
        return []
    before, whole, soonest = min(nodes, key=lambda node: node[0] + node[1])
    return used if len(used) > 1 and done <= WORTH_IT * (before + whole) else [soonest]


@dataclass
class Piece:
    """Texts that go out in one request, and then their vectors."""

    texts: list[str]
    vectors: list[list[float]]


class Pieces:
    """
    A batch in pieces; whoever iterates gets the next one that nobody has.

    Args:
        texts: the batch.
        node_ids: who shall work on it; for at most one it is cut only where it is too long.
    """

    def __init__(self, texts: Sequence[str], node_ids: Sequence[str]) -> None:
        self.node_ids = tuple(node_ids)
        count = PIECES_A_NODE * len(self.node_ids) if len(self.node_ids) > 1 else 1
        size = min(max(1, -(-len(texts) // count)), MAX_PIECE)
        self._all = [
            Piece(list(texts[start : start + size]), [])
            for start in range(0, len(texts) or 1, size)
        ]
        self._next = 0
        self._lock = threading.Lock()

    @classmethod
    def whole(cls, texts: Sequence[str]) -> Pieces:
        """A batch that stays together as far as it can."""
        return cls(texts, ())

    def __iter__(self) -> Iterator[Piece]:
        while True:
            with self._lock:
                if self._next >= len(self._all):
                    return
                piece = self._all[self._next]
                self._next += 1
            yield piece

    def stop(self) -> None:
        """Give out no more."""
        with self._lock:
            self._next = len(self._all)

    def vectors(self) -> list[list[float]]:
        """All vectors, in the order of the texts."""
        return [vector for piece in self._all for vector in piece.vectors]
