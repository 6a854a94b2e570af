"""LiteLLM's own proxy, in a process of its own, over simulated nodes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from hydra_llm.testing import SimulatedNode
from tests.helpers import PROXY_PYTHON

ROOT = Path(__file__).parents[2]

needs_proxy = pytest.mark.skipif(
    not PROXY_PYTHON.exists(), reason="`make test` installs LiteLLM's proxy into .venv/proxy"
)

ENVIRONMENT = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    # The proxy wants a master key, or to be told that there is other protection.
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
}


class running:  # noqa: N801  it is used like a function
    """
    A proxy's process, from when it serves to its end.

    Args:
        arguments: of the interpreter that has LiteLLM's proxy; host and port are added.
        folder: where its log is written.
        environment: variables, beside those there are that say nothing of us.
        cwd: where it runs; by default in the folder.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        *,
        cwd: Path | None = None,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "proxy.log"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("HYDRA_", "OLLAMA_"))}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(PROXY_PYTHON), *arguments, "--port", str(self.port), "--host", "127.0.0.1"],
                cwd=cwd or folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**clean, **environment},
                # In a group of its own, like a job of a terminal: what Ctrl-C there reaches
                # is all of it, its workers too.
                start_new_session=True,
            )

    def __enter__(self) -> running:
        deadline = time.monotonic() + 120
        try:
            while not self._is_ready():
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                assert time.monotonic() < deadline, self.log.read_text()[-3000:]
                time.sleep(0.2)
        except BaseException:
            self.kill()
            raise
        return self

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/readiness", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End all of it at once."""
        if self.process.poll() is None:
            if os.name == "posix":
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
        self.process.wait()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def write_config(
    folder: Path, deployments: Sequence[Mapping[str, Any]], **sections: Mapping[str, Any]
) -> Path:
    """A config like that of `docs/litellm.md`, in a checkout of ours, with inside_proxy.py."""
    (folder / "hydra_llm").symlink_to(ROOT / "hydra_llm")
    shutil.copy(Path(__file__).with_name("inside_proxy.py"), folder)
    config = folder / "config.yaml"
    about = {
        "model_list": list(deployments),
        "litellm_settings": {"callbacks": ["hydra_llm.integrations.litellm.instance"]},
        "general_settings": {"custom_auth": "inside_proxy.user_api_key_auth"},
        **sections,
    }
    config.write_text(yaml.safe_dump(about))
    return config


def deployment(group: str, model: str, node: SimulatedNode, **about: Any) -> dict[str, Any]:
    """A line of the config's `model_list`; `about` is what it says to us of the node."""
    return {
        "model_name": group,
        "litellm_params": {"model": model, "api_base": node.url},
        "model_info": {"id": f"{node.id}-{group}", "hydra": {"node_id": node.id, **about}},
    }


def books(url: str) -> dict[str, int]:
    """Leases opened, released, expired, in flight and waiting in a proxy's process, and its pid."""
    answer = httpx.get(f"{url}/books", timeout=20)
    answer.raise_for_status()
    told: dict[str, int] = answer.json()
    return told
