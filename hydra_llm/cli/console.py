"""Where output goes, and how errors are told.

stdout carries what was asked for, stderr everything else. Colours, widths and ``NO_COLOR``
are rich's business; whatever comes from nodes or users is :class:`~rich.text.Text`, so that
a model called ``[red]`` is no markup.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from hydra_llm.exceptions import (
    ConfigurationError,
    DeadlineError,
    HydraError,
    NodeError,
    NoEligibleNodeError,
    QueueFullError,
    StreamBrokenError,
)

NOBODY = 1
"""Exit code: no node could take or answer the request; or something did not hold."""
MISUSED = 2
"""Exit code: an argument or a setting is wrong, as the shell's own convention has it."""
BROKEN = 3
"""Exit code: a node failed with the answer half given, or refused the request."""
INTERRUPTED = 130


class NotInstalledError(Exception):
    """An optional package is missing; the message says how to install it."""


def stdout() -> Console:
    """What was asked for."""
    return Console(highlight=False)


def stderr() -> Console:
    """Everything else."""
    return Console(stderr=True, highlight=False)


def make_output_safe() -> None:
    """Have a terminal that knows no ``→`` show ``?`` rather than a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def print_json(document: Any) -> None:
    """One JSON document; not by way of rich, which would wrap it."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


@contextmanager
def told_in_one_line(*, debug: bool = False) -> Iterator[None]:
    """Errors in one line on stderr, with what to do about them, and an exit code."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # `hydra-llm nodes | head`: nobody reads on, and nobody needs to hear of it.
        with suppress(OSError):
            sys.stdout.close()
        raise typer.Exit(0) from None
    except Exception as error:
        if debug:
            raise
        tell(error)
        raise typer.Exit(exit_code_of(error)) from None


def tell(error: Exception) -> None:
    """Say on stderr what went wrong and what helps."""
    line = Text("error: ", style="bold red")
    line.append(_what(error), style="default not bold")
    if advice := _advice(error):
        line.append(f" — {advice}", style="dim")
    stderr().print(line, soft_wrap=True)


def exit_code_of(error: Exception) -> int:
    """Whether to blame the command, the cluster or one node."""
    if isinstance(error, ConfigurationError):
        return MISUSED
    if isinstance(error, NodeError) or _refused_with(error) is not None:
        return BROKEN
    return NOBODY


def _what(error: Exception) -> str:
    if isinstance(error, HydraError | NotInstalledError):
        return str(error)
    if (status := _refused_with(error)) is not None:
        # Ollama's own text may quote the prompt.
        return f"the node refused the request (status {status})"
    return f"unexpected {type(error).__name__}: {error}"


def _advice(error: Exception) -> str:
    if isinstance(error, ConfigurationError | NotInstalledError):
        return ""
    if isinstance(error, StreamBrokenError):
        return "what came before it stands; ask again for a whole answer"
    if isinstance(error, DeadlineError):
        return "raise --deadline-s, or take a smaller model"
    if isinstance(error, QueueFullError):
        return ""
    if isinstance(error, NoEligibleNodeError) and not _is_about_nodes(error):
        return ""
    if isinstance(error, HydraError):
        return "'hydra-llm doctor' looks at every node"
    if _refused_with(error) is not None:
        return "--debug shows its words"
    return "--debug shows where; please report it"


def _is_about_nodes(error: NoEligibleNodeError) -> bool:
    """Whether nodes are unwell, rather than too small or without the model."""
    return any(r.reason in ("down", "misconfigured", "circuit open") for r in error.rejections)


def _refused_with(error: Exception) -> int | None:
    """Status of an ``ollama.ResponseError``."""
    import ollama

    # NoNodeHasModelError is one too, and comes from us.
    if isinstance(error, ollama.ResponseError) and not isinstance(error, HydraError):
        return error.status_code
    return None
