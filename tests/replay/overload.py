"""
``python -m tests.replay.overload``: priority 10 where twice as much is asked as the nodes can do.

Of ten requests one has priority 10, two have 2, the rest 5, from cold. The 95th percentile of the
seconds to a first token of those of priority 10, of all seeds together, beside what it is if nobody
else asks; their ratio with its 90 % interval, by drawing seeds again.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean

from hydra_llm.replay.clusters import find_cluster
from hydra_llm.replay.measures import percentile
from hydra_llm.replay.running import HYDRA, Run, replay
from hydra_llm.replay.workload import read_load
from tests.replay.jobs import processes

MIX = {10: 1.0, 5: 7.0, 2: 2.0}
TWICE_S = {"24+24+12+8": 3.9, "demo": 2.3, "24": 1.0}
"""Requests in a second, about twice what the cluster can do."""
DRAWS = 2000


def overload(
    cluster: str, *, count: int, seed: int, rate: float | None = None, **settings: object
) -> tuple[Run, Run]:
    """All requests; and those of priority 10 with nobody else there."""
    machines = find_cluster(cluster)
    rate = TWICE_S[cluster] if rate is None else rate
    load = read_load("poisson", rate=rate, requests=count, priorities=MIX)
    asked = load.requests(machines.shares, seed=seed, num_ctx=4096)
    first = [one for one in asked if one.priority == 10]
    alone = [replace(one, number=number) for number, one in enumerate(first)]
    return (
        replay(machines, asked, HYDRA, seed=seed, settings=settings),
        replay(machines, alone, HYDRA, seed=seed),
    )


def firsts(run: Run, *priorities: int) -> list[float]:
    """Seconds to the first tokens of requests of these priorities."""
    return [
        answer.first_s
        for answer in run.answers
        if answer.asked.priority in priorities and answer.first_s is not None
    ]


def figures(
    seed: int, cluster: str, count: int, rate: float | None
) -> tuple[list[float], list[float], list[float], int]:
    """First tokens of priority 10, of these alone, and of the others; and how many failed."""
    mixed, alone = overload(cluster, count=count, seed=seed, rate=rate)
    failed = sum(not answer.is_ok for run in (mixed, alone) for answer in run.answers)
    return firsts(mixed, 10), firsts(alone, 10), firsts(mixed, 5, 2), failed


def ratio(mixed: Sequence[Sequence[float]], alone: Sequence[Sequence[float]]) -> float:
    """How many times as long the one takes as the other, at the 95th percentile of all together."""
    return _p95(mixed) / _p95(alone)


def _p95(runs: Sequence[Sequence[float]]) -> float:
    return percentile([one for run in runs for one in run], 95)


def line(
    cluster: str,
    seeds: range,
    count: int,
    *,
    rate: float | None,
    jobs: int,
    show: Callable[[str], None] = print,
) -> None:
    """Print what became of one cluster's requests, as a line of a table."""
    with processes(jobs) as pool:
        done = pool.map(partial(figures, cluster=cluster, count=count, rate=rate), seeds)
        mixed, alone, others, failed = zip(*done, strict=True)
    rng, ratios = random.Random(0), []
    for _ in range(DRAWS):
        drawn = rng.choices(range(len(mixed)), k=len(mixed))
        ratios.append(ratio([mixed[i] for i in drawn], [alone[i] for i in drawn]))
    low, high = percentile(ratios, 5), percentile(ratios, 95)
    cells = (
        f"`{cluster}`",
        f"{rate or TWICE_S[cluster]:g}/s",
        f"{len(mixed)} × {count}",
        f"{_p95(mixed):.1f} s",
        f"{_p95(alone):.1f} s",
        f"{ratio(mixed, alone):.2f} ({low:.2f} to {high:.2f})",
        f"{fmean(one for run in mixed for one in run):.2f} s",
        f"{fmean(one for run in others for one in run):.1f} s",
        f"{sum(failed)}",
    )
    show("| " + " | ".join(cells) + " |")


def main() -> None:
    """Read the options and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster", action="append", choices=list(TWICE_S))
    parser.add_argument("--rate", type=float, help="requests in a second, if not twice too many")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    heads = "cluster", "requests", "runs", "p95", "alone", "ratio", "mean", "others", "failed"
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    seeds = range(given.first, given.first + given.seeds)
    show = partial(print, flush=True)
    for cluster in given.cluster or ["24+24+12+8", "demo"]:
        line(cluster, seeds, given.requests, rate=given.rate, jobs=given.jobs, show=show)


if __name__ == "__main__":
    main()
