"""How far the estimates are from what real models took."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median

import pytest

from tests.vram.accuracy import by_model, errors, lines
from tests.vram.points import Point, View, measured, published

PAGE = Path(__file__).parents[2] / "docs" / "vram.md"
ROUNDING = 5_243  # half of 0.01 MiB, to which llama-server rounds each buffer


def sizes(points: list[Point], view: View) -> list[float]:
    return [abs(error) for error, _ in errors(points, view)]


@pytest.mark.parametrize("points", [published, measured])
def test_with_the_weights_known_the_mean_error_is_small(points: object) -> None:
    off = sizes(points(), "weights")  # type: ignore[operator]

    assert len(off) >= 28
    assert mean(off) <= 0.001
    assert median(off) <= 0.0005
    assert max(off) <= 0.02
    assert mean(by_model(errors(points(), "weights"))) <= 0.001  # type: ignore[operator]


@pytest.mark.parametrize("points", [published, measured])
def test_with_the_size_alone_it_is_a_few_per_cent_at_worst_for_most(points: object) -> None:
    off = sizes(points(), "size")  # type: ignore[operator]

    assert len(off) >= 34
    assert mean(off) <= 0.01
    assert median(off) <= 0.002
    assert max(off) <= 0.16  # an image encoder that nothing tells of


def test_with_a_tensor_table_old_forecasts_are_met_to_the_byte() -> None:
    found = [point for point in published() if "tensors" in point.views()]

    assert len(found) == 9
    for point in found:
        assert point.low == point.high == point.estimate("tensors").reported_bytes, point.name


def test_caches_are_those_of_the_planner_to_the_byte() -> None:
    for point in measured():
        assert point.estimate("size").kv_bytes() == point.parts["context"], point.name


def test_caches_are_those_that_were_logged() -> None:
    logged = [point for point in published() if "kv" in point.parts]

    assert len(logged) == 9
    for point in logged:
        need = point.estimate("size")
        assert abs(need.part("key/value cache") - point.parts["kv"]) <= ROUNDING, point.name
        state = need.part("recurrent state")
        # C18 ran two slots over one cache, which no setting of Ollama does.
        assert point.name.startswith("C18") or abs(state - point.parts["recurrent"]) <= ROUNDING


@pytest.mark.parametrize("view", ["tensors", "weights", "size"])
def test_the_interval_holds_what_was_seen(view: View) -> None:
    for point in [*published(), *measured()]:
        if view not in point.views():
            continue
        parts = [part for part in point.estimate(view).parts if part.reported]
        low = sum(part.low_bytes for part in parts)
        high = sum(part.high_bytes for part in parts)
        assert low <= point.high, point.name
        assert high >= point.low, point.name


def test_a_wider_interval_stands_for_knowing_less() -> None:
    for point in measured():
        known, sized = point.estimate("weights"), point.estimate("size")
        assert known.high_bytes - known.low_bytes < sized.high_bytes - sized.low_bytes


def test_the_page_shows_the_current_figures() -> None:
    page = PAGE.read_text(encoding="utf-8")
    shown = page.split("<!-- accuracy -->\n")[1].split("<!-- /accuracy -->")[0]

    assert shown.strip() == "\n".join(lines()).strip(), "run python -m tests.vram.accuracy"
