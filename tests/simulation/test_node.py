"""A simulated node over real sockets: life, death, faults, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import h11
import httpx
import pytest

from hydra_llm.simulation.listener import Listener
from hydra_llm.simulation.server import Connection, LoopThread
from hydra_llm.testing import (
    CutFault,
    ErrorBodyFault,
    ErrorLineFault,
    Fault,
    Gpu,
    HangFault,
    HtmlFault,
    HugeFault,
    MissingModelFault,
    PsFault,
    ResetFault,
    SimulatedCluster,
    SimulatedModel,
    SimulatedNode,
    SlowFault,
    StallFault,
    StatusFault,
    TokenFault,
)

MODEL = "llama3.2:3b"
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
BROKEN = (httpx.RemoteProtocolError, httpx.ReadError)


@pytest.fixture
def node() -> Iterator[SimulatedNode]:
    with SimulatedNode("a", speed=500.0, models=(MODEL, "qwen3:8b", "nomic-embed-text")) as node:
        node.preload(MODEL)
        yield node


def chat(node: SimulatedNode, *, timeout: float = 10.0, **more: Any) -> httpx.Response:
    return httpx.post(f"{node.url}/api/chat", json={**CHAT, **more}, timeout=timeout)


def lines_of(node: SimulatedNode, **more: Any) -> Iterator[dict[str, Any]]:
    """The lines of a streamed chat, until the stream ends or breaks."""
    timeout = httpx.Timeout(10.0, read=more.pop("read_timeout", 10.0))
    with httpx.stream(
        "POST", f"{node.url}/api/chat", json={**CHAT, **more}, timeout=timeout
    ) as answer:
        for line in answer.iter_lines():
            yield json.loads(line)


def eventually(true: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.001)


# ---------------------------------------------------------------- life


def test_a_node_answers_and_writes_down_what_it_was_asked(node: SimulatedNode) -> None:
    answer = chat(node, stream=False).json()

    assert answer["done"] is True
    (record,) = node.requests
    assert (record.method, record.path, record.model) == ("POST", "/api/chat", MODEL)
    assert (record.status, record.outcome) == (200, "done")
    assert record.body["messages"] == CHAT["messages"]
    assert record.finished is not None
    assert record.finished >= record.at


def test_every_line_of_a_stream_is_a_chunk_and_headers_come_with_the_first() -> None:
    with SimulatedNode(speed=1.0, prefill_ratio=0.05, gpu_bandwidth_gb_s=4000.0) as node:
        node.preload(MODEL)
        begun = time.monotonic()
        with httpx.stream("POST", f"{node.url}/api/chat", json=CHAT) as answer:
            waited = time.monotonic() - begun
            chunks = list(answer.iter_raw())
    # Reading the prompt takes 0.01 s a token here.
    assert waited > 0.1
    assert all(chunk.endswith(b"\n") for chunk in chunks)
    assert sum(chunk.count(b"\n") for chunk in chunks) == 65


def test_a_connection_is_kept_for_the_next_request(node: SimulatedNode) -> None:
    with httpx.Client(base_url=node.url) as client:
        for _ in range(3):
            assert client.post("/api/chat", json=CHAT).status_code == 200
            assert client.get("/api/ps").status_code == 200
        assert node.open_connections == 1


def test_two_nodes_give_the_same_text() -> None:
    with SimulatedCluster([SimulatedNode("a", speed=500), SimulatedNode("b", speed=500)]) as both:
        texts = {chat(node, stream=False).json()["message"]["content"] for node in both}
    assert len(texts) == 1


def test_a_client_that_leaves_frees_its_slot_at_once() -> None:
    with SimulatedNode(speed=1.0, gpu_bandwidth_gb_s=20.0) as node:
        node.preload(MODEL)
        with httpx.stream("POST", f"{node.url}/api/chat", json=CHAT) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert node.in_flight == 1
        eventually(lambda: node.in_flight == 0, seconds=0.5)
        assert node.loaded[MODEL].in_flight == 0
        assert node.requests[0].outcome == "client left"


def test_a_client_that_leaves_while_loading_ends_the_load() -> None:
    with SimulatedNode(load_fixed_s=60.0) as node:
        with pytest.raises(httpx.ReadTimeout):
            chat(node, timeout=0.1)
        eventually(lambda: node.vram_used_bytes == 0)
        assert node.loaded == {}


def test_stopping_twice_and_stopping_an_unstarted_node_are_fine() -> None:
    node = SimulatedNode()
    node.stop()
    node.start()
    node.stop()
    node.stop()


def test_starting_twice_is_refused() -> None:
    with SimulatedNode() as node, pytest.raises(RuntimeError, match="started already"):
        node.start()


def test_a_taken_port_is_said_to_be_taken() -> None:
    with SimulatedNode() as node, pytest.raises(OSError, match=r"in use|10048"):
        SimulatedNode(port=node.port).start()


def test_a_node_stops_with_requests_in_flight() -> None:
    node = SimulatedNode(load_fixed_s=60.0).start()
    errors: list[Exception] = []

    def ask() -> None:
        try:
            chat(node)
        except httpx.HTTPError as exc:
            errors.append(exc)

    asking = threading.Thread(target=ask)
    asking.start()
    eventually(lambda: node.in_flight == 1)
    node.stop()
    asking.join()
    assert isinstance(errors[0], BROKEN)


def test_many_requests_at_once_all_end(node: SimulatedNode) -> None:
    async def ask_all() -> list[int]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=node.url, limits=limits, timeout=30) as client:
            answers = await asyncio.gather(
                *(client.post("/api/chat", json={**CHAT, "options": {"num_predict": 3}})
                  for _ in range(60))
            )  # fmt: skip
        return [answer.status_code for answer in answers]

    assert asyncio.run(ask_all()) == [200] * 60
    eventually(lambda: node.open_connections == 0)


def test_a_client_may_wait_for_100_continue(node: SimulatedNode) -> None:
    body = json.dumps({**CHAT, "stream": False}).encode()
    head = (
        f"POST /api/chat HTTP/1.1\r\nHost: {node.host}\r\nExpect: 100-continue\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode()
    with socket.create_connection((node.host, node.port), timeout=5) as sock:
        sock.sendall(head)
        assert sock.recv(100).startswith(b"HTTP/1.1 100")
        sock.sendall(body)
        received = b"".join(iter(lambda: sock.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 200")


def test_what_is_not_http_closes_the_connection(node: SimulatedNode) -> None:
    with socket.create_connection((node.host, node.port), timeout=5) as sock:
        sock.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert sock.recv(100) == b""


# ---------------------------------------------------------------- death and sleep


def test_a_killed_node_breaks_streams_refuses_and_forgets_what_was_loaded() -> None:
    with SimulatedNode(speed=5.0) as node:
        node.preload(MODEL)
        port, lines = node.port, lines_of(node)
        next(lines)
        node.kill()
        with pytest.raises(BROKEN):
            list(lines)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/")
        assert node.requests[0].outcome == "cut"
        node.revive()
        assert node.port == port
        assert httpx.get(f"{node.url}/api/ps").json() == {"models": []}


def test_a_node_can_be_killed_and_revived_again_and_again(node: SimulatedNode) -> None:
    for _ in range(5):
        node.kill()
        node.kill()
        node.revive()
        node.revive()
        assert chat(node, stream=False).status_code == 200


def test_a_node_can_be_killed_only_when_it_is_idle() -> None:
    with SimulatedNode(speed=5.0) as node:
        node.preload(MODEL)
        lines = lines_of(node)
        next(lines)
        assert not node.kill(only_idle=True)
        assert list(lines)[-1]["done"]
        assert node.kill(only_idle=True)
        assert not node.kill(only_idle=True)  # dead already


def test_a_node_killed_as_soon_as_it_is_up_leaves_no_trace_in_the_loop() -> None:
    # The next socket gets the number of the closed one: it must not be taken for it.
    thread = LoopThread()
    try:
        for _ in range(20):
            hasty = SimulatedNode(speed=500.0)
            hasty.start(thread)
            hasty.inject(TokenFault(after=1, action=die_and_rise_and_die))
            with pytest.raises(BROKEN):
                chat(hasty)
            with pytest.raises(httpx.ConnectError):
                chat(hasty)
            hasty.stop()
            next_one = SimulatedNode(speed=500.0).start(thread)
            assert chat(next_one).status_code == 200
            next_one.stop()
    finally:
        thread.close()


def die_and_rise_and_die(node: SimulatedNode) -> None:
    node.kill()
    node.revive()
    node.kill()


def test_what_a_node_did_is_remembered_beyond_its_death() -> None:
    with SimulatedNode(speed=500.0) as node:
        chat(node)
        node.kill()
        assert node.loaded == {}
        assert node.vram_used_bytes == 0
        node.revive()
        chat(node)
    assert [record.model for record in node.loads] == [MODEL, MODEL]
    assert node.load_count == 2
    assert node.peak_vram_bytes > 0
    assert [record.outcome for record in node.requests] == ["done", "done"]


class OneTask:
    """Stands for the loop's thread seen from itself: what it runs goes on later."""

    task: asyncio.Task[None]

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.task = asyncio.get_running_loop().create_task(coroutine)


