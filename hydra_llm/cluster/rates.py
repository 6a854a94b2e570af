"""What routers have measured of the nodes, put together.

Each answer is measured by one router, which sends each of its samples once; Redis keeps the
means, and a router goes on from those instead of its own. So its own samples do not come back
to it as somebody else's, and what a fleet has learned outlives each of its routers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from hydra_llm.cluster.learning import OUTLIER_FACTOR, SETTLED_SAMPLES, WEIGHT

KEPT_SECONDS = 14 * 24 * 3600
"""How long a node's rates are kept after the last sample."""


MOST = 100.0
"""Of a logarithm of a rate in any unit, either way, and of slots; what is more is nobody's."""

MOST_SAMPLES = 10**12


class Rate(NamedTuple):
    """A mean as it is kept: of logarithms, or the latest value where there is no mean."""

    value: float
    samples: int


class Sample(NamedTuple):
    """One measurement on its way to the others."""

    node_id: str
    name: str
    value: float
    is_latest: bool
    """It replaces what was there."""


class Seed(NamedTuple):
    """A mean for Redis to go on from, where it has lost what it knew."""

    node_id: str
    name: str
    rate: Rate


def message_of(samples: Iterable[Sample], seeds: Iterable[Seed], numbers: Mapping[str, int]) -> str:
    """As ``rates.lua`` reads it; ``numbers`` are those of the nodes' keys, by id."""
    return json.dumps(
        {
            "weight": WEIGHT,
            "settled_samples": SETTLED_SAMPLES,
            "step_limit": math.log(OUTLIER_FACTOR),
            "kept_seconds": KEPT_SECONDS,
            "samples": [
                {
                    "node": numbers[sample.node_id],
                    "name": sample.name,
                    "value": sample.value,
                    "is_latest": sample.is_latest,
                }
                for sample in samples
            ],
            "seeds": [
                {
                    "node": numbers[seed.node_id],
                    "name": seed.name,
                    "value": seed.rate.value,
                    "samples": seed.rate.samples,
                }
                for seed in seeds
            ],
        },
        separators=(",", ":"),
    )


def rates_in(
    answer: Sequence[Sequence[Any]], node_ids: Sequence[str]
) -> dict[str, dict[str, Rate]]:
    """What the answer says, by node id and name; what cannot be read is left out."""
    found: dict[str, dict[str, Rate]] = {}
    for node_id, flat in zip(node_ids, answer, strict=True):
        rates = found[node_id] = {}
        for name, text in zip(flat[::2], flat[1::2], strict=True):
            try:
                value, samples = text.decode().split()
                rate = Rate(float(value), int(samples))
                # NaN is within no bounds.
                if abs(rate.value) <= MOST and 0 < rate.samples <= MOST_SAMPLES:
                    rates[name.decode()] = rate
            except ValueError:  # somebody else's
                continue
    return found
