"""``hydra-llm proxy`` with the real LiteLLM, from a config that ``litellm-config`` has written.

For tests/cli/test_proxy_live.py, once ``hydra_llm.integrations.litellm`` is there. LiteLLM's proxy
takes some ten seconds to start.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from hydra_llm.testing import SimulatedCluster
from tests.cli.conftest import Run
from tests.helpers import PROXY_PYTHON

ROOT = Path(__file__).parents[2]
KEY = "sk-" + "0123456789abcdef" * 4
"""Without one LiteLLM does not start."""
AS_CLIENT = {"Authorization": f"Bearer {KEY}"}

pytestmark = [
    pytest.mark.skipif(not PROXY_PYTHON.exists(), reason="LiteLLM's proxy is not in .venv/proxy"),
    pytest.mark.timeout(180),
]


@dataclass
class Proxy:
    process: "subprocess.Popen[str]"
    url: str
    temporary: Path
    log: Path

    def chat(self, **more: object) -> httpx.Response:
        body = {"model": "qwen3:8b", "messages": [{"role": "user", "content": "Hi"}], **more}
        url = f"{self.url}/v1/chat/completions"
        return httpx.post(url, json=body, headers=AS_CLIENT, timeout=60)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@pytest.fixture
def proxy(run: Run, cluster: SimulatedCluster, tmp_path: Path) -> Iterator[Proxy]:
    config, temporary, log = tmp_path / "config.yaml", tmp_path / "tmp", tmp_path / "log"
    temporary.mkdir()
    assert run("litellm-config", f"--output={config}", on=cluster).exit_code == 0
    with config.open("a") as file:
        file.write("  routing_strategy: hydra\n  routing_strategy_args: {max_queue: 7}\n")
    port = free_port()
    # In a group of its own, like a job of a terminal: what Ctrl-C there reaches is all of it.
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(PROXY_PYTHON), "-m", "hydra_llm", "proxy",
             "--config", str(config), "--port", str(port)],
            cwd=ROOT,
            env={
                **os.environ,
                "TMPDIR": str(temporary),
                "PYTHONPATH": str(ROOT),
                "LITELLM_MASTER_KEY": KEY,
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            start_new_session=True,
        )  # fmt: skip
    proxy = Proxy(process, f"http://127.0.0.1:{port}", temporary, log)
    try:
        wait_until_ready(proxy)
        yield proxy
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def wait_until_ready(proxy: Proxy) -> None:
    ends = time.monotonic() + 120
    while time.monotonic() < ends and proxy.process.poll() is None:
        try:
            httpx.get(f"{proxy.url}/health/readiness").raise_for_status()
        except httpx.HTTPError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(proxy.log.read_text())


def test_the_proxy_routes_and_ctrl_c_ends_it(proxy: Proxy, cluster: SimulatedCluster) -> None:
    answer = proxy.chat(node_id="gaming")
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-litellm-model-id"] == "gaming/qwen3:8b"

    cluster["gaming"].kill()
    answer = proxy.chat(node_id="gaming")
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-litellm-model-id"] != "gaming/qwen3:8b"

    [copy] = proxy.temporary.glob("hydra-llm-*/config.yaml")
    assert copy.stat().st_mode & 0o777 == 0o600
    os.killpg(proxy.process.pid, signal.SIGINT)
    assert proxy.process.wait(30) == 130
    assert not list(proxy.temporary.glob("hydra-llm-*"))
    # It has ended in its own time: uvicorn takes a second Ctrl-C for impatience.
    assert "Application shutdown complete" in proxy.log.read_text()
