"""What a decision foresaw beside what then happened, term by term.

Worked out when somebody asks: snapshots never change, so what was foreseen when a request came can
still be told after it has been answered.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hydra_llm.exceptions import RoutingError
from hydra_llm.scheduling.moment import Moment
from hydra_llm.scheduling.scheduler import Choice, Scheduler
from hydra_llm.tables import html_table, text_table
from hydra_llm.types import UNKNOWN_SPEED, InferenceRequest, NodeSnapshot, Usage

__all__ = ["TERMS", "Ended", "Outcome", "Prospect", "outcome_of"]

TERMS: Mapping[str, str] = {
    "wait": "wait",
    "load": "load",
    "prefill": "prefill",
    "decode": "decode",
    "first_token": "first token",
    "total": "whole answer",
    "prompt_tokens": "prompt's length",
    "output_tokens": "answer's length",
}
"""What is compared, and how it is called; seconds, and two counts of tokens."""


class Prospect(NamedTuple):
    """All that the scheduler would have chosen by when a request joined the waiting line."""

    scheduler: Scheduler
    request: InferenceRequest
    nodes: Sequence[NodeSnapshot]
    moment: Moment

    def choice(self) -> Choice | None:
        """What it would have chosen; None where a plug-in now says otherwise."""
        # A draw of its own: which node comes next must not hang on who looks back.
        try:
            return self.scheduler.schedule(self.request, self.nodes, self.moment, random.Random(0))
        except RoutingError:
            return None


class Ended(NamedTuple):
    """When things happened to a request that was answered as a whole, by the router's clock."""

    prospect: Prospect | None
    """Of one that waited in the line; one that did not was foreseen by its very choice."""
    sent_at: float
    first_token_at: float | None
    """None for an answer in one piece, which does not show it."""
    ended_at: float
    usage: Usage | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """
    What was foreseen when a request came, and what happened, by the names in :data:`TERMS`.

    Both count from the same moment: when the request came, or after a failover when the next node
    was looked for. What nothing tells is not there.
    """

    node_id: str
    """The node that was foreseen; once a place was free, another one may have been better."""
    predicted: Mapping[str, float]
    """Seconds by term, and tokens."""
    actual: Mapping[str, float]
    """The same, as far as it is known: Ollama's durations are in answers in Ollama's own form."""
    samples: int = 0
    """Measurements of the model's pace on the node that it was foreseen with."""

    def errors(self) -> dict[str, float]:
        """Predicted less actual, of what both have: above 0 where too much was expected."""
        return {
            name: self.predicted[name] - self.actual[name]
            for name in TERMS
            if name in self.predicted and name in self.actual
        }

    def to_dict(self) -> dict[str, Any]:
        """As plain data, rounded to a tenth of a millisecond."""
        return {
            "node_id": self.node_id,
            "predicted": rounded(self.predicted),
            "actual": rounded(self.actual),
            "samples": self.samples,
        }

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Outcome:
        """Read back what :meth:`to_dict` gave."""
        return cls(**{name: told[name] for name in cls.__slots__})

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        names = [name for name in TERMS if name in self.predicted and name in self.actual]
        body = [
            [label, *(_shown(name, values[name]) for name in names)]
            for label, values in (("expected", self.predicted), ("happened", self.actual))
        ]
        return ["", *(TERMS[name] for name in names)], body

    def table(self) -> str:
        """The two beside each other as text."""
        return text_table(*self._cells())

    def _repr_html_(self) -> str:
        return html_table(*self._cells())


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """To a tenth of a millisecond."""
    return {name: round(value, 4) if value else 0.0 for name, value in values.items()}


def _shown(name: str, value: float) -> str:
    return f"{value:.0f}" if name.endswith("_tokens") else f"{value:.2f} s"


def outcome_of(choice: Choice, ended: Ended) -> Outcome:
    """
    Put side by side what was foreseen and what happened.

    Args:
        choice: by which the request was sent.
    """
    foreseen = None if ended.prospect is None else ended.prospect.choice()
    choice = foreseen or choice
    request, moment = choice.request, choice.moment
    predicted = choice.predicted()
    predicted["prompt_tokens"] = float(request.input_tokens)
    predicted["output_tokens"] = float(moment.output_tokens(request))
    joins_load = moment.fit(request, choice.selected).verdict == "loading"
    return Outcome(
        node_id=choice.selected.id,
        predicted=predicted,
        actual=_happened(moment.now, ended, joins_load=joins_load),
        samples=choice.selected.speeds.get(request.model, UNKNOWN_SPEED).samples,
    )


def _happened(since: float, ended: Ended, *, joins_load: bool) -> dict[str, float]:
    usage = ended.usage or Usage()
    in_line = max(0.0, ended.sent_at - since)
    in_ollama = None if usage.slot_seconds is None else max(0.0, usage.slot_seconds)
    load = usage.load_seconds
    if joins_load and load is not None and in_ollama is not None:
        # Ollama counts the rest of a load that was under way as this request's own.
        in_ollama, load = in_ollama + load, 0.0
    first = ended.first_token_at
    known: dict[str, float | None] = {
        "wait": None if in_ollama is None else in_line + in_ollama,
        "load": load,
        "prefill": usage.prefill_seconds,
        "decode": usage.decode_seconds,
        "first_token": None if first is None else first - since,
        "total": ended.ended_at - since,
        "prompt_tokens": usage.prompt_tokens,
        "output_tokens": usage.output_tokens,
    }
    return {name: float(value) for name, value in known.items() if value is not None}
