"""LiteLLM's own proxy, in a process of its own, over simulated nodes."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from hydra_llm.testing import ErrorLineFault, SimulatedCluster, StatusFault
from tests.helpers import PROXY_PYTHON
from tests.litellm.conftest import CHAT, EMBEDDING, HELLO, asked, bodies, loaded_cluster, total

ROOT = Path(__file__).parents[2]
KEY = "sk-test"
ENVIRONMENT = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    # The proxy wants a master key, or to be told that there is other protection.
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
}

pytestmark = [
    pytest.mark.skipif(
        not PROXY_PYTHON.exists(), reason="`make test` installs LiteLLM's proxy into .venv/proxy"
    ),
    pytest.mark.timeout(120),
]

LIMITED = """
from litellm.proxy._types import UserAPIKeyAuth

async def user_api_key_auth(request, api_key):
    limit = {"hydra": {"max_priority": 2}} if api_key == "sk-limited" else {}
    return UserAPIKeyAuth(api_key=api_key, metadata=limit)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SimulatedCluster]:
    with loaded_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def proxy(cluster: SimulatedCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The proxy's URL; its config is the one that `docs/litellm.md` shows, with these nodes."""
    folder = tmp_path_factory.mktemp("proxy")
    (folder / "hydra_llm").symlink_to(ROOT / "hydra_llm")  # a config in a checkout of ours
    (folder / "my_auth.py").write_text(LIMITED)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(config_for(cluster)))
    with running(["-m", "litellm.proxy.proxy_cli", "--config", str(config)], folder) as url:
        yield url


def config_for(cluster: SimulatedCluster) -> dict[str, Any]:
    model_list = []
    for node, gb in zip(cluster, (8, 24, 80), strict=True):
        for group, model in (("qwen3", f"ollama_chat/{CHAT}"), ("embed", f"ollama/{EMBEDDING}")):
            model_list.append(
                {
                    "model_name": group,
                    "litellm_params": {"model": model, "api_base": node.url},
                    "model_info": {
                        "id": f"{node.id}-{group}",
                        "hydra": {"node_id": node.id, "vram_gb": gb},
                    },
                }
            )
    return {
        "model_list": model_list,
        "litellm_settings": {"callbacks": ["hydra_llm.integrations.litellm.instance"]},
        "router_settings": {"num_retries": 2},
        "general_settings": {"custom_auth": "my_auth.user_api_key_auth"},
    }


