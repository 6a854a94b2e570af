"""Asks one node over HTTP how it is and what it has."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import httpx

from hydra_llm.ollama.catalogue import parse_ps, parse_show, parse_tags, parse_version
from hydra_llm.probes.local import LocalMemory, LocalReading
from hydra_llm.probes.memory import Evidence, bytes_held, vram_figures
from hydra_llm.types import Health, InstalledModel, LoadedModel, Node, Observation

__all__ = ["MAX_BODY_BYTES", "NodeProbe", "ShowCache"]

MAX_BODY_BYTES = 16 << 20
"""More than this is no answer to a probe, and is not read to its end."""

SHOW_RETRY_SECONDS = 60.0

CANNOT_BE_SENT = "its configured URL or headers cannot be sent"

_T = TypeVar("_T")


class ProbeError(Exception):
    """A probe that failed: what that makes of the node, and why, without any credential."""

    def __init__(self, health: Health, reason: str) -> None:
        super().__init__(reason)
        self.health: Health = health
        self.reason = reason


@dataclass(slots=True)
class _Entry:
    told: InstalledModel | None = None
    retry_at: float = float("-inf")


class ShowCache:
    """
    What ``/api/show`` said of each model, by digest: a model is the same on every node.

    A model that is being asked about, or that could not be, is left alone for a minute.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def claim(self, installed: Mapping[str, InstalledModel], now: float) -> InstalledModel | None:
        """A model to ask about next; nobody else is given it for now."""
        for model in installed.values():
            entry = self._entries.setdefault(model.digest, _Entry())
            if model.digest and entry.told is None and entry.retry_at <= now:
                entry.retry_at = now + SHOW_RETRY_SECONDS
                return model
        return None

    def put(self, model: InstalledModel) -> None:
        """Keep what was learned."""
        self._entries[model.digest] = _Entry(told=model)

    def completed(self, installed: Mapping[str, InstalledModel]) -> dict[str, InstalledModel]:
        """The models with all that is known of them."""
        return {name: self._completed(model) for name, model in installed.items()}

    def _completed(self, model: InstalledModel) -> InstalledModel:
        entry = self._entries.get(model.digest)
        if entry is None or entry.told is None:
            return model
        told = entry.told
        return replace(
            model,
            capabilities=told.capabilities or model.capabilities,
            context_length=told.context_length or model.context_length,
            kv_bytes_per_token=told.kv_bytes_per_token,
        )


