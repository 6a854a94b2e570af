"""The examples of docs/litellm.md, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.conftest import found_by_name, machines
from tests.docs.pages import ROOT, Block, blocks

__all__ = ["found_by_name", "machines"]

PAGE = ROOT / "docs" / "litellm.md"

RESOLVER = """
import socket
resolve = socket.getaddrinfo
socket.getaddrinfo = lambda host, *a, **k: resolve("127.0.0.1", *a, **k)
"""


@pytest.mark.parametrize("block", blocks(PAGE, "python"), ids=str)
def test_an_example_runs(block: Block, found_by_name: Callable[[str], str], tmp_path: Path) -> None:
    program = tmp_path / "example.py"
    program.write_text(RESOLVER + found_by_name(block.text))

    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )

    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_the_proxys_config_is_one_that_the_callback_understands() -> None:
    from hydra_llm.integrations.litellm.deployments import read_deployment

    configs: list[Any] = [yaml.safe_load(block.text) for block in blocks(PAGE, "yaml")]
    first = configs[0]

    assert first["litellm_settings"]["callbacks"] == ["hydra_llm.integrations.litellm.instance"]
    nodes = [read_deployment(one) for one in first["model_list"]]
    assert [one.node.id for one in nodes if one] == ["rig", "gaming"]
    assert [one.node.vram_gb for one in nodes if one] == [24, 48]