async def test_a_port_closed_while_it_begins_to_listen_is_closed_after_it() -> None:
    listener, thread = Listener("127.0.0.1", 0), OneTask()
    listener.listen(thread, lambda: Connection(NodeStub()))
    await asyncio.sleep(0)
    listener.close()
    await thread.task
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", listener.port)


class NodeStub:
    is_frozen = False
    tls: ssl.SSLContext | None = None

    def request(self, connection: Connection, request: h11.Request, body: bytes) -> None: ...
    def left(self, connection: Connection) -> None: ...
    def opened(self, connection: Connection) -> None: ...


def test_a_killed_node_stops_cleanly(node: SimulatedNode) -> None:
    node.kill()


def test_a_frozen_node_takes_connections_and_says_nothing_until_thawed(
    node: SimulatedNode,
) -> None:
    node.freeze()
    with httpx.Client(base_url=node.url) as client:
        for path in ("/", "/api/version", "/api/ps", "/api/tags"):
            with pytest.raises(httpx.ReadTimeout):
                client.get(path, timeout=0.05)
    answers: list[int] = []
    asking = threading.Thread(target=lambda: answers.append(chat(node).status_code))
    asking.start()
    eventually(lambda: node.open_connections >= 1)
    asking.join(0.1)
    assert answers == []
    node.thaw()
    asking.join()
    assert answers == [200]


