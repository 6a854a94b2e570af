"""Futures that one thread waits for and another one settles."""

from __future__ import annotations

import asyncio
import concurrent.futures
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

__all__ = ["settle", "settled", "wait_async", "wait_sync"]


def settle(future: Future[bool], value: bool) -> None:
    """Give it its result, unless it has one or nobody waits for it any more."""
    with suppress(InvalidStateError):
        future.set_result(value)


def settled(value: bool) -> Future[bool]:
    """One that is done."""
    future: Future[bool] = Future()
    future.set_result(value)
    return future


def wait_sync(futures: list[Future[bool]], timeout_seconds: float) -> bool:
    """Wait for all of them; whether each came out true in that time."""
    done, pending = concurrent.futures.wait(futures, timeout_seconds)
    for one in pending:
        one.cancel()
    return not pending and all(one.result() for one in done)


async def wait_async(futures: list[Future[bool]], timeout_seconds: float) -> bool:
    """As :func:`wait_sync`, without blocking the event loop."""
    if not futures:
        return True
    wrapped = [asyncio.wrap_future(one) for one in futures]
    try:
        done, pending = await asyncio.wait(wrapped, timeout=timeout_seconds)
    finally:
        for one in wrapped:
            one.cancel()
    return not pending and all(one.result() for one in done)
