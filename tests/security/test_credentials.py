"""What opens one node is shown to no other: not on failover, not on redirects, not by probes."""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections.abc import Callable, Iterator

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or importing it asks the internet

from typing import Any

import httpx
import litellm as typed_litellm
import pytest

from hydra_llm import AsyncClient, Client, HydraTransport, Router
from hydra_llm.integrations.langchain import ChatHydra
from hydra_llm.integrations.litellm import register_provider
from hydra_llm.testing import SimulatedCluster
from tests.fuzz.hostile import MODEL, Bytes, Hostile, answer, begun, hostile
from tests.router.conftest import make_nodes, make_router, preloaded

litellm: Any = typed_litellm
MESSAGES = [{"role": "user", "content": "Hello"}]

PASSWORD, KEY = "password-of-a", "key-of-a"
BASIC = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
EXPORTER_PASSWORD, EXPORTER_KEY = "password-of-the-exporter", "key-of-the-exporter"
EXPORTER_BASIC = base64.b64encode(f"me:{EXPORTER_PASSWORD}".encode()).decode()
OF_A = (PASSWORD, KEY, BASIC)
OF_THE_EXPORTER = (EXPORTER_PASSWORD, EXPORTER_KEY, EXPORTER_BASIC)


def sync(router: Router) -> None:
    with Client(router=router) as client:
        client.chat(MODEL, MESSAGES, node_id="a")


def sync_stream(router: Router) -> None:
    with Client(router=router) as client:
        list(client.chat(MODEL, MESSAGES, stream=True, node_id="a"))


def asynchronous(router: Router) -> None:
    async def chat() -> None:
        async with AsyncClient(router=router) as client:
            await client.chat(MODEL, MESSAGES, node_id="a")

    asyncio.run(chat())


def by_httpx(router: Router) -> None:
    with httpx.Client(transport=HydraTransport(router=router), follow_redirects=True) as client:
        for _ in range(2):
            body = {"model": MODEL, "messages": MESSAGES, "stream": False}
            words = {"x-hydra-node-id": "a"}
            client.post("http://hydra/api/chat", json=body, headers=words)


def langchain(router: Router) -> None:
    ChatHydra(model=MODEL, nodes=router, node_id="a").invoke("Hello")


def langchain_async(router: Router) -> None:
    asyncio.run(ChatHydra(model=MODEL, nodes=router, node_id="a").ainvoke("Hello"))


def by_litellm(router: Router) -> None:
    litellm.completion(model=f"hydra/{MODEL}", messages=MESSAGES, node_id="a")


def by_litellm_async(router: Router) -> None:
    asyncio.run(
        litellm.acompletion(model=f"hydra/{MODEL}", messages=MESSAGES, node_id="a"),
    )


DOORS = (
    *(sync, sync_stream, asynchronous, by_httpx),
    *(langchain, langchain_async, by_litellm, by_litellm_async),
)

