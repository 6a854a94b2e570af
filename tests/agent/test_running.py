"""The agent as a whole: devices, page, sockets, signals."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from hydra_llm.agent import Agent, run_agent, running
from hydra_llm.agent.page import CONTENT_TYPE
from hydra_llm.agent.running import Pages
from hydra_llm.agent.server import AgentServer
from hydra_llm.exceptions import ConfigurationError
from hydra_llm.probes.exporters import ExporterWatch
from hydra_llm.probes.exporters.watch import Exported
from hydra_llm.probes.local import LocalDevices, LocalMemory
from hydra_llm.probes.nvml import NvmlReader
from hydra_llm.probes.programs import Program
from hydra_llm.types import Device, HostMemory, Node
from tests.probes.fake_nvml import GIB, Gpu, Known, Nvml

HERE = Path(__file__).parent


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Machine:
    """A card, two clocks, and the agent's pages of it."""

    def __init__(self) -> None:
        self.gpu = Gpu(compute={4711: 5 * GIB, 9: GIB})
        self.nvml = Nvml([self.gpu])
        self.readings = 0
        self.takes_seconds = 0.0
        self.clock, self.wall_clock = Clock(100.0), Clock(1_795_424_594.5)
        programs = Known({4711: Program("llama-server", "ollama"), 9: Program("game")})
        self.nvml_reader = NvmlReader(load=lambda: self.nvml, host=self.host, programs=programs)
        memory = LocalMemory(
            clock=self.clock,
            reader=LocalDevices([self.nvml_reader]),
            host=self.host,
            fresh_seconds=running.FRESH_SECONDS,
        )
        self.pages = Pages(memory, version="1.2.3", clock=self.clock, wall_clock=self.wall_clock)

    def host(self, now: float) -> HostMemory:
        self.readings += 1
        self.pass_seconds(self.takes_seconds)
        return HostMemory(total_bytes=64 * GIB, available_bytes=40 * GIB)

    def pass_seconds(self, seconds: float) -> None:
        self.clock.now += seconds
        self.wall_clock.now += seconds

    async def value(self, name: str) -> float:
        answer = await self.pages.metrics()
        [value] = values(answer.body.decode())[name].values()
        return value


def values(text: str) -> dict[str, dict[Any, float]]:
    return {
        family.name: {frozenset(one.labels.items()): one.value for one in family.samples}
        for family in text_string_to_metric_families(text)
    }


async def test_an_agent_on_loopback_is_read_by_a_stock_parser() -> None:
    machine = Machine()
    server = AgentServer(machine.pages.metrics)
    [(address, port)] = await server.listen(["127.0.0.1"], 0)
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(f"http://{address}:{port}/metrics")
    await server.close()
    machine.pages.close()

    assert (answer.status_code, answer.headers["content-type"]) == (200, CONTENT_TYPE)
    found = values(answer.text)
    assert [*found["hydra_node_gpu_memory_free_bytes"].values()] == [20.0 * GIB]
    held = found["hydra_node_gpu_process_memory_bytes"].items()
    assert {dict(about)["owner"]: value for about, value in held} == {
        "ollama": 5.0 * GIB,
        "other": float(GIB),
    }
    [about] = found["hydra_node_agent_info"]
    assert dict(about) == {"reasons": "", "version": "1.2.3"}
    assert machine.nvml.shutdowns == 1


async def test_an_agent_on_loopback_is_read_by_our_scraper_with_its_token_alone() -> None:
    machine = Machine()
    machine.wall_clock.now = time.time()  # the server says what time it is, by the machine's own
    server = AgentServer(machine.pages.metrics, token=SecretStr("s3cret"))
    [(address, port)] = await server.listen(["127.0.0.1"], 0)

    async def read(**headers: str) -> Exported:
        node = Node(
            "http://127.0.0.1:9", exporter=f"http://{address}:{port}", exporter_headers=headers
        )
        async with httpx.AsyncHTTPTransport() as transport:
            watch = ExporterWatch(
                node,
                transport,
                timeout_seconds=5.0,
                clock=machine.clock,
                wall_clock=machine.wall_clock,
            )
            watch.begin()
            return await watch.latest()

    told = await read(Authorization="Bearer s3cret")
    refused = await read(Authorization="Bearer guess")
    [nvml], _ = machine.nvml_reader.read(machine.clock.now)
    await server.close()
    machine.pages.close()

    [device] = told.devices
    assert told.trouble == ""
    assert replace(device, source="", observed_at=None) == replace(
        nvml, source="", observed_at=None
    )
    assert device.observed_at == pytest.approx(machine.clock.now, abs=1.0)
    assert told.host is not None
    assert told.host.available_bytes == 40 * GIB
    assert refused.devices == ()
    assert "401" in refused.trouble