def test_time_stands_still_while_a_node_is_frozen() -> None:
    with SimulatedNode(speed=1.0) as node:
        node.preload(MODEL, keep_alive=0.4)
        node.freeze()
        time.sleep(0.5)
        node.thaw()
        assert MODEL in node.loaded
        eventually(lambda: node.loaded == {})


def test_a_stream_frozen_in_the_middle_goes_on_after_it() -> None:
    with SimulatedNode(speed=50.0) as node:
        node.preload(MODEL)
        node.inject(TokenFault(after=3, action=freeze_for_a_moment))
        seen = list(lines_of(node))
    assert len(seen) == 65
    assert seen[-1]["done"] is True


def freeze_for_a_moment(node: SimulatedNode) -> None:
    node.freeze()
    threading.Timer(0.1, node.thaw).start()


def test_a_runner_killed_in_mid_stream_is_an_error_line_and_the_node_lives(
    node: SimulatedNode,
) -> None:
    node.inject(TokenFault(after=4, action=lambda node: node.kill_runner(MODEL)))
    seen = list(lines_of(node))

    assert len(seen) == 5
    assert seen[-1] == {"error": "an error was encountered while running the model: unexpected EOF"}
    assert MODEL in node.loaded
    node.clear_faults()
    assert chat(node, stream=False).status_code == 200
    assert node.load_count == 1


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 503])
def test_a_status_fault_has_ollamas_error_body(node: SimulatedNode, status: int) -> None:
    node.inject(StatusFault(status=status, retry_after=2), times=1)
    refused, served = chat(node, stream=False), chat(node, stream=False)

    assert refused.status_code == status
    assert isinstance(refused.json()["error"], str)
    assert refused.headers["Retry-After"] == "2"
    assert served.status_code == 200


def test_a_fault_on_v1_has_the_openai_shape(node: SimulatedNode) -> None:
    node.inject(StatusFault(status=503))
    refused = httpx.post(f"{node.url}/v1/chat/completions", json=CHAT)

    assert refused.json()["error"]["type"] == "api_error"


@pytest.mark.parametrize("path", ["/", "/api/version", "/api/tags", "/api/ps", "/v1/models"])
def test_the_control_plane_is_immune_unless_it_is_named(node: SimulatedNode, path: str) -> None:
    node.inject(StatusFault(status=500))
    assert httpx.get(node.url + path).status_code == 200
    node.inject(StatusFault(status=500, paths=(path,)))
    assert httpx.get(node.url + path).status_code == 500


