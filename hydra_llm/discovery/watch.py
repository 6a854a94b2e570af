"""Searches in the background for a router, again and again.

::

    made ──start()──▶ searching ◀──▶ waiting ──stop()──▶ stopped
                          └──fork──▶ made, in the child

Stopped is final.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Awaitable, Callable

from hydra_llm.discovery.calling import Sleep
from hydra_llm.discovery.search import Search, SearchResult, search
from hydra_llm.probes.thread import Errands

__all__ = ["DiscoveryWatch"]

log = logging.getLogger("hydra_llm")

CANCEL_SECONDS = 0.2
"""Before Python 3.12, ``wait_for`` may swallow a cancellation (bpo-37658)."""


class DiscoveryWatch:
    """
    One thread with its event loop, which begins when it is told to.

    Args:
        plan: what to search now; None ends it.
        on_result: called with what a search has found, on that thread.
        interval_seconds: from the end of one search to the next.
        run: searches.
        sleep: as :func:`asyncio.sleep`.
    """

    def __init__(
        self,
        plan: Callable[[], Search | None],
        on_result: Callable[[SearchResult], object],
        *,
        interval_seconds: float,
        run: Callable[[Search], Awaitable[SearchResult]] = search,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._plan = plan
        self._on_result = on_result
        self._interval = interval_seconds
        self._run = run
        self._sleep = sleep
        # Reentrant: stop() is a finalizer and may come in anywhere.
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._rounds: asyncio.Task[None] | None = None
        self._is_stopped = False

    def __repr__(self) -> str:
        state = "stopped" if self._is_stopped else "running" if self._thread else "not started"
        return f"<DiscoveryWatch {state}>"

    def start(self) -> None:
        """Begin to search; done already, or stopped, it does nothing."""
        if self._process != os.getpid():
            # In a forked child: the thread is not here, its loop and sockets are the parent's.
            self._lock, self._process = threading.RLock(), os.getpid()
            self._thread = self._loop = self._rounds = None
        with self._lock:
            if self._thread is not None or self._is_stopped:
                return
            thread = threading.Thread(target=self._main, name="hydra-llm-discovery", daemon=True)
            thread.start()
            self._thread = thread

    def stop(self, timeout_seconds: float = 5.0) -> None:
        """End the search and the thread; waits for that unless called on it. Safe to call twice."""
        if self._process != os.getpid():
            return
        with self._lock:
            self._is_stopped = True
            thread, loop = self._thread, self._loop
            if loop is not None:
                loop.call_soon_threadsafe(self._cancel)
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_seconds)

    # ------------------------------------------------------------ on the thread

    def _main(self) -> None:
        loop = asyncio.new_event_loop()
        loop.set_default_executor(Errands())  # a resolver that hangs keeps nobody from ending
        with self._lock:
            if self._is_stopped:
                loop.close()
                return
            self._loop = loop
        try:
            loop.run_until_complete(self._work())
        except Exception:
            log.exception("the discovery thread failed")
        finally:
            with self._lock:
                self._loop = self._rounds = None
            loop.close()

    async def _work(self) -> None:
        self._rounds = asyncio.ensure_future(self._search_again_and_again())
        if self._is_stopped:
            self._rounds.cancel()
        await asyncio.wait({self._rounds})

    def _cancel(self) -> None:
        rounds = self._rounds
        if rounds is None or rounds.done():
            return
        rounds.cancel()
        asyncio.get_running_loop().call_later(CANCEL_SECONDS, self._cancel)

    async def _search_again_and_again(self) -> None:
        while True:
            try:
                plan = self._plan()
                if plan is None:
                    return
                self._on_result(await self._run(plan))
            except Exception:
                log.exception("a search for nodes failed")
            await self._sleep(self._interval)
