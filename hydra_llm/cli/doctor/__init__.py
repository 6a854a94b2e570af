"""``hydra-llm doctor``: look once, then judge.

``look`` gathers settings and snapshots, ``checks`` are pure functions from those to
findings, ``report`` shows them.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra_llm.cli.doctor.checks import check
from hydra_llm.cli.doctor.finding import Finding
from hydra_llm.cli.doctor.look import look_at, settings_problems
from hydra_llm.config import HydraSettings
from hydra_llm.exceptions import ConfigurationError

__all__ = ["Finding", "examine"]


def examine(nodes: Sequence[str] | None = None) -> list[Finding]:
    """Everything there is to say about the settings and the nodes."""
    try:
        settings = HydraSettings(nodes or None)
    except ConfigurationError as error:
        return settings_problems(error)
    return check(look_at(settings))
