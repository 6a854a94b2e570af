"""langchain-ollama's own unit tests, with our classes in the place of its own."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = importlib.metadata.version("langchain-ollama")
SDIST = Path(sys.prefix) / "upstream" / f"langchain_ollama-{VERSION}.tar.gz"
"""`make test` has pip download it; it is no part of the project."""

PRIVATE_WIRING = {
    # The URL and the headers that are handed to ollama.Client, which is not used.
    "test_auth.py::TestChatOllamaUrlAuth::test_chat_ollama_url_auth_integration",
    "test_auth.py::TestChatOllamaUrlAuth::test_chat_ollama_url_auth_with_existing_headers",
    "test_auth.py::TestOllamaEmbeddingsUrlAuth::test_ollama_embeddings_url_auth_integration",
    # A function's name in upstream's module, replaced there by a mock that nobody calls.
    "test_chat_models.py::test_validate_model_on_init",
    "test_embeddings.py::test_validate_model_on_init",
}
"""What checks how a class works inside; everything else has to pass."""


@pytest.mark.timeout(300)
@pytest.mark.skipif(not SDIST.exists(), reason=f"no {SDIST.name}; `make test` downloads it")
def test_upstreams_unit_tests_pass_but_for_those_that_look_inside(tmp_path: Path) -> None:
    with tarfile.open(SDIST) as archive:
        wanted = [m for m in archive.getmembers() if "/tests/unit_tests/" in m.name and m.isfile()]
        for member in wanted:
            source = archive.extractfile(member)
            assert source is not None
            (tmp_path / Path(member.name).name).write_bytes(source.read())
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.langchain.upstream_swap", "-p",
         "no:cacheprovider", "--disable-recording", "--benchmark-disable", "-rfE", "."],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )  # fmt: skip

    failed = set(re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE))
    passed = re.search(r"(\d+) passed", done.stdout)
    assert failed == PRIVATE_WIRING, done.stdout[-5000:]
    assert passed is not None
    assert int(passed[1]) >= 80
