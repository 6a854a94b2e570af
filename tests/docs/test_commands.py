"""Every command that the pages name exists, with the options they give it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest
import typer

from hydra_llm.cli.app import app
from hydra_llm.config import HydraSettings
from tests.docs.pages import PAGES, ROOT, blocks, text_of

SHELL = ("sh", "bash", "console", "text")
OPERATORS = {"|", "&&", "||", ";", ">", "<", "&"}


def shell_lines() -> Iterator[tuple[str, str]]:
    """Lines of shell, with where they stand."""
    for page in PAGES:
        for block in blocks(page, *SHELL):
            for number, line in enumerate(block.text.splitlines()):
                if block.language != "text" or line.startswith("$ "):
                    yield f"{page.name}:{block.line + number}", line.removeprefix("$ ")
        for number, line in enumerate(text_of(page).splitlines(), 1):
            for inline in re.findall(r"`(hydra-llm [^`]+)`", line):
                yield f"{page.name}:{number}", inline


def commands_called(program: str) -> Iterator[tuple[str, list[str]]]:
    """Arguments of every call of a program."""
    for where, line in shell_lines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        call: list[str] = []
        for word in [*lexer, ";"]:
            if word not in OPERATORS:
                call.append(word)
                continue
            if call[:1] == [program]:
                yield where, call[1:]
            call = []


OURS = list(commands_called("hydra-llm"))


@pytest.mark.parametrize(
    "arguments", [call for _, call in OURS], ids=[f"{w} {' '.join(c)}" for w, c in OURS]
)
def test_a_command_is_one(arguments: list[str]) -> None:
    program = typer.main.get_command(app)
    if arguments == ["--version"]:
        assert "--version" in {name for one in program.params for name in one.opts}
        return
    name, *rest = arguments
    found = program.commands[name]  # type: ignore[attr-defined]  # a group
    # Reads the arguments, and raises if one is not known or is wrong; nothing is run.
    found.make_context(name, with_placeholders(name, rest)).close()


def with_placeholders(name: str, rest: list[str]) -> list[str]:
    """A command that is only named in a sentence gets the arguments it needs."""
    if rest:
        return rest
    needed = {
        "explain": ["MODEL"],
        "chat": ["MODEL", "PROMPT"],
        "proxy": ["--config=FILE"],
        **{name: ["NODE"] for name in ("cordon", "uncordon", "drain")},
    }
    return needed.get(name, [])


def test_there_are_commands() -> None:
    assert {call[0] for _, call in OURS} >= {"nodes", "explain", "chat", "doctor", "demo", "proxy"}


def test_make_can_make_what_is_said() -> None:
    targets = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {call[0] for _, call in commands_called("make")}
    named |= {name for page in PAGES for name in re.findall(r"`make ([a-z]+)", text_of(page))}

    assert {"demo", "test"} <= named <= set(targets)


def test_extras_that_are_installed_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    said = [
        word for _, call in commands_called("pip") for word in call if word.startswith("hydra-llm[")
    ]
    extras = {extra for word in said for extra in word.partition("[")[2].rstrip("]").split(",")}

    assert extras
    for extra in extras:
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def test_variables_that_are_set_exist() -> None:
    said = {
        name for page in PAGES for name in re.findall(r"export HYDRA_LLM_(\w+)=", text_of(page))
    }

    assert said
    assert {name.lower() for name in said} <= set(HydraSettings.model_fields)
