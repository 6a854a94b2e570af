"""How far the estimator is off, as the table in docs/vram.md.

python -m tests.vram.accuracy
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import mean, median

from tests.vram.points import Point, View, measured, published

WORST = 5
SETS = {"published": published, "planner": measured}
VIEWS: dict[View, str] = {
    "tensors": "tensor table",
    "weights": "weights given",
    "size": "file size only",
}


def errors(points: Sequence[Point], view: View) -> list[tuple[float, Point]]:
    """The error of each point that has what the view takes, by its size."""
    found = [(point.error(view), point) for point in points if view in point.views()]
    return sorted(found, key=lambda one: -abs(one[0]))


def by_model(found: Sequence[tuple[float, Point]]) -> list[float]:
    """Mean error of each model, so that none counts more for having more points."""
    models: dict[str, list[float]] = defaultdict(list)
    for error, point in found:
        models[point.model].append(abs(error))
    return [mean(one) for one in models.values()]


def lines() -> list[str]:
    table = [
        "| points | known of the weights | points | mean | median | largest | mean of models |"
    ]
    table.append("|---|---|---|---|---|---|---|")
    worst = ["| points | known of the weights | error | which |", "|---|---|---|---|"]
    for name, points in SETS.items():
        for view, title in VIEWS.items():
            found = errors(points(), view)
            if not found:
                continue
            off = [abs(error) for error, _ in found]
            figures = (mean(off), median(off), max(off), mean(by_model(found)))
            cells = " | ".join(f"{100 * one:.2f} %" for one in figures)
            table.append(f"| {name} | {title} | {len(off)} | {cells} |")
            seen: set[str] = set()
            for error, point in found:
                if point.model not in seen and len(seen) < WORST and abs(error) >= 5e-4:
                    seen.add(point.model)
                    worst.append(f"| {name} | {title} | {100 * error:+.2f} % | {point.name} |")
    return [*table, "", "The worst point of each of the worst models:", "", *worst]


if __name__ == "__main__":
    print("\n".join(lines()))