class running:  # noqa: N801  it is used like a function
    """A proxy's process, from when it serves to its end."""

    def __init__(self, arguments: list[str], folder: Path, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "proxy.log"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("HYDRA_", "OLLAMA_"))}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(PROXY_PYTHON), *arguments, "--port", str(port), "--host", "127.0.0.1"],
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**clean, **ENVIRONMENT, **environment},
            )

    def __enter__(self) -> str:
        deadline = time.monotonic() + 90
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/health/liveliness", timeout=5).status_code == 200:
                    return self.url
            except httpx.HTTPError:
                time.sleep(0.2)

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(autouse=True)
def quiet_again(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test no node is busy, and none has a fault."""
    if not PROXY_PYTHON.exists():
        yield
        return
    cluster: SimulatedCluster = request.getfixturevalue("cluster")
    yield
    deadline = time.monotonic() + 5
    while any(node.in_flight for node in cluster):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for node in cluster:
        node.clear_faults()


def post(url: str, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    given = {"Authorization": f"Bearer {KEY}", **headers}
    return httpx.post(f"{url}{path}", json=body, headers=given, timeout=60)


CHAT_BODY: dict[str, Any] = {"model": "qwen3", "messages": HELLO}
CHAT_PATH = "/v1/chat/completions"
ENDPOINTS: dict[str, dict[str, Any]] = {
    CHAT_PATH: CHAT_BODY,
    "/v1/completions": {"model": "qwen3", "prompt": "Hello"},
    "/v1/embeddings": {"model": "embed", "input": ["Hello"]},
    "/v1/responses": {"model": "qwen3", "input": "Hello"},
    "/v1/messages": {**CHAT_BODY, "max_tokens": 20},
}


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("node", ["a", "c"])
def test_every_endpoint_goes_to_the_pinned_node_and_says_so(
    proxy: str, cluster: SimulatedCluster, path: str, node: str
) -> None:
    before = asked(cluster)

    answer = post(proxy, path, {**ENDPOINTS[path], "node_id": node})

    assert answer.status_code == 200, answer.text
    assert asked(cluster)[node] == before[node] + 1
    assert total(asked(cluster)) == total(before) + 1
    assert answer.headers["x-hydra-node"] == node
    assert answer.headers["x-hydra-reason"]
    assert answer.headers["x-hydra-attempts"] == "1"
    assert "node_id" not in json.dumps(bodies(cluster))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_stream_goes_to_the_pinned_node_and_says_so(
    proxy: str, cluster: SimulatedCluster, path: str
) -> None:
    body = {**ENDPOINTS[path], "node_id": "b", "stream": True}
    given = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", f"{proxy}{path}", json=body, headers=given, timeout=60) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data:")]

    assert len(lines) > 3
    assert answer.headers["x-hydra-node"] == "b"


@pytest.mark.parametrize(
    ("said", "headers"),
    [
        ({"min_vram_gb": 60}, {}),
        ({"hydra": {"min_vram_gb": 60}}, {}),
        ({"metadata": {"hydra": {"min_vram_gb": 60}}}, {}),
        ({}, {"x-hydra-min-vram-gb": "60"}),
        ({"require_labels": []}, {"x-hydra-node-id": "c"}),
    ],
)
def test_words_may_stand_in_the_body_the_metadata_or_a_header(
    proxy: str, said: dict[str, Any], headers: dict[str, str]
) -> None:
    answer = post(proxy, CHAT_PATH, {**CHAT_BODY, **said}, **headers)

    assert answer.status_code == 200, answer.text
    assert answer.headers["x-hydra-node"] == "c"


def test_the_openai_client_may_say_them_as_extra_body(proxy: str) -> None:
    hello: Any = HELLO
    with openai.OpenAI(base_url=f"{proxy}/v1", api_key=KEY, max_retries=0) as client:
        create: Any = client.chat.completions.create
        raw = client.chat.completions.with_raw_response.create(
            model="qwen3", messages=hello, extra_body={"node_id": "b"}
        )
        words = {"hydra": {"node_id": "b"}}
        stream = create(model="qwen3", messages=hello, stream=True, extra_body=words)
        text = "".join(part.choices[0].delta.content or "" for part in stream if part.choices)

    assert raw.headers["x-hydra-node"] == "b"
    assert text


@pytest.mark.parametrize(
    ("said", "headers", "named"),
    [
        ({"min_vram_gb": "much"}, {}, "min_vram_gb"),
        ({"hydra": {"nod_id": "a"}}, {}, "nod_id"),
        ({}, {"x-hydra-priority": "11"}, "priority"),
    ],
)
def test_a_wrong_word_is_400_and_names_the_field(
    proxy: str, cluster: SimulatedCluster, said: dict[str, Any], headers: dict[str, str], named: str
) -> None:
    before = total(asked(cluster))

    answer = post(proxy, CHAT_PATH, {**CHAT_BODY, **said}, **headers)

    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"]
    assert total(asked(cluster)) == before


def test_what_cannot_be_is_400_and_gives_each_nodes_figure(proxy: str) -> None:
    answer = post(
        proxy, "/v1/chat/completions", {**CHAT_BODY, "min_vram_gb": 600, "vram": "require"}
    )

    assert answer.status_code == 400
    assert "short of VRAM" in answer.text


def test_a_busy_node_costs_the_caller_nothing(proxy: str, cluster: SimulatedCluster) -> None:
    cluster["b"].inject(StatusFault(503), times=1)

    answer = post(proxy, CHAT_PATH, {**CHAT_BODY, "node_id": "b"})

    assert answer.status_code == 200
    assert answer.headers["x-hydra-node"] != "b"
    assert answer.headers["x-hydra-attempts"] == "2"


def test_a_stream_that_breaks_names_the_node(proxy: str, cluster: SimulatedCluster) -> None:
    cluster["c"].inject(ErrorLineFault(after=3), times=1)

    body = {**CHAT_BODY, "node_id": "c", "stream": True}
    answer = post(proxy, CHAT_PATH, body)

    assert "the answer of c" in answer.text
    assert "KeyError" not in answer.text


def test_a_key_can_be_limited(proxy: str) -> None:
    limited = post(
        proxy,
        CHAT_PATH,
        {**CHAT_BODY, "hydra": {"priority": 10}},
        Authorization="Bearer sk-limited",
    )

    assert limited.status_code == 200  # what it does to the priority: test_words.py


@pytest.mark.parametrize("node", ["a", "b", "c"])
def test_clients_that_leave_a_stream_free_their_places(
    proxy: str, cluster: SimulatedCluster, node: str
) -> None:
    body = {**CHAT_BODY, "node_id": node, "pin": "require"}
    given = {"Authorization": f"Bearer {KEY}"}

    def leave(number: int) -> None:
        with httpx.stream(
            "POST", f"{proxy}{CHAT_PATH}", json={**body, "stream": True}, headers=given, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            for _ in range(number % 3):
                next(lines)

    with ThreadPoolExecutor(8) as many:
        list(many.map(leave, range(24)))
    # Were the places not given back, this would wait for one.
    answer = post(proxy, CHAT_PATH, {**body, "deadline_s": 5})

    assert answer.status_code == 200
    assert answer.headers["x-hydra-node"] == node


def test_the_prompt_is_not_in_the_headers(proxy: str) -> None:
    body = {"model": "qwen3", "messages": [{"role": "user", "content": "my secret"}]}

    answer = post(proxy, CHAT_PATH, body)

    assert not re.search("my secret", str(answer.headers))
