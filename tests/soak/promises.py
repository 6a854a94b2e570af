"""What must hold in a soak, whatever goes wrong (DESIGN sections 2 and 6)."""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from hydra_llm import (
    AllNodesFailedError,
    DeadlineError,
    HydraError,
    RoutingDecision,
    StreamBrokenError,
)
from tests.soak.callers import ANSWER_WORD, PROMPT_WORD, Asked, script
from tests.soak.troubles import Illness

__all__ = ["Judge", "LogWatch"]

MOST_TOLD = 20
TALKATIVE = ("repeated-token cut", "endless stream", "endless line")
"""Under these a node says more than it should; it is still only that node's answer."""
SLACK_S = 0.5
WINDOW_S = 120.0
SECRET = re.compile(f"{PROMPT_WORD}|{ANSWER_WORD}")


class Judge:
    """
    Looks at everything that happens, and remembers each promise that was broken.

    Args:
        models: what is installed, by node id.
        clock: the world's.
        floor: the retry budget's, in attempts.
        slack_s: how late a caller may learn that its deadline is over.
    """

    def __init__(
        self,
        models: Mapping[str, frozenset[str]],
        *,
        clock: Callable[[], float],
        floor: int,
        slack_s: float = SLACK_S,
    ) -> None:
        self.models = models
        self.broken: list[str] = []
        self.illnesses: list[tuple[Illness, float]] = []
        """With the seconds for which each is felt after its end."""
        self.outcomes: Counter[str] = Counter()
        self.requests = self.decisions = 0
        self._clock = clock
        self._floor = floor
        self._slack_s = slack_s
        self._window: list[tuple[float, float, int]] = []

    def tell(self, what: str) -> None:
        """A promise was broken."""
        self.outcomes["promises broken"] += 1
        if len(self.broken) < MOST_TOLD:
            self.broken.append(what)

    # ------------------------------------------------------------------ who was well

    def is_ill(self, node_id: str, since: float, until: float) -> list[Illness]:
        """What a node had, or may still have felt, in that time."""
        return [
            illness
            for illness, tail in self.illnesses
            if illness.node_id == node_id and illness.bears_on(since, until, tail)
        ]

    def forget(self, before: float) -> None:
        """No request under way has begun before that."""
        self.illnesses = [one for one in self.illnesses if one[0].ended + one[1] >= before]

    def _well(self, asked: Asked) -> list[str]:
        """Nodes that could have served a request all along."""
        tried = set(asked.words.get("exclude_nodes", ()))
        if asked.broken is not None:
            tried |= {attempt.node_id for attempt in asked.broken.attempts}
        return [
            node_id
            for node_id, models in self.models.items()
            if asked.model in models
            and node_id not in tried
            and asked.pinned_to in (None, node_id)
            and not self.is_ill(node_id, asked.began, asked.ended)
        ]

    # ------------------------------------------------------------------ one request

    def answered(self, asked: Asked) -> None:
        """A caller has its answer, an error, or has left."""
        self.requests += 1
        self._look_at_texts(asked)
        error = asked.error
        if error is not None:
            self._look_at_error(asked, error)
        elif asked.is_cancelled:
            self.outcomes["left by their callers"] += 1
            if asked.cancel_after is None and not any(
                self.is_ill(node_id, asked.began, asked.ended) for node_id in self.models
            ):
                self.tell(f"{asked} was not answered in {asked.ended - asked.began:.1f} s")
        elif asked.is_whole:
            self.outcomes["answered"] += 1
        elif asked.drop_after is not None or asked.parts:
            self.outcomes["dropped by their callers"] += 1
        else:
            self.tell(f"{asked} got nothing, and no error")
        if isinstance(
            error, AllNodesFailedError
        ):  # other ends have a decision, and are counted there
            self._count_retries(asked.began, asked.ended, len(error.attempts))

    def _look_at_texts(self, asked: Asked) -> None:
        for text in asked.texts:
            owners = set(re.findall(rf"{ANSWER_WORD}-(\w+)-", text))
            if len(owners) > 1:
                self.tell(f"{asked} got words of {' and '.join(sorted(owners))} in one answer")
            elif text and not self._is_beginning(asked, text, owners):
                self.tell(f"{asked} got something else than the beginning of an answer")
        if asked.is_whole and asked.kind != "embed" and asked.node_id is not None:
            said = self._expected(asked, asked.node_id)
            if asked.texts[-1] != said and not self._is_talkative(asked, asked.node_id):
                self.tell(f"{asked} got a whole answer that is not {asked.node_id}'s")

    def _is_beginning(self, asked: Asked, text: str, owners: set[str]) -> bool:
        if not owners:
            return any(self._is_talkative(asked, node_id) for node_id in self.models)
        (owner,) = owners
        said = self._expected(asked, owner)
        return said.startswith(text) or self._is_talkative(asked, owner)

    def _expected(self, asked: Asked, node_id: str) -> str:
        return "".join(script(node_id)[: asked.tokens])

    def _is_talkative(self, asked: Asked, node_id: str) -> bool:
        illnesses = self.is_ill(node_id, asked.began, asked.ended)
        return any(illness.trouble.name in TALKATIVE for illness in illnesses)

    def _look_at_error(self, asked: Asked, error: BaseException) -> None:
        self.outcomes[type(error).__name__] += 1
        text = str(error)
        if not isinstance(error, HydraError):
            self.tell(f"{asked} got a {type(error).__name__}, none of ours: {text!r}")
            return
        if "\n" in text or not text:
            self.tell(f"{asked} got an error that is not one line: {text!r}")
        if SECRET.search(text + repr(error)):
            self.tell(f"{asked} got an error that tells what was said: {text!r}")
        if not self._may_fail(asked, error):
            well = ", ".join(self._well(asked)) or "none"
            self.tell(f"{asked} failed although it need not have (well: {well}): {text}")

    def _may_fail(self, asked: Asked, error: HydraError) -> bool:
        deadline = asked.words.get("deadline_s")
        if deadline is not None:
            late = asked.ended - asked.began - deadline
            # Once parts come a caller has something, and may go on reading as it likes.
            if late > self._slack_s and not asked.parts:
                self.tell(f"{asked} learned of its deadline {late:.3f} s late")
            if isinstance(error, DeadlineError) or late > -0.1:
                return True
        if isinstance(error, StreamBrokenError):
            return bool(self.is_ill(error.node_id, asked.began, asked.ended))
        if isinstance(error, AllNodesFailedError) and "retry budget" in str(error):
            self.outcomes["retry budget spent"] += 1
            return True
        return not self._well(asked)

    def _count_retries(self, began: float, ended: float, attempts: int) -> None:
        """However bad it is: attempts ≤ 1.2 × requests + a floor, which a minute refills."""
        self._window.append((began, ended, max(0, attempts - 1)))
        since = ended - WINDOW_S
        if self._window[0][1] >= since - WINDOW_S / 4:
            return
        self._window = [one for one in self._window if one[1] >= since]
        inside = [one for one in self._window if one[0] >= since]
        retries = sum(one[2] for one in inside)
        most = 0.2 * len(self._window) + self._floor * (1 + WINDOW_S / 60.0)
        if retries > most:
            self.tell(
                f"{retries} further attempts for {len(inside)} requests in the {WINDOW_S:g} s "
                f"before {ended:.1f} s; the budget allows {most:.0f}"
            )

    # ------------------------------------------------------------------ decisions

    def decided(self, decision: RoutingDecision) -> None:
        """A request has ended on a node, one way or the other."""
        self.decisions += 1
        now = self._clock()
        total = (decision.actual or {}).get("total", 0.0)
        self._count_retries(now - total, now, len(decision.attempts))
        try:
            self._look_at_decision(decision)
        except Exception as error:
            self.tell(f"a decision cannot be read: {type(error).__name__}: {error}")

    def _look_at_decision(self, decision: RoutingDecision) -> None:
        told = decision.to_dict()
        text = json.dumps(told)
        wrong = list(_faults_of(decision, set(self.models)))
        if SECRET.search(text):
            wrong.append("it tells what was said")
        if wrong:
            self.tell(f"{decision!r}: {'; '.join(wrong)}")

    # ------------------------------------------------------------------ the end

    def count_attempts(self, sent: int) -> None:
        """All attempts that nodes have seen, against all requests."""
        most = 1.2 * self.requests + self._floor
        if sent > most:
            self.tell(f"{sent} attempts for {self.requests} requests: more than {most:.0f}")


