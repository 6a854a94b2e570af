"""Searches of loopback, where simulated nodes listen."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Iterator
from typing import Any

import pytest

from hydra_llm.discovery import Announced, Progress, Search, search
from hydra_llm.networks import read_network
from hydra_llm.testing import (
    HangFault,
    HtmlFault,
    HugeFault,
    SimulatedNode,
    StatusFault,
)
from hydra_llm.types import Node
from tests.discovery.conftest import (
    QUICK,
    free_port,
    looked,
    needs_ipv6,
    needs_socket_list,
    only,
    pages,
    urls,
)


@pytest.fixture
def a() -> Iterator[SimulatedNode]:
    with SimulatedNode("a", host="127.0.0.2", models=("llama3.2:3b", "qwen3:8b")) as node:
        yield node


# ------------------------------------------------------------------------- finding


def test_a_server_is_found_with_what_it_has(a: SimulatedNode) -> None:
    result = looked("127.0.0.0/29", ports=[a.port])

    found = only(result)
    assert found.urls == (a.url,)
    assert (found.version, found.models) == ("0.32.15", ("llama3.2:3b", "qwen3:8b"))
    assert (found.exporter, found.known_as, found.perhaps_same_as) == (None, None, ())
    assert (result.asked, result.planned, result.is_complete) == (6, 6, True)
    assert found.node().url == a.url


def test_nothing_changes_on_a_server_that_is_found(a: SimulatedNode) -> None:
    looked("127.0.0.2", ports=[a.port])

    assert {(one.method, one.path) for one in a.requests} == {
        ("GET", "/api/version"),
        ("GET", "/api/tags"),
    }
    assert a.open_connections == 0


@needs_ipv6
def test_ipv6_is_searched_too() -> None:
    with SimulatedNode("six", host="::1") as node:
        result = looked("::1/128", ports=[node.port])

        assert urls(result) == [(node.url,)]
        assert node.requests[0].headers["host"] == f"[::1]:{node.port}"


@pytest.mark.parametrize(
    "fault",
    [StatusFault(401), StatusFault(500), HtmlFault(), HangFault(), HugeFault()],
    ids=lambda fault: type(fault).__name__,
)
def test_what_does_not_answer_as_ollama_does_is_left_out(a: SimulatedNode, fault: Any) -> None:
    a.inject(fault, paths=("/api/version",))

    with SimulatedNode("b", host="127.0.0.3", port=a.port) as b:
        limits = QUICK._replace(answer_seconds=0.3 if isinstance(fault, HangFault) else 5.0)
        result = looked("127.0.0.2/31", ports=[b.port], limits=limits)

        assert urls(result) == [(b.url,)]


@pytest.mark.parametrize(
    "tags",
    ["{}", "[]", '{"models": {}}', "<html>", "null", "[" * 50_000, '{"models": ' + "9" * 9999],
)
def test_a_version_alone_makes_no_ollama(tags: str) -> None:
    told = {"/api/version": (200, '{"version": "1.0"}'), "/api/tags": (200, tags)}
    with pages(told) as server:
        assert looked("127.0.0.1", ports=[server.port]).found == ()


def test_a_redirect_and_a_login_are_left_alone(a: SimulatedNode) -> None:
    told = {"/api/version": (302, f"{a.url}/api/version"), "/api/tags": (401, "")}
    with pages(told) as server:
        assert looked("127.0.0.1", ports=[server.port]).found == ()
    assert a.requests == []


def test_what_strangers_say_can_do_a_terminal_no_harm() -> None:
    model = {"name": "\x1b]0;owned\x07\n[red]" + "x" * 5000, "digest": 7, "modified_at": None}
    told = {
        "/api/version": (200, json.dumps({"version": "1\x1b[2J\u202e"})),
        "/api/tags": (200, json.dumps({"models": [model, {"name": ""}, 3]})),
    }
    with pages(told) as server:
        found = only(looked("127.0.0.1", ports=[server.port]))

    [name] = found.models
    assert name.isprintable()
    assert len(name) == 200
    assert found.version == "1?[2J?"


def test_an_announced_server_is_asked_where_it_says_it_is(a: SimulatedNode) -> None:
    told = Announced(name="rig", addresses=(ipaddress.ip_address("127.0.0.2"),), port=a.port)

    assert urls(looked(ports=[free_port()], announced=[told])) == [(a.url,)]


def test_nobody_is_sent_to_a_public_address_by_an_announcement() -> None:
    told = Announced(name="rig", addresses=(ipaddress.ip_address("203.0.113.9"),))

    assert Search(announced=[told]).places() == []
    assert len(Search(announced=[told], allow_public=True).places()) == 1


# -------------------------------------------------------------------------- bounds


class Clock:
    """A second passes with every look at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


