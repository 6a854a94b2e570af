"""What goes wrong in a soak, and for how long a node may be called ill because of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from hydra_llm import Router
from hydra_llm.testing import SimulatedNode, StatusFault
from tests.faults.catalogue import CASES, Case

__all__ = ["TROUBLES", "Illness", "Trouble"]

Change = Callable[[SimulatedNode, Router], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """
    One way for a node to be ill for a while.

    Args:
        name: for the report.
        begin, end: make it so, and undo it.
        hangs: requests may learn of it only when their time limits pass.
        sticks: it may look as if loads were stuck on the node.
        weight: how often it is drawn.
    """

    name: str
    begin: Change
    end: Change
    hangs: bool = False
    sticks: bool = False
    weight: float = 1.0


@dataclass(slots=True, eq=False)
class Illness:
    """A trouble that a node has, or had."""

    trouble: Trouble
    node_id: str
    began: float
    ended: float = float("inf")

    def bears_on(self, since: float, until: float, tail: float) -> bool:
        """Whether it may be behind what happened in that time."""
        return self.began <= until and self.ended + tail >= since


# A hung or a slow node is known by time limits only; what stands for hours in the catalogue's
# words is short here.
_HANGS = ("hung", "slow-loris", "frozen", "stalled", "black hole", "10x", "endless", "under load")
_STICKS = ("hung", "frozen", "10x", "black hole", "under load", "slow-loris")
_NEED_MORE = ("DNS", "TLS")
"""They need other URLs."""


def _of_case(case: Case) -> Trouble:
    def well(node: SimulatedNode, router: Router) -> None:
        case.well(node)
        node.clear_faults()
        node.revive()

    return Trouble(
        name=case.name,
        begin=lambda node, router: case.ill(node),
        end=well,
        hangs=any(word in case.name for word in _HANGS),
        sticks=any(word in case.name for word in _STICKS),
    )


def _drop_models(node: SimulatedNode) -> None:
    for name in list(node.loaded):
        node.kill_runner(name)


def _restart(node: SimulatedNode) -> None:
    node.kill()
    node.revive()


TROUBLES: tuple[Trouble, ...] = (
    *(_of_case(case) for case in CASES if not case.name.startswith(_NEED_MORE)),
    Trouble(
        name="cordoned",
        begin=lambda node, router: router.cordon(node.id),
        end=lambda node, router: router.uncordon(node.id),
        weight=3.0,
    ),
    Trouble(
        name="killed and at once started again",
        begin=lambda node, router: _restart(node),
        end=lambda node, router: node.revive(),
        weight=3.0,
    ),
    Trouble(
        name="all runners killed",
        begin=lambda node, router: _drop_models(node),
        end=lambda node, router: None,
    ),
    Trouble(
        name="half of all answers 500",
        begin=lambda node, router: node.inject(StatusFault(500), probability=0.5),
        end=lambda node, router: node.clear_faults(),
    ),
)


def drawn(rng: random.Random) -> Trouble:
    """One of them."""
    return rng.choices(TROUBLES, weights=[one.weight for one in TROUBLES])[0]
