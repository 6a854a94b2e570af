"""Answers on their way to the caller, part by part.

A routed stream owns its lease until it is closed. Sync and async stand beside each other.

::

    opened ──parts──▶ complete
       │ ▲
  broken │ once, if it is wanted and can be: the rest comes from another node
       ▼ │
    continued ──broken──▶ a typed error
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress

import httpx

from hydra_llm.dispatch import Dispatch
from hydra_llm.exceptions import NodeError, StreamBrokenError
from hydra_llm.ollama.answers import AnswerReader
from hydra_llm.ollama.continuation import NotContinued, Told
from hydra_llm.ollama.errors import error_of_exception
from hydra_llm.patience import Patience
from hydra_llm.replies import check_continuation, check_part, too_long
from hydra_llm.types import Node


class _Reading:
    """What both kinds of routed streams know of the answer they hand on."""

    def __init__(self, dispatch: Dispatch, response: httpx.Response, patience: Patience) -> None:
        self._dispatch = dispatch
        self._limit = dispatch.max_body_bytes
        self._told = Told() if dispatch.continues else None
        self._received = 0
        self._parts_before = 0
        """Of the node that began the answer, once another one goes on with it."""
        self._beginning = ""
        self._read(response, patience)

    def _read(self, response: httpx.Response, patience: Patience) -> None:
        self._response = response
        self._patience = patience
        self._reader = AnswerReader(self._dispatch.call.framing)
        self._held: list[bytes] = []

    def _take(self, data: bytes | None) -> None:
        """The next bytes, or the end. Raises NodeError for what is no good answer."""
        reader, before = self._reader, self._reader.parts
        if data is None:
            reader.end()
        else:
            reader.feed(data)
            self._received += len(data)
            if self._received > self._limit:
                raise too_long(self._dispatch.node, self._limit)
        if data is None or reader.is_bad:
            check_part(self._dispatch, reader, ended=data is None)
        if reader.parts > before:
            self._patience.begin(self._patience)

    def _open(self, data: bytes | None) -> bool:
        """As :meth:`_take`, before the first part; whether that is there, as a whole."""
        reader = self._reader
        if data is None:
            reader.end()
            check_part(self._dispatch, reader, ended=True)
            return True
        reader.feed(data)
        self._held.append(data)
        if not (reader.parts or reader.is_bad):
            return False
        check_part(self._dispatch, reader, ended=False)
        return True

    def _outgoing(self, data: bytes) -> bytes:
        """What of it the caller gets now: all, or whole lines if another node may go on."""
        if self._reader.is_complete:
            self._dispatch.complete(self._reader.usage)
        return data if self._told is None else self._told.whole(data)

    def _rest(self) -> bytes:
        """What is left at the end: a line that has no end."""
        return b"" if self._told is None else self._told.rest()

    def _interrupted(self, error: NodeError, parts: int) -> Told:
        """
        Prepare for another node to go on; gives what the caller has been told.

        Raises:
            StreamBrokenError: that is not wanted, or cannot be.
        """
        told, dispatch = self._told, self._dispatch
        # An answer that ended properly and is not complete is the model's own doing.
        if told is None or self._parts_before or isinstance(error, StreamBrokenError):
            raise dispatch.broken(error, self._parts_before + parts) from None
        told.forget_rest()
        self._parts_before = told.parts
        dispatch.to_be_continued(error, told.parts)
        return told

    def _opened_again(self) -> None:
        """The other node's first part is here, as a whole. Raises NotContinued."""
        held = b"".join(self._held)
        self._held = [check_continuation(self._dispatch, held, self._beginning)]
        self._dispatch.first_byte()

    def _not_continued(self, error: NodeError, why: Exception) -> StreamBrokenError:
        if isinstance(why, NodeError):
            self._dispatch.failed(why)
        return self._dispatch.not_continued(error, self._parts_before, str(why))


class RoutedStream(_Reading, httpx.SyncByteStream):
    """
    An answer on its way to the caller; owns the lease until it is closed.

    Args:
        dispatch: the request.
        response: the node's answer.
        patience: for its parts.
        resume: has another node go on, after the first has failed. Raises NotContinued, NodeError.
    """

    def __init__(
        self,
        dispatch: Dispatch,
        response: httpx.Response,
        patience: Patience,
        resume: Callable[[Told], tuple[httpx.Response, Patience, str]],
    ) -> None:
        super().__init__(dispatch, response, patience)
        self._resume = resume
        dispatch.streams(self)

    def _read(self, response: httpx.Response, patience: Patience) -> None:
        super()._read(response, patience)
        assert isinstance(response.stream, httpx.SyncByteStream)
        self._source = iter(response.stream)

    def open(self) -> None:
        """Read on until the first part is whole; an error before that is not committed."""
        while not self._open(self._next()):
            pass
        self._dispatch.first_byte()

    def _next(self) -> bytes | None:
        try:
            return next(self._source, None)
        except httpx.HTTPError as exc:
            raise error_of_exception(self._dispatch.node, exc) from exc

    def __iter__(self) -> Iterator[bytes]:
        try:
            while True:
                for data in self._held:
                    if whole := self._outgoing(data):
                        yield whole
                self._held.clear()
                received = self._dispatch.lease.renew_at(self._dispatch.clock)
                patience = self._patience
                patience.begin(patience)
                while True:
                    before = self._reader.parts
                    try:
                        part = self._next()
                        self._take(part)
                    except NodeError as error:
                        self._response.close()
                        told, failure = self._interrupted(error, before), error
                        break
                    whole = self._outgoing(part or b"")
                    if part is None:
                        if whole := self._rest():
                            yield whole
                        return
                    received()
                    if whole:
                        patience.pause()
                        yield whole
                        patience.go_on()
                self._continue(told, failure)
        except GeneratorExit:
            if not self._reader.is_complete:
                self.let_go()
            raise

    def _continue(self, told: Told, failure: NodeError) -> None:
        try:
            response, patience, self._beginning = self._resume(told)
            self._read(response, patience)
            try:
                while not self._open(self._next()):
                    pass
                self._opened_again()
            except BaseException:
                self._response.close()
                raise
        except (NotContinued, NodeError) as why:
            raise self._not_continued(failure, why) from None

    def close(self) -> None:
        """Let go of the node: the connection is kept if the answer was complete."""
        if self._reader.is_complete:
            self._dispatch.complete(self._reader.usage)
            # What is left is the end of the chunked body; unread it costs the connection.
            with suppress(httpx.HTTPError):
                next(self._source, None)
        else:
            self._dispatch.streams(None)  # it lets go of itself
            self._dispatch.cancelled()
        self._response.close()

    def let_go(self) -> None:
        """Nobody waits for it any more, says who sees that first; from any thread."""
        if not self._response.is_closed:
            self._dispatch.drop(self._response)

    def __del__(self) -> None:
        # Dropped without a word.
        self.let_go()


