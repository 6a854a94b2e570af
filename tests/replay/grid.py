"""
``python -m tests.replay.grid``: the router beside two rules, on each trace at three rates.

A line each: the p95 of the seconds to the first token in the mean over seeds; on how many seeds the
router's was above the rule's; and its loads as a share of those of least connections. The table
stands in docs/simulate.md. ``--policy`` puts another one in the router's place.
"""

from __future__ import annotations

import argparse
from functools import partial
from statistics import fmean

from hydra_llm.replay.clusters import find_cluster
from hydra_llm.replay.measures import percentile
from hydra_llm.replay.running import HYDRA, replay
from hydra_llm.replay.workload import read_load
from tests.replay.jobs import processes

TRACES = (
    "azure2023_conv",
    "azure2023_code",
    "mooncake_conversation",
    "mooncake_synthetic",
)
RATES = (0.25, 0.5, 1.0)
RULES = ("least-connections", "additive")
HEAD = "| Trace | requests/s | `{}` | `least-connections` | `additive` | worse on | loads |"


def figures(job: tuple[str, str, float, int, str]) -> tuple[float, int]:
    """The p95 of one run, and its loads."""
    name, trace, rate, seed, policy = job
    cluster = find_cluster(name)
    load = read_load(trace, rate=rate, requests=200)
    asked = load.requests(cluster.shares, seed=seed, num_ctx=cluster.num_ctx)
    run = replay(cluster, asked, policy, seed=seed)
    return percentile(run.firsts, 95), run.loads


def main() -> None:
    """Read the options and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster", default="24+24+12+8")
    parser.add_argument("--policy", default=HYDRA)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    show = partial(print, flush=True)
    policy = given.policy
    show(HEAD.format(policy))
    show("|---" * HEAD.count(" | ") + "|---|")
    seeds = range(given.seeds)
    with processes(given.jobs) as pool:
        for trace in TRACES:
            for rate in RATES:
                p95s, loads = {}, {}
                for name in (policy, *RULES):
                    jobs = [(given.cluster, trace, rate, seed, name) for seed in seeds]
                    p95s[name], loads[name] = zip(*pool.map(figures, jobs), strict=True)
                own = fmean(p95s[policy])
                less = [1 - own / fmean(p95s[rule]) for rule in RULES]
                cells = [
                    f"{fmean(p95s[rule]):.1f} s (−{part:.0%})"
                    for rule, part in zip(RULES, less, strict=True)
                ]
                worse = [
                    sum(one > other for one, other in zip(p95s[policy], p95s[rule], strict=True))
                    for rule in RULES
                ]
                share = fmean(loads[policy]) / fmean(loads[RULES[0]])
                show(
                    f"| {trace} | {rate:g} | {own:.1f} s | {cells[0]} | {cells[1]} "
                    f"| {worse[0]} and {worse[1]} of {len(seeds)} | {share:.0%} |"
                )


if __name__ == "__main__":
    main()
