"""The agent's HTTP, over sockets on loopback."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from hydra_llm.agent.exposure import tls
from hydra_llm.agent.server import AgentServer, Answer, Limits

HERE = Path(__file__).parent
TOKEN = "s3cret-t0ken"
PAGE = b"a_metric 1\n"
QUESTION = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
WITH_TOKEN = {"Authorization": f"Bearer {TOKEN}"}


async def the_page() -> Answer:
    return Answer(200, PAGE, "text/plain; version=0.0.4; charset=utf-8")


class Served:
    def __init__(self, port: int) -> None:
        self.port = port

    async def ask(
        self, path: str = "/metrics", method: str = "GET", **about: Any
    ) -> httpx.Response:
        async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
            return await client.request(method, f"http://127.0.0.1:{self.port}{path}", **about)

    async def send(self, text: bytes) -> bytes:
        """All that comes back."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(text)
            return await reader.read()
        finally:
            await drop(writer)


async def drop(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    with suppress(OSError):
        await writer.wait_closed()


@asynccontextmanager
async def serving(
    metrics: Callable[[], Awaitable[Answer]] = the_page, **about: Any
) -> AsyncIterator[Served]:
    context = about.pop("tls", None)
    server = AgentServer(metrics, **about)
    [(_, port)] = await server.listen(["127.0.0.1"], 0, context)
    try:
        yield Served(port)
    finally:
        await server.close()


async def test_the_page_is_at_metrics() -> None:
    async with serving() as agent:
        answer = await agent.ask()

    assert (answer.status_code, answer.content) == (200, PAGE)
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["connection"] == "close"


async def test_head_gets_the_heading_alone() -> None:
    async with serving() as agent:
        answer = await agent.ask(method="HEAD")
        raw = await agent.send(b"HEAD /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")

    assert (answer.status_code, answer.headers["content-length"]) == (200, str(len(PAGE)))
    assert raw.endswith(b"\r\n\r\n")


async def test_other_places() -> None:
    async with serving() as agent:
        root = await agent.ask("/")
        health = await agent.ask("/healthz")
        query = await agent.ask("/metrics?module=x")
        others = [
            await agent.ask(path) for path in ("/metrics/", "/metricsx", "/%2e%2e/etc", "//metrics")
        ]

    assert root.status_code == 200
    assert root.text.startswith("hydra-llm agent")
    assert root.text.count("\n") == 1
    assert (health.status_code, health.text) == (200, "ok\n")
    assert (query.status_code, query.content) == (200, PAGE)
    assert [answer.status_code for answer in others] == [404] * 4


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "get"])
@pytest.mark.parametrize("path", ["/metrics", "/", "/nosuch"])
async def test_it_can_only_be_read(method: str, path: str) -> None:
    asked: list[int] = []

    async def metrics() -> Answer:
        asked.append(1)
        return await the_page()

    async with serving(metrics) as agent:
        raw = await agent.send(
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx".encode()
        )

    assert raw.startswith(b"HTTP/1.1 405 Method Not Allowed\r\n")
    assert b"Allow: GET, HEAD\r\n" in raw
    assert not asked


async def test_who_sends_more_than_is_read_gets_the_answer_all_the_same() -> None:
    head = b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 300000\r\n\r\n"
    async with serving() as agent:
        raw = await agent.send(head + b"x" * 300_000)

    assert raw.startswith(b"HTTP/1.1 405 ")


# ------------------------------------------------------------------------- who may ask


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": TOKEN},
        {"Authorization": "Basic OnMzY3JldC10MGtlbg=="},
    ],
)
@pytest.mark.parametrize("path", ["/metrics", "/", "/nosuch"])
async def test_without_the_token_nothing_is_told(path: str, headers: dict[str, str]) -> None:
    async with serving(token=SecretStr(TOKEN)) as agent:
        answer = await agent.ask(path, headers=headers)
        posted = await agent.ask(path, method="POST", headers=headers)

    assert (answer.status_code, posted.status_code) == (401, 401)
    assert answer.headers["www-authenticate"] == "Bearer"
    assert PAGE.decode() not in answer.text
    assert TOKEN not in answer.text + str(answer.headers)


async def test_with_the_token_it_is() -> None:
    async with serving(token=SecretStr(TOKEN)) as agent:
        answer = await agent.ask(headers=WITH_TOKEN)
        by_name = await agent.ask(headers={**WITH_TOKEN, "Host": "rig:9936"})

    assert (answer.status_code, answer.content) == (200, PAGE)
    assert by_name.status_code == 200


async def test_two_tokens_are_none() -> None:
    request = (
        "GET /metrics HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {TOKEN}\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
    )
    async with serving(token=SecretStr(TOKEN)) as agent:
        assert (await agent.send(request.encode())).startswith(b"HTTP/1.1 401 ")


