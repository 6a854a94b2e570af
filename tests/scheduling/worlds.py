"""Nodes and moments of every kind, for properties that hold in all of them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from hydra_llm.scheduling import Moment, Prices
from hydra_llm.types import GB, Demand, HostMemory, NodeSnapshot, RunnerOptions, Speed
from tests.helpers import BIG, LLAMA, request, running, snapshot

QWEN = "qwen3:8b"
MODELS: tuple[str, ...] = (LLAMA, QWEN, BIG)

SPEEDS = st.builds(
    Speed,
    prefill_seconds_per_token=st.sampled_from([None, 0.0001, 0.01]),
    decode_seconds_per_token=st.sampled_from([None, 0.005, 0.5]),
    load_seconds=st.sampled_from([None, 0.5, 60.0]),
    slots=st.sampled_from([None, 1, 4]),
)

RUNNING = st.builds(
    running,
    st.sampled_from(MODELS),
    seconds=st.sampled_from([0.0, 1.0, 30.0]),
    started_at=st.integers(-30, 0),
    load_seconds=st.sampled_from([0.0, 5.0]),
    loading=st.booleans(),
    reserved_bytes=st.sampled_from([0, 5 * GB]),
    evicts=st.sampled_from([frozenset(), frozenset({LLAMA})]),
)

STATES = st.fixed_dictionaries(
    {
        "warm": st.lists(st.sampled_from(MODELS), max_size=3, unique=True).map(tuple),
        "free_vram_gb": st.sampled_from([None, 0.0, 3.0, 12.0, 40.0]),
        "total_vram_gb": st.sampled_from([None, 0.0, 24.0, 80.0]),
        "slots": st.sampled_from([None, 1, 3]),
        "local": st.booleans(),
        "labels": st.sampled_from([(), ("fast",), ("fast", "eu")]),
        "host": st.sampled_from([None, HostMemory(total_bytes=8 * GB)]),
        "speeds": st.dictionaries(st.sampled_from(MODELS), SPEEDS, max_size=2),
        "bytes_per_second": st.sampled_from([None, 5e9, 1e12]),
        "load_bytes_per_second": st.sampled_from([None, 1e8, 1e10]),
        "running": st.lists(RUNNING, max_size=4).map(tuple),
        "penalty_seconds": st.sampled_from([0.0, 2.0, 20.0]),
    }
)


def node(state: dict[str, Any], node_id: str = "a") -> NodeSnapshot:
    return snapshot(node_id, models=MODELS, **state)


NODES = st.builds(node, STATES)
CLUSTERS = st.lists(STATES, min_size=1, max_size=6).map(
    lambda states: [node(state, f"n{number}") for number, state in enumerate(states)]
)

REQUESTS = st.builds(
    request,
    st.sampled_from(MODELS),
    input_tokens=st.sampled_from([0, 100, 20_000]),
    output_tokens=st.sampled_from([None, 0, 10, 4000]),
    interactive=st.booleans(),
    prefer_local=st.booleans(),
    priority=st.integers(1, 10),
    min_vram_bytes=st.sampled_from([None, None, 10 * GB]),
    prefer_labels=st.sampled_from([frozenset(), frozenset({"fast", "eu"})]),
    options=st.sampled_from([RunnerOptions(), RunnerOptions(num_ctx=8192)]),
    cached_tokens=st.sampled_from([{}, {"a": 50, "n0": 19_000, "n1": 30_000}]),
)

DEMAND: st.SearchStrategy[dict[str, Demand]] = st.dictionaries(
    st.sampled_from(list[str](MODELS)),
    st.builds(
        Demand,
        per_second=st.sampled_from([0.0, 0.01, 5.0]),
        warm_nodes=st.integers(0, 2),
        output_tokens=st.sampled_from([None, 50.0]),
    ),
)


@st.composite
def moments(draw: st.DrawFn) -> Moment:
    """A fresh moment: it holds what was worked out for one choice."""
    return Moment(
        now=float(draw(st.integers(0, 60))),
        demand=draw(DEMAND),
        queue_ahead=draw(st.integers(0, 5)),
        prices=draw(st.sampled_from([Prices(), Prices(prefer_local_seconds=0.0)])),
    )


def again(moment: Moment, **about: Any) -> Moment:
    """The same moment with nothing worked out yet."""
    return Moment(
        **{
            "now": moment.now,
            "demand": moment.demand,
            "queue_ahead": moment.queue_ahead,
            "prices": moment.prices,
            **about,
        }
    )
