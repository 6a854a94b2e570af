"""Exporters beside a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from hydra_llm.discovery import FoundExporter, FoundNode
from hydra_llm.discovery.exporters import AGENT_PORT, EXPORTER_PORTS
from hydra_llm.testing import SimulatedNode
from tests.discovery.conftest import PAGES, free_port, looked, needs_ipv6, only, pages, urls

AGENT, DCGM = PAGES["hydra-agent"], PAGES["dcgm-exporter-4.8"]
CPU_ONLY = PAGES["node-exporter-cpu-only"]


@contextmanager
def exporters(*served: str | tuple[int, str], host: str = "127.0.0.2") -> Iterator[list[int]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                pages({"/metrics": (200, one) if isinstance(one, str) else one}, host=host)
            ).port
            for one in served
        ]


def found(*served: str | tuple[int, str]) -> tuple[FoundNode, list[int]]:
    with SimulatedNode("a", host="127.0.0.2") as node, exporters(*served) as ports:
        return only(looked("127.0.0.2", ports=[node.port], exporter_ports=ports)), ports


def exporter(*served: str | tuple[int, str]) -> tuple[FoundExporter | None, list[int]]:
    node, ports = found(*served)
    return node.exporter, ports


def test_an_exporter_is_found_with_what_it_tells() -> None:
    one, [port] = exporter(DCGM)

    assert one is not None
    assert one.url == f"http://127.0.0.2:{port}/metrics"
    assert one.name == "dcgm-exporter"
    assert one.gpus >= 1
    assert one.total_bytes > 10**9
    assert len(one.uuids) == one.gpus


@pytest.mark.parametrize("page", ["node-exporter-drm-amd", "all-smi-apple"])
def test_a_number_or_a_slot_on_the_bus_tells_no_machine_from_another(page: str) -> None:
    one, _ = exporter(PAGES[page])

    assert one is not None
    assert one.gpus >= 1
    assert one.uuids == frozenset()


def test_the_first_of_the_ports_goes_before_the_others() -> None:
    first, ports = exporter(AGENT, DCGM)
    second, _ = exporter(DCGM, AGENT)

    assert first is not None
    assert second is not None
    assert first.url.endswith(f":{ports[0]}/metrics")
    assert (first.name, second.name) == ("hydra-agent", "dcgm-exporter")


@pytest.mark.parametrize(
    "useless",
    [CPU_ONLY, "", "<html>", "\x00\xff", (404, ""), (500, AGENT), (302, "/"), "x 1\n" * 2_000_000],
    ids=["cpu-only", "empty", "html", "noise", "404", "500", "302", "huge"],
)
def test_a_page_without_gpu_memory_is_no_use(useless: str | tuple[int, str]) -> None:
    alone, _ = exporter(useless)
    beside, [_, port] = exporter(useless, DCGM)

    assert alone is None
    assert beside is not None
    assert beside.url.endswith(f":{port}/metrics")


def test_one_that_wants_a_login_is_named() -> None:
    node, [port] = found((401, "a bearer token is needed"))

    assert node.exporter is None
    assert node.locked_exporters == (f"http://127.0.0.2:{port}/metrics",)


def test_nobody_need_log_in_where_another_tells() -> None:
    node, _ = found((401, ""), DCGM)

    assert node.exporter is not None
    assert node.locked_exporters == ()


def test_a_node_is_configured_with_its_exporter() -> None:
    node, [port] = found(DCGM)

    assert node.node().exporter == f"http://127.0.0.2:{port}/metrics"


def test_exporters_are_looked_for_beside_servers_alone() -> None:
    with SimulatedNode("a", host="127.0.0.2") as node:
        with exporters(DCGM, host="127.0.0.3") as ports:
            result = looked("127.0.0.0/29", ports=[node.port], exporter_ports=ports)

    assert only(result).exporter is None


@needs_ipv6
@pytest.mark.parametrize(
    ("other", "expected"),
    [("same", 1), ("another", 2)],
)
def test_gpus_tell_two_addresses_of_one_machine_from_two_machines(
    other: str, expected: int
) -> None:
    # Two sockets, for IPv4 and IPv6, of which nothing else tells whether they are one server.
    page = DCGM if other == "same" else other_gpus(DCGM)
    with SimulatedNode("a", host="127.0.0.2") as a, SimulatedNode("b", host="::1", port=a.port):
        with exporters(DCGM) as [port], pages({"/metrics": (200, page)}, host="::1", port=port):
            result = looked("127.0.0.2", "::1", ports=[a.port], exporter_ports=[port])

    assert len(urls(result)) == expected
    assert all(not one.perhaps_same_as for one in result.found)


def other_gpus(page: str) -> str:
    """The same figures, of another machine's GPUs."""
    changed = page.replace("GPU-1111", "GPU-aaaa").replace("GPU-6666", "GPU-bbbb")
    assert "GPU-aaaa" in changed
    return changed


def test_the_ports_are_those_of_the_docs() -> None:
    assert EXPORTER_PORTS[0] == AGENT_PORT == 9936
    assert set(EXPORTER_PORTS) == {9936, 9835, 9400, 8000, 9090, 5000, 9966, 9100}
    assert free_port() not in EXPORTER_PORTS
