"""
Recordings of a real Ollama as vcrpy cassettes, and their replay below the doors.

::

    with replayed(Tape("0.32.15", "chat-stream"), folder=tmp_path) as router:
        Client(router=router).chat(...)

A cassette is built from `tests/recordings` when a test wants it, as YAML in the test's own folder.
Requests are matched on method, path and body; a request that is not in it raises, and so does,
in the end, an answer that nobody asked for. The node's name exists nowhere: whatever would get
past vcrpy could reach nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import vcr
import yaml

from hydra_llm import HydraSettings, Node, Router

RECORDINGS = Path(__file__).parents[1] / "recordings"
VERSIONS = ("0.24.0", "0.32.15")
NODE = Node("http://recorded.invalid:11434", id="recorded")

END_HEADER = "x-recorded-end"
"""How the recorded answer's body ended, where that was not as it should; taken off in replay."""
_CUT = "connection closed by the peer without the terminal chunk"
_SILENT = "connection closed before any response"


@dataclass(frozen=True)
class Recording:
    """One file: what a real server of that version was asked, and what it answered."""

    version: str
    name: str

    @cached_property
    def _file(self) -> dict[str, Any]:
        path = RECORDINGS / f"v{self.version}-{self.name}.json"
        file: dict[str, Any] = json.loads(path.read_text("utf-8"))
        assert file["ollama_version"] == self.version
        return file

    @property
    def method(self) -> str:
        return str(self._file["request"]["method"])

    @property
    def path(self) -> str:
        return str(self._file["request"]["path"])

    @property
    def asked(self) -> Any:
        """The request's JSON."""
        return self._file["request"]["body"]

    @property
    def status(self) -> int:
        return int(self._file["response"].get("status", 0))

    @property
    def document(self) -> Any:
        """The answer's JSON, where it came in one piece."""
        return self._file["response"]["body"]

    @property
    def lines(self) -> list[str]:
        return [chunk["line"] for chunk in self._file["response"].get("chunks", [])]

    @property
    def content(self) -> str:
        """The answer's body; event streams get back the blank lines that recordings leave out."""
        if "chunks" in self._file["response"]:
            end = "\n\n" if self.path.startswith("/v1") else "\n"
            return "".join(line + end for line in self.lines)
        body = self._file["response"].get("body", "")
        return body if isinstance(body, str) else _compact(body)

    @property
    def text(self) -> str:
        """What a stream's caller reads until it ends."""
        parts = [json.loads(line) for line in self.lines]
        return "".join(p.get("response", "") or p.get("message", {}).get("content", "")
                       for p in parts)  # fmt: skip

    def interaction(self) -> dict[str, Any]:
        """As vcrpy keeps it."""
        response = self._file["response"]
        headers = {name: [value] for name, value in response.get("headers", {}).items()}
        if response["body_end"] in (_CUT, _SILENT):
            headers[END_HEADER] = [response["body_end"]]
        return {
            "request": {
                "method": self.method,
                "uri": NODE.url + self.path,
                "headers": {},
                "body": "" if self.asked is None else _compact(self.asked),
            },
            "response": {
                "status": {"code": self.status, "message": response.get("reason", "")},
                "headers": headers,
                "body": {"string": self.content},
            },
        }


def _compact(document: Any) -> str:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True)
class Tape:
    """
    What a cassette is made of.

    Args:
        version: of the Ollama that was recorded.
        name: the recording that a test is about; ``""`` for none.
        ps: what the node says is loaded.
        deleted: models that were still there when the node was last looked at.
    """

    version: str
    name: str = ""
    ps: str = "ps-idle"
    deleted: tuple[str, ...] = ()

    def write(self, folder: Path) -> Path:
        """Make the file, readable by eye."""
        names = ["tags", "version", self.ps, *([self.name] if self.name else [])]
        tapes = [_as_yaml(Recording(self.version, name)) for name in names]
        if self.deleted:
            tapes[0] = _as_yaml(Recording(self.version, "tags"), self.deleted)
        path = folder / f"v{self.version}-{self.name or self.ps}.yaml"
        head = f"# Ollama {self.version}: {', '.join(names)}\n"
        path.write_text(f"{head}version: 1\ninteractions:\n{''.join(tapes)}")
        return path