FAILS: dict[str, Bytes] = {
    "500": b"HTTP/1.1 500 No\r\nSet-Cookie: s=key-of-a\r\nContent-Length: 0\r\n\r\n",
    "503": b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
    "401": b"HTTP/1.1 401 Who\r\nWWW-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n",
    "hangs up": b"",
    "cut off": begun() + b'{"message":',
    "no answer": answer(b"{}"),
    **{
        f"{status} to the other": b"HTTP/1.1 %d Away\r\nLocation: {b}/api/chat\r\n\r\n" % status
        for status in (301, 302, 303, 307, 308)
    },
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[SimulatedCluster]:
    with preloaded(make_nodes("b"), MODEL) as cluster:
        yield cluster


def seen_by(cluster: SimulatedCluster) -> str:
    """Every header that came to the other node."""
    found = [f"{name}: {value}" for r in cluster["b"].requests for name, value in r.headers.items()]
    assert found
    return "\n".join(found)


@pytest.mark.leaks(reason="LiteLLM's own threads and sessions stay")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_credentials_of_a_node_that_fails_reach_no_other(
    cluster: SimulatedCluster, door: Callable[[Router], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(litellm, "custom_provider_map", [])
    monkeypatch.setattr(litellm, "suppress_debug_info", True)
    b = cluster["b"].node()
    for name, said in FAILS.items():
        assert isinstance(said, bytes)
        with hostile({"/api/chat": said.replace(b"{b}", b.url.encode())}) as server:
            a = server.node("a", **secrets_of(server))
            with make_router(cluster, nodes=[a, b]) as router:
                register_provider(router)
                until_seen_up(router)
                door(router)
            asked = [head for head in server.heads if b"/api/chat" in head]
        assert asked, name
        assert all(BASIC.encode() in head and KEY.encode() in head for head in server.heads)
    for secret in OF_A:
        assert secret not in seen_by(cluster)


def until_seen_up(router: Router) -> None:
    """On a busy machine a first look may come too late; pytest-timeout is the limit."""
    router.start()
    while any(node.health != "up" for node in router.nodes()):
        time.sleep(0.005)


def secrets_of(server: Hostile) -> dict[str, Any]:
    """A password in its URL, and a key beside it."""
    url = server.url.replace("http://", f"http://me:{PASSWORD}@")
    return {"url": url, "headers": {"X-Api-Key": KEY}}


def test_a_nodes_cookies_are_kept_by_nobody(cluster: SimulatedCluster) -> None:
    cookie = b"Set-Cookie: s=key-of-a; Path=/"
    body = b'{"message":{"role":"assistant","content":"x"},"done":true}'
    says: dict[str, Bytes] = {"/api/chat": answer(body, cookie), "/api/pull": answer(b"{}", cookie)}
    with hostile(says) as server:
        nodes = [server.node("a"), cluster["b"].node()]
        with make_router(cluster, nodes=nodes) as router:
            until_seen_up(router)
            with httpx.Client(transport=HydraTransport(router=router)) as client:
                for node_id in ("a", "b", "a"):
                    for path in ("chat", "pull"):
                        client.post(
                            f"http://hydra/api/{path}",
                            json={"model": MODEL, "messages": MESSAGES, "stream": False},
                            headers={"x-hydra-node-id": node_id},
                        )
                assert not client.cookies

    assert not any(b"cookie" in head.lower() for head in server.heads)
    assert "key-of-a" not in seen_by(cluster)


def test_a_node_cannot_say_that_it_is_another(cluster: SimulatedCluster) -> None:
    body = b'{"message":{"role":"assistant","content":"x"},"done":true}'
    said = answer(body, b"X-Hydra-Node-Id: b")
    with hostile({"/api/chat": said}) as server:
        with make_router(cluster, nodes=[server.node("a")]) as router:
            until_seen_up(router)
            with httpx.Client(transport=HydraTransport(router=router)) as client:
                told = client.post(
                    "http://hydra/api/chat",
                    json={"model": MODEL, "messages": MESSAGES, "stream": False},
                )

    assert told.headers.get_list("x-hydra-node-id") == ["a"]


def test_a_node_and_its_exporter_do_not_see_one_anothers_credentials(
    cluster: SimulatedCluster,
) -> None:
    away = b"HTTP/1.1 307 Away\r\nLocation: %s/metrics\r\n\r\n"
    with hostile({}) as server, hostile({"/metrics": away % server.url.encode()}) as exporter:
        a = server.node(
            "a",
            **secrets_of(server),
            exporter=exporter.url.replace("http://", f"http://me:{EXPORTER_PASSWORD}@"),
            exporter_headers={"X-Token": EXPORTER_KEY},
        )
        nodes = [a, cluster["b"].node()]
        with make_router(cluster, nodes=nodes, vram_monitoring=True) as router:
            router.nodes()

    assert exporter.requests == ["/metrics"] * len(exporter.requests) != []
    assert all(EXPORTER_BASIC.encode() in head for head in exporter.heads)
    for secret in OF_A:
        assert not any(secret.encode() in head for head in exporter.heads)
    for secret in OF_THE_EXPORTER:
        assert not any(secret.encode() in head for head in server.heads)
        assert secret not in seen_by(cluster)
    assert "/metrics" not in server.requests
