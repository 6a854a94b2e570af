"""However a call ends, nothing of it is left: no lease, no place in line, no connection.

What is left of files, threads and tasks is seen by `tests/leaks.py` around each test.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ClassVar

import httpx
import pytest

from hydra_llm import (
    AllNodesFailedError,
    AsyncClient,
    AsyncHydraTransport,
    Client,
    DeadlineError,
    HydraTransport,
    NodeError,
    Router,
    StreamBrokenError,
)
from hydra_llm.dispatch import Dispatch
from hydra_llm.pools import Pools
from hydra_llm.testing import (
    HangFault,
    SimulatedCluster,
    StallFault,
    StatusFault,
)
from tests.router.conftest import MODEL, make_nodes, make_router, preloaded

MESSAGES = [{"role": "user", "content": "Tell me about lighthouses."}]
ENDLESS: dict[str, Any] = {"num_predict": -1}
SHORT: dict[str, Any] = {"num_predict": 8}
PROMPTLY_SECONDS = 0.1


@pytest.fixture
def cluster() -> Iterator[SimulatedCluster]:
    """Two nodes that never come to an end by themselves, and never unload their model."""
    nodes = make_nodes("a", "b", keep_alive_s=1e9, token_output=10_000, speed=20.0)
    with SimulatedCluster(nodes) as cluster:
        for node in cluster:
            node.preload(MODEL)
        yield cluster


@pytest.fixture
def router(cluster: SimulatedCluster) -> Iterator[Router]:
    with make_router(cluster, verify=False) as router:
        router.nodes()
        yield router
        assert_idle(router)


def assert_idle(router: Router) -> None:
    """The books are balanced: nothing is under way, and nothing is thought to be."""
    assert (router.in_flight, router.waiting) == (0, 0)
    assert [len(node.running) for node in router.nodes()] == [0] * len(router.nodes())


def until(condition: Callable[[], object]) -> float:
    """Wait for something elsewhere; how long it took. pytest-timeout is the limit."""
    began = time.monotonic()
    while not condition():
        time.sleep(0.001)
    return time.monotonic() - began


async def auntil(condition: Callable[[], object]) -> float:
    began = time.monotonic()
    while not condition():
        await asyncio.sleep(0.001)
    return time.monotonic() - began


def chats(cluster: SimulatedCluster) -> list[Any]:
    return [r for node in cluster for r in node.requests if r.path.startswith(("/api/chat", "/v1"))]


def assert_the_nodes_are_free_promptly(cluster: SimulatedCluster) -> None:
    """A node notices that its client has left: it is not left working for nobody."""
    assert until(lambda: not any(node.in_flight for node in cluster)) < PROMPTLY_SECONDS + 0.4
    assert chats(cluster)
    assert all(record.outcome != "open" for record in chats(cluster))


# -------------------------------------------------------------------------- streams


def leave_by_break(stream: Any) -> None:
    for _ in stream:
        break
    stream.close()


def leave_by_close(stream: Any) -> None:
    next(stream)
    stream.close()


def leave_unread(stream: Any) -> None:
    stream.close()


def leave_by_error(stream: Any) -> None:
    with pytest.raises(LookupError):
        for _ in stream:
            raise LookupError("of the caller's own")
    stream.close()


def leave_at_the_end(stream: Any) -> None:
    list(stream)


LEAVING = [leave_by_break, leave_by_close, leave_unread, leave_by_error]


@pytest.mark.parametrize("leave", LEAVING)
def test_a_stream_left_early_leaves_nothing(
    cluster: SimulatedCluster, router: Router, leave: Callable[[Any], None]
) -> None:
    with Client(router=router) as client:
        leave(client.chat(MODEL, MESSAGES, stream=True, options=ENDLESS))

        assert_idle(router)
        if leave is not leave_unread:  # it was never sent
            assert_the_nodes_are_free_promptly(cluster)


def test_a_stream_read_to_its_end_leaves_nothing_and_keeps_its_connection(
    cluster: SimulatedCluster, router: Router
) -> None:
    with Client(router=router, node_id="a") as client:
        for _ in range(3):
            leave_at_the_end(client.chat(MODEL, MESSAGES, stream=True, options=SHORT))
            assert_idle(router)

    pool: Any = router._pools.sync()
    assert len(pool._pool.connections) == 1


def test_a_stream_that_is_left_at_its_last_part_keeps_its_connection(router: Router) -> None:
    with Client(router=router, node_id="a") as client:
        for _ in range(3):
            stream = client.chat(MODEL, MESSAGES, stream=True, options={"num_predict": 5})
            while not next(stream).done:
                pass
            stream.close()
            assert_idle(router)

    pool: Any = router._pools.sync()
    assert len(pool._pool.connections) == 1


def test_a_forgotten_stream_is_given_back_by_the_garbage_collector(
    cluster: SimulatedCluster, router: Router
) -> None:
    with Client(router=router) as client:
        stream = client.chat(MODEL, MESSAGES, stream=True, options=ENDLESS)
        next(stream)
        assert router.in_flight == 1
        del stream
        gc.collect()

        assert_idle(router)
        assert_the_nodes_are_free_promptly(cluster)


def test_a_client_closed_with_a_stream_open_breaks_it_off(cluster: SimulatedCluster) -> None:
    client = Client(cluster.nodes())
    router = client.router
    stream = client.chat(MODEL, MESSAGES, stream=True, options=ENDLESS)
    next(stream)
    client.close()

    with pytest.raises((StreamBrokenError, StopIteration)):
        while True:
            next(stream)
    assert (router.in_flight, router.waiting) == (0, 0)
    assert_the_nodes_are_free_promptly(cluster)


async def test_an_async_client_closed_with_a_stream_open_breaks_it_off(
    cluster: SimulatedCluster,
) -> None:
    client = AsyncClient(cluster.nodes())
    router = client.router
    stream = await client.chat(MODEL, MESSAGES, stream=True, options=ENDLESS)
    await stream.__anext__()
    await client.close()

    with pytest.raises((StreamBrokenError, StopAsyncIteration)):
        while True:
            await stream.__anext__()
    assert (router.in_flight, router.waiting) == (0, 0)
    assert_the_nodes_are_free_promptly(cluster)


async def aleave_by_break(stream: AsyncIterator[Any]) -> None:
    async for _ in stream:
        break
    await stream.aclose()  # type: ignore[attr-defined]  # a generator


async def aleave_by_error(stream: AsyncIterator[Any]) -> None:
    with pytest.raises(LookupError):
        async for _ in stream:
            raise LookupError("of the caller's own")
    await stream.aclose()  # type: ignore[attr-defined]


async def aleave_by_forgetting(stream: AsyncIterator[Any]) -> None:
    await stream.__anext__()
    del stream


async def aleave_unread(stream: AsyncIterator[Any]) -> None:
    await stream.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "leave", [aleave_by_break, aleave_by_error, aleave_by_forgetting, aleave_unread]
)
async def test_an_async_stream_left_early_leaves_nothing(
    cluster: SimulatedCluster, router: Router, leave: Callable[[Any], Any]
) -> None:
    async with AsyncClient(router=router) as client:
        await leave(await client.chat(MODEL, MESSAGES, stream=True, options=ENDLESS))
        gc.collect()

        assert await auntil(lambda: router.in_flight == 0) < PROMPTLY_SECONDS + 0.4
        if leave is not aleave_unread:
            await auntil(lambda: not any(node.in_flight for node in cluster))
    await router.aclose()


def test_a_transports_stream_left_early_leaves_nothing(
    cluster: SimulatedCluster, router: Router
) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "stream": True}
    with httpx.Client(transport=HydraTransport(router=router)) as client:
        with client.stream("POST", "http://hydra/v1/chat/completions", json=body) as answer:
            next(answer.iter_raw())
            assert router.in_flight == 1
        assert_idle(router)
        with client.stream("POST", "http://hydra/v1/chat/completions", json=body):
            pass  # not a byte of it read
        assert_idle(router)
        assert_the_nodes_are_free_promptly(cluster)


async def test_an_async_transports_stream_left_early_leaves_nothing(
    cluster: SimulatedCluster, router: Router
) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "stream": True}
    async with httpx.AsyncClient(transport=AsyncHydraTransport(router=router)) as client:
        for reads in (True, False):
            async with client.stream(
                "POST", "http://hydra/v1/chat/completions", json=body
            ) as answer:
                if reads:
                    await answer.aiter_raw().__anext__()
                assert router.in_flight == 1
            assert_idle(router)
    await router.aclose()


# --------------------------------------------------------------------- cancellation


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_call_cancelled_before_the_first_byte_leaves_nothing(
    cluster: SimulatedCluster, router: Router, stream: bool
) -> None:
    for node in cluster:
        node.inject(HangFault())
    async with AsyncClient(router=router) as client:
        task = asyncio.create_task(first_of(client, stream))
        await auntil(lambda: chats(cluster))
        assert router.in_flight == 1

        await cancel(task)
        assert_idle(router)
        took = await auntil(lambda: all(r.outcome == "client left" for r in chats(cluster)))
        assert took < PROMPTLY_SECONDS + 0.4
    await router.aclose()


async def first_of(client: AsyncClient, stream: bool) -> Any:
    answer = await client.chat(MODEL, MESSAGES, stream=stream, options=ENDLESS)
    return await answer.__anext__() if stream else answer


async def test_a_call_cancelled_in_mid_stream_leaves_nothing(
    cluster: SimulatedCluster, router: Router
) -> None:
    parts = 0

    async def read() -> None:
        nonlocal parts
        async for _ in await client.chat(MODEL, MESSAGES, stream=True, options=ENDLESS):
            parts += 1

    async with AsyncClient(router=router) as client:
        task = asyncio.create_task(read())
        await auntil(lambda: parts > 3)
        await cancel(task)

        assert await auntil(lambda: router.in_flight == 0) < PROMPTLY_SECONDS + 0.4
        await auntil(lambda: not any(node.in_flight for node in cluster))
    await router.aclose()


@pytest.mark.parametrize("delay_steps", range(0, 40, 3))
async def test_a_call_cancelled_at_any_step_leaves_nothing(
    router: Router, delay_steps: int
) -> None:
    async with AsyncClient(router=router) as client:
        for stream in (False, True):
            task = asyncio.create_task(read_all(client, stream))
            for _ in range(delay_steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert_idle(router)
    await router.aclose()


async def read_all(client: AsyncClient, stream: bool) -> None:
    answer = await client.chat(MODEL, MESSAGES, stream=stream, options={"num_predict": 3})
    if stream:
        async for _ in answer:
            pass


async def test_a_request_cancelled_in_the_line_gives_up_its_place() -> None:
    with SimulatedCluster(make_nodes("a", keep_alive_s=1e9)) as cluster:
        cluster["a"].preload(MODEL)
        async with (
            make_router(cluster, verify=False) as router,
            AsyncClient(router=router) as client,
        ):
            cluster["a"].inject(HangFault())
            running = [asyncio.create_task(client.chat(MODEL, MESSAGES)) for _ in range(4)]
            await auntil(lambda: router.waiting == 2 and len(chats(cluster)) == 2)
            waiting = running[2:]

            await cancel(waiting[0])
            assert router.waiting == 1
            await cancel(waiting[1])
            assert (router.waiting, router.in_flight) == (0, 2)
            for task in running[:2]:
                await cancel(task)
            assert_idle(router)
            assert len(chats(cluster)) == 2


# ------------------------------------------------------------------------ interrupts


@contextmanager
def interrupted_when(condition: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C for the main thread, once something is so."""

    def interrupt() -> None:
        until(condition)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        yield
    thread.join()


