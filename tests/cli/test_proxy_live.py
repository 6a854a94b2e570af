"""``hydra-llm proxy`` with the real LiteLLM, from a config that ``litellm-config`` has written."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from hydra_llm.testing import SimulatedCluster
from tests.cli.conftest import Run
from tests.litellm.proxies import ROOT, needs_proxy, running

KEY = "sk-" + "0123456789abcdef" * 4
"""Without one LiteLLM does not start."""
AS_CLIENT = {"Authorization": f"Bearer {KEY}"}

pytestmark = [needs_proxy, pytest.mark.timeout(180)]


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """Where the proxy puts what is there for a while."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    return folder


@pytest.fixture
def proxy(
    run: Run, cluster: SimulatedCluster, tmp_path: Path, temporary: Path
) -> Iterator[running]:
    config = tmp_path / "config.yaml"
    assert run("litellm-config", f"--output={config}", on=cluster).exit_code == 0
    with config.open("a") as file:
        file.write("  routing_strategy: hydra\n  routing_strategy_args: {max_queue: 7}\n")
    about = {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT), "LITELLM_MASTER_KEY": KEY}
    command = ["-m", "hydra_llm", "proxy", "--config", str(config)]
    with running(command, tmp_path, about, cwd=ROOT) as proxy:
        yield proxy


def chat(proxy: running, **more: object) -> httpx.Response:
    body = {"model": "qwen3:8b", "messages": [{"role": "user", "content": "Hi"}], **more}
    return httpx.post(f"{proxy.url}/v1/chat/completions", json=body, headers=AS_CLIENT, timeout=60)


def test_the_proxy_routes_and_ctrl_c_ends_it(
    proxy: running, cluster: SimulatedCluster, temporary: Path
) -> None:
    answer = chat(proxy, node_id="gaming")
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-litellm-model-id"] == "gaming/qwen3:8b"

    cluster["gaming"].kill()
    answer = chat(proxy, node_id="gaming")
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-litellm-model-id"] != "gaming/qwen3:8b"

    [copy] = temporary.glob("hydra-llm-*/config.yaml")
    assert copy.stat().st_mode & 0o777 == 0o600
    os.killpg(proxy.process.pid, signal.SIGINT)
    assert proxy.process.wait(30) == 130
    assert not list(temporary.glob("hydra-llm-*"))
    # It has ended in its own time: uvicorn takes a second Ctrl-C for impatience.
    assert "Application shutdown complete" in proxy.log.read_text()
