"""Each idea that the table of the ablation leaves out is one that decisions depend on."""

from __future__ import annotations

from functools import cache

import pytest

from tests.replay.ablation import IDEAS, Case, first_tokens, without

BUSY = Case(name="busy", cluster="24+24+12+8", trace="poisson", rate=1.0, requests=100)
TALK = Case(name="talk", cluster="24+24+12+8", trace="mooncake_synthetic", rate=1.0, requests=100)


@cache
def as_it_is(case: Case, seed: int) -> list[float]:
    return first_tokens(case, seed)


@pytest.mark.parametrize("idea", IDEAS)
def test_without_it_requests_fare_otherwise(idea: str) -> None:
    case, seed = (TALK, 2) if idea == "prompts are cached" else (BUSY, 1)
    with without(idea):
        left_out = first_tokens(case, seed)
    assert left_out != as_it_is(case, seed)
