"""A metrics page in Prometheus' text format, as rows by the metric's name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from hydra_llm.tables import printable

__all__ = ["MissingParserError", "Page", "Row"]

MAX_LINE = 4096
"""Characters; the parser's work grows with the square of a line."""

MAX_WANTED = 128 << 10
"""Characters that are parsed of one page: some fifty GPUs, and half a second if it means harm."""

MACHINE_LABELS = ("hostname", "instance", "node")


class MissingParserError(Exception):
    """``prometheus_client`` is not installed."""


class Row(NamedTuple):
    """One sample."""

    labels: Mapping[str, str]
    """Their names in lower case: exporters have changed them between versions."""
    value: float


class Page:
    """
    The lines of a page that somebody asked for; a bad line costs itself.

    Args:
        text: the page.
        names: of metrics, whole.
        endings: of metrics' names.

    Raises:
        MissingParserError: nothing else, whatever the text.
    """

    def __init__(self, text: str, names: frozenset[str], endings: tuple[str, ...] = ()) -> None:
        self._rows: dict[str, list[Row]] = {}
        self.bad_lines = 0
        self.is_cut = False
        """There was more than is parsed of one page."""
        left = MAX_WANTED
        for line in text.split("\n"):
            # Before it is parsed: most of a page is other metrics, and parsing is slow.
            name = name_of(line)
            if name not in names and not name.endswith(endings):
                continue
            left -= len(line)
            if left < 0:
                self.is_cut = True
                break
            if len(line) > MAX_LINE:
                self.bad_lines += 1
            else:
                self._add(line)

    def _add(self, line: str) -> None:
        try:
            for name, labels, value in _samples(line):
                lowered = {label.lower(): printable(text) for label, text in labels.items()}
                self._rows.setdefault(name, []).append(Row(lowered, float(value)))
        except MissingParserError:
            raise
        except Exception:  # the parser answers nonsense with whatever its code runs into
            self.bad_lines += 1

    @property
    def found(self) -> Iterable[str]:
        """Names of the metrics that are on it."""
        return self._rows.keys()

    def rows(self, name: str) -> list[Row]:
        """Every row of one metric."""
        return self._rows.get(name, [])

    def value(self, name: str) -> float | None:
        """The metric's first value."""
        rows = self.rows(name)
        return rows[0].value if rows else None

    def machines(self, names: Iterable[str]) -> int:
        """How many machines the rows of some metrics are of, by what their labels say."""
        rows = [row for name in names for row in self.rows(name)]
        seen = [{row.labels.get(label) for row in rows} - {None} for label in MACHINE_LABELS]
        return max(1, *map(len, seen))


def name_of(line: str) -> str:
    """The metric's name at the beginning of a line; of a comment, its mark."""
    words = line[: MAX_LINE + 1].partition("{")[0].split(None, 1)
    return words[0] if words else ""


def _samples(line: str) -> Iterator[tuple[str, Mapping[str, str], float]]:
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        raise MissingParserError from None
    for family in text_string_to_metric_families(line):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value
