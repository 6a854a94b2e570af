"""Over real sockets: whatever a node sends, the next one answers, soon and in bounded memory."""

from __future__ import annotations

import asyncio
import gzip
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import repeat
from random import Random
from typing import Any

import pytest

from hydra_llm import AsyncClient, Client, Router
from hydra_llm.exceptions import HydraError, NodeError, NodeProtocolError, StreamBrokenError
from hydra_llm.testing import SimulatedCluster
from tests.fuzz.hostile import HEALTHY, MODEL, Bytes, Hostile, answer, begun, hostile
from tests.fuzz.spoiling import spoilt_bytes
from tests.router.conftest import make_nodes, make_router, preloaded

MESSAGES = [{"role": "user", "content": "Hello"}]
MOST_BYTES = 32 << 20
"""That a request may take on its way: a line that is too long and what is made of it."""
MOST_SECONDS = 8.0
LIMIT = 200_000
"""``max_body_bytes`` of the router here."""


def for_ever(head: bytes, part: bytes) -> Callable[[], Iterable[bytes]]:
    def said() -> Iterator[bytes]:
        yield head
        yield from repeat(part)

    return said


CHUNKED = begun(b"Transfer-Encoding: chunked")
WHOLE = b'{"message":{"role":"assistant","content":"hi"},"done":true}'
PART = b'{"message":{"role":"assistant","content":"hi"},"done":false}\n'
BOMB = gzip.compress(bytes(50_000_000))

BEFORE: dict[str, Bytes] = {
    "no status": b"\r\n\r\n",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "a status that is none": b"HTTP/1.1 2000 OK\r\n\r\n",
    "a status in words": b"HTTP/1.1 fine OK\r\n\r\n",
    "a status of no kind": b"HTTP/1.1 799 What\r\nContent-Length: 0\r\n\r\n",
    "switches protocols": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n" + PART,
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "HTTP 0.9": WHOLE,
    "HTTP 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "200 kB of one header": begun(b"X: " + b"x" * 200_000) + PART,
    "a million headers": begun(*[b"X: y"] * 1_000_000) + PART,
    "headers for ever": for_ever(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1000),
    "a header for ever": for_ever(b"HTTP/1.1 200 OK\r\nX: ", b"x" * 10_000),
    "a header without a name": begun(b": x") + PART,
    "a header of control bytes": begun(b"X: \x00\x01\x1b[2J") + PART,
    "two lengths": begun(b"Content-Length: 5", b"Content-Length: 6") + PART,
    "a length below zero": begun(b"Content-Length: -5") + PART,
    "a length that is none": begun(b"Content-Length: many") + PART,
    "a length of 30 digits": begun(b"Content-Length: " + b"9" * 30) + b"{",
    "longer than it says": begun(b"Content-Length: 5") + PART * 3,
    "shorter than it says": begun(b"Content-Length: 500") + b"{",
    "a chunk of 20 digits": CHUNKED + b"F" * 20 + b"\r\n{",
    "a chunk of 21 digits": CHUNKED + b"F" * 21 + b"\r\n{",
    "a chunk size that is none": CHUNKED + b"zz\r\n{\r\n",
    "a chunk below zero": CHUNKED + b"-5\r\nhello\r\n",
    "a chunk's extension for ever": for_ever(CHUNKED + b"5;", b"x" * 10_000),
    "trailers for ever": for_ever(CHUNKED + b"0\r\n", b"X: y\r\n" * 1000),
    "two encodings of transfer": begun(b"Transfer-Encoding: gzip, chunked") + PART,
    "a bomb": begun(b"Content-Encoding: gzip") + BOMB,
    "a bomb in a word": begun(b"Content-Encoding: br") + BOMB,
    "10,000 times 100": b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000 + b"HTTP/1.1 500 No\r\n\r\n",
    "10,000 times 103": b"HTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" * 10_000,
    "a web page": answer(b"<html>" * 1000, kind=b"text/html"),
    "a web page that says it is JSON": answer(b"<html>" * 1000),
    "a line for ever": for_ever(begun(), b"x" * 60_000),
    "an object for ever": for_ever(begun() + b'{"message":{"content":"', b"x" * 60_000),
    "empty lines for ever": for_ever(begun(), b"\n" * 60_000),
    "JSON that never ends": for_ever(begun(kind=b"application/json") + b"[", b"[" * 60_000),
    "an error for ever": for_ever(b"HTTP/1.1 500 No\r\n\r\n", b"x" * 60_000),
    "deep JSON": answer(b"[" * 100_000),
    "a long number": answer(b'{"done":true,"eval_count":' + b"9" * 100_000 + b"}"),
    "another kind of message": answer(b'{"message":"hi","done":true}'),
    "no answer": answer(b'{"version":"1"}'),
    "null": answer(b"null"),
    "a redirect": b"HTTP/1.1 307 Away\r\nLocation: http://127.0.0.1:9/\r\n\r\n",
    "a redirect to itself": b"HTTP/1.1 308 Away\r\nLocation: /api/chat\r\n\r\n",
}
"""What is no answer, so that the next node is asked."""


