"""Every Python example of the README and of docs/ runs, and prints what the page says it does."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, Block, blocks

WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
NOT_RUN = {"README.md": 1, "litellm.md": 2}
"""Blocks marked ``no-test``, by page; each says why."""

ALONE = ("-p", "no:cacheprovider", "-p", "no:asyncio")
Prepare = Callable[[str], str]


def is_run(block: Block) -> bool:
    return block.language == "python" and block.mark != "no-test"


def is_test_file(block: Block) -> bool:
    return re.search(r"^(async )?def test_", block.text, re.MULTILINE) is not None


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_the_examples_of_a_page_run_one_after_another(
    page: Path, found_by_name: Prepare, tmp_path: Path
) -> None:
    # A page is read from the top: later blocks may use what earlier ones have made.
    names: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    for block in blocks(page):
        if block.mark == "prints":
            assert printed == block.text, f"{block} is not what the example before it prints"
        elif is_run(block) and is_test_file(block):
            run_by_pytest(block, tmp_path)
        elif is_run(block):
            printed = run(block, found_by_name(block.text), names)
    names.clear()
    # What a page leaves open is closed with its last reference, as at the end of a program.
    gc.collect()


def run(block: Block, text: str, names: dict[str, object]) -> str:
    """Run one block, so that a traceback shows the page and its line; what it printed."""
    out = io.StringIO()
    code = compile("\n" * (block.line - 1) + text, str(block.page), "exec")
    with contextlib.redirect_stdout(out):
        exec(code, names)  # noqa: S102  our own pages
    return out.getvalue()


def run_by_pytest(block: Block, folder: Path) -> None:
    """Examples of tests are run as what they are, in a process of their own."""
    path = folder / f"test_line_{block.line}.py"
    path.write_text(block.text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", *ALONE, str(path)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        timeout=50,
        check=False,
    )
    count = len(re.findall(r"^def test_", block.text, re.MULTILINE))
    assert f"{count} passed in" in done.stdout, f"{block}\n{done.stdout}{done.stderr}"


def test_few_examples_are_not_run_and_each_says_why() -> None:
    left_out = [block for page in PAGES for block in blocks(page) if block.mark == "no-test"]

    assert all(len(block.says) > 20 for block in left_out)
    assert {
        page.name: count
        for page in PAGES
        if (count := sum(block.page == page for block in left_out))
    } == NOT_RUN


def test_marks_mean_something() -> None:
    marks = {block.mark for page in PAGES for block in blocks(page)}

    assert marks <= {"", "no-test", "prints", "explained", "worked"}


def test_every_fence_names_its_language() -> None:
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert all(fences[::2]), page.name
        assert not any(fences[1::2]), page.name
