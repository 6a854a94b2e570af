"""Each fault, with 1, 2 and 4 nodes, streamed or not, in a thread or a loop."""

from __future__ import annotations

import pytest

from tests.faults.callers import LangChainCaller, PlainCaller
from tests.faults.matrix import Case, MakeCaller, over_all_cases, play
from tests.faults.stage import ample_time

__all__ = ["ample_time"]

CALLERS: dict[str, MakeCaller] = {"Client": PlainCaller, "ChatHydra": LangChainCaller}


@pytest.mark.usefixtures("ample_time")
@over_all_cases(CALLERS)
def test_fault(case: Case, front_end: str) -> None:
    play(case, CALLERS[front_end])