async def test_whether_it_lives_is_told_to_all() -> None:
    async with serving(token=SecretStr(TOKEN)) as agent:
        assert (await agent.ask("/healthz")).text == "ok\n"


async def test_without_a_token_a_web_pages_own_name_leads_nowhere() -> None:
    async with serving() as agent:
        rebound = await agent.ask(headers={"Host": "evil.example:9936"})
        usual = await agent.ask(headers={"Host": "localhost:9936"})

    assert (rebound.status_code, usual.status_code) == (403, 200)
    assert PAGE.decode() not in rebound.text


async def test_no_other_site_is_allowed_to_read_it_in_a_browser() -> None:
    async with serving() as agent:
        answer = await agent.ask(headers={"Origin": "http://evil.example"})

    assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_over_tls() -> None:
    trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusted.load_verify_locations(HERE / "certificate.pem")
    context = tls(HERE / "certificate.pem", HERE / "key.pem")
    async with serving(token=SecretStr(TOKEN), tls=context) as agent:
        async with httpx.AsyncClient(verify=trusted, trust_env=False) as client:
            url = f"https://127.0.0.1:{agent.port}/metrics"
            answer = await client.get(url, headers=WITH_TOKEN)
            refused = await client.get(url)
        in_clear = await agent.send(QUESTION)

    assert (answer.status_code, answer.content, refused.status_code) == (200, PAGE, 401)
    assert PAGE not in in_clear


# ----------------------------------------------------------------------------- limits


async def test_a_head_that_is_too_long_is_refused() -> None:
    async with serving(limits=Limits(head_bytes=1000)) as agent:
        fine = await agent.ask(headers={"X": "y" * 500})
        raw = await agent.send(
            b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 1000 + b"\r\n\r\n"
        )

    assert fine.status_code == 200
    assert raw.startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    "text",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: a\r\n Folded : x\x00\r\n\r\n",
    ],
    ids=["TLS", "nonsense", "no host", "two hosts", "a zero"],
)
async def test_what_is_no_http_is_refused(text: bytes) -> None:
    async with serving() as agent:
        raw = await agent.send(text)
        after = await agent.ask()

    assert raw.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert after.status_code == 200


async def test_who_does_not_come_to_the_end_of_a_question_is_cut() -> None:
    async with serving(limits=Limits(head_seconds=0.05)) as agent:
        silent = await agent.send(b"")
        slow = await agent.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nX:")

    assert silent.startswith(b"HTTP/1.1 408 ")
    assert slow.startswith(b"HTTP/1.1 408 ")


async def test_who_does_not_read_the_answer_gives_his_place_to_others() -> None:
    pages = [b"x" * (32 << 20), PAGE]

    async def first_a_long_one() -> Answer:
        return Answer(200, pages.pop(0))

    limits = Limits(connections=1, connection_seconds=0.1)
    async with serving(first_a_long_one, limits=limits) as agent:
        # Its buffer is full after the first kilobytes, and so is the server's then.
        _, writer = await asyncio.open_connection("127.0.0.1", agent.port, limit=1024)
        writer.write(QUESTION)
        answer = await once_there_is_room(agent)
        await drop(writer)

    assert answer.endswith(PAGE)


async def once_there_is_room(agent: Served) -> bytes:
    while True:
        # Turned away with its question unread, it may not even see the answer.
        with suppress(ConnectionError):
            answer = await agent.send(QUESTION)
            if not answer.startswith(b"HTTP/1.1 503 "):
                return answer


async def test_there_are_no_more_connections_than_that() -> None:
    async with serving(limits=Limits(connections=2)) as agent:
        held = [await asyncio.open_connection("127.0.0.1", agent.port) for _ in range(2)]
        refused = [await agent.send(b"") for _ in range(3)]
        for reader, writer in held:
            writer.write(QUESTION)
            assert (await reader.read()).endswith(PAGE)
            await drop(writer)
        again = await once_there_is_room(agent)

    assert [one[:13] for one in refused] == [b"HTTP/1.1 503 "] * 3
    assert again.endswith(PAGE)


async def test_one_question_is_answered_on_a_connection() -> None:
    async with serving() as agent:
        assert (await agent.send(QUESTION * 2)).count(b"HTTP/1.1 200") == 1


async def test_a_page_that_cannot_be_made_is_an_error_without_its_words(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken() -> Answer:
        raise RuntimeError("words")

    async with serving(broken) as agent:
        answer = await agent.ask()

    assert answer.status_code == 500
    assert "words" not in answer.text
    assert "could not make its page" in caplog.text


async def test_closing_drops_what_is_not_answered_and_leaves_nothing() -> None:
    asked = asyncio.Event()

    async def never() -> Answer:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    before = asyncio.all_tasks()
    async with serving(never) as agent:
        question = asyncio.ensure_future(agent.ask())
        await asked.wait()
    with pytest.raises(httpx.TransportError):
        await question

    assert asyncio.all_tasks() == before
