"""LiteLLM's own proxy, in a process of its own, over simulated nodes."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import httpx
import openai
import pytest

from hydra_llm.testing import ErrorLineFault, SimulatedCluster, StallFault, StatusFault
from tests.helpers import PROXY_PYTHON
from tests.litellm.callers import CALLS, PATIENCE_SECONDS, Callers, trouble
from tests.litellm.conftest import (
    CHAT,
    EMBEDDING,
    HELLO,
    OTHER,
    asked,
    bodies,
    loaded_cluster,
    total,
    until,
)
from tests.litellm.proxies import ENVIRONMENT, books, deployment, needs_proxy, running, write_config

KEY = "sk-test"

pytestmark = [needs_proxy, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SimulatedCluster]:
    # One slot more than the config says, so that a stream beyond them begins too.
    with loaded_cluster(num_parallel=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def proxy(cluster: SimulatedCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The proxy's URL."""
    groups = {"qwen3": f"ollama_chat/{CHAT}", "embed": f"ollama/{EMBEDDING}"}
    groups["other"] = f"ollama_chat/{OTHER}"
    deployments = [
        deployment(group, model, node, vram_gb=gb, slots=1)
        for node, gb in zip(cluster, (8, 24, 80), strict=True)
        for group, model in groups.items()
    ]
    folder = tmp_path_factory.mktemp("proxy")
    config = write_config(folder, deployments, router_settings={"num_retries": 2})
    command = ["-m", "litellm.proxy.proxy_cli", "--config", str(config)]
    with running(command, folder, ENVIRONMENT) as process:
        yield process.url


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


@contextmanager
def silent_stream(proxy: str, body: dict[str, Any]) -> Iterator[None]:
    """A stream that has begun, and is left at the end of the block."""
    given = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream(
        "POST", f"{proxy}{CHAT_PATH}", json={**body, "stream": True}, headers=given, timeout=60
    ) as answer:
        lines = answer.iter_lines()  # dropped, it would leave
        assert next(lines).startswith("data:")
        yield


@pytest.mark.parametrize(
    ("key", "priority", "free"),
    [
        ("sk-key-2", 10, 5),  # lowered to 2
        ("sk-team-2", 10, 5),
        ("sk-key-9", 2, 5),  # not raised to 9
        ("sk-key-9", None, 6),
    ],
)
def test_a_limit_of_a_key_or_team_lowers_its_priority_and_never_raises_it(
    proxy: str, cluster: SimulatedCluster, key: str, priority: int | None, free: int
) -> None:
    """The one without a limit comes later and goes first."""
    cluster["a"].inject(StallFault(after=1, models=(OTHER,)), times=2)
    words = {"node_id": "a", "pin": "require"}
    asked_for = {"model": "other", "max_tokens": 5}

    def chats() -> list[Any]:
        return [r.body["messages"] for r in cluster["a"].requests if r.path == "/api/chat"]

    def ask(name: str, key: str, priority: int | None) -> int:
        said = words if priority is None else {**words, "priority": priority}
        body = {**asked_for, "messages": [{"role": "user", "content": name}], "hydra": said}
        return post(proxy, CHAT_PATH, body, Authorization=f"Bearer {key}").status_code

    before = len(chats())
    with ThreadPoolExecutor(2) as threads:
        with ExitStack() as holding:
            # A slot, and the headroom of usual priorities.
            for _ in range(2):
                body = {**asked_for, **words, "messages": HELLO}
                holding.enter_context(silent_stream(proxy, body))
            limited = threads.submit(ask, "limited", key, priority)
            until(lambda: books(proxy)["waiting"] == 1)
            later = threads.submit(ask, "free", KEY, free)
            until(lambda: books(proxy)["waiting"] == 2)
        assert [limited.result(), later.result()] == [200, 200]

    assert [one[0]["content"] for one in chats()[before + 2 :]] == ["free", "limited"]


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


@pytest.mark.timeout(300)
async def test_500_calls_with_every_kind_of_end_leave_nothing(
    proxy: str, cluster: SimulatedCluster
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    before, began = books(proxy), time.monotonic()
    callers = Callers(proxy, random.Random(seed))
    troubling = asyncio.create_task(trouble(cluster, random.Random(seed)))
    await callers.ask(CALLS)
    troubling.cancel()
    with suppress(asyncio.CancelledError):
        await troubling

    def is_quiet() -> bool:
        told = books(proxy)
        return not told["in_flight"] and not told["waiting"]

    # Whole answers are waited for although their clients have left, over all attempts.
    await asyncio.to_thread(until, is_quiet, 10 * PATIENCE_SECONDS)
    await asyncio.to_thread(until, lambda: not any(node.in_flight for node in cluster))
    after = books(proxy)
    assert (after["released"], after["expired"]) == (after["opened"], 0)
    assert after["opened"] - before["opened"] > CALLS / 4

    # That all of it has happened.
    assert callers.ends.total() == CALLS
    assert callers.ends["200"] > CALLS / 8, callers.ends
    assert callers.ends.keys() > {"left before the end", "left a stream", "broken stream", "503"}
    requests = [r for node in cluster for r in node.requests if r.at > began and r.model]
    assert {r.outcome for r in requests} == {"done", "error", "cut", "client left"}
