"""Which model goes where, by somebody who knows the load: the least time that requests take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from hydra_llm.replay.clusters import Machine, Machines
from hydra_llm.simulation.catalog import GB
from hydra_llm.simulation.memory import Need, need_of
from hydra_llm.simulation.settings import NodeSettings

__all__ = ["Placed", "place_by_hand"]

_SHARE_OF_FREE = 0.8
"""Of free memory, what Ollama lets a model take that is loaded beside others."""
_MOST_MODELS = 3
"""Ollama's own limit for a node with one GPU."""
_MOST_LAYOUTS = 3_000
_PIECES = 40
"""Into so many parts a model's requests are split, to be shared out."""
_PREFILL_RATIO = 30.0
_HOPELESS_S = 1e6


@dataclass(frozen=True, slots=True)
class Placed:
    """The placement: seconds that a request takes, by model and by node that is meant for it."""

    seconds: Mapping[str, Mapping[str, float]]

    def models_on(self, node_id: str) -> list[str]:
        """What a node is to hold."""
        return [model for model, nodes in self.seconds.items() if node_id in nodes]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of one model: requests in a second, and their mean lengths."""

    rate: float
    input_tokens: float
    output_tokens: float


def place_by_hand(cluster: Machines, wanted: Mapping[str, Wanted]) -> Placed:
    """
    Give every node a set of models that fit together, so that requests take the least time.

    All layouts are tried where there are few; else nodes are changed one after the other for as
    long as it helps.
    """
    seconds = _seconds(cluster, wanted)
    choices = [_sets(cluster, machine) for machine in cluster.machines]
    if math.prod(map(len, choices)) <= _MOST_LAYOUTS:
        layouts: Iterable[tuple[_Set, ...]] = product(*choices)
        best = min(layouts, key=lambda layout: _badness(cluster, layout, wanted, seconds))
    else:
        best = _climbed(cluster, choices, wanted, seconds)
    return Placed(
        {
            model: {
                machine.id: seconds[model, machine.id]
                for machine, held in zip(cluster.machines, best, strict=True)
                if model in held
            }
            for model in wanted
        }
    )


_Set = frozenset[str]


def _seconds(cluster: Machines, wanted: Mapping[str, Wanted]) -> dict[tuple[str, str], float]:
    found = {}
    for machine in cluster.machines:
        for model, want in wanted.items():
            per_token = cluster.model(model).size_bytes / (machine.bandwidth_gb_s * GB)
            tokens = want.output_tokens + want.input_tokens / _PREFILL_RATIO
            found[model, machine.id] = tokens * per_token
    return found


def _sets(cluster: Machines, machine: Machine) -> list[_Set]:
    """The largest sets of models that a node can hold, in whatever order they are loaded."""
    names = cluster.installed(machine)
    needs = {name: _need(cluster, machine, name) for name in names}
    found: list[_Set] = []
    for size in range(min(_MOST_MODELS, len(names)), 0, -1):
        for some in combinations(names, size):
            held = frozenset(some)
            if _fit(machine, [needs[name] for name in some]) and not any(held < f for f in found):
                found.append(held)
    return found or [frozenset()]


def _need(cluster: Machines, machine: Machine, name: str) -> Need:
    model, settings = cluster.model(name), NodeSettings()
    num_ctx = min(cluster.num_ctx, model.context_length)
    return need_of(model, num_ctx=num_ctx, num_batch=None, slots=machine.slots, on=settings)


def _fit(machine: Machine, needs: Sequence[Need]) -> bool:
    room = (machine.vram_gb - machine.used_vram_gb) * GB
    total = sum(need.total for need in needs)
    if total > room:
        return False
    return len(needs) == 1 or all(
        need.forecast <= _SHARE_OF_FREE * (room - (total - need.total)) for need in needs
    )


def _climbed(
    cluster: Machines,
    choices: Sequence[Sequence[_Set]],
    wanted: Mapping[str, Wanted],
    seconds: Mapping[tuple[str, str], float],
) -> tuple[_Set, ...]:
    layout = [sets[0] for sets in choices]
    best = math.inf
    while True:
        before = best
        for number, sets in enumerate(choices):
            for held in sets:
                tried = (*layout[:number], held, *layout[number + 1 :])
                badness = _badness(cluster, tried, wanted, seconds)
                if badness < best:
                    best, layout = badness, list(tried)
        if best >= before:
            return tuple(layout)


def _badness(
    cluster: Machines,
    layout: Sequence[_Set],
    wanted: Mapping[str, Wanted],
    seconds: Mapping[tuple[str, str], float],
) -> float:
    """About how long requests take in all, each second, with the models' requests shared out."""
    busy = {machine.id: 0.0 for machine in cluster.machines}
    slots = {machine.id: float(machine.slots) for machine in cluster.machines}
    holders = {
        model: [m.id for m, held in zip(cluster.machines, layout, strict=True) if model in held]
        for model in wanted
    }
    bad = 0.0
    # The most demanding first, as they have the least choice.
    for model in sorted(wanted, key=lambda model: (len(holders[model]), model)):
        rate = wanted[model].rate / _PIECES
        if not holders[model]:
            bad += wanted[model].rate * _HOPELESS_S
            continue
        for _ in range(_PIECES):
            costs = [
                (_time_in(seconds[model, node], busy[node] / slots[node]), node)
                for node in holders[model]
            ]
            _, node = min(costs)
            busy[node] += rate * seconds[model, node]
    for machine in cluster.machines:
        load = busy[machine.id] / slots[machine.id]
        bad += busy[machine.id] * _time_in(1.0, load)
    return bad


def _time_in(seconds: float, load: float) -> float:
    """Service and waiting in a queue; beyond what a node can do it goes on rising."""
    if load < 0.95:
        return seconds / (1.0 - load)
    return seconds * 20.0 * (1.0 + 20.0 * (load - 0.95))