async def test_a_reading_serves_for_a_quarter_of_a_second() -> None:
    machine = Machine()

    first = await machine.value("hydra_node_sample_timestamp_seconds")
    machine.pass_seconds(0.24)
    again = await machine.value("hydra_node_sample_timestamp_seconds")
    assert (first, again, machine.readings) == (1_795_424_594.5, 1_795_424_594.5, 1)

    machine.gpu.free = GIB
    machine.pass_seconds(0.02)
    assert await machine.value("hydra_node_gpu_memory_free_bytes") == GIB
    assert await machine.value("hydra_node_sample_timestamp_seconds") == 1_795_424_594.76
    assert machine.readings == 2


async def test_many_at_once_cost_the_driver_one_reading() -> None:
    machine = Machine()

    answers = await asyncio.gather(*(machine.pages.metrics() for _ in range(20)))

    assert {answer.status for answer in answers} == {200}
    assert machine.readings == 1


async def test_the_timestamp_says_when_the_devices_were_asked_not_when_they_had_answered() -> None:
    machine = Machine()
    machine.takes_seconds = 2.0

    assert await machine.value("hydra_node_sample_timestamp_seconds") == 1_795_424_594.5


async def test_a_reading_keeps_its_timestamp_though_the_clock_is_set() -> None:
    machine = Machine()

    first = await machine.value("hydra_node_sample_timestamp_seconds")
    machine.wall_clock.now -= 3600
    assert await machine.value("hydra_node_sample_timestamp_seconds") == first
    machine.pass_seconds(1.0)
    assert await machine.value("hydra_node_sample_timestamp_seconds") == first - 3599


async def test_a_driver_that_hangs_is_an_error_and_no_empty_page(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(running, "READ_SECONDS", 0.01)
    release = threading.Event()

    class Hanging:
        def read(self, now: float) -> Any:
            release.wait(10)
            return (), ()

        def close(self) -> None:
            """Nothing is open."""

    memory = LocalMemory(clock=Clock(0.0), reader=Hanging(), host=lambda now: HostMemory())
    pages = Pages(memory, version="1")

    answer = await pages.metrics()
    told = await pages.findings()
    pages.close()
    release.set()

    assert answer.status == 503
    assert b"hydra_node" not in answer.body
    assert told == ["the devices do not answer; /metrics says 503 as long as they do not"]


async def test_a_lost_gpu_is_a_reason_on_the_page() -> None:
    machine = Machine()
    machine.nvml.fails["nvmlDeviceGetMemoryInfo"] = 15

    found = values((await machine.pages.metrics()).body.decode())

    assert "hydra_node_gpu_memory_free_bytes" not in found
    [about] = found["hydra_node_agent_info"]
    assert dict(about)["reasons"] == "NVML: GPU-1: the GPU is lost (code 15)"


async def test_what_it_found_is_told_at_the_start() -> None:
    machine = Machine()
    assert await machine.pages.findings() == ["found NVIDIA GeForce RTX 4090, 25.8 GB"]

    machine.nvml.fails["nvmlDeviceGetMemoryInfo"] = 15
    machine.clock.now += 1
    assert await machine.pages.findings() == [
        "found GPU-1, which does not answer",
        "NVML: GPU-1: the GPU is lost (code 15)",
    ]

    machine.nvml.gpus = []
    machine.clock.now += 1
    assert await machine.pages.findings() == ["no GPU is found"]


# ------------------------------------------------------------------- what is refused


def test_a_public_address_without_a_token_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(*args: object) -> None:
        raise AssertionError("it went on")

    monkeypatch.setattr(asyncio, "run", serve)

    with pytest.raises(ConfigurationError, match="--token-file"):
        run_agent(Agent(host="0.0.0.0", port=0), say=print)


def test_a_token_in_clear_is_warned_of_where_others_can_hear_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asyncio, "run", lambda coroutine: coroutine.close())
    token = SecretStr("s3cret")
    certificate = {"tls_certificate": HERE / "certificate.pem", "tls_key": HERE / "key.pem"}
    warnings: list[str] = []

    def start(**about: Any) -> int:
        warnings.clear()
        run_agent(Agent(token=token, **about), say=print, warn=warnings.append)
        return len(warnings)

    assert start(host="0.0.0.0") == 1
    assert "clear" in warnings[0]
    assert "s3cret" not in warnings[0]
    assert start(host="0.0.0.0", **certificate) == 0
    assert start(host="127.0.0.1") == 0


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"port {port}: another program"):
            run_agent(Agent(port=port), say=print)


def test_an_address_of_another_machine_is_told() -> None:
    # Of a block that is for documents and belongs to nobody.
    with pytest.raises(ConfigurationError, match="no address of this machine"):
        run_agent(Agent(host="192.0.2.1", port=0, token=SecretStr("t")), say=print)


def test_so_it_is_where_python_tells_no_number() -> None:
    error = OSError("could not bind on any address out of [('192.0.2.1', 0)]")

    assert "no address of this machine" in running._cannot_listen(Agent(), error)


def test_the_token_is_in_no_repr() -> None:
    assert "s3cret" not in repr(Agent(token=SecretStr("s3cret")))


def test_a_device_without_a_name_is_told_by_its_key() -> None:
    assert running._found(Device(key="k", vendor="v", total_bytes=10**9)) == "found k, 1.0 GB"