class NodeProbe:
    """
    One node, asked again and again.

    Args:
        node: whom to ask.
        transport: connections; it follows no redirect and knows no proxy.
        shown: what ``/api/show`` told of models, on any node.
        local: this machine's memory, for a node that runs on it.
        timeout_seconds: for each answer.
        clock: of ``observed_at``.
    """

    def __init__(
        self,
        node: Node,
        transport: httpx.AsyncBaseTransport,
        *,
        shown: ShowCache,
        local: LocalMemory | None = None,
        timeout_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self.node = node
        self._transport = transport
        self._shown = shown
        self._local = local
        self._timeout = timeout_seconds
        self._clock = clock
        self._installed: Mapping[str, InstalledModel] = {}
        self._loaded: Mapping[str, LoadedModel] | None = None
        self._loaded_at: float | None = None
        self._most_loaded_bytes = 0
        self._last: Observation | None = None

    def __repr__(self) -> str:
        return f"<NodeProbe {self.node.id}>"

    # ----------------------------------------------------------------- a round

    async def probe(self) -> Observation:
        """
        Look at the node once; whatever is wrong with it is in the observation.

        ``observed_at`` is when the round began: what changed after that may not be in it.
        """
        began = self._clock()
        tags = asyncio.ensure_future(self._ask("GET", "/api/tags", parse_tags))
        version = asyncio.ensure_future(self._ask_if_it_tells("GET", "/api/version", parse_version))
        ps = asyncio.ensure_future(self._ask_if_it_tells("GET", "/api/ps", parse_ps))
        local = asyncio.ensure_future(self._read_local())
        asked: tuple[asyncio.Future[Any], ...] = (tags, version, ps, local)
        try:
            try:
                self._installed = await tags
            except ProbeError as trouble:
                return self._not_up(began, trouble)
            loaded, ps_trouble = await ps
            return self._up(began, (await version)[0], loaded, ps_trouble, await local)
        finally:
            for one in asked:
                one.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def learn(self) -> bool:
        """Ask about one model that nobody has told of yet; whether there may be another."""
        model = self._shown.claim(self._installed, self._clock())
        if model is None:
            return False
        shown, _ = await self._ask_if_it_tells(
            "POST", "/api/show", lambda data: parse_show(data, model), {"model": model.name}
        )
        if shown is not None:
            self._shown.put(shown)
        return shown is not None

    def with_what_was_learned(self) -> Observation | None:
        """The last observation, if :meth:`learn` has more to say about its models."""
        completed = self._shown.completed(self._installed)
        if self._last is None or completed == self._last.installed:
            return None
        self._last = replace(self._last, installed=completed)
        return self._last

    def _not_up(self, began: float, trouble: ProbeError) -> Observation:
        # Who comes back has empty runners, unless a probe says else.
        self._loaded = self._loaded_at = self._last = None
        return Observation(
            node_id=self.node.id,
            observed_at=began,
            health=trouble.health,
            health_reason=trouble.reason,
        )

    def _up(
        self,
        began: float,
        version: str | None,
        loaded: Mapping[str, LoadedModel] | None,
        ps_trouble: str,
        local: LocalReading,
    ) -> Observation:
        if loaded is not None:
            self._loaded, self._loaded_at = loaded, began
            held = bytes_held(loaded.values())
            self._most_loaded_bytes = max(self._most_loaded_bytes, held)
        figures = vram_figures(
            Evidence(
                node=self.node,
                devices=local.devices or (),
                loaded=self._loaded,
                loaded_at=self._loaded_at,
                most_loaded_bytes=self._most_loaded_bytes,
            )
        )
        self._last = Observation(
            node_id=self.node.id,
            observed_at=began,
            health="up",
            health_reason=ps_trouble,
            version=version,
            installed=self._shown.completed(self._installed),
            loaded=loaded,
            devices=local.devices,
            host=local.host,
            total_vram_bytes=figures.total_bytes,
            free_vram_bytes=figures.free_bytes,
            vram_source=figures.source,
            vram_observed_at=figures.observed_at,
        )
        return self._last

    async def _read_local(self) -> LocalReading:
        if self._local is None:
            return LocalReading()
        return await self._local.read(self._timeout)

    # ------------------------------------------------------------- one question

    async def _ask_if_it_tells(
        self,
        method: str,
        path: str,
        parse: Callable[[object], _T],
        body: Mapping[str, str] | None = None,
    ) -> tuple[_T | None, str]:
        """As :meth:`_ask`, of what a round can do without: the answer, or why there is none."""
        try:
            return await self._ask(method, path, parse, body), ""
        except ProbeError as trouble:
            return None, trouble.reason

    async def _ask(
        self,
        method: str,
        path: str,
        parse: Callable[[object], _T],
        body: Mapping[str, str] | None = None,
    ) -> _T:
        """
        One question and its answer, understood.

        Raises:
            ProbeError: nothing else.
        """
        try:
            text = await asyncio.wait_for(self._send(method, path, body), self._timeout)
        except (asyncio.TimeoutError, httpx.TimeoutException):
            raise ProbeError("down", f"{path} gave no answer in {self._timeout:g} s") from None
        except (httpx.TransportError, OSError) as error:
            raise _trouble_of(error) from error
        except (ValueError, httpx.InvalidURL) as error:
            # The text of the error may quote a header.
            raise ProbeError("misconfigured", CANNOT_BE_SENT) from error
        try:
            return parse(json.loads(text))
        except (ValueError, RecursionError):
            what = "a web page" if text.lstrip()[:1] == b"<" else "something"
            raise ProbeError(
                "misconfigured", f"{path} is {what} that no Ollama server sends"
            ) from None

    async def _send(self, method: str, path: str, body: Mapping[str, str] | None) -> bytes:
        headers = httpx.Headers({"Accept": "application/json", "User-Agent": "hydra-llm"})
        # A compressed body could be far larger than it looks.
        headers["Accept-Encoding"] = "identity"
        headers.update(self.node.headers)
        request = httpx.Request(
            method,
            self.node.url + path,
            headers=headers,
            json=body,
            extensions={"timeout": dict.fromkeys(("connect", "read", "write", "pool"))},
        )
        response = await self._transport.handle_async_request(request)
        try:
            _check_status(response.status_code, path)
            return await _body(response, path)
        finally:
            await response.aclose()


async def _body(response: httpx.Response, path: str) -> bytes:
    received = bytearray()
    async for part in response.aiter_raw():
        received += part
        if len(received) > MAX_BODY_BYTES:
            size = MAX_BODY_BYTES >> 20
            raise ProbeError("misconfigured", f"{path} is larger than {size} MiB: no Ollama server")
    return bytes(received)


def _check_status(status: int, path: str) -> None:
    if status == 200:
        return
    if status in (401, 403):
        raise ProbeError("misconfigured", f"refuses access ({status}); check Node(headers=...)")
    if 300 <= status < 400:
        raise ProbeError("misconfigured", f"redirects ({status}); configure the URL it leads to")
    if status in (408, 429) or status >= 500:
        raise ProbeError("down", f"{path} answers with status {status}")
    raise ProbeError("misconfigured", f"{path} answers with status {status}: no Ollama server")


# ------------------------------------------------------------------ what went wrong


def _trouble_of(error: Exception) -> ProbeError:
    """A failed connection in a phrase of ours: the error's own text may name anything."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and (why := _reason_of(cause)):
            return ProbeError("down", why)
    if isinstance(error, (httpx.LocalProtocolError, httpx.UnsupportedProtocol)):
        return ProbeError("misconfigured", CANNOT_BE_SENT)
    is_cut_off = "disconnected" in str(error) or "closed connection" in str(error)
    if isinstance(error, httpx.RemoteProtocolError) and not is_cut_off:
        return ProbeError("misconfigured", "what it sends is not HTTP")
    is_connected = not isinstance(error, httpx.ConnectError)
    return ProbeError("down", "the connection broke" if is_connected else "no connection")


def _reason_of(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        why = error.verify_message or "it cannot be verified"
        return f"its TLS certificate is not accepted: {why}"
    if isinstance(error, ssl.SSLError):
        return "the TLS handshake failed"
    if isinstance(error, socket.gaierror):
        return "its host name is unknown"
    return os.strerror(error.errno).lower() if error.errno in errno.errorcode else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what caused it, and what that was made of."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [one.__cause__, one.__context__]
        waiting += getattr(one, "exceptions", ())  # an ExceptionGroup, one for each address