INTERRUPTS = pytest.mark.skipif(
    not hasattr(signal, "pthread_kill"), reason="signals come to threads on POSIX only"
)


@INTERRUPTS
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_interrupted_call_leaves_nothing(
    cluster: SimulatedCluster, router: Router, stream: bool
) -> None:
    for node in cluster:
        node.inject(HangFault())
    with Client(router=router) as client:
        with interrupted_when(lambda: chats(cluster)):
            answer = client.chat(MODEL, MESSAGES, stream=stream)
            next(answer)

        assert_idle(router)
        assert_the_nodes_are_free_promptly(cluster)


@INTERRUPTS
def test_a_request_interrupted_in_the_line_gives_up_its_place(
    cluster: SimulatedCluster, router: Router
) -> None:
    for node in cluster:
        node.inject(HangFault())
    with Client(router=router) as client, ThreadPoolExecutor(4) as workers:
        jobs = [workers.submit(client.chat, MODEL, MESSAGES) for _ in range(4)]
        try:
            until(lambda: len(chats(cluster)) == 4)
            with interrupted_when(lambda: router.waiting == 1):
                client.chat(MODEL, MESSAGES)
            assert (router.in_flight, router.waiting) == (4, 0)
        finally:  # or a failure would wait for jobs that never end
            for node in cluster:
                node.kill()
        for job in jobs:
            assert isinstance(job.exception(), ConnectionError)