class AsyncRoutedStream(_Reading, httpx.AsyncByteStream):
    """As :class:`RoutedStream`, for an event loop."""

    def __init__(
        self,
        dispatch: Dispatch,
        response: httpx.Response,
        patience: Patience,
        resume: Callable[[Told], Awaitable[tuple[httpx.Response, Patience, str]]],
    ) -> None:
        super().__init__(dispatch, response, patience)
        self._resume = resume
        self._loop = asyncio.get_running_loop()
        dispatch.streams(self)

    def _read(self, response: httpx.Response, patience: Patience) -> None:
        super()._read(response, patience)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        self._source = response.stream.__aiter__()

    async def open(self) -> None:
        """Read on until the first part is whole; an error before that is not committed."""
        while not self._open(await self._next()):
            pass
        self._dispatch.first_byte()

    async def _next(self) -> bytes | None:
        try:
            return await self._source.__anext__()
        except StopAsyncIteration:
            return None
        except httpx.HTTPError as exc:
            raise error_of_exception(self._dispatch.node, exc) from exc

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while True:
                for data in self._held:
                    if whole := self._outgoing(data):
                        yield whole
                self._held.clear()
                received = self._dispatch.lease.renew_at(self._dispatch.clock)
                patience = self._patience
                patience.begin(patience)
                while True:
                    before = self._reader.parts
                    try:
                        part = await self._next()
                        self._take(part)
                    except NodeError as error:
                        await self._response.aclose()
                        told, failure = self._interrupted(error, before), error
                        break
                    whole = self._outgoing(part or b"")
                    if part is None:
                        if whole := self._rest():
                            yield whole
                        return
                    received()
                    if whole:
                        patience.pause()
                        yield whole
                        patience.go_on()
                await self._continue(told, failure)
        except GeneratorExit:
            # An event loop closes generators that were dropped, and forgets them only later.
            if not self._reader.is_complete:
                self.let_go()
            raise

    async def _continue(self, told: Told, failure: NodeError) -> None:
        try:
            response, patience, self._beginning = await self._resume(told)
            self._read(response, patience)
            try:
                while not self._open(await self._next()):
                    pass
                self._opened_again()
            except BaseException:
                await self._response.aclose()
                raise
        except (NotContinued, NodeError) as why:
            raise self._not_continued(failure, why) from None

    async def aclose(self) -> None:
        """Let go of the node: the connection is kept if the answer was complete."""
        if self._reader.is_complete:
            self._dispatch.complete(self._reader.usage)
            # What is left is the end of the chunked body; unread it costs the connection.
            with suppress(StopAsyncIteration, httpx.HTTPError):
                await self._source.__anext__()
        else:
            self._dispatch.streams(None)  # it lets go of itself
            self._dispatch.cancelled()
        await self._response.aclose()

    def let_go(self) -> None:
        """Nobody waits for it any more, says who sees that first; from any thread."""
        if not self._response.is_closed:
            self._dispatch.drop(self._response, self._loop)

    def __del__(self) -> None:
        # Dropped without a word, as LiteLLM does when a client leaves in the middle.
        self.let_go()


class ClosingStream(httpx.SyncByteStream):
    """Bytes handed through, up to a limit if there is one; httpx's errors become ours."""

    def __init__(self, node: Node, response: httpx.Response, limit: int | None = None) -> None:
        self._node = node
        self._response = response
        self._limit = limit
        self._count = 0

    def __iter__(self) -> Iterator[bytes]:
        assert isinstance(self._response.stream, httpx.SyncByteStream)
        try:
            for data in self._response.stream:
                self._count += len(data)
                if self._limit is not None and self._count > self._limit:
                    raise too_long(self._node, self._limit)
                yield data
        except httpx.HTTPError as exc:
            raise error_of_exception(self._node, exc) from exc

    def close(self) -> None:
        """Let go of the node."""
        self._response.close()


class AsyncClosingStream(httpx.AsyncByteStream):
    """As :class:`ClosingStream`, for an event loop."""

    def __init__(self, node: Node, response: httpx.Response, limit: int | None = None) -> None:
        self._node = node
        self._response = response
        self._limit = limit
        self._count = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        assert isinstance(self._response.stream, httpx.AsyncByteStream)
        try:
            async for data in self._response.stream:
                self._count += len(data)
                if self._limit is not None and self._count > self._limit:
                    raise too_long(self._node, self._limit)
                yield data
        except httpx.HTTPError as exc:
            raise error_of_exception(self._node, exc) from exc

    async def aclose(self) -> None:
        """Let go of the node."""
        await self._response.aclose()
