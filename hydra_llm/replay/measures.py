"""What came of runs: seconds, shares and counts, over several seeds with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from hydra_llm.replay.running import Answer, Run

__all__ = ["SHARES", "Figure", "Measured", "measured", "percentile", "steps"]

# Two-sided, 95 %; by degrees of freedom from 1 on.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_T_OF_MANY = 1.96

SHARES = ("mean", "p50", "p95", "p99")


@dataclass(frozen=True, slots=True)
class Figure:
    """
    One figure over all seeds: a value for each, their mean, and how far that may be off.

    ``half`` is half of the 95 % interval by Student's t, of the seeds' values; ``None`` for one.
    Seeds with nothing to measure (no answer at all) have no value.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds; NaN without any."""
        return fmean(self.values) if self.values else math.nan

    @property
    def half(self) -> float | None:
        """Half of the interval."""
        count = len(self.values)
        if count < 2:
            return None
        t = _T[count - 2] if count - 2 < len(_T) else _T_OF_MANY
        return t * stdev(self.values) / math.sqrt(count)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        mean = None if math.isnan(self.mean) else self.mean
        return {"mean": mean, "half": self.half, "values": list(self.values)}


@dataclass(frozen=True, slots=True)
class Measured:
    """
    The runs of one policy on one cluster, a figure a name.

    ``first_mean`` to ``first_p99`` and ``whole_mean`` to ``whole_p99`` are seconds, of answers that
    came as a whole; ``in_time`` is the share of all requests answered with the first token in time,
    ``goodput`` those in a second; ``loads``, ``load_seconds``, ``evictions`` and ``errors`` are
    sums of a run.
    """

    policy: str
    cluster: str
    figures: Mapping[str, Figure]
    priorities: Mapping[int, Mapping[str, Figure]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "policy": self.policy,
            "cluster": self.cluster,
            "figures": _plain(self.figures),
            "priorities": {str(rank): _plain(each) for rank, each in self.priorities.items()},
        }


def measured(runs: Sequence[Run], *, cluster: str, slo_s: float) -> Measured:
    """Measure the runs of one policy, one a seed."""
    figures = _of_answers([run.answers for run in runs], slo_s)
    figures["goodput"] = Figure(
        tuple(sum(_in_time(a, slo_s) for a in run.answers) / max(run.seconds, 1e-9) for run in runs)
    )
    for name, value in _COUNTS.items():
        figures[name] = Figure(tuple(value(run) for run in runs))
    ranks = sorted({answer.asked.priority for run in runs for answer in run.answers}, reverse=True)
    of_rank = {
        rank: _of_answers(
            [[a for a in run.answers if a.asked.priority == rank] for run in runs], slo_s
        )
        for rank in ranks
    }
    return Measured(runs[0].policy, cluster, figures, of_rank)


_COUNTS: Mapping[str, Callable[[Run], float]] = {
    "loads": lambda run: run.loads,
    "load_seconds": lambda run: run.load_s,
    "evictions": lambda run: run.evictions,
}


def _of_answers(runs: Sequence[Sequence[Answer]], slo_s: float) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    good = [[answer for answer in run if answer.is_ok] for run in runs]
    seconds = {
        "first": [[a.first_s for a in run if a.first_s is not None] for run in good],
        "whole": [[a.whole_s for a in run] for run in good],
    }
    for what, each in seconds.items():
        for share in SHARES:
            figures[f"{what}_{share}"] = Figure(tuple(_at(one, share) for one in each if one))
    figures["in_time"] = Figure(
        tuple(fmean(_in_time(a, slo_s) for a in run) for run in runs if run)
    )
    figures["requests"] = Figure(tuple(float(len(run)) for run in runs))
    figures["errors"] = Figure(tuple(float(sum(not a.is_ok for a in run)) for run in runs))
    return figures


def _in_time(answer: Answer, slo_s: float) -> bool:
    return answer.is_ok and answer.first_s is not None and answer.first_s <= slo_s


def _at(values: Sequence[float], share: str) -> float:
    return fmean(values) if share == "mean" else percentile(values, float(share[1:]))


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest values, in proportion."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100.0
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def steps(runs: Iterable[Run]) -> tuple[list[float], list[float]]:
    """Seconds to the first token of all seeds together, and the share that has it by then."""
    seconds = sorted(
        a.first_s for run in runs for a in run.answers if a.is_ok and a.first_s is not None
    )
    return seconds, [(place + 1) / len(seconds) for place in range(len(seconds))]


def _plain(figures: Mapping[str, Figure]) -> dict[str, Any]:
    return {name: figure.to_dict() for name, figure in figures.items()}
