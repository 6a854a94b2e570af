"""No data of a request, and nothing that a node answers, chooses an address."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or importing it asks the internet

import httpx
import litellm as typed_litellm
import pytest

from hydra_llm import AsyncClient, AsyncHydraTransport, Client, HydraTransport, Router
from hydra_llm.exceptions import HydraError
from hydra_llm.integrations.langchain import ChatHydra
from hydra_llm.integrations.litellm import register_provider
from hydra_llm.testing import SimulatedCluster
from tests.fuzz.hostile import Bytes, hostile
from tests.router.conftest import MODEL, make_nodes, make_router, preloaded
from tests.security.addresses import Spoken, addresses

litellm: Any = typed_litellm
MESSAGES = [{"role": "user", "content": "Hello"}]
CHAT = {"model": MODEL, "messages": MESSAGES, "stream": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[SimulatedCluster]:
    with preloaded(make_nodes("a", "b"), MODEL) as cluster:
        yield cluster


@pytest.fixture
def router(cluster: SimulatedCluster) -> Iterator[Router]:
    with make_router(cluster) as router:
        yield router


@pytest.fixture(scope="module")
def evil() -> Iterator[str]:
    """Host and port of somebody who listens and is no node."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def only_nodes(cluster: SimulatedCluster) -> Iterator[Spoken]:
    """Nobody but the nodes is spoken to inside."""
    with addresses() as spoken:
        yield spoken
    assert spoken.connected <= {("127.0.0.1", node.port) for node in cluster}
    assert spoken.looked_up <= {"127.0.0.1"}
    assert spoken.datagrams == []


async def connect(host: str, port: int) -> None:
    _, writer = await asyncio.open_connection(host, port)
    writer.close()
    await writer.wait_closed()


def test_the_watch_sees_a_connection(evil: str) -> None:
    host, port = evil.split(":")
    with addresses() as spoken:
        with suppress(httpx.HTTPError):
            httpx.get(f"http://localhost:{port}", timeout=0.05, trust_env=False)
        asyncio.run(connect(host, int(port)))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.sendto(b"", (host, int(port)))

    assert (host, int(port)) in spoken.connected
    assert "localhost" in spoken.looked_up
    assert spoken.datagrams == [(host, int(port))]


# --------------------------------------------------------------------- over httpx


URLS = [
    "http://{evil}/api/chat",
    "http://{evil}//api/chat",
    "http://user:pass@{evil}/api/chat",
    "http://hydra//{evil}/api/chat",
    "http://hydra/http://{evil}/api/chat",
    "http://hydra/@{evil}/api/chat",
    "http://hydra/..//{evil}/api/chat",
    "http://hydra/\\{evil}/api/chat",
    "http://hydra/api/chat?host={evil}",
    "http://hydra/api/chat#@{evil}",
    "http://hydra@{evil}/api/chat",
    "https://{evil}/api/chat",
    "http://hydra/api/tags",
    "http://{evil}/api/version",
    "http://{evil}/api/pull",
    "http://{evil}/",
]
HEADERS = [
    {},
    {"host": "{evil}"},
    {"x-hydra-node-id": "http://{evil}"},
    {"x-hydra-node-id": "{evil}"},
    {"x-forwarded-host": "{evil}", "forwarded": "host={evil}", "x-original-url": "http://{evil}/"},
    {"proxy-authorization": "Basic eA==", "upgrade": "websocket", "connection": "upgrade"},
]


def told(templates: dict[str, str], evil: str) -> dict[str, str]:
    return {name: value.format(evil=evil) for name, value in templates.items()}


@pytest.mark.parametrize("url", URLS)
def test_no_url_and_no_header_leads_elsewhere(
    router: Router, cluster: SimulatedCluster, evil: str, url: str
) -> None:
    async def send() -> None:
        transport = AsyncHydraTransport(router=router)
        async with httpx.AsyncClient(transport=transport, follow_redirects=True) as client:
            for headers in HEADERS:
                with suppress(HydraError, httpx.InvalidURL):
                    await client.post(url.format(evil=evil), json=CHAT, headers=told(headers, evil))

    with only_nodes(cluster) as spoken:
        transport = HydraTransport(router=router)
        with httpx.Client(transport=transport, follow_redirects=True) as client:
            for headers in HEADERS:
                for method in ("POST", "GET", "HEAD", "CONNECT", "DELETE"):
                    with suppress(HydraError, httpx.InvalidURL):
                        client.request(
                            method, url.format(evil=evil), json=CHAT, headers=told(headers, evil)
                        )
        asyncio.run(send())

    assert spoken.connected


@pytest.mark.parametrize("target", [b"http://{evil}/api/chat", b"@{evil}/api/chat", b":{evil}"])
def test_no_raw_target_leads_elsewhere(
    router: Router, cluster: SimulatedCluster, evil: str, target: bytes
) -> None:
    raw = target.replace(b"{evil}", evil.encode())
    with only_nodes(cluster), HydraTransport(router=router) as transport:
        with pytest.raises(httpx.InvalidURL):
            httpx.URL("http://hydra").copy_with(raw_path=raw)
        request = httpx.Request(
            "POST", "http://hydra/api/chat", json=CHAT, extensions={"target": raw}
        )
        with suppress(HydraError):
            transport.handle_request(request).close()


# --------------------------------------------------------------------- in bodies


