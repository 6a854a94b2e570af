"""The explanation that goes back with an answer."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any

from hydra_llm.exceptions import NoEligibleNodeError
from hydra_llm.scheduling.outcome import Ended, Outcome, outcome_of
from hydra_llm.scheduling.scheduler import Choice
from hydra_llm.tables import html_table, stacked_bars, text_table
from hydra_llm.types import Attempt, Candidate, Rejection, masked_url

KEYS = (
    "model",
    "requested_node",
    "selected_node",
    "node_id",
    "node_url",
    "reason",
    "warnings",
    "candidates",
    "rejections",
    "attempts",
    "predicted",
    "actual",
    "outcome",
    "continued",
)


class RoutingDecision(Mapping[str, Any]):
    """
    Why a request went where it went, and what happened there.

    Read it as attributes or as a mapping; :meth:`to_dict` gives plain data for JSON::

        decision = response["routing_decision"]
        print(decision["reason"])
        print(decision.table())

    Costs and predictions are in seconds. They are worked out when first asked for, from
    snapshots that never change, so an answer that nobody questions costs nothing.
    """

    def __init__(
        self,
        *,
        model: str,
        requested_node: str | None = None,
        choice: Choice | None = None,
        refusal: NoEligibleNodeError | None = None,
        attempts: tuple[Attempt, ...] = (),
        actual: Mapping[str, float] | None = None,
        continued: Mapping[str, Any] | None = None,
        ended: Ended | None = None,
    ) -> None:
        self.model = model
        # It may be a URL with a password in it, and this goes into answers and logs.
        self.requested_node = None if requested_node is None else masked_url(requested_node)
        self.attempts = attempts
        self.continued = continued
        """Of a stream that another node has gone on with: ``from`` which, ``after_parts`` of it."""
        self._choice = choice
        self._refusal = refusal
        self._actual = actual
        self._ended = ended
        self._outcome: Outcome | None = None
        self._candidates: tuple[Candidate, ...] | None = None
        self._predicted: dict[str, float] | None = None

    # ------------------------------------------------------------------ facts

    @property
    def selected_node(self) -> str | None:
        """Id of the node that was chosen; None when no node could take the request."""
        return None if self._choice is None else self._choice.selected.id

    @property
    def node_id(self) -> str | None:
        """The same as ``selected_node``, as answers call it."""
        return self.selected_node

    @property
    def node_url(self) -> str | None:
        """URL of the chosen node, without credentials."""
        return None if self._choice is None else self._choice.selected.node.url

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Every node that could have taken it, with its costs, cheapest first."""
        if self._candidates is None:
            self._candidates = () if self._choice is None else self._choice.candidates()
        return self._candidates

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        """Every node that could not, with the reason."""
        if self._choice is not None:
            return self._choice.rejections
        return self._refusal.rejections if self._refusal is not None else ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Wishes that could not be fulfilled, a sentence each."""
        return () if self._choice is None else self._choice.warnings

    @property
    def predicted(self) -> dict[str, float] | None:
        """Expected seconds on the chosen node: by term, ``first_token`` and ``total``."""
        if self._predicted is None and self._choice is not None:
            self._predicted = self._choice.predicted()
        return self._predicted

    @property
    def actual(self) -> Mapping[str, float] | None:
        """What was measured, in seconds; None before the answer is complete."""
        return self._actual

    @property
    def outcome(self) -> Outcome | None:
        """
        What was foreseen when the request came, and what happened.

        None before the answer is complete, of a request that failed or was broken off, and of an
        answer that two nodes have given.
        """
        if self._outcome is None and self._ended is not None and self._choice is not None:
            self._outcome = outcome_of(self._choice, self._ended)
        return self._outcome

    @property
    def reason(self) -> str:
        """One readable sentence."""
        if self._choice is None:
            return str(self._refusal) if self._refusal is not None else "nothing was decided"
        failed = [a for a in self.attempts if a.outcome not in ("ok", "cancelled")]
        sentence = self._main_reason()
        if failed:
            names = ", ".join(f"{a.node_id} ({a.outcome})" for a in failed)
            sentence += f" after {names} failed"
        if self.continued is not None:
            begun_by, parts = self.continued["from"], self.continued["after_parts"]
            sentence += f", to go on with the answer of {begun_by} after its {parts} parts"
        return f"{sentence}; {'; '.join(self.warnings)}" if self.warnings else sentence

    def _main_reason(self) -> str:
        choice = self._choice
        assert choice is not None
        node_id = choice.selected.id
        candidates = self.candidates
        mine = next(c for c in candidates if c.node_id == node_id)
        given_up = {relaxation.name for relaxation in choice.relaxations}
        if self.requested_node is not None and "node_id" not in given_up:
            return f"{node_id}: pinned by node_id; {mine.note}"
        total = self.predicted["total"] if self.predicted else mine.total_seconds
        text = f"{node_id}: {mine.note}, about {_seconds(total)} expected"
        others = [c for c in candidates if c.node_id != node_id]
        if not others:
            return f"{text}; the only node that can take it"
        second = others[0]
        lead = second.total_seconds - mine.total_seconds
        if abs(lead) <= max(0.05, 0.05 * mine.total_seconds):
            return f"{text}; as good as {second.node_id}, drawn at random"
        return f"{text}; {_seconds(lead)} cheaper than {second.node_id} ({second.note})"

    # ---------------------------------------------------------------- mapping

    def __getitem__(self, key: str) -> Any:
        if key not in KEYS:
            raise KeyError(key)
        value = getattr(self, key)
        if key in ("candidates", "rejections", "attempts"):
            return [item.to_dict() for item in value]
        if key == "warnings":
            return list(value)
        if key == "outcome":
            return value and value.to_dict()
        if key in ("predicted", "actual") and value is not None:
            return {name: round(seconds, 4) for name, seconds in value.items()}
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(KEYS)

    def __len__(self) -> int:
        return len(KEYS)

    def to_dict(self) -> dict[str, Any]:
        """As plain data that ``json.dumps`` takes."""
        return {key: self[key] for key in KEYS}

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> RoutingDecision:
        """
        Read back what :meth:`to_dict` gave, for its tables.

        LangChain's ``response_metadata["routing_decision"]`` is such plain data, and so is a
        decision that was written to a log.

        Raises:
            ValueError: it is something else.
        """
        try:
            return _ToldDecision(told)
        except (AttributeError, KeyError, TypeError) as exc:
            raise ValueError(f"this is no routing decision's plain data: {exc!r}") from exc

    # ---------------------------------------------------------------- reading

    def rows(self) -> list[dict[str, Any]]:
        """A row a node: chosen first, then the other candidates, then the rejected ones."""
        rows: list[dict[str, Any]] = []
        for candidate in self.candidates:
            row: dict[str, Any] = {
                "node": candidate.node_id,
                "chosen": candidate.node_id == self.selected_node,
                "seconds": candidate.total_seconds,
                **candidate.costs,
                "note": candidate.note,
            }
            rows.append(row)
        rows.sort(key=lambda row: (not row["chosen"], row["seconds"]))
        for rejection in self.rejections:
            note = rejection.reason + (f": {rejection.detail}" if rejection.detail else "")
            rows.append({"node": rejection.node_id, "chosen": False, "seconds": None, "note": note})
        return rows

    @property
    def _terms(self) -> list[str]:
        return list(self.candidates[0].costs) if self.candidates else []

    def _cells(self, rows: list[dict[str, Any]], *, nothing: str) -> list[list[str]]:
        return [
            [
                row["node"],
                nothing if row["seconds"] is None else f"{row['seconds']:.2f}",
                *(f"{row[name]:.2f}" if name in row else "" for name in self._terms),
                row["note"],
            ]
            for row in rows
        ]

    def table(self) -> str:
        """The rows as text, for a terminal or a log."""
        rows = self.rows()
        body = [
            ["→" if row["chosen"] else "", *cells]
            for row, cells in zip(rows, self._cells(rows, nothing="-"), strict=True)
        ]
        table = text_table(["", "node", "seconds", *self._terms, "note"], body)
        return table if self.outcome is None else f"{table}\n\n{self.outcome.table()}"

    def _repr_html_(self) -> str:
        """For notebooks: the candidates' seconds as bars, and everything as a table."""
        rows, terms = self.rows(), self._terms
        chosen = next((number for number, row in enumerate(rows) if row["chosen"]), None)
        head = ["node", "seconds", *terms, "note"]
        table = html_table(head, self._cells(rows, nothing="–"), bold=chosen)
        bars = stacked_bars(
            [(row["node"], {name: row[name] for name in terms}) for row in rows if row["seconds"]],
            unit="s",
        )
        outcome = "" if self.outcome is None else self.outcome._repr_html_()
        return f"<p>{html.escape(self.reason)}</p>{bars}{table}{outcome}"

    def __repr__(self) -> str:
        if self.selected_node is None:
            return f"<RoutingDecision {self.model} → nobody: {self.reason}>"
        return f"<RoutingDecision {self.model} → {self.reason}>"


