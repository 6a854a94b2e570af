"""One finished request, as a line of JSON.

::

    {"at": 1790000000.123, "node": "rig", "model": "llama3.2:3b", "priority": 5, "ended": "ok",
     "attempts": 1, "answers_before": 12, "samples": 9, "foreseen_node": "rig",
     "predicted": {"wait": 0.0, "load": 0.0, ..., "output_tokens": 180.0},
     "actual": {"wait": 0.0, "load": 0.004, ..., "output_tokens": 221.0}}

No word of a prompt or an answer is in it, no URL and no credential.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_llm.exceptions import ConfigurationError
from hydra_llm.scheduling import TERMS, RoutingDecision
from hydra_llm.scheduling.outcome import rounded

__all__ = ["OK", "Record", "read_records", "record_of"]

OK = "ok"
_FEWEST_READABLE = 0.5
"""A file of which less can be read is none of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """
    What was foreseen of a request, and what happened.

    Args:
        at: when it ended, in seconds since 1970.
        node: the one that answered.
        ended: ``ok``, ``cancelled``, ``refused``, or the cause of the failure.
        answers_before: whole answers that this router had had of the model from the node.
        samples: measurements of the model's pace there that it was foreseen with.
        foreseen_node: another one may have been better once a place was free.
        predicted, actual: seconds and tokens by the names in ``scheduling.TERMS``, counted from
            when the request came.
    """

    at: float
    node: str
    model: str
    priority: int
    ended: str
    attempts: int
    answers_before: int
    samples: int
    foreseen_node: str
    predicted: Mapping[str, float]
    actual: Mapping[str, float]

    @property
    def is_ok(self) -> bool:
        """Whether both sides are there to be compared."""
        return self.ended == OK and bool(self.predicted) and bool(self.actual)

    def line(self) -> str:
        """As a line of JSON."""
        told = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps(told, separators=(",", ":"), ensure_ascii=False) + "\n"


def record_of(
    decision: RoutingDecision, *, at: float, priority: int, answers_before: int
) -> Record:
    """Make the record of a finished request, which has been to some node at least."""
    outcome, node = decision.outcome, decision.selected_node or ""
    foreseen_node, samples = node, 0
    # How long it took until it ended as it did; it is compared with nothing.
    predicted: Mapping[str, float] = decision.predicted or {}
    actual: Mapping[str, float] = {"total": decision.actual["total"]} if decision.actual else {}
    if outcome is not None:
        foreseen_node, samples = outcome.node_id, outcome.samples
        predicted, actual = outcome.predicted, outcome.actual
    return Record(
        at=round(at, 3),
        node=node,
        model=decision.model,
        priority=priority,
        ended=decision.attempts[-1].outcome,
        attempts=len(decision.attempts),
        answers_before=answers_before,
        samples=samples,
        foreseen_node=foreseen_node,
        predicted=rounded(predicted),
        actual=rounded(actual),
    )


def read_records(path: Path) -> list[Record]:
    """
    Read a decision log, and before it what was set aside when it had grown too long.

    Lines that cannot be read are passed over: the last one may be half a line.

    Raises:
        ConfigurationError: there is no such file, or it is something else.
    """
    records: list[Record] = []
    lines = 0
    for one in (older_of(path), path):
        try:
            text = one.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigurationError(f"{one}: it cannot be read ({error.strerror})") from None
        for line in text.splitlines():
            lines += 1
            record = _read(line)
            if record is not None:
                records.append(record)
    if not lines and not path.exists():
        raise ConfigurationError(f"{path}: there is no such file; decision_log names one to write")
    if lines and len(records) < _FEWEST_READABLE * lines:
        raise ConfigurationError(f"{path}: it is no decision log")
    return records


def older_of(path: Path) -> Path:
    """Where a log goes that has grown too long."""
    return path.with_name(f"{path.name}.1")


def _read(line: str) -> Record | None:
    try:
        told = json.loads(line)
        return Record(
            **{
                **told,
                "predicted": _figures(told["predicted"]),
                "actual": _figures(told["actual"]),
            }
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _figures(told: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(told[name]) for name in TERMS if name in told}