# -------------------------------------------------------------------------- timeouts


def test_a_call_that_times_out_leaves_nothing(cluster: SimulatedCluster, router: Router) -> None:
    for node in cluster:
        node.inject(HangFault())
    with Client(router=router, timeout=0.1) as client:
        with pytest.raises(AllNodesFailedError) as caught:
            client.chat(MODEL, MESSAGES)

    assert [a.outcome for a in caught.value.attempts] == ["timeout"] * 2
    assert_idle(router)
    assert_the_nodes_are_free_promptly(cluster)


def test_a_stream_that_falls_silent_is_given_up(cluster: SimulatedCluster, router: Router) -> None:
    for node in cluster:
        node.inject(StallFault(after=2))
    with Client(router=router, timeout=0.2) as client:
        with pytest.raises(StreamBrokenError, match="silent"):
            list(client.chat(MODEL, MESSAGES, stream=True))

    assert_idle(router)
    assert_the_nodes_are_free_promptly(cluster)


def test_a_deadline_that_passes_leaves_nothing(cluster: SimulatedCluster, router: Router) -> None:
    for node in cluster:
        node.inject(HangFault())
    began = time.monotonic()
    with Client(router=router) as client:
        with pytest.raises((DeadlineError, AllNodesFailedError)):
            client.chat(MODEL, MESSAGES, deadline_s=0.3, options={"num_predict": 1})

    assert time.monotonic() - began < 5.0
    assert_idle(router)
    assert_the_nodes_are_free_promptly(cluster)


