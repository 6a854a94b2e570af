"""HTTP for the agent: one question on a connection, one answer, and good-bye.

::

    connected ──head read──▶ asked ──answered──▶ closed
        └──too slow, too much, too many──────────▶ closed
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from email.utils import formatdate
from http import HTTPStatus
from typing import NamedTuple

import h11
from pydantic import SecretStr

from hydra_llm.agent.exposure import bears_token, names_loopback

__all__ = ["Answer", "AgentServer", "Limits"]

log = logging.getLogger("hydra_llm")

TEXT = "text/plain; charset=utf-8"

CLOSE_SECONDS = 2.0

PART_SECONDS = 0.5
"""How long those who have their answer may take to close."""

WELCOME = b"hydra-llm agent: the memory of this machine's GPUs is at /metrics\n"


class Answer(NamedTuple):
    """What is sent back."""

    status: int
    body: bytes
    content_type: str = TEXT
    headers: Mapping[str, str] = {}


class Limits(NamedTuple):
    """How much of it anybody can take up."""

    head_bytes: int = 8192
    head_seconds: float = 5.0
    """To send a question, and for TLS to come about before it."""
    connection_seconds: float = 15.0
    """From the first byte to the last."""
    connections: int = 32
    """At a time; one more is told to come later."""


class AgentServer:
    """
    Answers ``/metrics``, ``/`` and ``/healthz`` until it is closed.

    Args:
        metrics: makes the page.
        token: what a question must bear; None lets in everybody who reaches it. ``/healthz``
            tells nothing and asks for none.
        limits: how much of it anybody can take up.
    """

    def __init__(
        self,
        metrics: Callable[[], Awaitable[Answer]],
        *,
        token: SecretStr | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._metrics = metrics
        self._token = token
        self._limits = Limits() if limits is None else limits
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._admitted = 0

    async def listen(
        self, addresses: Sequence[str], port: int, tls: ssl.SSLContext | None = None
    ) -> list[tuple[str, int]]:
        """
        Begin, and return where.

        Raises:
            OSError: it cannot be there.
        """
        self._server = await asyncio.start_server(
            self._serve,
            list(addresses),
            port,
            limit=self._limits.head_bytes,
            backlog=self._limits.connections,
            ssl=tls,
            ssl_handshake_timeout=None if tls is None else self._limits.head_seconds,
        )
        return [one.getsockname()[:2] for one in self._server.sockets]

    async def close(self) -> None:
        """Take no more questions, and drop those that are not answered yet."""
        if self._server is not None:
            self._server.close()
        for task in self._serving:
            task.cancel()
        if self._serving:
            await asyncio.wait(self._serving, timeout=CLOSE_SECONDS)

    # ------------------------------------------------------------- a connection

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        # Those that are turned away count not, or they would keep others from coming in.
        is_full = self._admitted >= self._limits.connections
        self._admitted += not is_full
        exchange = _turn_away(writer) if is_full else self._exchange(reader, writer)
        try:
            with suppress(asyncio.TimeoutError, OSError):
                await asyncio.wait_for(exchange, self._limits.connection_seconds)
        except asyncio.CancelledError:
            pass  # we are closing; asyncio would report it as a failure
        finally:
            self._admitted -= not is_full
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()
            self._serving.discard(task)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        http = h11.Connection(h11.SERVER)
        request: h11.Request | None = None
        try:
            question = _question(http, reader, self._limits.head_bytes)
            request = await asyncio.wait_for(question, self._limits.head_seconds)
            if request is None:
                return
            answer = await self._answer(request)
        except asyncio.TimeoutError:
            answer = Answer(408, b"too slow\n")
        except h11.RemoteProtocolError as error:
            answer = Answer(error.error_status_hint, b"that is no question in HTTP/1.1\n")
        except Exception:
            log.exception("the agent could not make its page")
            answer = Answer(500, b"the agent failed; its log says why\n")
        is_head = request is not None and request.method == b"HEAD"
        writer.write(_sent(http, answer, is_head=is_head))
        await writer.drain()
        await _part(reader, writer)

    # ----------------------------------------------------------------- the answer

    async def _answer(self, request: h11.Request) -> Answer:
        path = request.target.partition(b"?")[0]
        if (refused := self._refused(request, path)) is not None:
            return refused
        if request.method not in (b"GET", b"HEAD"):
            return Answer(405, b"it can only be read\n", headers={"Allow": "GET, HEAD"})
        if path == b"/metrics":
            return await self._metrics()
        if path == b"/":
            return Answer(200, WELCOME)
        if path == b"/healthz":
            return Answer(200, b"ok\n")
        return Answer(404, b"there is /metrics, /healthz and /\n")

    def _refused(self, request: h11.Request, path: bytes) -> Answer | None:
        """Who is not let in; None for all others."""
        sent = dict[bytes, list[bytes]]()
        for name, value in request.headers:
            sent.setdefault(name, []).append(value)
        if self._token is None:
            if names_loopback(sent.get(b"host", [b""])[0].decode("latin-1")):
                return None
            return Answer(403, b"without a token it answers to localhost and 127.0.0.1 alone\n")
        authorizations = sent.get(b"authorization", [])
        if path == b"/healthz" or (
            len(authorizations) == 1 and bears_token(authorizations[0], self._token)
        ):
            return None
        return Answer(401, b"a bearer token is needed\n", headers={"WWW-Authenticate": "Bearer"})


async def _question(
    http: h11.Connection, reader: asyncio.StreamReader, most_bytes: int
) -> h11.Request | None:
    """The head of a request; None if they leave without one. A body is not read."""
    # Not h11's own limit: that lets pass what is complete, however long.
    while (event := http.next_event()) is h11.NEED_DATA:
        if most_bytes <= 0:
            raise h11.RemoteProtocolError("too long", error_status_hint=431)
        data = await reader.read(most_bytes)
        most_bytes -= len(data)
        http.receive_data(data)
    return event if isinstance(event, h11.Request) else None


async def _turn_away(writer: asyncio.StreamWriter) -> None:
    http = h11.Connection(h11.SERVER)
    writer.write(_sent(http, Answer(503, b"too many connections\n"), is_head=False))
    writer.close()
    await writer.wait_closed()


async def _part(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """
    Close, once they have the answer.

    To close with something unread would have the system throw away what is on its way to them.
    """
    if writer.can_write_eof():
        writer.write_eof()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_read_to_the_end(reader), PART_SECONDS)
    writer.close()
    await writer.wait_closed()


async def _read_to_the_end(reader: asyncio.StreamReader) -> None:
    while await reader.read(4096):
        pass


def _sent(http: h11.Connection, answer: Answer, *, is_head: bool) -> bytes:
    headers = {
        "Content-Type": answer.content_type,
        "Content-Length": str(len(answer.body)),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Date": formatdate(usegmt=True),
        "Connection": "close",
        **answer.headers,
    }
    events = [
        h11.Response(
            status_code=answer.status,
            headers=list(headers.items()),
            reason=HTTPStatus(answer.status).phrase.encode(),
        ),
        h11.Data(data=b"" if is_head else answer.body),
        h11.EndOfMessage(),
    ]
    return b"".join(http.send(event) or b"" for event in events)
