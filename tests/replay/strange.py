"""
``python -m tests.replay.strange``: on clusters that nobody has tuned for, drawn from a seed each.

Two to eight nodes of 8 to 48 GB, disks of 0.3 to 5 GB/s, one slot to eight, three to eight models
of 1.3 to 40 GB that have room together, between a tenth and a half of what the nodes can do: the
router's mean seconds to a first token, those of models placed by hand, and the ratio.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import fmean
from typing import Literal, get_args

from hydra_llm.replay.clusters import Machine, Machines, Weights
from hydra_llm.replay.measures import percentile
from hydra_llm.replay.placing import Placed, Wanted, place_by_hand
from hydra_llm.replay.running import HYDRA, replay
from hydra_llm.replay.workload import read_load
from tests.replay.ablation import AS_IT_IS, IDEAS, without
from tests.replay.jobs import processes

HAND = "hand-placed"
BANDWIDTHS = {8: 300, 12: 400, 16: 400, 24: 750, 48: 800}
SIZES = (1.3, 1.4, 2.0, 2.5, 4.1, 4.9, 5.2, 8.1, 9.0, 9.3, 12.0, 14.0, 17.0, 19.5, 20.0, 25.0, 40.0)
REQUESTS = 200


def strange(seed: int) -> tuple[Machines, float]:
    """A cluster, and requests in a second."""
    draw = random.Random(f"cluster {seed}")
    while True:
        cluster = Machines(name=str(seed), machines=_machines(draw), models=_models(draw))
        alone = _placed(cluster, 0.1)
        if all(alone.seconds[model.name] for model in cluster.models):
            break
    busy = draw.choice([0.1, 0.2, 0.3, 0.4, 0.5])
    placed, total = _placed(cluster, 1.0), sum(cluster.shares.values())
    seconds = sum(
        share / total * fmean(placed.seconds[name].values())
        for name, share in cluster.shares.items()
    )
    return cluster, busy * len(cluster.machines) / seconds


def _machines(draw: random.Random) -> tuple[Machine, ...]:
    machines = []
    for number in range(draw.choice([2, 3, 3, 4, 4, 4, 5, 6, 8])):
        vram = draw.choice([8, 8, 12, 12, 16, 24, 24, 24, 48])
        bandwidth = BANDWIDTHS[vram] * draw.uniform(0.7, 1.3)
        load = min(5.0, max(0.3, draw.lognormvariate(0.3, 0.6)))
        machines.append(
            Machine(id=f"n{number}-{vram}", vram_gb=vram, bandwidth_gb_s=bandwidth, load_gb_s=load)
        )
    slots = draw.choice([1, 1, 1, 2, 4])
    return tuple(
        replace(one, slots=slots if one.vram_gb < 16 else draw.choice([slots, slots, 2 * slots]))
        for one in machines
    )


def _models(draw: random.Random) -> tuple[Weights, ...]:
    sizes = sorted(draw.sample(SIZES, draw.choice([3, 4, 5, 5, 6, 8])))
    return tuple(
        Weights(name=f"m{number}:{size:g}", size_gb=size, share=draw.choice([1, 1, 2, 3, 5, 8]))
        for number, size in enumerate(sizes)
    )


def _placed(cluster: Machines, rate: float) -> Placed:
    total = sum(cluster.shares.values())
    return place_by_hand(
        cluster,
        {
            name: Wanted(rate=rate * share / total, input_tokens=300.0, output_tokens=150.0)
            for name, share in cluster.shares.items()
        },
    )


Told = Literal["all", "half", "none"]
"""Of which nodes the router is told the memory."""


def figures(job: tuple[int, str, int, Told], idea: str = AS_IT_IS) -> tuple[float, float, int]:
    """Mean and p99 of the seconds to a first token, and loads, without an idea."""
    number, policy, seed, told = job
    cluster, rate = strange(number)
    if told != "all":
        cluster = cluster.untold(every=2 if told == "half" else 1)
    load = read_load("poisson", rate=rate, requests=REQUESTS)
    asked = load.requests(cluster.shares, seed=seed, num_ctx=cluster.num_ctx)
    with without(idea):
        run = replay(cluster, asked, policy, seed=seed)
    return fmean(run.firsts), percentile(run.firsts, 99), run.loads


def table(
    clusters: range,
    seeds: int,
    jobs: int,
    *,
    told: Told,
    idea: str = AS_IT_IS,
    show: Callable[[str], None] = print,
) -> None:
    """Print a line each, and what they are together."""
    work = list(product(clusters, (HYDRA, HAND), range(seeds), [told]))
    with processes(jobs) as pool:
        done = dict(zip(work, pool.map(partial(figures, idea=idea), work), strict=True))
    ratios, tails = {}, {}
    for number in clusters:
        means = {}
        for policy in (HYDRA, HAND):
            runs = [done[number, policy, seed, told] for seed in range(seeds)]
            means[policy] = tuple(fmean(values) for values in zip(*runs, strict=True))
        ratios[number] = means[HYDRA][0] / means[HAND][0]
        tails[number] = means[HYDRA][1] / means[HAND][1]
        show(
            f"{number:3} ratio {ratios[number]:.2f} p99 {tails[number]:.2f}   "
            + "   ".join(f"{p} {m:.2f} p99 {q:.1f} loads {n:.0f}" for p, (m, q, n) in means.items())
        )
    mean = math.exp(fmean(math.log(ratio) for ratio in ratios.values()))
    within = sum(ratio <= 1.2 for ratio in ratios.values())
    tail = sum(ratio <= 1.5 for ratio in tails.values())
    show(
        f"geometric mean of the ratios {mean:.2f}; means within 1.2 on {within}, p99 within 1.5 on "
        f"{tail} of {len(clusters)}"
    )


def main() -> None:
    """Read the options and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--told", choices=get_args(Told), default="all", help="whose VRAM the router is told"
    )
    parser.add_argument(
        "--without", choices=[AS_IT_IS, *IDEAS], default=AS_IT_IS, help="an idea to leave out"
    )
    given = parser.parse_args()
    numbers = range(given.first, given.first + given.clusters)
    table(numbers, given.seeds, given.jobs, told=given.told, idea=given.without)


if __name__ == "__main__":
    main()
