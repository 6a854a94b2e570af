"""What is taken of cards that nobody has measured or told."""

from __future__ import annotations

import pytest

from hydra_llm.vram.cards import GIB, usual_bandwidth, usual_size
from hydra_llm.vram.loading import loading_rule


def test_a_larger_card_is_taken_to_be_no_slower() -> None:
    speeds = [usual_bandwidth(gib * GIB) for gib in (1, 8, 12, 16, 24, 32, 48, 80, 192)]

    assert speeds == sorted(speeds)
    assert speeds[0] < speeds[-1]


@pytest.mark.parametrize(("gb", "like_gib"), [(24.0, 24), (12.0, 12), (8.0, 8), (80.0, 80)])
def test_decimal_gigabytes_are_the_same_card(gb: float, like_gib: int) -> None:
    assert usual_bandwidth(int(gb * 1e9)) == usual_bandwidth(like_gib * GIB)


@pytest.mark.parametrize(
    ("least_gb", "speed", "gb"),
    [
        (0.0, None, 8),
        (5.3, None, 8),
        (8.0, None, 8),
        (8.5, None, 8.5),  # 8 GiB are a little more
        (8.6, None, 10),
        (13.0, None, 16),
        (5.3, 700e9, 24),
        (5.3, 400e9, 12),
        (5.3, 100e9, 8),
        (30.0, 400e9, 32),
        (600.0, None, 600),
    ],
)
def test_a_card_has_at_least_what_lies_on_it_and_what_is_as_fast(
    least_gb: float, speed: float | None, gb: float
) -> None:
    assert usual_size(int(least_gb * 1e9), speed) == gb * 1e9


def test_from_0_30_on_a_further_model_may_take_four_fifths() -> None:
    assert loading_rule("0.32.15") == loading_rule(None)
    assert (loading_rule(None).share, loading_rule(None).margin_bytes) == (0.8, GIB)
    assert (loading_rule("0.24.0").share, loading_rule("0.24.0").margin_bytes) == (1.0, 0)
