"""The notebooks run from their first cell to their last, and show no name that is not public."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers import PROXY_PYTHON

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LITELLM = ROOT / "notebooks" / "03_litellm_proxy.ipynb"
PUBLIC = {
    "hydra_llm",
    "hydra_llm.integrations.langchain",
    "hydra_llm.integrations.litellm",
    "hydra_llm.testing",
}
PLAIN = [path for path in NOTEBOOKS if path != LITELLM]

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
        "03_litellm_proxy.ipynb",
    ]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", PLAIN, ids=lambda path: path.name)
def test_a_notebook_runs_on_the_simulator(path: Path, tmp_path: Path) -> None:
    assert run(path, tmp_path)


@pytest.mark.timeout(300)
def test_the_litellm_notebook_loses_nothing_and_tells_what_the_proxy_lacks(tmp_path: Path) -> None:
    said = run(LITELLM, tmp_path)

    assert "least-busy: 30 of 30 requests lost" in said
    assert "hydra-llm: 0 of 30 requests lost" in said
    assert re.search(r"^400 .* rack: [\d.]+ GB VRAM available", said, re.MULTILINE)
    assert re.search(
        r"^The proxy has not started\. .*needs fastapi.*pip install", said, re.MULTILINE
    )


@pytest.mark.skipif(not PROXY_PYTHON.exists(), reason="LiteLLM's proxy is not in .venv/proxy")
@pytest.mark.timeout(300)
def test_the_litellm_notebook_calls_the_proxy_that_a_terminal_would_start(tmp_path: Path) -> None:
    said = run(LITELLM, tmp_path, commands_of=PROXY_PYTHON)

    [(url, told)] = re.findall(r"^The proxy listens on (\S+)\n(.*)", said, re.DOTALL | re.MULTILINE)
    assert "x-hydra-node: gaming\nx-hydra-reason: gaming: pinned by node_id" in told
    assert re.search(r"^Error code: 400 .* rack: [\d.]+ GB VRAM available", told, re.MULTILINE)
    with pytest.raises(httpx.ConnectError):  # nothing of it is left
        httpx.get(url)


def run(path: Path, folder: Path, *, commands_of: Path = Path(sys.executable)) -> str:
    """
    Run a copy of a notebook in our environment, and give what it prints.

    Args:
        path: the notebook.
        folder: for the copy.
        commands_of: the interpreter beside which the shell finds its commands first.
    """
    copy = folder / path.name
    copy.write_bytes(path.read_bytes())
    # The autouse fixture has taken what this machine says of nodes out of the environment.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--nbmake", "--overwrite", "-p", "no:cacheprovider",
         "-c", os.devnull, f"--rootdir={folder}", str(copy)],
        cwd=folder,
        env={**os.environ, "PATH": f"{commands_of.parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"^1 passed", done.stdout, re.MULTILINE)
    said = {"stdout": "", "stderr": ""}
    for cell in json.loads(copy.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                said[output["name"]] += "".join(output["text"])
    assert not said["stderr"]  # neither warnings nor logs
    return said["stdout"]


@each_notebook
def test_a_notebook_uses_public_names_only(path: Path) -> None:
    used = 0
    for cell in cells(path, "code"):
        for node in ast.walk(compile(cell, str(path), "exec", PARSED)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hydra_llm"):
                assert {name.name for name in node.names} <= public_names(node.module or "")
                used += 1
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith("_"), node.attr
    assert used


def public_names(module: str) -> set[str]:
    """Read a module's `__all__` without importing it: LiteLLM's import would outlast the test."""
    assert module in PUBLIC
    found = find_spec(module)
    assert found
    assert found.origin
    for statement in ast.parse(Path(found.origin).read_text(encoding="utf-8")).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=names):
                return {*ast.literal_eval(names)}
    raise AssertionError(f"{module} has no __all__")


@each_notebook
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in document["cells"] if cell["cell_type"] == "code"]

    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


@each_notebook
def test_a_notebook_says_how_to_run_it(path: Path) -> None:
    extras = "cli,litellm" if path == LITELLM else "langchain"

    assert f'`pip install ".[{extras}]" jupyterlab`' in cells(path, "markdown")[0]
