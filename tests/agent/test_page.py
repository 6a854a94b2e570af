"""The page, read by the stock parser."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hydra_llm.agent.page import FAMILIES, render
from hydra_llm.probes.local import LocalReading
from hydra_llm.probes.nvml import NvmlReader
from hydra_llm.probes.programs import Program
from hydra_llm.types import Device, DeviceProcess, HostMemory
from tests.probes.fake_nvml import GIB, Gpu, Known, Nvml

HERE = Path(__file__).parent

RTX = Gpu(
    name="NVIDIA GeForce RTX 3090",
    uuid="GPU-0f0e0d0c-0b0a-0908-0706-050403020100",
    total=24 * GIB,
    free=17 * GIB,
    reserved=GIB,
    busy=50,
    compute={4711: 5 * GIB},
)
GB10 = Gpu(
    name="NVIDIA GB10",
    uuid="GPU-deadbeef-0000-0000-0000-000000000001",
    v1=3,
    v2=3,
    busy=None,
    compute={1203: 34485567488},
)
RUNNER = Program("llama-server", "ollama")


def families(text: str) -> dict[str, Any]:
    """Name to meaning, kind, and value by labels."""
    return {
        family.name: (
            family.documentation,
            family.type,
            {frozenset(one.labels.items()): one.value for one in family.samples},
        )
        for family in text_string_to_metric_families(text)
    }


def sample(name: str) -> dict[str, Any]:
    return families((HERE / name).read_text(encoding="utf-8"))


def rendered(gpu: Gpu, host: HostMemory, sampled_at: float, version: str = "0") -> str:
    programs = Known({4711: RUNNER, 1203: RUNNER})
    reader = NvmlReader(load=lambda: Nvml([gpu]), host=lambda now: host, programs=programs)
    devices, reasons = reader.read(1.0)
    reading = LocalReading(devices, host, reasons)
    return render(reading, sampled_at=sampled_at, version=version)


def page(*devices: Device, **about: Any) -> dict[str, Any]:
    reading = LocalReading(devices, **about)
    return families(render(reading, sampled_at=1.5, version="1"))


def test_a_machine_with_a_card_is_told_as_in_the_sample() -> None:
    host = HostMemory(total_bytes=137438953472, available_bytes=85899345920)

    text = rendered(RTX, host, 1795424594.219613)

    assert families(text) == sample("hydra-agent.prom")
    assert list(families(text)) == list(FAMILIES)


def test_unified_memory_is_told_as_in_the_sample() -> None:
    host = HostMemory(total_bytes=128450560000, available_bytes=85899345920)

    found = families(rendered(GB10, host, 1795424600.0))

    assert found.pop("hydra_node_agent_info")[2] == {
        frozenset({("reasons", ""), ("version", "0")}): 1.0
    }
    assert found == sample("hydra-agent-gb10.prom")


@pytest.mark.parametrize(
    "name",
    [
        'say "hi"',
        "back\\slash",
        "two\nlines",
        "\\n is no new line",
        'ends with \\"',
        "\\",
        "}{,= ",
        "Grafikkarte für Öl – 显卡",
        "",
    ],
)
def test_a_label_says_what_it_is_given(name: str) -> None:
    process = DeviceProcess(pid=1, name=name, used_bytes=1)
    device = Device(key="k", vendor="v", name=name, free_bytes=3, processes=(process,))

    found = page(device, reasons=(name,))

    [(about, value)] = found["hydra_node_gpu_memory_free_bytes"][2].items()
    assert (dict(about)["name"], value) == (name, 3.0)
    [held] = found["hydra_node_gpu_process_memory_bytes"][2]
    assert dict(held)["comm"] == name
    [info] = found["hydra_node_agent_info"][2]
    assert dict(info)["reasons"] == name


@pytest.mark.parametrize("character", ["\r", "\x0b", "\x1c", "\x00", "\x85", "\u2028", "\udcff"])
def test_what_a_reader_may_take_for_the_end_of_a_line_is_replaced(character: str) -> None:
    device = Device(key="k", vendor="v", name=f"a{character}b", free_bytes=3)

    text = render(LocalReading((device,)), sampled_at=1.5, version="1")

    assert 'name="a\ufffdb"' in text
    assert text.encode().decode().splitlines() == text.split("\n")[:-1]


def test_a_forged_name_adds_no_sample() -> None:
    forged = 'x"} 1\nhydra_node_gpu_memory_free_bytes{uuid="other"} 99e9\n#'
    process = DeviceProcess(pid=1, name=forged, used_bytes=1)
    device = Device(key="k", vendor="v", free_bytes=3, processes=(process,))

    found = page(device)

    assert list(found["hydra_node_gpu_memory_free_bytes"][2].values()) == [3.0]
    assert len(found["hydra_node_gpu_process_memory_bytes"][2]) == 1


def test_what_is_unknown_is_not_on_the_page() -> None:
    lost = Device(key="GPU-1", vendor="nvidia", source="nvml")

    found = page(lost, host=HostMemory(), reasons=("NVML: GPU-1: the GPU is lost", "b"))

    assert set(found) == {"hydra_node_sample_timestamp_seconds", "hydra_node_agent_info"}
    [info] = found["hydra_node_agent_info"][2]
    assert dict(info)["reasons"] == "NVML: GPU-1: the GPU is lost; b"


def test_zero_is_on_the_page() -> None:
    full = Device(key="k", vendor="v", free_bytes=0, utilization=0.0)

    found = page(full)

    assert list(found["hydra_node_gpu_memory_free_bytes"][2].values()) == [0.0]
    assert list(found["hydra_node_gpu_utilization_ratio"][2].values()) == [0.0]


def test_programs_that_hold_an_unknown_part_are_left_out() -> None:
    processes = (DeviceProcess(pid=1), DeviceProcess(pid=2, used_bytes=7, owner="ollama"))

    found = page(Device(key="k", vendor="v", processes=processes))

    [(about, value)] = found["hydra_node_gpu_process_memory_bytes"][2].items()
    assert (dict(about)["pid"], dict(about)["owner"], value) == ("2", "ollama", 7.0)


def test_each_device_has_its_number_and_no_line_is_there_twice() -> None:
    devices = [
        Device(key="GPU-a", vendor="nvidia", free_bytes=1),
        Device(key="MIG-b", vendor="nvidia", kind="mig", free_bytes=2),
        Device(key="apple:0", vendor="apple", kind="unified", free_bytes=3),
    ]

    found = page(*devices)["hydra_node_gpu_memory_free_bytes"][2]

    told = {dict(about)["gpu"]: (dict(about)["uuid"], dict(about)["kind"]) for about in found}
    assert told == {
        "0": ("a", "discrete"),
        "1": ("MIG-b", "mig"),
        "2": ("apple:0", "unified"),
    }


def test_bytes_are_whole_numbers_however_many() -> None:
    many = Device(key="k", vendor="v", total_bytes=(1 << 53) - 1)

    text = render(LocalReading((many,)), sampled_at=1795424594.25, version="1")

    assert f" {(1 << 53) - 1}\n" in text
    assert "hydra_node_sample_timestamp_seconds 1795424594.25\n" in text
    assert not any(
        math.isnan(value) for _, _, samples in families(text).values() for value in samples.values()
    )


def test_used_is_left_out_where_others_use_the_same_memory() -> None:
    shared = Device(key="k", vendor="nvidia", kind="unified", used_bytes=5, free_bytes=1)

    assert "hydra_node_gpu_memory_used_bytes" not in page(shared)
    assert "hydra_node_gpu_memory_used_bytes" in page(replace(shared, kind="discrete"))