async def no_pause(seconds: float) -> None:
    await asyncio.sleep(0)


def test_a_search_ends_in_time_and_says_what_it_left_out(a: SimulatedNode) -> None:
    plan = Search(
        networks=[read_network("127.0.0.0/24")],
        ports=[a.port],
        exporter_ports=(),
        limits=QUICK._replace(concurrency=4),
        timeout_seconds=60.0,
    )

    result = asyncio.run(search(plan, clock=Clock(), sleep=no_pause))

    assert not result.is_complete
    assert 0 < result.asked < result.planned == 254
    assert urls(result) == [(a.url,)]


def test_progress_is_told(a: SimulatedNode) -> None:
    told: list[Progress] = []
    plan = Search(
        networks=[read_network("127.0.0.0/29")],
        ports=[a.port],
        exporter_ports=(),
        limits=QUICK,
    )

    asyncio.run(search(plan, on_progress=told.append))

    assert [one.asked for one in told] == [1, 2, 3, 4, 5, 6]
    assert (told[-1].planned, told[-1].found) == (6, 1)


async def test_a_search_can_be_given_up() -> None:
    with SimulatedNode("a", host="127.0.0.2") as node:
        node.inject(HangFault(), paths=("/api/version",))
        plan = Search(
            networks=[read_network("127.0.0.2")],
            ports=[node.port],
            limits=QUICK._replace(answer_seconds=60.0),
        )
        task = asyncio.ensure_future(search(plan))
        while not node.requests:
            await asyncio.sleep(0.001)

        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # No task and no socket is left: the tests' watch sees to it.


# ---------------------------------------------------------------------- who is who


@needs_ipv6
@needs_socket_list
def test_addresses_of_one_socket_are_one_node() -> None:
    with SimulatedNode("all", host="::") as node:
        found = only(looked("::1", "127.0.0.0/30", ports=[node.port]))

        assert found.urls == tuple(
            f"http://{host}:{node.port}" for host in ("127.0.0.1", "127.0.0.2", "[::1]")
        )


def test_one_server_on_every_ipv4_address_is_one_node() -> None:
    with SimulatedNode("all", host="0.0.0.0") as node:
        found = only(looked("127.0.0.0/29", ports=[node.port]))

        assert len(found.urls) == 6


def test_equal_servers_on_two_ports_stay_two(a: SimulatedNode) -> None:
    with SimulatedNode("b", host="127.0.0.2", models=("llama3.2:3b", "qwen3:8b")) as b:
        result = looked("127.0.0.2", ports=[a.port, b.port])

        assert sorted(urls(result)) == sorted([(a.url,), (b.url,)])
        assert all(not found.perhaps_same_as for found in result.found)


@needs_socket_list
def test_equal_servers_on_two_addresses_stay_two(a: SimulatedNode) -> None:
    models = ("llama3.2:3b", "qwen3:8b")
    with SimulatedNode("b", host="127.0.0.3", port=a.port, models=models) as b:
        result = looked("127.0.0.0/29", ports=[a.port])

        assert urls(result) == [(a.url,), (b.url,)]
        assert all(not found.perhaps_same_as for found in result.found)