def _faults_of(decision: RoutingDecision, nodes: set[str]) -> Iterable[str]:
    """What is missing in, or wrong with, an explanation."""
    candidates = [one.node_id for one in decision.candidates]
    rejected = [one.node_id for one in decision.rejections]
    attempts = [one.node_id for one in decision.attempts]
    if sorted([*candidates, *rejected]) != sorted(nodes):
        yield f"candidates {candidates} and rejections {rejected} are not the nodes"
    if any(not one.reason for one in decision.rejections):
        yield "a rejection without a reason"
    if decision.selected_node not in candidates:
        yield "the selected node is no candidate"
    if not decision.reason or "\n" in decision.reason:
        yield f"the reason is no sentence: {decision.reason!r}"
    if not attempts or attempts[-1] != decision.selected_node:
        yield f"the last attempt of {attempts} is not on the selected node"
    if len(set(attempts)) != len(attempts):
        yield f"a node was tried twice: {attempts}"
    yield from _figures(decision)


def _figures(decision: RoutingDecision) -> Iterable[str]:
    predicted, actual = decision.predicted, decision.actual
    if predicted is None or not {"first_token", "total"} <= set(predicted):
        yield "nothing was predicted"
    if actual is None or "total" not in actual:
        yield "nobody says what happened"
        return
    costs = [value for one in decision.candidates for value in one.costs.values()]
    figures = [*costs, *(predicted or {}).values(), *actual.values()]
    if any(not math.isfinite(value) or value < 0.0 for value in figures):
        yield f"a figure that cannot be: {figures}"
    if decision.attempts[-1].outcome == "ok" and "first_token" not in actual:
        yield "no first token of a whole answer"
    if actual.get("first_token", 0.0) > actual["total"] + 1e-9:
        yield "the first token came after the end"


class LogWatch(logging.Handler):
    """Reads every line that is logged, and keeps none."""

    def __init__(self, judge: Judge) -> None:
        super().__init__(logging.DEBUG)
        self._judge = judge
        self.lines = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Look at a line."""
        self.lines += 1
        text = record.getMessage()
        if record.exc_info:
            text += logging.Formatter().formatException(record.exc_info)
        if SECRET.search(text):
            self._judge.tell(f"a line of the log tells what was said: {text[:200]!r}")
        if record.levelno >= logging.ERROR:
            self._judge.tell(f"an error was logged: {text[:500]}")
