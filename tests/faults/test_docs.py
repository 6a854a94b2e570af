"""docs/reliability.md says what the matrix asserts."""

from __future__ import annotations

from tests.faults.catalogue import BY_NAME
from tests.faults.rows import ROWS
from tests.faults.table import PAGE, with_table


def test_the_tables_are_those_of_the_rows() -> None:
    text = PAGE.read_text(encoding="utf-8")

    assert with_table(text) == text, "write them anew: python -m tests.faults.table"


def test_every_fault_of_the_catalogue_has_its_row() -> None:
    names = [row.name for row in ROWS]

    assert sorted(names) == sorted(BY_NAME)


def test_every_row_says_something_that_can_be_seen() -> None:
    for row in ROWS:
        assert (row.failing > 0) == (row.cause is not None), row.name
        assert row.cause is not None or row.claim, row.name
