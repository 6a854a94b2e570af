"""Each idea that the table of the ablation leaves out is one that decisions depend on."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from tests.replay.ablation import IDEAS, UNEQUAL, Case, first_tokens, without

BUSY = Case(name="busy", cluster="24+24+12+8", trace="poisson", rate=1.0, requests=100)
STRANGE = replace(BUSY, name="strange", cluster=UNEQUAL, vram_told=False)
TALK = Case(name="talk", cluster="24+24+12+8", trace="mooncake_synthetic", rate=1.0, requests=100)

CASES = {
    "prompts are cached": (TALK, 2),
    "what nobody tells is guessed": (STRANGE, 1),
    "what is unknown is found out": (STRANGE, 0),
    "loads show what a node holds": (STRANGE, 4),
    "a copy in system memory is worth little": (STRANGE, 1),
    "another warm copy takes over": (BUSY, 2),
    "one model's cache tells of the others'": (BUSY, 0),
    "nobody reads three tokens a second": (BUSY, 2),
    "swaps are put off": (BUSY, 2),
}
"""Where an idea matters that does not matter where it is only busy."""


@cache
def as_it_is(case: Case, seed: int) -> list[float]:
    return first_tokens(case, seed)


@pytest.mark.parametrize("idea", IDEAS)
def test_without_it_requests_fare_otherwise(idea: str) -> None:
    case, seed = CASES.get(idea, (BUSY, 1))
    with without(idea):
        left_out = first_tokens(case, seed)
    assert left_out != as_it_is(case, seed)
