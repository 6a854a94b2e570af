"""The notebooks run from their first cell to their last, and show no name that is not public."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hydra_llm
from hydra_llm import testing
from hydra_llm.integrations import langchain

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# A cell may have `await` at its top level.
PARSED = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def cells(path: Path, kind: str) -> list[str]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in document["cells"] if c["cell_type"] == kind]


def test_there_are_notebooks() -> None:
    assert [path.name for path in NOTEBOOKS] == [
        "01_langchain_quickstart.ipynb",
        "02_vram_aware_routing.ipynb",
    ]


@pytest.mark.timeout(300)
@each_notebook
def test_a_notebook_runs_on_the_simulator(path: Path, tmp_path: Path) -> None:
    # The autouse fixture has taken what this machine says of nodes out of the environment.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--nbmake", "-p", "no:cacheprovider", "-c",
         os.devnull, f"--rootdir={tmp_path}", str(path)],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"^1 passed", done.stdout, re.MULTILINE)


@each_notebook
def test_a_notebook_uses_public_names_only(path: Path) -> None:
    public = {
        "hydra_llm": hydra_llm.__all__,
        "hydra_llm.testing": testing.__all__,
        "hydra_llm.integrations.langchain": langchain.__all__,
    }
    used = 0
    for cell in cells(path, "code"):
        for node in ast.walk(compile(cell, str(path), "exec", PARSED)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hydra_llm"):
                assert {name.name for name in node.names} <= {*public[node.module or ""]}
                used += 1
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith("_"), node.attr
    assert used


@each_notebook
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in document["cells"] if cell["cell_type"] == "code"]

    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


@each_notebook
def test_a_notebook_says_how_to_run_it(path: Path) -> None:
    assert '`pip install ".[langchain]" jupyterlab`' in cells(path, "markdown")[0]
