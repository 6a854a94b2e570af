"""Each fault, with 1, 2 and 4 nodes, streamed or not, in a thread or a loop."""

from __future__ import annotations

import pytest

from tests.faults.callers import LangChainCaller, PlainCaller, asked
from tests.faults.catalogue import BY_NAME
from tests.faults.matrix import Case, MakeCaller, over_all_cases, play
from tests.faults.rows import NO_ANSWER, NO_CONNECTION, SILENCE, Row
from tests.faults.stage import ample_time, stage_of

__all__ = ["ample_time"]

CALLERS: dict[str, MakeCaller] = {"Client": PlainCaller, "ChatHydra": LangChainCaller}


@pytest.mark.usefixtures("ample_time")
@over_all_cases(CALLERS)
def test_fault(case: Case, front_end: str) -> None:
    play(case, CALLERS[front_end])


AT_ONCE = [
    row for row in (*NO_CONNECTION, *NO_ANSWER, *SILENCE) if not row.limit and not row.strike
]


@pytest.mark.parametrize("row", AT_ONCE, ids=lambda row: row.name)
@pytest.mark.parametrize("front_end", CALLERS)
def test_one_node_that_lives_is_enough(row: Row, front_end: str) -> None:
    """Three of four fail in the same way, and nobody who asks sees it."""
    ill = BY_NAME[row.name]
    with stage_of(4, case=ill, **{**ill.router, **row.settings}) as stage:
        *failing, well = stage.cluster.node_list
        for node in failing:
            ill.ill(node)
        caller = CALLERS[front_end](stage)
        for number in range(4):
            seen = asked(caller, stream=number % 2 == 0, in_a_loop=number < 2, limit=10.0)
            assert seen.error is None
            assert seen.text
        served = [decision.selected_node for decision in stage.decisions]
        if ill.chance == 1.0 and ill.times is None:
            assert served == [well.id] * 4
        for node in failing:
            ill.well(node)
