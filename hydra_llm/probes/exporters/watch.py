"""Fetches one node's exporter page, beside the rounds of probes at the node."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import httpx

from hydra_llm.probes.api import (
    ProbeError,
    TooLargeError,
    quiet_request,
    read_body,
    trouble_of,
)
from hydra_llm.probes.exporters.reading import ExporterReading, read_page
from hydra_llm.types import Device, HostMemory, Node

__all__ = ["Exported", "ExporterWatch"]

MAX_BODY_BYTES = 8 << 20

PATIENCE_SECONDS = 0.5
"""How long the end of a round waits for a page that was asked for at its beginning; it does
not wait where the last page took longer."""

KEPT_SECONDS = 30.0
"""How long a page serves after it was fetched, where no other follows it: as long as the
slowest exporter's own figures do."""

STALE_SECONDS = 60.0
"""A sample of this age is of an exporter that no longer reads anything."""

ACCEPT = "text/plain;version=0.0.4,text/plain;q=0.5,*/*;q=0.1"


class Exported(NamedTuple):
    """What a node's exporter tells, dated by our clock."""

    devices: tuple[Device, ...] = ()
    host: HostMemory | None = None
    trouble: str = ""
    """Why it tells nothing of any GPU's memory, or nothing new."""
    reasons: tuple[str, ...] = ()
    """All that is wrong with it, ``trouble`` included."""


NOTHING = Exported()


class ExporterWatch:
    """
    The exporter of one node. A page that does not come in time costs no round anything.

    ::

        watch.begin()
        ...                        # the node's own answers
        exported = await watch.latest()

    Args:
        node: with an ``exporter``; the headers for it go to it alone.
        transport: connections; it follows no redirect, keeps no cookie, knows no proxy.
        timeout_seconds: for a page.
        kept_seconds: how long one serves.
        clock: what devices are dated by.
        wall_clock: Unix time, for an exporter that says when it looked, but not what time it is.
    """

    def __init__(
        self,
        node: Node,
        transport: httpx.AsyncBaseTransport,
        *,
        timeout_seconds: float,
        kept_seconds: float = KEPT_SECONDS,
        clock: Callable[[], float],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._url = node.exporter or ""
        self._headers = node.exporter_headers
        self._transport = transport
        self._timeout = timeout_seconds
        self._kept = kept_seconds
        self._clock = clock
        self._wall_clock = wall_clock
        self._pending: asyncio.Future[None] | None = None
        self._is_slow = False
        self._last = NOTHING
        self._fetched_at = float("-inf")
        self._trouble = "it has not answered yet"

    def begin(self) -> None:
        """Ask for the page, unless it is being waited for."""
        if self._pending is None:
            self._pending = asyncio.ensure_future(self._fetch())

    async def latest(self) -> Exported:
        """What it told now, or else lately."""
        if self._pending is not None:
            patience = 0.0 if self._is_slow else PATIENCE_SECONDS
            done, _ = await asyncio.wait({self._pending}, timeout=patience)
            self._is_slow |= not done
        if self._clock() - self._fetched_at <= self._kept:
            if not self._trouble:
                return self._last
            return self._last._replace(
                trouble=self._trouble, reasons=(*self._last.reasons, self._trouble)
            )
        trouble = self._trouble or f"it has not answered for {self._kept:g} s"
        return Exported(trouble=trouble, reasons=(trouble,))

    @property
    def under_way(self) -> Iterable[asyncio.Future[Any]]:
        """What whoever ends it has to cancel."""
        return () if self._pending is None else (self._pending,)

    # ------------------------------------------------------------------ a page

    async def _fetch(self) -> None:
        began, now = self._clock(), asyncio.get_running_loop().time
        started = now()
        try:
            text, date = await asyncio.wait_for(self._page(), self._timeout)
        except (asyncio.TimeoutError, httpx.TimeoutException):
            self._trouble = f"it gave no answer in {self._timeout:g} s"
        except ProbeError as trouble:
            self._trouble = trouble.reason
        except Exception as error:
            self._trouble = trouble_of(error).reason
        else:
            await self._read(text, began, date)
        finally:
            self._is_slow = now() - started > PATIENCE_SECONDS
            self._pending = None

    async def _page(self) -> tuple[str, float | None]:
        request = quiet_request("GET", self._url, accept=ACCEPT, headers=self._headers)
        response = await self._transport.handle_async_request(request)
        try:
            _check_status(response.status_code)
            body = await read_body(response, MAX_BODY_BYTES)
        except TooLargeError as error:
            raise ProbeError("misconfigured", f"its page {error}") from None
        finally:
            await response.aclose()
        return body.decode(errors="replace"), _date_of(response.headers)

    async def _read(self, text: str, began: float, date: float | None) -> None:
        try:
            # In a thread: a page that means harm takes half a second.
            reading = await asyncio.get_running_loop().run_in_executor(None, read_page, text)
        except Exception as error:  # a fault of ours must not cost the node its round
            self._trouble = f"its page could not be read ({type(error).__name__})"
            return
        age, doubt = self._age_of(reading, date)
        if age > STALE_SECONDS:
            doubt = f"{reading.exporter} last read the GPUs {age:.0f} s ago"
            reading = replace(reading, devices=(), host=None)
        reasons = (*reading.reasons, doubt) if doubt else reading.reasons
        sampled_at = began - age
        host = reading.host
        self._fetched_at = began
        self._last = Exported(
            devices=tuple(replace(one, observed_at=sampled_at) for one in reading.devices),
            host=None if host is None else replace(host, observed_at=sampled_at),
            trouble="" if reading.has_memory else _why_without_memory(reading, reasons),
            reasons=reasons,
        )
        self._trouble = ""

    def _age_of(self, reading: ExporterReading, date: float | None) -> tuple[float, str]:
        """How old a page's figures were when it was asked for, and what is odd about that."""
        if reading.sampled_at is None:
            return reading.refresh_seconds, ""
        if date is not None:
            # Both by the exporter's machine; a clock that is put right may make it negative.
            return max(0.0, date - reading.sampled_at), ""
        age = self._wall_clock() - reading.sampled_at
        if abs(age) <= STALE_SECONDS:
            return max(0.0, age), ""
        return 0.0, "its clock is not ours, so how old its figures are cannot be said"


def _why_without_memory(reading: ExporterReading, reasons: tuple[str, ...]) -> str:
    why = "; ".join(reasons) or "its page names no GPU"
    return f"{reading.exporter}: {why}" if reading.exporter else why


def _check_status(status: int) -> None:
    if status == 200:
        return
    if status in (401, 403):
        why = f"it refuses access ({status}); check Node(exporter_headers=...)"
    elif 300 <= status < 400:
        why = f"it redirects ({status}); configure the URL it leads to"
    else:
        why = f"it answers with status {status}"
    raise ProbeError("misconfigured", why)


def _date_of(headers: httpx.Headers) -> float | None:
    """What the exporter's machine takes the time for."""
    with suppress(TypeError, ValueError, OverflowError):
        return parsedate_to_datetime(headers.get("Date", "")).timestamp()
    return None
