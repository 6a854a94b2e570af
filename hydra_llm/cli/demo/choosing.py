"""Which stories are played: on simulated nodes, or on the user's own."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from hydra_llm.cli.console import print_json, stdout
from hydra_llm.cli.demo import own, simulated
from hydra_llm.config import HydraSettings

__all__ = ["run_demo"]


def run_demo(*, nodes: Sequence[str] | None = None, speed: float = 1.0, as_json: bool) -> bool:
    """Play the stories that suit the nodes there are; True if every claim held."""
    settings = HydraSettings(nodes or None)
    console = Console(quiet=True) if as_json else stdout()
    if settings.nodes_configured:
        result = own.play(settings, console)
    else:
        result = simulated.play(console, speed=speed)
    if as_json:
        print_json(result.to_dict())
    return result.held