def test_a_fault_can_be_for_one_model_only(node: SimulatedNode) -> None:
    node.inject(MissingModelFault(models=("qwen3:8b",)))

    assert chat(node, model="qwen3:8b").status_code == 404
    assert chat(node).status_code == 200
    assert "qwen3:8b" in httpx.get(f"{node.url}/api/tags").text


def test_a_probable_fault_strikes_the_same_requests_each_time() -> None:
    def struck() -> list[int]:
        with SimulatedNode(speed=500.0, seed=7) as node:
            node.inject(StatusFault(status=500, probability=0.3))
            return [chat(node, stream=False).status_code for _ in range(20)]

    first = struck()
    assert first == struck()
    assert 1 <= first.count(500) <= 12


def test_an_error_body_comes_with_status_200(node: SimulatedNode) -> None:
    node.inject(ErrorBodyFault(text="went wrong"))
    answer = chat(node)

    assert answer.status_code == 200
    assert answer.json() == {"error": "went wrong"}


@pytest.mark.parametrize("after", [0, 3])
def test_an_error_line_comes_after_so_many_tokens(node: SimulatedNode, after: int) -> None:
    node.inject(ErrorLineFault(after=after, text="went wrong"))
    seen = list(lines_of(node))

    assert [line.get("error") for line in seen] == [None] * after + ["went wrong"]
    assert node.in_flight == 0


@pytest.mark.parametrize("after", [None, 0, 3])
def test_a_reset_breaks_the_connection(node: SimulatedNode, after: int | None) -> None:
    node.inject(ResetFault(after=after))
    seen: list[Any] = []
    with pytest.raises(BROKEN):
        seen.extend(lines_of(node))
    assert node.requests[0].tokens == (after or 0)
    assert node.requests[0].status == (None if after is None else 200)


def test_a_reset_is_a_reset_and_no_orderly_end(node: SimulatedNode) -> None:
    node.inject(ResetFault())
    body = json.dumps(CHAT).encode()
    head = f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((node.host, node.port), timeout=5) as sock:
        sock.sendall(head.encode() + body)
        with pytest.raises(ConnectionResetError):
            sock.recv(100)


def test_a_cut_stream_ends_without_done(node: SimulatedNode) -> None:
    node.inject(CutFault(after=3))
    seen = list(lines_of(node))

    assert len(seen) == 3
    assert not any(line["done"] for line in seen)


def test_a_stalled_stream_stays_open_and_silent(node: SimulatedNode) -> None:
    node.inject(StallFault(after=3))
    seen: list[Any] = []
    with pytest.raises(httpx.ReadTimeout):
        seen.extend(lines_of(node, read_timeout=0.1))
    assert len(seen) == 3
    eventually(lambda: node.in_flight == 0)


def test_a_hang_says_nothing(node: SimulatedNode) -> None:
    node.inject(HangFault())
    with pytest.raises(httpx.ReadTimeout):
        chat(node, timeout=0.05)


def test_a_hang_of_loads_leaves_loaded_models_alone(node: SimulatedNode) -> None:
    node.inject(HangFault(loads_only=True))

    assert chat(node).status_code == 200
    with pytest.raises(httpx.ReadTimeout):
        chat(node, model="qwen3:8b", timeout=0.05)
    with pytest.raises(httpx.ReadTimeout):
        chat(node, options={"num_ctx": 1234}, timeout=0.05)


def test_a_web_page_is_no_answer(node: SimulatedNode) -> None:
    node.inject(HtmlFault())
    answer = chat(node)

    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.text.startswith("<!DOCTYPE html>")


def test_a_huge_document_is_as_huge_as_said(node: SimulatedNode) -> None:
    node.inject(HugeFault(size_bytes=3_000_000))

    assert len(chat(node).content) > 3_000_000


def test_a_slow_node_is_slow_for_a_time() -> None:
    with SimulatedNode(speed=100.0) as node:
        node.preload(MODEL)
        usual = chat(node, stream=False).json()["eval_duration"]
        node.inject(SlowFault(factor=10.0, for_s=20.0))
        slow = chat(node, stream=False).json()["eval_duration"]
        assert slow == pytest.approx(10 * usual, rel=0.01)
        time.sleep(0.25)
        assert chat(node, stream=False).json()["eval_duration"] == pytest.approx(usual, rel=0.01)


