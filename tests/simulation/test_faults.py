"""Faults that take more than a wrong answer: no network, no name, no trust, no end."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from hydra_llm.testing import (
    Behaviour,
    EndlessFault,
    Fault,
    HostNames,
    LoadFault,
    LoopFault,
    OffloadFault,
    PsFault,
    SimulatedModel,
    SimulatedNode,
    SlowLorisFault,
    TokenFault,
)
from tests.simulation import recorded

MODEL, OTHER = "llama3.2:3b", "qwen3:8b"
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/api/chat": CHAT,
    "/api/generate": {"model": MODEL, "prompt": "Hello"},
    "/v1/chat/completions": CHAT,
}
BROKEN = (httpx.RemoteProtocolError, httpx.ReadError)
AGENT = Path(__file__).parents[1] / "agent"
STRANGER = Path(__file__).parents[1] / "faults"

no_black_hole = pytest.mark.skipif(
    sys.platform == "win32", reason="a full queue refuses connections there"
)


@pytest.fixture
def node() -> Iterator[SimulatedNode]:
    # Five minutes would be over in half a second here.
    with SimulatedNode("a", speed=500.0, models=(MODEL, OTHER), keep_alive_s=1e6) as node:
        node.preload(MODEL)
        yield node


def chat(node: SimulatedNode, *, timeout: float = 10.0, **more: Any) -> httpx.Response:
    body = {**CHAT, "stream": False, **more}
    return httpx.post(f"{node.url}/api/chat", json=body, timeout=timeout)


def eventually(true: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.001)


def recorded_answer(version: str, name: str) -> dict[str, Any]:
    return recorded.read(recorded.FOLDER / f"v{version}-{name}.json").response


# ---------------------------------------------------------------- a black hole


@no_black_hole
def test_to_connect_to_a_node_that_vanished_takes_until_the_timeout(node: SimulatedNode) -> None:
    node.vanish()
    for _ in range(3):
        begun = time.monotonic()
        with pytest.raises(httpx.ConnectTimeout):
            chat(node, timeout=0.2)
        assert time.monotonic() - begun >= 0.2
    assert node.requests == []
    assert repr(node) == "<SimulatedNode a [vanished | 0 in flight]>"
    node.reappear()
    assert chat(node).status_code == 200
    assert node.load_count == 0  # it never stopped working


@no_black_hole
def test_who_is_connected_to_a_node_that_vanishes_hears_nothing_until_it_is_back() -> None:
    with SimulatedNode(speed=20.0) as node, httpx.Client(base_url=node.url) as client:
        node.preload(MODEL)
        node.inject(TokenFault(after=3, action=SimulatedNode.vanish), times=1)
        with client.stream("POST", "/api/chat", json=CHAT, timeout=5.0) as answer:
            lines = answer.iter_lines()
            seen = [next(lines) for _ in range(3)]
            time.sleep(0.1)
            assert node.in_flight == 1
            node.reappear()
            seen += lines
        assert len(seen) == 65
        assert client.get("/api/ps").status_code == 200
        assert node.open_connections == 1


@no_black_hole
def test_a_connection_begun_while_a_node_is_gone_is_made_when_it_is_back(
    node: SimulatedNode,
) -> None:
    node.vanish()
    with closing(socket.socket()) as early:
        early.setblocking(False)
        early.connect_ex((node.host, node.port))
        node.reappear()
        early.settimeout(10.0)
        # The next try of TCP, a second after the first.
        early.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert early.recv(100).startswith(b"HTTP/1.1 200")


@no_black_hole
def test_a_node_can_vanish_again_and_again_and_die_while_it_is_gone(node: SimulatedNode) -> None:
    for _ in range(3):
        node.vanish()
        node.vanish()
        with pytest.raises(httpx.ConnectTimeout):
            chat(node, timeout=0.05)
        node.reappear()
        node.reappear()
        assert chat(node).status_code == 200
    node.vanish()
    node.revive()  # it is not dead
    with pytest.raises(httpx.ConnectTimeout):
        chat(node, timeout=0.05)
    node.kill()
    with pytest.raises(httpx.ConnectError):
        chat(node)
    node.reappear()
    with pytest.raises(httpx.ConnectError):
        chat(node)
    node.vanish()  # the whole machine this time
    with pytest.raises(httpx.ConnectTimeout):
        chat(node, timeout=0.05)
    node.reappear()
    with pytest.raises(httpx.ConnectError):
        chat(node)
    node.vanish()
    node.revive()
    assert chat(node).status_code == 200


@no_black_hole
def test_a_node_that_vanished_stops_and_gives_back_its_port(node: SimulatedNode) -> None:
    node.vanish()
    port = node.port
    node.stop()
    with SimulatedNode(port=port):
        pass
    with pytest.raises(RuntimeError, match="has not been started"):
        SimulatedNode().vanish()


# ---------------------------------------------------------------- names


def test_a_name_is_looked_up_in_this_process_and_nowhere_else(node: SimulatedNode) -> None:
    real = socket.getaddrinfo
    url = f"http://rig.internal:{node.port}/api/version"
    with HostNames({"rig.internal": node.host}) as names:
        assert httpx.get(url).status_code == 200
        assert httpx.get(url.replace("rig", "Rig")).status_code == 200
        names.lose("rig.internal")
        with pytest.raises(httpx.ConnectError, match="not known"):
            httpx.get(url)
        names.point("RIG.internal.", node.host)
        assert httpx.get(url).status_code == 200
        assert chat(node).status_code == 200
        assert names.asked == ["rig.internal"] * 4
        assert repr(names) == "<HostNames [rig.internal -> 127.0.0.1]>"
    assert socket.getaddrinfo is real


async def test_asynchronous_clients_look_names_up_too(node: SimulatedNode) -> None:
    url = f"http://rig.internal:{node.port}/api/version"
    with HostNames({"rig.internal": node.host}) as names:
        async with httpx.AsyncClient() as client:
            assert (await client.get(url)).status_code == 200
        _, writer = await asyncio.open_connection("rig.internal", node.port)
        writer.close()
        await writer.wait_closed()
        names.lose("rig.internal")
        with pytest.raises(socket.gaierror):
            await asyncio.open_connection("rig.internal", node.port)
        assert socket.getaddrinfo(b"localhost", 80)


@pytest.mark.skipif(sys.platform == "darwin", reason="127.0.0.2 is no address there")
def test_a_name_moves_to_another_address(node: SimulatedNode) -> None:
    url = f"http://rig.internal:{node.port}/api/version"
    with SimulatedNode("b", host="127.0.0.2", port=node.port, version="0.24.0"):
        with HostNames({"rig.internal": "127.0.0.1"}) as names:
            first = httpx.get(url).json()["version"]
            names.point("rig.internal", "127.0.0.2")
            assert (first, httpx.get(url).json()["version"]) == ("0.32.15", "0.24.0")


def test_a_look_up_may_take_long_and_ends_with_the_names() -> None:
    with HostNames({"rig.internal": "127.0.0.1"}) as names:
        names.delay("rig.internal", 0.1)
        begun = time.monotonic()
        socket.getaddrinfo("rig.internal", 80)
        assert time.monotonic() - begun >= 0.1
        names.delay("rig.internal", 60.0)
        asking = threading.Thread(target=socket.getaddrinfo, args=("rig.internal", 80))
        asking.start()
        eventually(lambda: len(names.asked) == 2)
    asking.join(5.0)
    assert not asking.is_alive()


def test_names_are_used_by_one_at_a_time() -> None:
    with HostNames() as names, pytest.raises(RuntimeError, match="in use already"):
        names.__enter__()


# ---------------------------------------------------------------- TLS


def tls(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return context


@pytest.fixture
def trusting() -> Iterator[httpx.Client]:
    trusted = ssl.create_default_context(cafile=AGENT / "certificate.pem")
    with httpx.Client(verify=trusted, timeout=10.0) as client:
        yield client


def test_a_node_speaks_tls(node: SimulatedNode, trusting: httpx.Client) -> None:
    node.speak_tls(tls(AGENT))
    assert node.url.startswith("https://127.0.0.1:")
    for _ in range(3):
        with trusting.stream("POST", f"{node.url}/api/chat", json=CHAT) as answer:
            assert len(list(answer.iter_lines())) == 65
    long = {**CHAT, "stream": False, "messages": [{"role": "user", "content": "x" * 100_000}]}
    assert trusting.post(f"{node.url}/api/chat", json=long).json()["done"]
    assert node.open_connections == 1
    node.inject(TokenFault(after=3))
    with pytest.raises(BROKEN):
        trusting.post(f"{node.url}/api/chat", json=CHAT)


def test_an_answer_over_tls_ends_in_order(node: SimulatedNode) -> None:
    node.speak_tls(tls(AGENT))
    context = ssl.create_default_context(cafile=AGENT / "certificate.pem")
    with socket.create_connection((node.host, node.port), timeout=5) as sock:
        with context.wrap_socket(sock, server_hostname="localhost") as secure:
            secure.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            received = b"".join(iter(lambda: secure.recv(65536), b""))
            # Without the farewell of TLS this would be an ssl.SSLEOFError.
            secure.unwrap()
    assert received.endswith(b"Ollama is running")


def test_a_certificate_of_a_stranger_is_not_trusted(
    node: SimulatedNode, trusting: httpx.Client
) -> None:
    node.speak_tls(tls(STRANGER))
    for _ in range(2):
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            trusting.post(f"{node.url}/api/chat", json=CHAT)
    assert node.requests == []
    eventually(lambda: node.open_connections == 0)
    node.speak_tls(tls(AGENT))
    assert trusting.post(f"{node.url}/api/chat", json=CHAT).status_code == 200


def test_tls_and_plain_http_do_not_understand_each_other(
    node: SimulatedNode, trusting: httpx.Client
) -> None:
    plain = node.url
    with pytest.raises(httpx.ConnectError, match="SSL"):
        trusting.get(plain.replace("http:", "https:"))
    node.speak_tls(tls(AGENT))
    with pytest.raises(BROKEN):
        trusting.get(plain)
    node.speak_tls(None)
    assert node.url == plain
    assert trusting.get(plain).status_code == 200


def test_a_frozen_node_hangs_in_the_handshake(node: SimulatedNode, trusting: httpx.Client) -> None:
    node.speak_tls(tls(AGENT))
    node.freeze()
    with pytest.raises(httpx.ConnectTimeout):
        trusting.get(node.url, timeout=0.1)
    assert node.open_connections <= 1
    node.thaw()
    assert trusting.get(node.url).status_code == 200


def test_to_change_the_certificate_breaks_what_is_connected(
    node: SimulatedNode, trusting: httpx.Client
) -> None:
    node.speak_tls(tls(AGENT))
    trusting.get(node.url)
    node.speak_tls(tls(STRANGER))
    eventually(lambda: node.open_connections == 0)


# ---------------------------------------------------------------- up and down


def test_a_node_flaps_until_it_is_cleared(node: SimulatedNode) -> None:
    def is_up() -> bool:
        try:
            return chat(node).status_code == 200
        except (httpx.ConnectError, *BROKEN):
            return False

    node.flap(up_s=0.3, down_s=0.5)
    assert not is_up()
    for _ in range(2):
        eventually(is_up)
        eventually(lambda: not is_up())
    node.clear_faults()
    begun = time.monotonic()
    while time.monotonic() - begun < 1.0:  # it would go down after 0.8 s at the latest
        assert is_up()


def test_a_node_that_flaps_can_be_stopped(node: SimulatedNode) -> None:
    node.flap(up_s=0.01, down_s=0.01)
    node.flap(up_s=0.01, down_s=0.01)
    time.sleep(0.05)
    node.stop()
    node.clear_faults()
    with pytest.raises(RuntimeError, match="has not been started"):
        SimulatedNode().flap()


def test_to_hang_up_breaks_connections_and_keeps_what_is_loaded() -> None:
    with SimulatedNode(speed=5.0) as node, httpx.Client(base_url=node.url) as client:
        node.preload(MODEL)
        with client.stream("POST", "/api/chat", json=CHAT) as answer:
            lines = answer.iter_lines()
            next(lines)
            node.hang_up()
            with pytest.raises(BROKEN):
                list(lines)
        assert node.requests[0].outcome == "cut"
        assert node.loaded[MODEL].in_flight == 0
        assert client.get("/api/ps").json()["models"][0]["name"] == MODEL


# ---------------------------------------------------------------- somebody else


def test_another_context_waits_for_a_program_of_somebody_elses() -> None:
    models = (MODEL, OTHER, "gemma3:12b")
    with SimulatedNode("a", speed=500.0, models=models, keep_alive_s=1e6) as node:
        node.preload(MODEL, num_ctx=2048)
        node.preload(OTHER)
        node.occupy(MODEL, num_ctx=2048)
        assert node.loaded[MODEL].in_flight == 1
        assert (node.in_flight, node.requests) == (0, [])
        answers: list[int] = []
        asking = threading.Thread(target=lambda: answers.append(chat(node).status_code))
        asking.start()
        eventually(lambda: node.in_flight == 1)
        # What has to be loaded waits behind it; what is loaded does not.
        with pytest.raises(httpx.ReadTimeout):
            chat(node, model="gemma3:12b", timeout=0.1)
        assert chat(node, model=OTHER).status_code == 200
        assert answers == []
        node.vacate()
        asking.join()
        assert answers == [200]
        assert [one.reason for one in node.evictions] == ["reload"]
        assert node.loaded[MODEL].context_length == 4096


def test_what_somebody_else_began_ends_with_the_node(node: SimulatedNode) -> None:
    node.occupy(MODEL)
    with pytest.raises(httpx.ReadTimeout):
        chat(node, timeout=0.05)
    node.kill()
    node.revive()
    node.vacate()
    assert chat(node).status_code == 200


# ---------------------------------------------------------------- loads


@pytest.mark.parametrize("version", ["0.24.0", "0.32.15"])
def test_a_load_fails_for_want_of_memory_in_ollamas_words(version: str) -> None:
    with SimulatedNode(speed=500.0, version=version, models=(MODEL, OTHER)) as node:
        node.inject(LoadFault())
        refused = chat(node)
        assert refused.status_code == 500
        real = recorded_answer(version, "err-memory-huge-num_ctx")["body"]["error"]
        assert shape(refused.json()["error"]) in shapes(real)
        assert node.loaded == {}
        node.clear_faults()
        assert chat(node).status_code == 200


def shape(text: str) -> str:
    return re.sub(r"[\d.]+", "N", text)


def shapes(real: str) -> set[str]:
    """Whether it is the cache or the weights that find no room is told in the last line."""
    *first, last = shape(real).split("\n")
    weights = "llama_model_load_from_file_impl: failed to load model"
    return {"\n".join([*first, end]) for end in (last, weights)}


def test_a_failing_load_takes_its_time_and_leaves_loaded_models_to_others() -> None:
    with SimulatedNode(speed=10.0, models=(MODEL, OTHER), keep_alive_s=1e6) as node:
        node.inject(LoadFault(), models=(OTHER,))
        begun = time.monotonic()
        assert chat(node, model=OTHER).status_code == 500
        assert time.monotonic() - begun > 0.05  # half a second of the node's at least
        assert chat(node).status_code == 200
        assert MODEL in node.loaded
        # As a real one: all else is unloaded for a second try.
        assert chat(node, model=OTHER).status_code == 500
        assert node.loaded == {}


def test_an_old_server_knows_before_it_unloads_anything() -> None:
    models = (MODEL, OTHER)
    with SimulatedNode(speed=500.0, version="0.24.0", models=models, keep_alive_s=1e6) as node:
        node.preload(OTHER)
        node.inject(LoadFault())
        text = chat(node).json()["error"]
        wanted, there = map(float, re.findall(r"\(([\d.]+) GiB\)", text))
        assert 0 < there < wanted
        assert OTHER in node.loaded
        assert chat(node, model=OTHER).status_code == 200


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [True, False])
def test_a_load_fails_at_every_door(node: SimulatedNode, path: str, stream: bool) -> None:
    node.inject(LoadFault(text="cudaMalloc failed: out of memory"), times=1)
    body = {**BODIES[path], "model": OTHER, "stream": stream}
    refused, served = (httpx.post(node.url + path, json=body) for _ in range(2))

    assert refused.status_code == 500
    assert "cudaMalloc failed: out of memory" in refused.text
    assert served.status_code == 200


def test_a_load_lands_in_system_memory_and_nothing_says_so(node: SimulatedNode) -> None:
    def shown() -> tuple[float, float]:
        (one,) = (m for m in httpx.get(f"{node.url}/api/ps").json()["models"] if m["name"] == OTHER)
        return one["size_vram"] / one["size"], one["size"]

    usual = chat(node, model=OTHER).json()["eval_duration"]
    whole, size = shown()
    assert whole == 1.0
    node.inject(OffloadFault(gpu_share=0.5))
    assert chat(node, model=OTHER).json()["eval_duration"] == pytest.approx(usual, rel=0.01)
    node.kill_runner(OTHER)
    assert chat(node, model=OTHER).status_code == 200
    half, same_size = shown()
    assert half == pytest.approx(0.5, abs=0.05)
    assert same_size == size
    node.clear_faults()
    node.inject(OffloadFault())
    node.kill_runner(OTHER)
    slow = chat(node, model=OTHER).json()["eval_duration"]
    assert shown()[0] == 0.0
    # 400 GB/s against 40.
    assert slow == pytest.approx(10 * usual, rel=0.01)
    node.clear_faults()
    assert shown()[0] == 0.0
    node.kill_runner(OTHER)
    assert chat(node, model=OTHER).json()["eval_duration"] == pytest.approx(usual, rel=0.01)


def test_what_lands_in_system_memory_drives_nothing_off_the_gpu() -> None:
    with SimulatedNode(speed=500.0, vram_gb=8.0, models=(MODEL, OTHER), keep_alive_s=1e6) as node:
        node.preload(MODEL)
        node.inject(OffloadFault())
        assert chat(node, model=OTHER).status_code == 200
        assert set(node.loaded) == {MODEL, OTHER}
        node.clear_faults()
        node.kill_runner(OTHER)
        assert chat(node, model=OTHER).status_code == 200
        assert set(node.loaded) == {OTHER}


@pytest.mark.parametrize("fault", [LoadFault(times=1), OffloadFault(times=1)])
def test_a_fault_of_loads_waits_for_a_load(node: SimulatedNode, fault: Fault) -> None:
    node.inject(fault)
    assert chat(node).status_code == 200
    status = chat(node, model=OTHER).status_code
    whole = OTHER in node.loaded and node.loaded[OTHER].size_vram > 0
    assert (status == 500) or not whole


def test_ps_blocks_and_models_go_on(node: SimulatedNode) -> None:
    node.inject(PsFault(block_s=20.0))
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{node.url}/api/ps", timeout=0.05)
    for path in ("/", "/api/version", "/api/tags", "/v1/models"):
        assert httpx.get(node.url + path, timeout=1.0).status_code == 200
    assert chat(node, timeout=1.0).status_code == 200
    assert chat(node, model=OTHER, timeout=1.0).status_code == 200
    node.clear_faults()
    assert len(httpx.get(f"{node.url}/api/ps", timeout=1.0).json()["models"]) == 2


# ---------------------------------------------------------------- a token again and again


@pytest.mark.parametrize("path", BODIES)
def test_a_repeated_token_ends_a_stream_without_a_word(node: SimulatedNode, path: str) -> None:
    node.inject(LoopFault(text=" the"))
    answer = httpx.post(node.url + path, json={**BODIES[path], "stream": True})
    lines = [line for line in answer.text.split("\n") if line]

    assert answer.status_code == 200
    name = "token-repeat-abort-generate" if path == "/api/generate" else "token-repeat-abort-stream"
    real = recorded_answer("0.32.15", name)["chunks"]
    assert len(lines) == len(real)
    assert all(" the" in line for line in lines)
    assert "[DONE]" not in answer.text
    assert '"done":true' not in answer.text


def test_a_repeated_token_leaves_a_whole_answer_that_is_not_done(node: SimulatedNode) -> None:
    node.inject(LoopFault(), times=1)
    answer, next_one = chat(node), chat(node)

    assert answer.status_code == 200
    assert answer.json()["done"] is False
    assert "done_reason" not in answer.json()
    assert next_one.json()["done"] is True


def test_a_runner_that_uses_its_own_template_does_not_notice() -> None:
    with SimulatedNode(speed=5000.0, go_template=False) as node:
        node.inject(LoopFault())
        answer = chat(node, options={"num_predict": 40}).json()
        assert (answer["done_reason"], answer["eval_count"]) == ("length", 40)


# ---------------------------------------------------------------- byte by byte


def pieces_of(node: SimulatedNode, path: str, **more: Any) -> Generator[bytes, None, None]:
    """What comes over a socket, as it comes, until the node closes."""
    body = json.dumps({**BODIES[path], "options": {"num_predict": 2}, "max_tokens": 2, **more})
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((node.host, node.port), timeout=10) as sock:
        sock.sendall((head + body).encode())
        while piece := sock.recv(65536):
            yield piece


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after", [None, 0, 1])
def test_an_answer_comes_byte_by_byte_and_whole(
    node: SimulatedNode, path: str, stream: bool, after: int | None
) -> None:
    node.inject(SlowLorisFault(after=after, pause_s=0.0002))
    pieces = list(pieces_of(node, path, stream=stream))
    whole = b"".join(pieces)
    head, _, body = whole.partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 200")
    end = b'"done":true' if path.startswith("/api") else b"[DONE]" if stream else b'"usage"'
    assert end in body
    # The test may wake up late and find several bytes at once.
    assert len(pieces) > 20
    if after is None:
        assert len(pieces[0]) < len(head)
    elif after == 0 or not stream:
        assert len(pieces[0]) >= len(head)
    else:
        # The head, and the first chunk: its length and its line.
        spared = len(head) + len(b"".join(body.split(b"\n", 2)[:2]))
        assert len(b"".join(pieces[:3])) > spared


def test_a_pause_is_before_every_byte(node: SimulatedNode) -> None:
    node.inject(SlowLorisFault(pause_s=0.05))
    begun, pieces = time.monotonic(), pieces_of(node, "/api/chat")
    first = [next(pieces) for _ in range(4)]
    assert time.monotonic() - begun >= 0.2
    assert b"".join(first) == b"HTTP"
    pieces.close()
    eventually(lambda: node.open_connections == 0)


def test_after_a_dripped_answer_the_connection_is_as_good_as_ever(node: SimulatedNode) -> None:
    node.inject(SlowLorisFault(pause_s=0.0003), times=1)
    with httpx.Client(base_url=node.url, timeout=10.0) as client:
        few = {**CHAT, "stream": False, "options": {"num_predict": 2}}
        assert client.post("/api/chat", json=few).json()["done"]
        begun = time.monotonic()
        assert len(client.post("/api/chat", json={**CHAT, "stream": False}).content) > 500
        assert time.monotonic() - begun < 0.1
        assert node.open_connections == 1


def test_the_control_plane_drips_when_it_is_named(node: SimulatedNode) -> None:
    node.inject(SlowLorisFault(pause_s=60.0, paths=("/api/tags",)))
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{node.url}/api/tags", timeout=0.1)
    assert httpx.get(f"{node.url}/api/ps").status_code == 200


def test_a_frozen_node_does_not_drip(node: SimulatedNode) -> None:
    node.inject(SlowLorisFault(pause_s=0.001))
    pieces = pieces_of(node, "/api/chat")
    next(pieces)
    node.freeze()
    held = [len(connection._drops._held) for connection in node._serving.connections]
    time.sleep(0.05)
    assert held == [len(one._drops._held) for one in node._serving.connections]
    node.thaw()
    assert b"".join(pieces).endswith(b"0\r\n\r\n")


# ---------------------------------------------------------------- without end


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_has_no_end(node: SimulatedNode, path: str) -> None:
    node.inject(EndlessFault(after=3, pause_s=0.0005))
    lines: list[str] = []
    with httpx.stream("POST", node.url + path, json={**BODIES[path], "stream": True}) as answer:
        for line in answer.iter_lines():
            lines += [line] if line else []
            if len(lines) == 200:
                break
    parsed = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert not any(one.get("done") for one in parsed)
    assert all(one["model"] == MODEL for one in parsed)
    eventually(lambda: node.in_flight == 0)
    assert node.requests[0].outcome == "client left"
    assert node.requests[0].tokens == 3
    node.clear_faults()
    assert httpx.post(node.url + path, json=BODIES[path]).status_code == 200


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [True, False])
def test_a_line_has_no_end(node: SimulatedNode, path: str, stream: bool) -> None:
    node.inject(EndlessFault(after=3, in_one_line=stream, pause_s=0.0005))
    seen = b""
    body = {**BODIES[path], "stream": stream}
    with httpx.stream("POST", node.url + path, json=body) as answer:
        kind = answer.headers["Content-Type"].split(";")[0]
        for piece in answer.iter_bytes():
            seen += piece
            if len(seen) > 300_000:
                break
    streams = "text/event-stream" if path.startswith("/v1") else "application/x-ndjson"
    assert kind == (streams if stream else "application/json")
    assert len(seen.split(b"\n")[-1]) > 290_000
    assert sum(line.startswith((b"{", b"data: {")) for line in seen.split(b"\n")) == (
        4 if stream else 1
    )


def test_a_client_that_does_not_read_costs_no_memory(node: SimulatedNode) -> None:
    node.inject(EndlessFault(after=0, in_one_line=True, pause_s=0.0))
    pieces = pieces_of(node, "/api/chat")
    next(pieces)
    (connection,) = node._serving.connections
    eventually(lambda: connection.is_clogged)
    time.sleep(0.05)
    transport = connection._transport
    assert transport is not None
    assert transport.get_write_buffer_size() < 200_000
    pieces.close()


def test_an_answer_that_shows_nothing_has_no_end_either() -> None:
    mute = SimulatedModel("mute:1b", size_gb=1.0, behaviour=Behaviour("script", ()))
    with SimulatedNode(speed=500.0, models=(mute,)) as node:
        node.inject(EndlessFault(after=0, pause_s=0.0005))
        pieces = pieces_of(node, "/api/chat", model="mute:1b")
        assert sum(len(next(pieces)) for _ in range(10)) > 10_000
        pieces.close()
        assert httpx.get(f"{node.url}/api/ps", timeout=1.0).status_code == 200


@pytest.mark.parametrize(
    "fault",
    [SlowLorisFault(), EndlessFault(after=0), LoopFault(), LoadFault(), OffloadFault()],
    ids=lambda fault: type(fault).__name__,
)
def test_probes_meet_none_of_it(node: SimulatedNode, fault: Fault) -> None:
    node.inject(fault)
    for path in ("/", "/api/version", "/api/tags", "/api/ps", "/v1/models"):
        assert httpx.get(node.url + path, timeout=1.0).status_code == 200
