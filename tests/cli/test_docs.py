"""What docs/cli.md says of options is what the commands have."""

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hydra_llm.cli.app import app
from hydra_llm.cli.console import BROKEN, INTERRUPTED, MISUSED, NOBODY

DOCS = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
COMMANDS = (
    *("nodes", "explain", "fit", "chat", "doctor", "demo", "proxy", "litellm-config", "discover"),
    *("agent", "cordon", "uncordon", "drain", "simulate", "calibration"),
)
OF_LITELLM = {"--num_workers", "--reload"}


def options_of(command: str) -> set[str]:
    help_text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", help_text))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_the_docs(command: str) -> None:
    assert options_of(command)
    assert not {option for option in options_of(command) if f"`{option}" not in DOCS}


def test_every_option_in_the_docs_exists() -> None:
    said = set(re.findall(r"`(--[a-z][a-z_-]+)", DOCS))

    assert not said - {"--version"} - OF_LITELLM - set().union(*map(options_of, COMMANDS))


def test_every_command_has_its_chapter() -> None:
    registered = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]  # a group

    assert registered == set(COMMANDS)
    for command in COMMANDS:
        assert f"\n## {command}\n" in DOCS


def test_every_exit_code_is_in_the_docs() -> None:
    for code in (0, NOBODY, MISUSED, BROKEN, INTERRUPTED):
        assert f"\n| {code} |" in DOCS
