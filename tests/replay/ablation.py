"""
``python -m tests.replay.ablation``: what each idea behind a decision is worth, by leaving it out.

The table stands in docs/how-a-decision-is-made.md. Seconds to the first token, in the mean over
seeds, of the router as it is; for each idea, what they are without it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

from hydra_llm.replay.clusters import find_cluster
from hydra_llm.replay.measures import percentile
from hydra_llm.replay.running import HYDRA, replay
from hydra_llm.replay.workload import read_load
from hydra_llm.scheduling.costs import COST_TERMS
from hydra_llm.scheduling.moment import Prices
from hydra_llm.types import NodeSnapshot, RunningRequest
from tests.replay.jobs import processes

COSTS, SCHEDULER = "hydra_llm.scheduling.costs", "hydra_llm.scheduling.scheduler"
LEARNING, LEDGER, TYPES = (
    "hydra_llm.cluster.learning",
    "hydra_llm.cluster.cluster",
    "hydra_llm.types",
)


def gets_on_while_it_waits(self: RunningRequest, now: float) -> float:
    """As if a request were served from when it was sent."""
    spent = max(0.0, now - self.started_at - self.load_seconds)
    return max(self.expected_seconds - spent, 0.8 * self.expected_seconds)


def free(*_: object) -> float:
    """A term that costs nothing."""
    return 0.0


def nothing_cached(*_: object) -> dict[str, int]:
    """As if no node remembered any prompt."""
    return {}


def nothing_known(*_: object) -> None:
    """As if there were no telling."""


Changes = Mapping[str, Any]

IDEAS: dict[str, Changes] = {
    "who waits for a slot does not get on": {
        f"{TYPES}.RunningRequest.seconds_left": gets_on_while_it_waits
    },
    "answers are heavy-tailed": {f"{TYPES}.RESIDUAL_SHARE": 0.25},
    "GPUs are shared": {f"{COSTS}.SHARING_SLOWDOWN": 0.0},
    "lengths of answers start from all models'": {f"{LEARNING}.PRIOR_SAMPLES": 0},
    "demand is judged by the time counted": {f"{TYPES}.MIN_COUNTED_SECONDS": float("inf")},
    "pushing a model out has a price": {
        f"{SCHEDULER}.COST_TERMS": {**COST_TERMS, "eviction": free}
    },
    "what has come must answer before a reload": {f"{COSTS}.still_at_work": free},
    "those that come during a reload wait too": {f"{COSTS}.QUEUE_DURING_RELOAD": 0.0},
    "another warm copy takes over": {f"{COSTS}.COPY_ELSEWHERE_SHARE": 1.0},
    "a further copy serves others": {f"{COSTS}.LEAST_LOAD_SHARE": 1.0},
    "a copy in system memory is worth little": {f"{COSTS}._lost_on_cpu": free},
    "nobody reads three tokens a second": {
        "hydra_llm.router.Prices": partial(Prices, reading_seconds_per_token=math.inf)
    },
    "large cards are fast": {f"{TYPES}.NodeSnapshot.usual_bytes_per_second": None},
    "one model's cache tells of the others'": {
        "hydra_llm.cluster.record.NodeRecord._cache_ratio": None
    },
    "what nobody tells is guessed": {
        f"{TYPES}.NodeSnapshot.room_bytes": NodeSnapshot.free_vram_bytes
    },
    "what is unknown is found out": {f"{COSTS}.UNKNOWN_MEMORY_SHARE": 0.5},
    "loads show what a node holds": {
        "hydra_llm.cluster.room.LearnedRoom.likely_bytes": nothing_known
    },
    "swaps are put off": {f"{LEDGER}.SWAP_PATIENCE": 0.0},
    "the rest waits in the router": {f"{SCHEDULER}.HEADROOM_BY_PRIORITY": (1000,) * 10},
    "prompts are cached": {f"{LEDGER}.Cluster.cached_tokens": nothing_cached},
}
"""What to change so that the idea is left out, by its name."""

AS_IT_IS = "as it is"

UNEQUAL = str(Path(__file__).parent / "unequal.toml")
"""Slow and fast disks, one slot and four."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A load."""

    name: str
    cluster: str
    trace: str
    rate: float
    requests: int = 200
    shift: bool = False
    vram_told: bool = True


CASES = (
    Case(name="0.5/s", cluster="24+24+12+8", trace="poisson", rate=0.5),
    Case(name="1/s", cluster="24+24+12+8", trace="poisson", rate=1.0),
    Case(name="2/s", cluster="24+24+12+8", trace="poisson", rate=2.0),
    Case(name="0.5/s, shift", cluster="24+24+12+8", trace="poisson", rate=0.5, shift=True),
    Case(name="24+12, 0.25/s", cluster="24+12", trace="poisson", rate=0.25),
    Case(name="Mooncake, 0.5/s", cluster="24+24+12+8", trace="mooncake_conversation", rate=0.5),
    Case(name="unequal, 0.5/s", cluster=UNEQUAL, trace="poisson", rate=0.5),
    Case(name="VRAM untold, 0.5/s", cluster=UNEQUAL, trace="poisson", rate=0.5, vram_told=False),
)


@contextmanager
def without(idea: str) -> Iterator[None]:
    """Leave an idea out; `AS_IT_IS` leaves none."""
    with ExitStack() as stack:
        for target, value in IDEAS.get(idea, {}).items():
            stack.enter_context(patch(target, value))
        yield


def first_tokens(case: Case, seed: int) -> list[float]:
    """Seconds to the first token of one run."""
    cluster = find_cluster(case.cluster)
    if not case.vram_told:
        cluster = cluster.untold()
    load = read_load(case.trace, rate=case.rate, requests=case.requests, shift=case.shift)
    asked = load.requests(cluster.shares, seed=seed, num_ctx=cluster.num_ctx)
    return replay(cluster, asked, HYDRA, seed=seed).firsts


def figures(job: tuple[str, Case, int]) -> tuple[float, float]:
    """Mean and p95 of one run without an idea."""
    idea, case, seed = job
    with without(idea):
        firsts = first_tokens(case, seed)
    return fmean(firsts), percentile(firsts, 95)


def table(seeds: int, jobs: int, ideas: list[str], show: Callable[[str], None] = print) -> None:
    """Print all, as Markdown, a line as soon as it is done."""
    show("| Without | " + " | ".join(case.name for case in CASES) + " |")
    show("|---" * (len(CASES) + 1) + "|")
    with processes(jobs) as pool:
        for idea in ideas:
            work = [(idea, case, seed) for case, seed in product(CASES, range(seeds))]
            done = list(pool.map(figures, work))
            cells = []
            for number, _ in enumerate(CASES):
                runs = done[number * seeds : (number + 1) * seeds]
                mean, p95 = (fmean(values) for values in zip(*runs, strict=True))
                cells.append(f"{mean:.2f} / {p95:.1f}")
            show(f"| {idea} | " + " | ".join(cells) + " |")


def main() -> None:
    """Read the options and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--idea", action="append", choices=[AS_IT_IS, *IDEAS])
    given = parser.parse_args()
    table(given.seeds, given.jobs, given.idea or [AS_IT_IS, *IDEAS], partial(print, flush=True))


if __name__ == "__main__":
    main()
