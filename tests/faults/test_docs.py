"""docs/reliability.md says what the matrix asserts."""

from __future__ import annotations

from hydra_llm.config import settings_table
from tests.docs.pages import table
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


def test_settings_have_the_defaults_that_are_told() -> None:
    defaults = {row.name: row.default for row in settings_table()}
    text = PAGE.read_text(encoding="utf-8")
    told = {
        name.strip("` "): value.strip()
        for names, values, _ in (row for row in table(text) if len(row) == 3)
        for name, value in zip(names.split(","), values.split(","), strict=False)
        if name.strip("` ") in defaults
    }

    assert len(told) == 13
    for name, value in told.items():
        number, _, unit = value.partition(" ")
        factor = 1024**2 if unit == "MiB" else 1
        assert float(number) * factor == float(defaults[name]), name