@contextmanager
def between(server: Hostile, cluster: SimulatedCluster) -> Iterator[Router]:
    """A router over both, with the hostile one in its books as the better."""
    nodes = [server.node(), cluster["good"].node()]
    limits = {"max_body_bytes": LIMIT, "whole_answer_timeout": 5.0, "first_byte_timeout": 5.0}
    with make_router(cluster, nodes=nodes, **limits) as router:
        yield router
        assert router.in_flight == 0


@pytest.fixture(scope="module")
def good() -> Iterator[SimulatedCluster]:
    with preloaded(make_nodes("good"), MODEL) as cluster:
        yield cluster


class Watch:
    """How long something took, and how much memory at most."""

    def __enter__(self) -> Watch:
        tracemalloc.start()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self.peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


def chat(router: Router, *, stream: bool, is_async: bool, **words: Any) -> Any:
    """The last part of an answer, which holds the decision."""
    if is_async:
        return asyncio.run(achat(router, stream=stream, **words))
    with Client(router=router) as client:
        told = client.chat(MODEL, MESSAGES, stream=stream, **words)
        return list(told)[-1] if stream else told


async def achat(router: Router, *, stream: bool, **words: Any) -> Any:
    async with AsyncClient(router=router) as client:
        told = await client.chat(MODEL, MESSAGES, stream=stream, **words)
        return [part async for part in told][-1] if stream else told


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("name", BEFORE)
def test_what_is_no_answer_costs_a_moment_and_the_next_node_answers(
    good: SimulatedCluster, name: str, is_async: bool
) -> None:
    stream = name not in ("a long number", "another kind of message")
    with hostile({"/api/chat": BEFORE[name]}) as server, between(server, good) as router:
        with Watch() as watch:
            told = chat(router, stream=stream, is_async=is_async, node_id="hostile")

    attempts = told.routing_decision.attempts
    assert [one.node_id for one in attempts] == ["hostile", "good"]
    assert attempts[0].outcome not in ("ok", "cancelled")
    assert len(attempts[0].error) < 300
    assert watch.peak < MOST_BYTES
    assert watch.seconds < MOST_SECONDS


