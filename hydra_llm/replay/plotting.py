"""Pictures of runs, by matplotlib, which is imported only here and only when one is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra_llm.exceptions import ConfigurationError
from hydra_llm.replay.measures import Measured, steps
from hydra_llm.replay.running import Run

__all__ = ["check_plot", "draw"]

# Told apart also by who sees few colours (Okabe and Ito's palette).
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000")
_LEAST_SECONDS = 0.01


def check_plot(path: Path) -> None:
    """
    Find out before the long work whether a picture can be written.

    Raises:
        ImportError: matplotlib is missing.
        ConfigurationError: nothing can be written there.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kinds = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix[1:].lower() not in kinds:
        raise ConfigurationError(f"--plot {path}: the name should end in one of {', '.join(kinds)}")
    if not path.parent.is_dir():
        raise ConfigurationError(f"--plot {path}: there is no folder {path.parent}")


def draw(path: Path, results: Sequence[tuple[Measured, Sequence[Run]]], *, title: str) -> None:
    """Draw how soon first tokens come, and what loads there were."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(11.0, 1.5 + max(3.5, 0.35 * len(results))), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(title, fontsize="medium")
    names = _names([measured for measured, _ in results])
    for number, (name, (_, runs)) in enumerate(zip(names, results, strict=True)):
        seconds, shares = steps(runs)
        curves.step(
            [max(_LEAST_SECONDS, one) for one in seconds],
            shares,
            where="post",
            label=name,
            color=_COLOURS[number % len(_COLOURS)],
            linestyle=("-", "--", ":")[number // len(_COLOURS) % 3],
        )
    curves.set_xscale("log")
    curves.set_xlabel("seconds to the first token")
    curves.set_ylabel("share of answers")
    curves.grid(visible=True, alpha=0.3)
    curves.legend(fontsize="small")
    places = range(len(results))
    means = [measured.figures["first_p95"].mean for measured, _ in results]
    halves = [measured.figures["first_p95"].half or 0.0 for measured, _ in results]
    colours = [_COLOURS[place % len(_COLOURS)] for place in places]
    bars.barh(places, means, xerr=halves, color=colours, capsize=3)
    loads = [f"{measured.figures['loads'].mean:.0f} loads" for measured, _ in results]
    bars.set_yticks(places, [f"{n}\n{one}" for n, one in zip(names, loads, strict=True)])
    bars.invert_yaxis()
    bars.set_xlim(left=0.0)
    bars.set_xlabel("p95 of the first token, seconds, with the 95 % interval")
    figure.savefig(path)


def _names(measured: Sequence[Measured]) -> list[str]:
    clusters = {one.cluster for one in measured}
    policies = {one.policy for one in measured}
    if len(clusters) == 1:
        return [one.policy for one in measured]
    if len(policies) == 1:
        return [one.cluster for one in measured]
    return [f"{one.policy}, {one.cluster}" for one in measured]
