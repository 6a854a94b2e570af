"""What the pages show of a terminal is what a terminal shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hydra_llm.cli.app import app
from hydra_llm.testing import SimulatedCluster
from tests.docs.pages import README, blocks

NODE = """\
[[nodes]]
id = "{node.id}"
url = "{node.url}"
vram_gb = {node.vram_gb}
vram_reserved_gb = {node.vram_reserved_gb}
local = {local}
"""


def words(text: str) -> list[list[str]]:
    """The words of each line: how wide a column is, and rules, do not matter."""
    lines = [re.sub("[─━]{2,}", "", line).split() for line in text.splitlines()]
    return [line for line in lines if line]


def test_the_decision_on_the_first_screen_is_a_real_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [block] = [block for block in blocks(README, "text") if block.mark == "explained"]
    command, _, picture = block.text.partition("\n")
    with SimulatedCluster.demo(speed=50) as cluster:
        cluster["gaming"].preload("qwen3:8b")
        tables = [
            NODE.format(node=node, local=str(node.id == "workstation").lower())
            for node in cluster.nodes()
        ]
        # This machine's own GPUs have no part in the picture.
        (tmp_path / "hydra.toml").write_text("vram_monitoring = false\n" + "".join(tables))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "100")
        shown = CliRunner().invoke(app, command.removeprefix("$ hydra-llm ").split()).output

    assert words(shown) == words(picture)
