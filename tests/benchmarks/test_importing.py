"""How long ``import hydra_llm`` takes in a fresh interpreter. No assertions."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest


@pytest.mark.benchmark(group="a fresh interpreter")
@pytest.mark.parametrize(
    "statement", ["pass", "import hydra_llm", "from hydra_llm import Client", "import ollama"]
)
def test_importing(benchmark: Any, statement: str) -> None:
    command = [sys.executable, "-c", statement]
    benchmark.pedantic(lambda: subprocess.run(command, check=True), rounds=5, warmup_rounds=1)
