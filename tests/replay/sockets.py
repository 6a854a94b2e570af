"""
``python -m tests.replay.sockets``: the same loads in replay and over sockets, seed by seed.

It leaves with 1 where the mean, or the p95, of the seconds to the first token differs by more than
10 % over the seeds. One seed alone may differ by far: between nodes that are nearly as good a hair
decides, or a draw, and all that is loaded later depends on it. So take many seeds where that is.

Most of the time is waiting: on a quiet machine ``--jobs`` may be as many as it has cores. A busy
one shows in ``late``, which grows, and counts ``--speed`` times.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean, median
from typing import Any

from hydra_llm.replay.clusters import find_cluster
from hydra_llm.replay.measures import Figure, percentile
from hydra_llm.replay.running import POLICIES, Run, replay
from hydra_llm.replay.workload import read_load
from tests.replay.jobs import processes

TOLERANCE = 0.10
COMPARED = ("mean", "p95")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run to do twice."""

    cluster: str
    rate: float
    requests: int
    policy: str
    seed: int
    speed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Both:
    """
    One run done twice.

    Args:
        replayed, sent: what came of it in replay, and over sockets: ``mean`` and ``p95`` seconds
            to the first token, ``loads`` and ``errors``.
        same_node: the share of requests that the same node answered.
        late_ms: by how many real milliseconds first tokens of those came later over sockets, in
            the median.
    """

    replayed: dict[str, float]
    sent: dict[str, float]
    same_node: float
    late_ms: float


def both(case: Case) -> Both:
    """Do one run twice."""
    cluster = find_cluster(case.cluster)
    load = read_load("poisson", rate=case.rate, requests=case.requests)
    asked = load.requests(cluster.shares, seed=case.seed, num_ctx=cluster.num_ctx)
    replayed = replay(cluster, asked, case.policy, seed=case.seed)
    sent = replay(cluster, asked, case.policy, seed=case.seed, speed=case.speed)
    pairs = list(zip(replayed.answers, sent.answers, strict=True))
    late = [
        after.first_s - before.first_s
        for before, after in pairs
        if before.node == after.node and before.first_s is not None and after.first_s is not None
    ]
    return Both(
        replayed=_figures(replayed),
        sent=_figures(sent),
        same_node=fmean(before.node == after.node for before, after in pairs),
        late_ms=1000.0 * median(late) / case.speed if late else 0.0,
    )


def _figures(run: Run) -> dict[str, float]:
    return {
        "mean": fmean(run.firsts),
        "p95": percentile(run.firsts, 95.0),
        "loads": float(run.loads),
        "errors": float(sum(not answer.is_ok for answer in run.answers)),
    }


# ----------------------------------------------------------------------------- the program


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, and say whether they agree."""
    parser = argparse.ArgumentParser(prog="python -m tests.replay.sockets", description=__doc__)
    parser.add_argument("--cluster", default="24+24+12+8")
    parser.add_argument("--policy", default="hydra,hand-placed", help="one or more, with commas")
    parser.add_argument("--rate", default="0.5,1", help="requests in a second, with commas")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--speed", type=float, default=10.0, help="seconds in a real one (10)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    given = parser.parse_args(arguments)
    policies = given.policy.split(",")
    if unknown := set(policies) - set(POLICIES):
        parser.error(f"--policy has {', '.join(POLICIES)}, and no {', '.join(sorted(unknown))}")
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    is_good = True
    for text, policy in product(given.rate.split(","), policies):
        rate = float(text)
        cases = [_case(given, rate, policy, seed) for seed in seeds]
        print(f"\n{policy}, {rate:g} requests/s, {given.speed:g} times as fast", flush=True)
        is_good &= _compared(seeds, _done(cases, given.jobs))
    return 0 if is_good else 1


def _done(cases: Sequence[Case], jobs: int) -> Iterator[Both]:
    if jobs == 1:
        yield from map(both, cases)
        return
    with processes(jobs) as pool:
        yield from pool.map(both, cases)


def _case(given: Any, rate: float, policy: str, seed: int) -> Case:
    return Case(
        cluster=given.cluster,
        rate=rate,
        requests=given.requests,
        policy=policy,
        seed=seed,
        speed=given.speed,
    )


def _compared(seeds: Iterable[int], results: Iterator[Both]) -> bool:
    """Print a policy's runs as they come, and whether all in all they agree."""
    print("seed   mean: replay  sockets  ratio    p95: replay  sockets  ratio    "
          "loads    errors    same node   late")  # fmt: skip
    done: list[Both] = []
    for seed, one in zip(seeds, results, strict=True):
        done.append(one)
        parts = [
            f"{one.replayed[what]:12.3f} {one.sent[what]:8.3f} {_ratio(one, what):6.3f}"
            for what in COMPARED
        ]
        counts = [f"{one.replayed[what]:.0f} {one.sent[what]:.0f}" for what in ("loads", "errors")]
        print(f"{seed:4} {parts[0]}   {parts[1]}    {counts[0]:>7} {counts[1]:>8} "
              f"{one.same_node:11.0%} {one.late_ms:6.1f} ms", flush=True)  # fmt: skip
    agreeing = [_agree(done, what) for what in COMPARED]
    return all(agreeing)


def _ratio(one: Both, what: str) -> float:
    return one.sent[what] / one.replayed[what]


def _agree(done: Sequence[Both], what: str) -> bool:
    replayed = Figure(tuple(one.replayed[what] for one in done))
    sent = Figure(tuple(one.sent[what] for one in done))
    ratio = sent.mean / replayed.mean
    # The usual interval of a ratio of means: that of what each pair has beside the ratio.
    pairs = zip(replayed.values, sent.values, strict=True)
    with_interval = Figure(tuple(ratio + (s - ratio * r) / replayed.mean for r, s in pairs))
    agrees = abs(ratio - 1.0) <= TOLERANCE
    print(
        f"{what}: replay {_text(replayed)}, sockets {_text(sent)}, ratio {_text(with_interval)}: "
        f"{'agree' if agrees else 'DIFFER'}",
        flush=True,
    )
    return agrees


def _text(figure: Figure) -> str:
    return f"{figure.mean:.3f}" + ("" if figure.half is None else f" ±{figure.half:.3f}")


if __name__ == "__main__":
    sys.exit(main())
