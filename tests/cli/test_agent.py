"""``hydra-llm agent``, as a process of its own where it serves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import hydra_llm
from hydra_llm.config import HydraSettings, agent_token
from hydra_llm.exceptions import ConfigurationError
from tests.cli.conftest import Run

TOKEN = "s3cret-t0ken"
VARIABLE = "HYDRA_LLM_AGENT_TOKEN"


class Running:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise AssertionError(process.communicate()[1])
        self.url = line.removeprefix("listening on ").strip()

    def stop(self, number: int) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err


@contextmanager
def running(*options: str, **environment: str) -> Iterator[Running]:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "hydra_llm", "agent", "--port=0", *options],
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        yield Running(process)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def heeded_ctrl_c() -> Iterator[None]:
    """What a shell starts in the background ignores Ctrl-C, and so would all that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_on_loopback_until_it_is_stopped(number: int) -> None:
    before = time.time()
    with running() as agent:
        with httpx.Client(trust_env=False) as client:
            answer = client.get(agent.url)
        code, out, _ = agent.stop(number)

    assert agent.url.startswith("http://127.0.0.1:")
    found = {one.name: one.samples for one in text_string_to_metric_families(answer.text)}
    [info] = found["hydra_node_agent_info"]
    assert info.labels["version"] == hydra_llm.__version__
    assert before - 1 < found["hydra_node_sample_timestamp_seconds"][0].value < time.time() + 1
    assert found["hydra_node_host_memory_total_bytes"][0].value > 0
    assert (code, out) == (0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("by_file", [True, False])
def test_a_token_is_asked_for_and_never_shown(tmp_path: Path, *, by_file: bool) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    options = [f"--token-file={file}"] if by_file else []
    # A file goes before the variable.
    with running(*options, **{VARIABLE: "another" if by_file else TOKEN}) as agent:
        with httpx.Client(trust_env=False) as client:
            without = client.get(agent.url)
            wrong = client.get(agent.url, headers={"Authorization": "Bearer another-one"})
            right = client.get(agent.url, headers={"Authorization": f"Bearer {TOKEN}"})
        code, out, err = agent.stop(signal.SIGTERM)

    assert [answer.status_code for answer in (without, wrong, right)] == [401, 401, 200]
    assert code == 0
    assert TOKEN not in out + err + right.text


def test_a_public_address_is_refused_without_a_token(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)

    done = run("agent", "--host", "0.0.0.0", "--port", "0")

    assert done.exit_code == 2
    assert "--token-file FILE" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tls-key", "key.pem"], "--tls-key needs --tls-cert"),
        (["--tls-cert", "nosuch.pem"], "nosuch.pem"),
        (["--token-file", "nosuch"], "--token-file nosuch: it cannot be read"),
        (["--host", ""], "--host is empty"),
        (["--port", "65536"], "65535"),
    ],
)
def test_what_is_wrong_is_told_and_leaves_with_2(run: Run, options: list[str], says: str) -> None:
    done = run("agent", *options)

    assert done.exit_code == 2
    assert says in done.stderr


# ------------------------------------------------------------------------- the token


@pytest.mark.parametrize("text", ["s3cret-t0ken", "  s3cret-t0ken\r\n", "\ufeffs3cret-t0ken"])
def test_a_tokens_file_may_end_as_editors_end_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text, encoding="utf-8", newline="")

    token = agent_token(tmp_path / "token")

    assert token is not None
    assert token.get_secret_value() == TOKEN
    assert TOKEN not in repr(token)


@pytest.mark.parametrize("text", [b"", b"\n", b"two words", b"a\nb", "schlüssel".encode(), b"\xff"])
def test_what_no_header_can_carry_is_no_token_and_not_shown(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "token").write_bytes(text)

    with pytest.raises(ConfigurationError, match="one word") as caught:
        agent_token(tmp_path / "token")
    assert "words of" not in str(caught.value)
    assert "schl" not in str(caught.value)


@pytest.mark.parametrize(("value", "expected"), [(None, None), ("", None), (" t1 ", "t1")])
def test_the_variable_serves_where_no_file_is_named(
    monkeypatch: pytest.MonkeyPatch, value: str | None, expected: Any
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)

    token = agent_token(None)

    assert (token and token.get_secret_value()) == expected


def test_an_agents_token_is_no_misspelt_setting_of_a_router(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, TOKEN)

    assert TOKEN not in repr(HydraSettings("http://rig:11434"))