AFTER: dict[str, Bytes] = {
    # More than is read at once: of what comes in one piece nothing is handed out, and so the
    # next node answers.
    "no JSON": begun() + PART * 3000 + b"no JSON\n",
    "another kind": begun() + PART + b'{"message":[],"done":false}\n',
    "cut JSON": begun() + PART + b'{"message":\n',
    "deep JSON": begun() + PART + b'{"message":' + b"[" * 100_000 + b"\n",
    "a line for ever": for_ever(begun() + PART, b"x" * 60_000),
    "empty lines for ever": for_ever(begun() + PART, b"\n" * 60_000),
    "an absurd chunk": CHUNKED + b"%x\r\n%s\r\nzz\r\n" % (len(PART), PART),
    "trailers for ever": for_ever(
        CHUNKED + b"%x\r\n%s\r\n0\r\n" % (len(PART), PART), b"X: y\r\n" * 1000
    ),
}
"""What breaks an answer off that has begun."""


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("name", AFTER)
def test_what_breaks_an_answer_off_is_one_typed_error(
    good: SimulatedCluster, name: str, is_async: bool
) -> None:
    with hostile({"/api/chat": AFTER[name]}) as server, between(server, good) as router:
        with Watch() as watch, pytest.raises(StreamBrokenError) as caught:
            chat(router, stream=True, is_async=is_async, node_id="hostile")

    # pydantic's and json's own errors show what they could not read.
    assert caught.value.__context__ is None or isinstance(caught.value.__context__, HydraError)
    assert caught.value.node_id == "hostile"
    assert watch.peak < MOST_BYTES
    assert watch.seconds < MOST_SECONDS


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_an_answer_that_is_none_is_in_no_error(good: SimulatedCluster, is_async: bool) -> None:
    odd = b'{"message":{"role":"assistant","content":{"the answer":"itself"}},"done":true}'
    with hostile({"/api/chat": answer(odd)}) as server, between(server, good) as router:
        with pytest.raises(NodeProtocolError, match="no answer of Ollama's") as caught:
            chat(router, stream=False, is_async=is_async, node_id="hostile")

    assert "itself" not in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "said",
    [
        for_ever(begun(kind=b"application/json") + b"[", b" " * 60_000),
        begun(b"Content-Encoding: gzip", kind=b"application/json") + BOMB,
        b"HTTP/1.1 307 Away\r\nLocation: http://hydra/api/chat\r\n\r\n",
        answer(b"[]"),
        answer(b'{"status":{}}'),
    ],
    ids=["for ever", "a bomb", "a redirect", "a list", "another kind"],
)
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_what_a_node_answers_about_itself_is_limited_too(
    good: SimulatedCluster, said: Bytes, is_async: bool
) -> None:
    async def pull(router: Router) -> None:
        async with AsyncClient(router=router) as client:
            await client.pull(MODEL, node_id="hostile")

    with hostile({"/api/pull": said}) as server, between(server, good) as router:
        with Watch() as watch, pytest.raises(NodeError):
            if is_async:
                asyncio.run(pull(router))
            else:
                with Client(router=router) as client:
                    client.pull(MODEL, node_id="hostile")

    assert "/api/chat" not in server.requests
    assert watch.peak < MOST_BYTES


ABOUT = {
    **{name: said for name, said in BEFORE.items() if name not in ("a long number",)},
    "a list for ever": for_ever(begun(kind=b"application/json") + b'{"models":[', b"{}," * 20_000),
}


@pytest.mark.parametrize("path", ["/api/tags", "/api/ps", "/api/version", "/api/show"])
def test_probes_are_not_held_up_by_what_a_node_says_of_itself(
    good: SimulatedCluster, path: str
) -> None:
    """One hostile node for each kind, all probed by one router beside the good one."""
    names = [name for name in ABOUT if path == "/api/tags" or "for ever" in name or "deep" in name]
    servers: list[Hostile] = []
    with _all(path, names, servers):
        nodes = [server.node(f"h{n}") for n, server in enumerate(servers)]
        with make_router(
            good, nodes=[*nodes, good["good"].node()], health_check_timeout=3.0
        ) as router:
            began = time.perf_counter()
            seen = {one.id: one for one in router.nodes()}
            answered = chat(router, stream=False, is_async=False, node_id="good")
            seconds = time.perf_counter() - began

    assert answered.node_id == "good"
    assert seen["good"].health == "up"
    assert seconds < MOST_SECONDS
    for one in seen.values():
        assert len(one.health_reason) < 300
        assert one.health_reason.isprintable()


@contextmanager
def _all(path: str, names: list[str], servers: list[Hostile]) -> Iterator[None]:
    if not names:
        yield
        return
    with hostile({path: ABOUT[names[0]]}) as server:
        servers.append(server)
        with _all(path, names[1:], servers):
            yield


@pytest.mark.parametrize("seed", range(12))
def test_spoilt_answers_of_all_kinds_end_in_an_answer_or_a_typed_error(
    good: SimulatedCluster, seed: int
) -> None:
    random = Random(seed)
    stream = seed % 2 == 0
    seeds = [answer(WHOLE), begun() + PART + WHOLE + b"\n", CHUNKED + b"5\r\nhello\r\n0\r\n\r\n"]
    said = {
        path: spoilt_bytes(random, random.choice(seeds) if path == "/api/chat" else whole)
        for path, whole in {**HEALTHY, "/api/chat": b""}.items()
        if isinstance(whole, bytes)
    }
    with hostile(said) as server, between(server, good) as router:
        for is_async in (False, True):
            try:
                told = chat(router, stream=stream, is_async=is_async, node_id="hostile")
            except HydraError as error:
                assert len(str(error)) < 500
            else:
                assert told.node_id in ("hostile", "good")