class _Dumper(yaml.SafeDumper):
    """Streams line by line."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


@cache
def _as_yaml(recording: Recording, listed: tuple[str, ...] = ()) -> str:
    """One interaction; ``listed`` are models to add to a list of them."""
    interaction = recording.interaction()
    if listed:
        models = recording.document["models"]
        models = [*models, *({**models[0], "name": f"{name}:latest"} for name in listed)]
        interaction["response"]["body"]["string"] = _compact({"models": models})
    dumped: str = yaml.dump([interaction], Dumper=_Dumper, width=100, allow_unicode=True)
    return dumped


# -------------------------------------------------------------------------- matching


def same_to_ollama(one: Any, other: Any) -> None:
    """vcrpy's matcher for bodies: equal JSON, where a default said aloud is one unsaid."""
    assert asked(one) == asked(other)


def asked(request: Any) -> Any:
    """What a request's body says, as Ollama reads it."""
    body = request.body or b""
    if not body:
        return None
    try:
        document = json.loads(body)
    except ValueError:
        return body
    if not isinstance(document, Mapping) or not request.path.startswith("/api/"):
        return document
    said = {k: v for k, v in document.items() if k in ("think", "stream") or not _is_unsaid(v)}
    if request.path in ("/api/chat", "/api/generate"):
        said.setdefault("stream", True)
    if said.get("think") is None:
        said.pop("think", None)
    return said


def _is_unsaid(value: Any) -> bool:
    """Not so 0: as ``keep_alive`` it says a lot."""
    return value is None or value is False or value in ("", [], {})


# ---------------------------------------------------------------------------- replay


class _Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A recorded body as it came: line by line, and broken off where it was."""

    def __init__(self, content: bytes, end: str | None) -> None:
        self._pieces = content.splitlines(keepends=True)
        self._end = end

    def __iter__(self) -> Iterator[bytes]:
        yield from self._pieces
        if self._end == _CUT:
            raise httpx.RemoteProtocolError("peer closed connection (incomplete chunked read)")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece


def _as_it_came(response: httpx.Response) -> httpx.Response:
    """vcrpy plays a body in one piece and to its end; Ollama sends each line as one chunk."""
    end = response.headers.pop(END_HEADER, None)
    if end == _SILENT:
        raise httpx.RemoteProtocolError("Server disconnected without sending a response.")
    assert isinstance(response.stream, httpx.ByteStream)
    response.stream = _Body(b"".join(response.stream), end)
    return response


@contextmanager
def _line_by_line() -> Iterator[None]:
    """Around what vcrpy has put in the place of httpx's transports; the collector looks once."""
    played = httpx.HTTPTransport.handle_request
    aplayed = httpx.AsyncHTTPTransport.handle_async_request
    looked: set[str] = set()

    def handle(self: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        return _as_it_came(played(self, request))

    async def ahandle(self: httpx.AsyncHTTPTransport, request: httpx.Request) -> httpx.Response:
        if request.headers["user-agent"] == "hydra-llm":
            if request.url.path in looked or request.method != "GET":
                await asyncio.Event().wait()  # until the router closes
            looked.add(request.url.path)
        return _as_it_came(await aplayed(self, request))

    with (
        mock.patch.object(httpx.HTTPTransport, "handle_request", handle),
        mock.patch.object(httpx.AsyncHTTPTransport, "handle_async_request", ahandle),
    ):
        yield


@contextmanager
def replayed(tape: Tape, *, folder: Path) -> Iterator[Router]:
    """
    A router over one recorded node.

    Its collector looks once, at what is on the tape; beyond that (``/api/show``, and a second
    look after an error) nobody answers it.
    """
    recorder = vcr.VCR(record_mode=vcr.mode.NONE, match_on=["method", "path", "asked"])
    recorder.register_matcher("asked", same_to_ollama)
    settings = HydraSettings(
        nodes=[NODE], health_check_interval=3600, vram_monitoring=False, verify=False
    )
    path = str(tape.write(folder))
    played = recorder.use_cassette(path, allow_playback_repeats=False)
    with played as cassette, _line_by_line():
        with Router(settings=settings) as router:
            router.nodes()
            yield router
            assert (router.in_flight, router.waiting) == (0, 0)
        unplayed = [
            f"{request.method} {request.path}"
            for index, request in enumerate(cassette.requests)
            if not cassette.play_counts[index]
        ]
        assert not unplayed, f"nobody asked for {', '.join(unplayed)}"
        assert cassette.all_played
