"""An empty directory, and an environment without settings."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

WriteToml = Callable[[str], Path]


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in os.environ:
        if name.upper().startswith(("HYDRA_LLM_", "SOLLOL_", "OLLAMA_HOST")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def toml(empty_directory: Path) -> WriteToml:
    """Writes hydra.toml."""

    def write(text: str) -> Path:
        path = empty_directory / "hydra.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write