@needs_ipv6
def test_a_server_with_two_sockets_is_known_by_what_it_has_loaded() -> None:
    # As Docker publishes a port, one for IPv4 and one for IPv6; the pages are those of one server.
    model = {"name": "m", "digest": "d", "modified_at": "2026-11-01T12:00:00.123456789Z"}

    def told(until: str) -> dict[str, tuple[int, str]]:
        running = [{**model, "expires_at": until}] if until else []
        return {
            "/api/version": (200, '{"version": "0.32.15"}'),
            "/api/tags": (200, json.dumps({"models": [model]})),
            "/api/ps": (200, json.dumps({"models": running})),
        }

    def found(first: str, second: str) -> list[tuple[int, int]]:
        with pages(told(first)) as four:
            with pages(told(second), host="::1", port=four.port):
                result = looked("127.0.0.1", "::1", ports=[four.port])
        return [(len(one.urls), len(one.perhaps_same_as)) for one in result.found]

    now, later = "2026-11-26T19:30:00.123Z", "2026-11-26T19:31:00.456Z"
    assert found(now, now) == [(2, 0)]
    assert found(now, later) == [(1, 0), (1, 0)]
    assert found("", "") == [(1, 0), (1, 1)]


# ----------------------------------------------------------------- configured nodes


def test_a_configured_node_is_known(a: SimulatedNode) -> None:
    found = only(looked("127.0.0.2", ports=[a.port], known=[Node(a.url, id="rig")]))

    assert found.known_as == "rig"


def test_a_node_configured_by_name_is_known_by_address() -> None:
    with SimulatedNode("a", host="127.0.0.1") as node:
        known = Node(f"http://localhost:{node.port}", id="here")
        found = only(looked("127.0.0.1", ports=[node.port], known=[known]))

        assert (found.known_as, found.url) == ("here", node.url)


def test_a_configured_node_is_known_at_an_address_that_nobody_wrote_down() -> None:
    with SimulatedNode("a", host="0.0.0.0") as node:
        known = Node(f"http://127.0.0.9:{node.port}", id="here")
        found = only(looked("127.0.0.4", ports=[node.port], known=[known]))

        assert found.known_as == "here"
        # The configured address is in none of the networks: it was not found.
        assert found.urls == (f"http://127.0.0.4:{node.port}",)


def test_a_configured_node_that_is_another_is_not_mistaken(a: SimulatedNode) -> None:
    with SimulatedNode("b", host="127.0.0.3") as b:
        result = looked("127.0.0.2", ports=[a.port], known=[Node(b.url, id="b")])

        assert only(result).known_as is None


@pytest.mark.parametrize(
    "url", ["https://127.0.0.2:443", "http://127.0.0.2:80/ollama", f"http://{'x' * 70}:11434"]
)
def test_a_configured_node_that_no_search_could_find_does_not_matter(
    a: SimulatedNode, url: str
) -> None:
    assert only(looked("127.0.0.2", ports=[a.port], known=[Node(url)])).known_as is None


def test_a_configured_nodes_credentials_stay_here() -> None:
    told = {
        "/api/version": (200, '{"version": "0.32.15"}'),
        "/api/tags": (200, '{"models": []}'),
        "/metrics": (200, ""),
    }
    with pages(told) as server:
        node = Node(
            f"http://user:secret@127.0.0.1:{server.port}",
            headers={"X-Key": "secret"},
            exporter=f"http://user:secret@127.0.0.1:{server.port}",
        )
        looked("127.0.0.1", ports=[server.port], known=[node], exporter_ports=[server.port])

    assert {path for path, _ in server.asked} >= {"/api/version", "/metrics"}
    for _, headers in server.asked:
        assert headers.keys() <= {"host", "accept", "accept-encoding", "user-agent", "connection"}
        assert "secret" not in str(headers)