@pytest.mark.parametrize("door", ["sync", "async"])
def test_a_deadline_that_passes_in_the_line_gives_up_the_place(door: str) -> None:
    async def wait_in_line(router: Router) -> None:
        await AsyncClient(router=router).chat(
            MODEL, MESSAGES, deadline_s=0.3, options={"num_predict": 1}
        )

    with (
        SimulatedCluster(make_nodes("a", keep_alive_s=1e9)) as cluster,
        ThreadPoolExecutor(2) as workers,
    ):
        cluster["a"].preload(MODEL)
        with make_router(cluster, verify=False) as router, Client(router=router) as client:
            cluster["a"].inject(HangFault(times=2))
            options = {"num_predict": 1}
            jobs = [workers.submit(client.chat, MODEL, MESSAGES, options=options) for _ in range(2)]
            until(lambda: router.in_flight == 2)
            with pytest.raises(DeadlineError):
                if door == "sync":
                    client.chat(MODEL, MESSAGES, deadline_s=0.3, options=options)
                else:
                    asyncio.run(wait_in_line(router))
            assert (router.waiting, router.in_flight) == (0, 2)
            cluster["a"].kill()
            for job in jobs:
                with pytest.raises((AllNodesFailedError, NodeError)):
                    job.result()
            assert_idle(router)


