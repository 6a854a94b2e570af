"""Answers on their way to the caller, part by part.

A routed stream owns its lease until it is closed. Sync and async stand beside each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import httpx

from hydra_llm.dispatch import Dispatch
from hydra_llm.exceptions import NodeError
from hydra_llm.ollama.answers import AnswerReader
from hydra_llm.ollama.errors import error_of_exception
from hydra_llm.replies import check_opening, check_part
from hydra_llm.types import Node


class RoutedStream(httpx.SyncByteStream):
    """An answer on its way to the caller; owns the lease until it is closed."""

    def __init__(self, dispatch: Dispatch, response: httpx.Response) -> None:
        self._dispatch = dispatch
        self._response = response
        assert isinstance(response.stream, httpx.SyncByteStream)
        self._source = iter(response.stream)
        self._reader = AnswerReader(dispatch.call.framing)
        self._held: list[bytes] = []
        dispatch.streams(self)

    def open(self) -> None:
        """Read on until the first part is whole; an error before that is not committed."""
        while not self._reader.parts:
            data = self._next()
            if data is None:
                self._reader.end()
                check_opening(self._dispatch, self._reader, ended=True)
                break
            self._reader.feed(data)
            self._held.append(data)
        check_opening(self._dispatch, self._reader, ended=False)
        self._dispatch.first_byte()

    def _next(self) -> bytes | None:
        try:
            return next(self._source, None)
        except httpx.HTTPError as exc:
            raise error_of_exception(self._dispatch.node, exc) from exc

    def __iter__(self) -> Iterator[bytes]:
        try:
            dispatch, reader = self._dispatch, self._reader
            received = dispatch.lease.renew_at(dispatch.clock)
            for data in self._held:
                if reader.is_complete:
                    dispatch.complete(reader.usage)
                yield data
            self._held.clear()
            while True:
                before = reader.parts
                try:
                    part = self._next()
                    if part is None:
                        reader.end()
                    else:
                        reader.feed(part)
                    if part is None or reader.error is not None or reader.is_too_long:
                        check_part(dispatch, reader, ended=part is None)
                except NodeError as error:
                    self._response.close()
                    raise dispatch.broken(error, before) from None
                if reader.is_complete:
                    dispatch.complete(reader.usage)
                if part is None:
                    return
                received()
                yield part
        except GeneratorExit:
            if not self._reader.is_complete:
                self.let_go()
            raise

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


class AsyncRoutedStream(httpx.AsyncByteStream):
    """As :class:`RoutedStream`, for an event loop."""

    def __init__(self, dispatch: Dispatch, response: httpx.Response) -> None:
        self._dispatch = dispatch
        self._response = response
        assert isinstance(response.stream, httpx.AsyncByteStream)
        self._source = response.stream.__aiter__()
        self._reader = AnswerReader(dispatch.call.framing)
        self._held: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        dispatch.streams(self)

    async def open(self) -> None:
        """Read on until the first part is whole; an error before that is not committed."""
        while not self._reader.parts:
            data = await self._next()
            if data is None:
                self._reader.end()
                check_opening(self._dispatch, self._reader, ended=True)
                break
            self._reader.feed(data)
            self._held.append(data)
        check_opening(self._dispatch, self._reader, ended=False)
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
            dispatch, reader = self._dispatch, self._reader
            received = dispatch.lease.renew_at(dispatch.clock)
            for data in self._held:
                if reader.is_complete:
                    dispatch.complete(reader.usage)
                yield data
            self._held.clear()
            while True:
                before = reader.parts
                try:
                    part = await self._next()
                    if part is None:
                        reader.end()
                    else:
                        reader.feed(part)
                    if part is None or reader.error is not None or reader.is_too_long:
                        check_part(dispatch, reader, ended=part is None)
                except NodeError as error:
                    await self._response.aclose()
                    raise dispatch.broken(error, before) from None
                if reader.is_complete:
                    dispatch.complete(reader.usage)
                if part is None:
                    return
                received()
                yield part
        except GeneratorExit:
            # An event loop closes generators that were dropped, and forgets them only later.
            if not self._reader.is_complete:
                self.let_go()
            raise

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
    """Bytes handed through; httpx's errors become ours."""

    def __init__(self, node: Node, response: httpx.Response) -> None:
        self._node = node
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        assert isinstance(self._response.stream, httpx.SyncByteStream)
        try:
            yield from self._response.stream
        except httpx.HTTPError as exc:
            raise error_of_exception(self._node, exc) from exc

    def close(self) -> None:
        """Let go of the node."""
        self._response.close()


class AsyncClosingStream(httpx.AsyncByteStream):
    """As :class:`ClosingStream`, for an event loop."""

    def __init__(self, node: Node, response: httpx.Response) -> None:
        self._node = node
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        assert isinstance(self._response.stream, httpx.AsyncByteStream)
        try:
            async for data in self._response.stream:
                yield data
        except httpx.HTTPError as exc:
            raise error_of_exception(self._node, exc) from exc

    async def aclose(self) -> None:
        """Let go of the node."""
        await self._response.aclose()