def bodies(evil: str) -> list[dict[str, Any]]:
    url = f"http://{evil}"
    return [
        {**CHAT, **dict.fromkeys(("base_url", "api_base", "host", "url", "node"), url)},
        {**CHAT, "options": {"base_url": url, "api_base": url, "host": url}},
        {**CHAT, "model": f"{url}/library/x:latest"},
        {**CHAT, "messages": [{"role": "user", "content": url, "images": [url]}]},
        {**CHAT, "metadata": {"node_id": url, "api_base": url}, "node_id": url},
    ]


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/api/show", "/api/pull"])
def test_no_body_leads_elsewhere(
    router: Router, cluster: SimulatedCluster, evil: str, path: str
) -> None:
    with (
        only_nodes(cluster),
        httpx.Client(transport=HydraTransport(router=router), base_url="http://hydra") as client,
    ):
        for body in bodies(evil):
            for words in ({}, {"x-hydra-node-id": "a"}):
                with suppress(HydraError):
                    client.post(path, json=body, headers=words)


# -------------------------------------------------------------------------- words


@pytest.mark.parametrize("form", ["http://{evil}", "{evil}", "http://a@{evil}", "https://{evil}/a"])
def test_no_pin_leads_elsewhere(
    router: Router, cluster: SimulatedCluster, evil: str, form: str
) -> None:
    name = form.format(evil=evil)

    async def send() -> str | None:
        async with AsyncClient(router=router) as client:
            answer = await client.chat(MODEL, MESSAGES, node_id=name)
            return str(answer.node_id)

    with only_nodes(cluster), Client(router=router) as client:
        assert client.chat(MODEL, MESSAGES, node_id=name).node_id in ("a", "b")
        assert asyncio.run(send()) in ("a", "b")
        for verb in (client.chat, client.pull, client.show):
            with pytest.raises(HydraError):
                verb(MODEL, node_id=name, pin="require")


def test_no_argument_of_langchains_leads_elsewhere(
    router: Router, cluster: SimulatedCluster, evil: str
) -> None:
    url = f"http://{evil}"
    words: list[dict[str, Any]] = [
        {"base_url": url},
        {"options": {"base_url": url}},
        {"client_kwargs": {"base_url": url}},
        {"node_id": url},
        {"nodes": [url]},
        {"router": url},
        {"headers": {"host": evil}},
    ]
    with only_nodes(cluster):
        model = ChatHydra(model=MODEL, nodes=router)
        for more in words:
            with suppress(HydraError, TypeError, ValueError):
                model.invoke("Hello", **more)
            with suppress(HydraError, TypeError, ValueError):
                asyncio.run(model.bind(**more).ainvoke("Hello"))
            with suppress(HydraError, TypeError, ValueError):
                model.invoke("Hello", config={"configurable": more})


@pytest.mark.leaks(reason="LiteLLM's own threads and sessions stay")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_argument_of_litellms_leads_elsewhere(
    router: Router, cluster: SimulatedCluster, evil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(litellm, "custom_provider_map", [])
    monkeypatch.setattr(litellm, "suppress_debug_info", True)
    register_provider(router)
    url = f"http://{evil}"
    words: list[dict[str, Any]] = [
        {"api_base": url},
        {"base_url": url},
        {"metadata": {"api_base": url, "node_id": url}},
        {"node_id": url},
        {"extra_headers": {"host": evil, "x-hydra-node-id": url}},
        {"extra_body": {"api_base": url}},
    ]
    model = f"hydra/{MODEL}"

    async def send() -> None:
        for more in words:
            answer = await litellm.acompletion(model=model, messages=MESSAGES, **more)
            assert answer._hidden_params["routing_decision"]["selected_node"] in ("a", "b")

    with only_nodes(cluster):
        for more in words:
            answer = litellm.completion(model=model, messages=MESSAGES, **more)
            assert answer._hidden_params["routing_decision"]["selected_node"] in ("a", "b")
        asyncio.run(send())


# ------------------------------------------------------------- the world around us


def test_no_proxy_of_the_environment_is_used(
    cluster: SimulatedCluster, evil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://{evil}")
    with only_nodes(cluster), make_router(cluster) as router, Client(router=router) as client:
        assert client.chat(MODEL, MESSAGES).node_id in ("a", "b")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_of_a_node_is_followed(
    cluster: SimulatedCluster, evil: str, status: int
) -> None:
    away = f"HTTP/1.1 {status} Away\r\nLocation: http://{evil}/api/chat\r\n\r\n".encode()
    paths = ("/api/chat", "/api/version", "/api/ps", "/api/show", "/api/pull", "/metrics", "/")
    says: dict[str, Bytes] = dict.fromkeys(paths, away)
    with hostile(says) as server:
        node = server.node()
        nodes = [node, cluster["a"].node()]
        with addresses() as spoken, make_router(cluster, nodes=nodes) as router:
            with Client(router=router) as client:
                answer = client.chat(MODEL, MESSAGES, node_id="hostile")
                with pytest.raises(HydraError, match="redirects"):
                    client.pull(MODEL, node_id="hostile")
            with httpx.Client(
                transport=HydraTransport(router=router), follow_redirects=True
            ) as client:
                with pytest.raises(HydraError, match="redirects"):
                    client.get("http://hydra/", headers={"x-hydra-node-id": "hostile"})

    assert answer.routing_decision.attempts[0].outcome == "protocol"
    host, port = evil.split(":")
    assert (host, int(port)) not in spoken.connected
    assert answer.node_id == "a"