# --------------------------------------------------------------------- event loops


def test_an_event_loop_that_ends_with_a_stream_open_leaves_nothing(
    cluster: SimulatedCluster, router: Router
) -> None:
    kept: list[Any] = []

    async def leave_it_open() -> None:
        client = AsyncClient(router=router)
        stream = await client.chat(MODEL, MESSAGES, stream=True, options=ENDLESS)
        await stream.__anext__()
        kept.append(stream)  # so that no garbage collector closes it

    for _ in range(2):
        asyncio.run(leave_it_open())
        assert until(lambda: router.in_flight == 0) < PROMPTLY_SECONDS + 0.4
        assert_the_nodes_are_free_promptly(cluster)
    assert_idle(router)


def test_an_event_loop_that_ends_with_calls_under_way_leaves_nothing(
    cluster: SimulatedCluster, router: Router
) -> None:
    for node in cluster:
        node.inject(HangFault())

    async def start_and_leave() -> None:
        client = AsyncClient(router=router)
        tasks = [asyncio.create_task(client.chat(MODEL, MESSAGES)) for _ in range(6)]
        await auntil(lambda: len(chats(cluster)) == 4)
        assert (router.in_flight, router.waiting) == (4, 2)
        assert len(tasks) == 6

    asyncio.run(start_and_leave())
    assert_idle(router)
    assert_the_nodes_are_free_promptly(cluster)


def test_each_event_loop_has_a_pool_of_its_own_and_takes_it_along(router: Router) -> None:
    seen: list[Any] = []

    async def ask() -> None:
        answer = await AsyncClient(router=router).chat(MODEL, MESSAGES, options=SHORT)
        assert answer.done
        seen.append(await router._pools.of_this_loop())
        assert await router._pools.of_this_loop() is seen[-1]
        assert len(router._pools._async) == 1

    for _ in range(3):
        asyncio.run(ask())
        assert not router._pools._async
    assert len(set(map(id, seen))) == 3


def test_a_loop_closed_without_goodbye_is_let_go_of(router: Router) -> None:
    for _ in range(3):
        loop = asyncio.new_event_loop()
        pool: Any = loop.run_until_complete(router._pools.of_this_loop())
        loop.run_until_complete(pool.aclose())
        loop.close()

    assert len(router._pools._async) == 1
    asyncio.run(AsyncClient(router=router).chat(MODEL, MESSAGES, options=SHORT))
    assert not router._pools._async


def test_threads_that_leave_their_streams_leave_nothing(
    cluster: SimulatedCluster, router: Router
) -> None:
    def ask(number: int) -> None:
        stream = client.chat(MODEL, MESSAGES, stream=True, options={"num_predict": 20})
        for _ in range(number % 25):
            if next(stream, None) is None:
                break
        stream.close()

    with Client(router=router) as client, ThreadPoolExecutor(8) as workers:
        list(workers.map(ask, range(50)))

        assert_idle(router)
        assert_the_nodes_are_free_promptly(cluster)


def test_a_forked_child_neither_uses_nor_closes_its_parents_connections(
    cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(pool: httpx.HTTPTransport) -> int:
        answer = pool.handle_request(httpx.Request("GET", f"{cluster['a'].url}/"))
        answer.read()  # to the end, which gives the connection back
        return answer.status_code

    pools = Pools(verify=False)
    parents = pools.sync()
    assert ask(parents) == 200
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)  # to fork for it would cost the threads here
        assert pools.sync() is not parents
        assert ask(pools.sync()) == 200
        pools.close()

    inner: Any = parents
    assert [connection.is_idle() for connection in inner._pool.connections] == [True]
    assert ask(parents) == 200
    parents.close()