class _ToldDecision(RoutingDecision):
    """A decision read back from plain data."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        super().__init__(
            model=str(told["model"]),
            requested_node=told.get("requested_node"),
            continued=told.get("continued"),
        )
        self.attempts = tuple(Attempt(**attempt) for attempt in told.get("attempts") or ())
        self._actual = told.get("actual")
        self._predicted = told.get("predicted")
        outcome = told.get("outcome")
        self._outcome = outcome and Outcome.from_dict(outcome)
        self._candidates = tuple(
            Candidate(
                node_id=candidate["node_id"],
                costs=candidate["costs"],
                total_seconds=candidate["seconds"],
                note=candidate["note"],
            )
            for candidate in told.get("candidates") or ()
        )
        self._rejections = tuple(Rejection(**one) for one in told.get("rejections") or ())
        self._warnings = tuple(told.get("warnings") or ())
        self._told = told

    @property
    def selected_node(self) -> str | None:
        return self._told.get("selected_node")

    @property
    def node_url(self) -> str | None:
        return self._told.get("node_url")

    @property
    def reason(self) -> str:
        return str(self._told.get("reason", ""))

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        return self._rejections

    @property
    def warnings(self) -> tuple[str, ...]:
        return self._warnings


def _seconds(value: float) -> str:
    if value < 0.0995:
        return f"{value * 1000:.0f} ms"
    return f"{value:.1f} s" if value < 99.5 else f"{value:.0f} s"
