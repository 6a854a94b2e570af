"""One question: at a pace, within limits, and with nothing in it that is not ours to send."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from hydra_llm.discovery.calling import Caller, Limits, NoAnswerError, Pace
from tests.discovery.conftest import QUICK, free_port, pages

LOOPBACK = ipaddress.ip_address("127.0.0.1")


class Time:
    """Stands still, but for who sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 6))


# ------------------------------------------------------------------------ the pace


async def test_so_many_connections_begin_in_a_second() -> None:
    time = Time()
    pace = Pace(10.0, clock=time.clock, sleep=time.sleep)

    for _ in range(4):
        await pace.turn()

    assert time.slept == [0.1, 0.2, 0.3]


async def test_a_pause_saves_nothing_up_for_a_burst() -> None:
    time = Time()
    pace = Pace(10.0, clock=time.clock, sleep=time.sleep)

    await pace.turn()
    time.now += 60.0
    for _ in range(3):
        await pace.turn()

    assert time.slept == [0.1, 0.2]


async def test_every_question_takes_its_turn() -> None:
    time = Time()
    with pages({"/": (200, "yes")}) as server:
        caller = Caller(Limits(rate=4.0), clock=time.clock, sleep=time.sleep)
        for _ in range(3):
            await caller.get(LOOPBACK, server.port, "/", most_bytes=100)
        with pytest.raises(NoAnswerError):
            await caller.get(LOOPBACK, free_port(), "/", most_bytes=100)

    assert time.slept == [0.25, 0.5, 0.75]


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[int]:
    async def serve_and_part(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve_and_part, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


async def test_only_so_many_connections_are_open_at_a_time() -> None:
    now = most = 0
    two = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        if now == 2:
            two.set()
        await two.wait()
        for _ in range(50):  # whoever else may come in comes in now
            await asyncio.sleep(0)
        now -= 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()

    async def no_pause(seconds: float) -> None:
        await asyncio.sleep(0)

    async with serving(serve) as port:
        limits = QUICK._replace(concurrency=2, answer_seconds=20.0)
        caller = Caller(limits, sleep=no_pause)
        asked = [caller.get(LOOPBACK, port, "/", most_bytes=10) for _ in range(8)]
        answers = await asyncio.gather(*asked)

    assert [answer.status for answer in answers] == [200] * 8
    assert most == 2


# ---------------------------------------------------------------- what comes back


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 101\r\n\r\n" + b"x" * 101,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"33\r\n%b\r\n" % (b"x" * 51) * 2,
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000,
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n",
    ],
    ids=["nothing", "no-http", "short", "head", "long", "long-in-chunks", "long-head", "upgrade"],
)
async def test_what_is_no_whole_answer_of_a_fair_size_is_none(sent: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await writer.drain()
        writer.write_eof()
        await reader.read()

    async with serving(serve) as port:
        with pytest.raises(NoAnswerError):
            await Caller(QUICK).get(LOOPBACK, port, "/", most_bytes=100)


async def test_an_answer_may_come_in_chunks_and_end_with_the_connection() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.0 200 OK\r\n\r\nall of it")
        writer.write_eof()
        await reader.read()

    async with serving(serve) as port:
        answer = await Caller(QUICK).get(LOOPBACK, port, "/", most_bytes=100)

    assert answer == (200, b"all of it")


async def test_who_answers_by_the_byte_is_not_waited_for() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with serving(serve) as port:
        with pytest.raises(NoAnswerError):
            caller = Caller(QUICK._replace(answer_seconds=0.05))
            await caller.get(LOOPBACK, port, "/", most_bytes=100)


async def test_a_redirect_is_not_followed() -> None:
    with pages({"/": (200, "elsewhere")}) as other:
        where = f"http://127.0.0.1:{other.port}/"
        with pages({"/": (302, where)}) as server:
            answer = await Caller(QUICK).get(LOOPBACK, server.port, "/", most_bytes=100)

    assert answer.status == 302
    assert other.asked == []


async def test_a_question_carries_no_credential_and_uses_no_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://user:secret@127.0.0.1:{free_port()}")
    with pages({"/": (200, "yes")}) as server:
        await Caller(QUICK).get(LOOPBACK, server.port, "/", most_bytes=100)

    [(_, headers)] = server.asked
    assert headers.keys() == {"host", "accept", "accept-encoding", "user-agent", "connection"}
    assert headers["host"] == f"127.0.0.1:{server.port}"
