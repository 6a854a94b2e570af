"""How far off predictions were, term by term."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from hydra_llm.calibration.records import Record
from hydra_llm.scheduling import TERMS

__all__ = ["COLD_ANSWERS", "SMALL_SECONDS", "Calibration", "Group", "TermErrors", "calibrate"]

COLD_ANSWERS = 20
"""Until a router has had so many answers of a model from a node, it is still getting to know it."""
SMALL_SECONDS = 0.05
"""What took less is compared in milliseconds: a share of next to nothing says nothing."""
NOTHING_SECONDS = 0.001
"""Foreseen and found to be less than this, there was nothing to foresee."""

COLD, KNOWN = "cold", "known"


@dataclass(frozen=True, slots=True, kw_only=True)
class TermErrors:
    """
    One term's errors; shares are of what happened, above 0 where too much was expected.

    Args:
        count: how many took `SMALL_SECONDS` or longer, or had a token; ``error`` to ``bias`` are
            of these, and None without any.
        error: the median of the shares without their signs.
        p90: nine of ten were no further off.
        bias: the median of the shares with their signs.
        small: how many took less, though something was there or foreseen.
        small_off_ms: the median of milliseconds that these were off by; None without any.
        off: seconds, or tokens, that it was off by in the mean of all answers, those included
            where there was nothing to foresee: what a term has in the error of the whole.
    """

    count: int
    error: float | None
    p90: float | None
    bias: float | None
    small: int
    small_off_ms: float | None
    off: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The answers that have something in common; ``model`` and ``node`` are None for all."""

    stage: str
    """``cold`` or ``known``."""
    answers: int
    terms: dict[str, TermErrors]
    model: str | None = None
    node: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "stage": self.stage,
            "model": self.model,
            "node": self.node,
            "answers": self.answers,
            "terms": {name: errors.to_dict() for name, errors in self.terms.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """All groups, and how many requests are in none."""

    groups: tuple[Group, ...]
    left_out: int
    """Those that failed, were cancelled, or of which nothing was foreseen."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "cold_answers": COLD_ANSWERS,
            "small_seconds": SMALL_SECONDS,
            "left_out": self.left_out,
            "groups": [group.to_dict() for group in self.groups],
        }


def calibrate(
    records: Iterable[Record], *, by_model: bool = False, by_node: bool = False
) -> Calibration:
    """Compare what was foreseen with what happened."""
    given = list(records)
    good = [record for record in given if record.is_ok]

    def pair(record: Record) -> tuple[str | None, str | None]:
        return record.model if by_model else None, record.node if by_node else None

    stages: list[tuple[str, Callable[[Record], bool]]] = [
        (COLD, lambda record: record.answers_before < COLD_ANSWERS),
        (KNOWN, lambda record: record.answers_before >= COLD_ANSWERS),
    ]
    groups = []
    for stage, belongs in stages:
        mine = [record for record in good if belongs(record)]
        for model, node in sorted({pair(record) for record in mine}, key=str):
            those = [record for record in mine if pair(record) == (model, node)]
            terms = {name: _errors(name, those) for name in TERMS}
            groups.append(
                Group(stage=stage, answers=len(those), terms=terms, model=model, node=node)
            )
    return Calibration(groups=tuple(groups), left_out=len(given) - len(good))


def _errors(name: str, records: Sequence[Record]) -> TermErrors:
    pairs = [
        (record.predicted[name], record.actual[name])
        for record in records
        if name in record.predicted and name in record.actual
    ]
    is_tokens = name.endswith("_tokens")
    least = 1.0 if is_tokens else SMALL_SECONDS
    shares = [(told - found) / found for told, found in pairs if found >= least]
    small = [
        abs(told - found) * 1000.0
        for told, found in pairs
        if found < least and max(told, found) >= NOTHING_SECONDS and not is_tokens
    ]
    sizes = sorted(map(abs, shares))
    return TermErrors(
        count=len(shares),
        error=median(sizes) if sizes else None,
        p90=sizes[math.ceil(0.9 * len(sizes)) - 1] if sizes else None,
        bias=median(shares) if shares else None,
        small=len(small),
        small_off_ms=median(small) if small else None,
        off=fmean(abs(told - found) for told, found in pairs) if pairs else None,
    )
