"""What has to hold over many requests, or before any is sent."""

from __future__ import annotations

import pytest

from tests.faults.books import ROWS


@pytest.mark.parametrize("row", ROWS)
def test_row(row: str) -> None:
    ROWS[row]()
