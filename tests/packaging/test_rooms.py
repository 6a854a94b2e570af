"""The import rules that import-linter has no words for; the others stand in pyproject.toml."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hydra_llm
from tests.packaging.conftest import ROOT

INTEGRATIONS = sorted((ROOT / "integrations").rglob("*.py"))


@pytest.mark.parametrize("file", INTEGRATIONS, ids=lambda file: file.name)
def test_an_integration_uses_only_what_hydra_llm_promises(file: Path) -> None:
    promised = {f"hydra_llm.{name}" for name in getattr(hydra_llm, "__all__", ())}
    own = ("hydra_llm.integrations", "hydra_llm.integrations.")

    used = {name for name in imported_by(file) if name.startswith("hydra_llm.")}
    assert not {name for name in used - promised if name != own[0] and not name.startswith(own[1])}


def test_scheduling_reaches_for_no_clock_and_no_socket() -> None:
    world = {"asyncio", "datetime", "httpx", "os", "socket", "subprocess", "threading", "time"}
    files = (ROOT / "hydra_llm" / "scheduling").rglob("*.py")

    reaching = {
        file.name: {name.split(".")[0] for name in imported_by(file)} & world for file in files
    }
    assert not {name: modules for name, modules in reaching.items() if modules}


def test_the_parser_of_metrics_pages_is_used_by_one_module_of_the_probes() -> None:
    package = ROOT / "hydra_llm"
    users = [
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if any(name.startswith("prometheus_client") for name in imported_by(file))
    ]

    assert users == ["probes/exporters/page.py"]


def imported_by(file: Path) -> Iterator[str]:
    """Yield the dotted name of everything a file imports."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_what_a_file_imports_is_seen_wherever_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "room.py"
    file.write_text("import a.b\ndef f():\n    from hydra_llm.router import _private\n")

    assert [*imported_by(file)] == ["a.b", "hydra_llm.router._private"]
