"""The command line, ``hydra-llm``: look at nodes, have choices explained, find faults."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run one command and return its exit code.

    Args:
        arguments: without the program's name; by default those of the process.
    """
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError:
        sys.stderr.write(
            "the command line needs typer and rich: pip install 'hydra-llm[cli]'\n",
        )
        return 1
    from hydra_llm.cli.app import run

    return run(arguments)
