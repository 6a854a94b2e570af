"""Plays a row: one fault, some nodes, one kind of caller."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest

from hydra_llm import HydraSettings
from hydra_llm.exceptions import AllNodesFailedError, NoEligibleNodeError, StreamBrokenError
from tests.faults.callers import Caller, Seen, asked
from tests.faults.catalogue import BY_NAME
from tests.faults.rows import BEFORE, BROKEN, ROWS, SHORT, Blame, Ending, Row
from tests.faults.stage import Stage, stage_of

COUNTS = (1, 2, 4)
UNFINISHED_SECONDS = 10.0
LEAST_LIMIT_SECONDS = HydraSettings.model_fields["connect_timeout"].default

MakeCaller = Callable[[Stage], Caller]


@dataclass(frozen=True, kw_only=True)
class Case:
    row: Row
    count: int
    stream: bool
    in_a_loop: bool

    def __str__(self) -> str:
        nodes = f"{self.count} node{'s' if self.count > 1 else ''}"
        how = "stream" if self.stream else "whole"
        return f"{self.row.name}-{nodes}-{how}-{'async' if self.in_a_loop else 'sync'}"

    @property
    def is_seen(self) -> bool:
        """Whether the caller sees it although another node could serve."""
        return self.row.is_mid_stream and self.stream


def cases(rows: Iterable[Row] = ROWS) -> list[Case]:
    return [
        Case(row=row, count=count, stream=stream, in_a_loop=in_a_loop)
        for row in rows
        for count in COUNTS
        for stream in (False, True)
        for in_a_loop in (False, True)
    ]


def over_all_cases(front_ends: Iterable[str]) -> pytest.MarkDecorator:
    params = [
        pytest.param(case, front_end, id=f"{case}-{front_end}")
        for case in cases()
        for front_end in front_ends
    ]
    return pytest.mark.parametrize(("case", "front_end"), params)


def play(case: Case, make_caller: MakeCaller, *, unfinished: float = UNFINISHED_SECONDS) -> None:
    """
    Play it and look at everything.

    Raises:
        AssertionError: something is not as its row says.
    """
    row = case.row
    answer = _undisturbed(make_caller)
    ill = BY_NAME[row.name]
    with stage_of(case.count, case=ill, **row.stage, **{**ill.router, **_settings(row)}) as stage:
        if row.strike is not None:
            row.strike(stage)
        else:
            ill.ill(stage.first)
        seen: list[Seen] = []
        with closing(make_caller(stage)) as caller:
            for number in range(row.asks):
                if row.before_each is not None:
                    row.before_each(stage, number)
                seen.append(
                    asked(
                        caller,
                        stream=case.stream,
                        in_a_loop=case.in_a_loop,
                        limit=unfinished,
                        **row.words,
                    )
                )
                _check_seen(case, stage, answer, seen[-1], _ending(case, number))
        _check_attempts(case, stage)
        if row.is_probed:
            stage.router.refresh()
        _blame(case, stage).check(stage.seen("a"), stage.clock())
        for node in stage.others:
            _check_unharmed(stage, node.id)
        if row.holds is not None:
            row.holds(stage, seen)


@lru_cache
def _undisturbed(make_caller: MakeCaller) -> str:
    """What such a caller is answered where nothing is wrong; all nodes say the same."""
    with stage_of(1) as stage, closing(make_caller(stage)) as caller:
        seen = asked(caller, stream=False, in_a_loop=False, limit=UNFINISHED_SECONDS)
    assert seen.error is None
    assert len(seen.text) > 20
    return seen.text


def _settings(row: Row) -> dict[str, Any]:
    if row.limit is None:
        return dict(row.settings)
    # An answer in one piece has one limit for all of its silence.
    return {row.limit: SHORT, "whole_answer_timeout": SHORT, **row.settings}


def _ending(case: Case, number: int) -> Ending:
    if case.is_seen:
        return BROKEN
    alone = case.row.alone
    return alone[min(number, len(alone) - 1)] if case.count == 1 else Ending(None)


def _check_seen(case: Case, stage: Stage, answer: str, seen: Seen, ending: Ending) -> None:
    if ending.kind is None:
        if seen.error is not None:
            raise AssertionError(f"the caller sees {seen.error!r}") from seen.error
        assert seen.text == answer
        return
    error = seen.error
    assert error is not None, f"the caller sees {seen.text!r}"
    _check_error(error, ending, case.row, stage.seen("a").node.url)
    if isinstance(error, AllNodesFailedError | StreamBrokenError):
        for attempt in error.attempts:
            _check_time(case.row, stage.clock.real_seconds(attempt.seconds))
    parts = len([part for part in seen.parts if part])
    if case.is_seen and case.row.parts is None:
        assert parts
        return
    assert parts == (BEFORE if case.is_seen else 0)
    assert answer.startswith(seen.text)


def _check_error(error: BaseException, ending: Ending, row: Row, url: str) -> None:
    text = str(error)
    is_litellms = type(error).__module__.startswith("litellm")
    if is_litellms:
        assert type(error).__name__ == ending.litellm, repr(error)
        # It adds lines of its own: about groups and retries, or where the stream broke.
        text = text.splitlines()[0].removeprefix(f"litellm.{type(error).__name__}: ")
    else:
        assert ending.kind is not None
        assert isinstance(error, ending.kind), repr(error)
    assert ending.says in text
    if ending.kind is not None and not issubclass(ending.kind, NoEligibleNodeError):
        assert row.why in text
    assert "\n" not in text
    assert "lighthouses" not in str(error)
    if isinstance(error, StreamBrokenError):
        assert error.node_id == "a"
        assert error.node_url == url
        assert error.parts == (row.parts or error.parts) > 0
        assert [one.node_id for one in error.attempts] == ["a"]


def _check_attempts(case: Case, stage: Stage) -> None:
    """How often it was tried, and for how long."""
    row = case.row
    failing = row.failing
    if case.count == 1 and row.failing_alone is not None:
        failing = row.failing_alone
    cause = row.cause
    if _came_in_one_piece(stage):
        cause = row.cause_in_one_piece or cause
    assert stage.failures == ([] if cause is None else [("a", cause)] * failing)
    for decision in stage.decisions:
        *before, last = decision.attempts
        if last.outcome == "ok":
            assert [(one.node_id, one.outcome) for one in before] in ([], [("a", cause)])
            assert not before or f"after a ({cause}) failed" in decision.reason
            assert last.node_id == decision.selected_node
        for failed in before:
            _check_time(row, stage.clock.real_seconds(failed.seconds))
    served = [one.selected_node for one in stage.decisions if one.attempts[-1].outcome == "ok"]
    answers = sum(_ending(case, number).kind is None for number in range(row.asks))
    assert len(served) == answers
    # Nobody else was asked for an answer that was handed out from somewhere else.
    elsewhere = sum(len(stage.asked_of(node)) for node in stage.others)
    assert elsewhere == sum(node_id != "a" for node_id in served)


def _check_time(row: Row, seconds: float) -> None:
    """It waited for the one limit that is its own, or for none: the least of the others is 5 s."""
    if row.limit is not None:
        assert seconds > 0.9 * SHORT
    assert seconds < LEAST_LIMIT_SECONDS


def _came_in_one_piece(stage: Stage) -> bool:
    """Whether the node was asked so; LangChain asks for parts even of what it gives as a whole."""
    return any(one.body.get("stream") is False for one in stage.asked_of(stage.first))


def _blame(case: Case, stage: Stage) -> Blame:
    row = case.row
    if case.count == 1 and row.blame_alone is not None:
        return row.blame_alone
    if _came_in_one_piece(stage) and row.blame_in_one_piece is not None:
        return row.blame_in_one_piece
    return row.blame


def _check_unharmed(stage: Stage, node_id: str) -> None:
    node = stage.seen(node_id)
    assert (node.health, node.circuit, node.penalty_seconds) == ("up", "closed", 0.0)
    assert node.paused_until is None
    assert not node.load_retry_at