def test_ps_can_be_stale_empty_or_made_up(node: SimulatedNode) -> None:
    def shown() -> list[str]:
        models = httpx.get(f"{node.url}/api/ps").json()["models"]
        return [one["name"] for one in models]

    node.inject(PsFault(shows="stale"))
    chat(node, model="qwen3:8b")
    assert shown() == [MODEL]
    node.clear_faults()
    assert sorted(shown()) == [MODEL, "qwen3:8b"]
    node.inject(PsFault(shows="empty"), times=1)
    assert shown() == []
    node.inject(PsFault(shows="given", entries=[{"name": "ghost:latest"}]), times=1)
    assert shown() == ["ghost:latest"]


def test_ps_can_block_while_the_rest_answers(node: SimulatedNode) -> None:
    node.inject(PsFault(block_s=0.2))
    begun = time.monotonic()
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{node.url}/api/ps", timeout=0.05)
    assert httpx.get(f"{node.url}/api/version").status_code == 200
    assert httpx.get(f"{node.url}/api/ps").status_code == 200
    assert time.monotonic() - begun > 0.2


@pytest.mark.parametrize(
    "fault",
    [ErrorLineFault(after=2), ResetFault(after=2), CutFault(after=2), TokenFault(after=2)],
    ids=lambda fault: type(fault).__name__,
)
def test_token_faults_strike_answers_that_are_not_streamed_too(
    node: SimulatedNode, fault: Fault
) -> None:
    node.inject(fault)
    try:
        answer = chat(node, stream=False)
    except BROKEN:
        return
    assert answer.status_code == 500


def test_killed_during_the_third_token() -> None:
    with SimulatedNode(speed=20.0) as node:
        node.preload(MODEL)
        node.inject(TokenFault(after=3))
        seen: list[Any] = []
        with pytest.raises(BROKEN):
            seen.extend(lines_of(node))
        assert node.requests[0].tokens == 3


# ---------------------------------------------------------------- what tests look at


def test_what_a_node_shows_of_itself() -> None:
    model = SimulatedModel("own:1b", size_gb=1.0)
    gpus = [Gpu(total_bytes=8_000_000_000), Gpu(total_bytes=4_000_000_000)]
    with SimulatedNode("rig", models=[MODEL, model], gpus=gpus, speed=500.0) as node:
        chat(node, model="own:1b")
        assert node.loaded["own:1b"].model is model
        assert [record.model for record in node.loads] == ["own:1b"]
        assert 0 < node.vram_used_bytes <= node.peak_vram_bytes
        configured = node.node(labels=("fast",))
        assert (configured.url, configured.id) == (node.url, "rig")
        assert configured.vram_gb == pytest.approx(12.0)
        assert repr(node) == "<SimulatedNode rig [up | 0 in flight]>"


def test_models_come_and_go(node: SimulatedNode) -> None:
    node.add_model("gemma3:12b")
    assert chat(node, model="gemma3:12b").status_code == 200
    node.remove_model("gemma3:12b")
    assert chat(node, model="gemma3:12b").status_code == 404
    assert "gemma3:12b" not in node.loaded
    node.kill()
    node.revive()
    assert chat(node, model="gemma3:12b").status_code == 404


def test_expires_at_is_true_on_the_clients_clock() -> None:
    with SimulatedNode(speed=100.0) as node:
        node.preload(MODEL, keep_alive=20.0)
        shown = httpx.get(f"{node.url}/api/ps").json()["models"][0]["expires_at"]
        stamp = shown.split(".")[0] + "+00:00"
        from datetime import datetime

        left = datetime.fromisoformat(stamp).timestamp() - time.time()
        assert -1.1 < left < 0.3
        eventually(lambda: node.loaded == {}, seconds=1.0)


def test_the_demo_cluster_is_three_home_machines() -> None:
    with SimulatedCluster.demo(speed=1000.0) as cluster:
        assert [node.id for node in cluster] == ["workstation", "rack", "gaming"]
        assert len(cluster.urls) == len(cluster.nodes()) == len(cluster) == 3
        assert chat(cluster["rack"], model="mistral-small:24b").status_code == 200
        assert chat(cluster["workstation"], model="mistral-small:24b").status_code == 404
    with pytest.raises(KeyError):
        cluster["nowhere"]


def test_a_cluster_in_which_one_node_cannot_start_starts_none() -> None:
    with SimulatedNode() as taken:
        cluster = SimulatedCluster([SimulatedNode("a"), SimulatedNode("b", port=taken.port)])
        with pytest.raises(OSError, match=r"in use|10048"):
            cluster.start()


def test_two_nodes_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="one id: a, a"):
        SimulatedCluster([SimulatedNode("a"), SimulatedNode("a")])