def test_pools_can_be_closed_twice_and_used_again() -> None:
    pools = Pools(verify=False)
    first = pools.sync()
    assert pools.sync() is first
    pools.close()
    pools.close()
    assert pools.sync() is not first
    pools.close()


def test_pools_share_one_context_that_is_made_when_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Any] = []
    real = httpx.create_ssl_context

    def make(**about: Any) -> Any:
        made.append(about)
        return real(**about)

    monkeypatch.setattr(httpx, "create_ssl_context", make)
    pools = Pools(verify=False)
    assert not made

    async def use() -> None:
        await pools.of_this_loop()

    pools.sync()
    for _ in range(2):
        asyncio.run(use())
    pools.close()

    assert len(made) <= 1


# ----------------------------------------------------------------- locks and sockets


class WatchedLock:
    """A lock that knows which thread holds it."""

    held_by: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()
        self.held_by.add(threading.get_ident())

    def __exit__(self, *exc: object) -> None:
        self.held_by.discard(threading.get_ident())
        self._lock.release()


@pytest.fixture
def watched(router: Router, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done on a socket by a thread that held one of the router's locks."""
    found: list[str] = []
    for owner in (router._cluster, router._pools):
        monkeypatch.setattr(owner, "_lock", WatchedLock())

    def watch(name: str) -> None:
        real = getattr(socket.socket, name)

        def call(self: socket.socket, *args: Any) -> Any:
            if threading.get_ident() in WatchedLock.held_by:
                found.append(name)
            return real(self, *args)

        monkeypatch.setattr(socket.socket, name, call)

    for name in ("connect", "connect_ex", "send", "sendall", "recv", "recv_into", "close"):
        watch(name)
    return found


def test_no_lock_is_held_while_a_socket_is_used(
    cluster: SimulatedCluster, router: Router, watched: list[str]
) -> None:
    async def ask() -> None:
        client = AsyncClient(router=router)
        await asyncio.gather(*(client.chat(MODEL, MESSAGES, options=SHORT) for _ in range(6)))
        async for _ in await client.chat(MODEL, MESSAGES, stream=True, options=SHORT):
            pass

    cluster["a"].inject(HangFault(times=1))
    with Client(router=router, timeout=0.2) as client, ThreadPoolExecutor(6) as workers:
        list(workers.map(lambda _: client.chat(MODEL, MESSAGES, options=SHORT), range(12)))
        leave_by_close(client.chat(MODEL, MESSAGES, stream=True, options=ENDLESS))
        client.list()
        asyncio.run(ask())
        router.explain(MODEL)
        router.refresh()

    assert not watched
    assert not WatchedLock.held_by


def test_the_watch_on_locks_sees_what_it_is_for(router: Router, watched: list[str]) -> None:
    with router._cluster._lock:
        socket.socket().close()

    assert watched == ["close"]


def test_a_request_that_hangs_keeps_nobody_else_waiting(
    cluster: SimulatedCluster, router: Router
) -> None:
    with Client(router=router) as client, ThreadPoolExecutor(1) as worker:
        cluster["a"].inject(HangFault(times=1))
        hanging = worker.submit(client.chat, MODEL, MESSAGES, node_id="a", pin="require")
        until(lambda: chats(cluster))

        began = time.monotonic()
        for _ in range(5):
            router.nodes()
            router.explain(MODEL)
            assert (router.in_flight, router.waiting) == (1, 0)
            assert client.chat(MODEL, MESSAGES, node_id="b", options=SHORT).node_id == "b"
        assert time.monotonic() - began < 2.0
        assert not hanging.done()

        cluster["a"].kill()
        with pytest.raises(AllNodesFailedError):
            hanging.result()
    assert_idle(router)


# ------------------------------------------------------------ dropped without a word

SOON_SECONDS = 3.0
"""A tick and a busy machine; the answers go on for ten."""


def chat(stream: bool = True) -> dict[str, Any]:
    return {"model": MODEL, "messages": MESSAGES, "options": ENDLESS, "stream": stream}


@pytest.mark.parametrize("is_begun", [False, True])
async def test_a_stream_that_is_dropped_lets_go_of_its_node(
    cluster: SimulatedCluster, router: Router, is_begun: bool
) -> None:
    client = httpx.AsyncClient(transport=AsyncHydraTransport(router=router))
    request = client.build_request("POST", "http://any/api/chat", json=chat())
    response = await client.send(request, stream=True)
    parts = response.aiter_raw()
    if is_begun:
        await parts.__anext__()
    assert router.in_flight == 1

    del response, parts
    gc.collect()

    assert await auntil(lambda: not any(node.in_flight for node in cluster)) < SOON_SECONDS
    await auntil(lambda: not router.in_flight)
    await client.aclose()


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_synchronous_stream_that_is_dropped_lets_go_of_its_node(
    cluster: SimulatedCluster, router: Router, is_begun: bool
) -> None:
    with httpx.Client(transport=HydraTransport(router=router)) as client:
        request = client.build_request("POST", "http://any/api/chat", json=chat())
        response = client.send(request, stream=True)
        parts = response.iter_raw()
        if is_begun:
            next(parts)
        assert router.in_flight == 1

        del response, parts
        gc.collect()

        assert until(lambda: not any(node.in_flight for node in cluster)) < SOON_SECONDS
        until(lambda: not router.in_flight)


async def test_a_stream_whose_caller_is_known_to_have_left_lets_go_although_it_is_held(
    cluster: SimulatedCluster, router: Router
) -> None:
    transport = AsyncHydraTransport(router=router)
    client = httpx.AsyncClient(transport=transport)
    dispatch = await transport.reserve("/api/chat", chat())
    request = client.build_request(
        "POST", "http://any/api/chat", json=chat(), extensions={"hydra_dispatch": dispatch}
    )
    response = await client.send(request, stream=True)

    dispatch.cancelled()

    assert await auntil(lambda: not any(node.in_flight for node in cluster)) < SOON_SECONDS
    assert router.in_flight == 0
    await response.aclose()
    await client.aclose()


def test_what_is_dropped_after_a_failover_needs_no_garbage_collector(
    cluster: SimulatedCluster,
) -> None:
    """
    An error that is kept with its frames holds the request that keeps it.

    Other failures leave cycles of httpcore's behind, in some versions of Python.
    """
    nodes = [node.node(labels=("first",) if node.id == "a" else ()) for node in cluster]
    cluster["a"].inject(StatusFault(500))
    with (
        make_router(cluster, nodes=nodes, prefer_label_seconds=1000.0) as router,
        Client(router=router, prefer_labels="first") as client,
    ):
        gc.collect()
        gc.disable()
        try:
            parts = client.chat(MODEL, MESSAGES, stream=True)
            next(parts)
            dispatches = [
                weakref.ref(o)
                for o in gc.get_objects()
                if isinstance(o, Dispatch) and o._router is router
            ]
            assert len(dispatches) == 1
            parts.close()
            del parts
            assert dispatches[0]() is None
        finally:
            gc.enable()


def test_what_was_dropped_in_a_cycle_is_found_while_another_one_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hydra_llm.cluster.dropped.WHILE_ONE_WAITS_SECONDS", 0.5)
    with (
        preloaded(make_nodes("a"), MODEL) as cluster,
        make_router(cluster, nodes=[cluster["a"].node(slots=1)]) as router,
        Client(router=router, priority=1) as client,
    ):
        cluster["a"].inject(StallFault(after=1), times=1)
        gc.collect()
        gc.disable()
        try:
            cycle: list[Any] = [client.chat(MODEL, MESSAGES, stream=True)]
            next(cycle[0])
            cycle.append(cycle)
            del cycle
            assert router.in_flight == 1
            assert client.chat(MODEL, MESSAGES).message.content
        finally:
            gc.enable()
