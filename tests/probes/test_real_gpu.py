"""What is told of a real NVIDIA card, where there is one: beside nvidia-smi, and by our agent."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from hydra_llm.agent.page import render
from hydra_llm.probes.exporters import read_page
from hydra_llm.probes.local import LocalReading
from hydra_llm.probes.nvml import NvmlReader
from hydra_llm.probes.programs import Programs
from hydra_llm.types import Device

GIB = 1 << 30
MIB = 1 << 20
CONTEXT_BYTES = 2 * GIB
"""More than what CUDA takes for itself in a program that allocates anything."""


def cards() -> int:
    """The NVIDIA GPUs of this machine, asked without the code under test."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return 0 if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) else count.value


pytestmark = [
    pytest.mark.skipif(not cards(), reason="there is no NVIDIA GPU on this machine"),
    pytest.mark.leaks(reason="NVIDIA's library keeps an eventfd of its own"),
    pytest.mark.skipif("TEST_GPU" not in os.environ, reason="TEST_GPU=1 lets it take GPU memory"),
]

TAKES = """
import ctypes, sys
open("/proc/self/comm", "w").write(sys.argv[2])
cuda = ctypes.CDLL("libcuda.so.1")
device, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
for failed in (
    cuda.cuInit(0),
    cuda.cuDeviceGet(ctypes.byref(device), 0),
    cuda.cuCtxCreate_v2(ctypes.byref(context), 0, device),
    cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(int(sys.argv[1]))),
):
    assert not failed, failed
print("taken", flush=True)
sys.stdin.read()
"""


@contextmanager
def taken(size: int, program: str = "trainer") -> Iterator[int]:
    """A program of that name that holds so much of the first card; gives its PID."""
    process = subprocess.Popen(
        [sys.executable, "-c", TAKES, str(size), program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "taken\n"
        yield process.pid
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


@pytest.fixture
def reader() -> Iterator[NvmlReader]:
    reader = NvmlReader()
    yield reader
    reader.close()


def first(reader: NvmlReader) -> Device:
    devices, reasons = reader.read(time.monotonic())
    print([*reasons], devices[0])
    return devices[0]


def smi(*fields: str) -> list[int]:
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}"]
    told = subprocess.run(
        [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True
    )
    return [int(value) * MIB for value in told.stdout.split(",")]


def test_it_is_a_card_with_figures_that_add_up(reader: NvmlReader) -> None:
    card = first(reader)

    assert (card.vendor, card.source) == ("nvidia", "nvml")
    assert card.key.startswith("GPU-")
    assert card.total_bytes is not None
    assert card.used_bytes is not None
    assert card.free_bytes is not None
    told = card.used_bytes + card.free_bytes + (card.reserved_bytes or 0)
    assert told == pytest.approx(card.total_bytes, abs=2 * MIB)
    assert card.utilization is None or 0 <= card.utilization <= 1


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="there is no nvidia-smi to ask")
def test_it_says_what_nvidia_smi_says(reader: NvmlReader) -> None:
    card = first(reader)

    told = smi("memory.total", "memory.used", "memory.free", "memory.reserved")

    ours = [card.total_bytes, card.used_bytes, card.free_bytes, card.reserved_bytes]
    assert ours == pytest.approx(told, abs=2 * MIB)


def test_ten_gib_that_are_taken_are_free_no_more(reader: NvmlReader) -> None:
    before = first(reader).free_bytes
    assert before is not None
    size = min(10 * GIB, before // 2)

    with taken(size):
        during = first(reader).free_bytes
    after = first(reader).free_bytes

    assert during is not None
    assert size <= before - during <= size + CONTEXT_BYTES
    assert after == pytest.approx(before, abs=256 * MIB)


@pytest.mark.parametrize("program", ["trainer", "llama-server"])
def test_who_holds_them_is_told(reader: NvmlReader, program: str) -> None:
    if not Programs().are_the_hosts():
        pytest.skip("PIDs are others in this container")
    size = 2 * GIB
    with taken(size, program) as pid:
        processes = first(reader).processes

    assert processes is not None
    [ours] = [one for one in processes if one.pid == pid]
    assert ours.used_bytes is not None
    assert size <= ours.used_bytes <= size + CONTEXT_BYTES
    assert ours.name == program
    assert ours.owner == ("ollama" if program == "llama-server" else "other")


def test_our_scraper_reads_of_the_agents_page_what_nvml_said(reader: NvmlReader) -> None:
    devices, reasons = reader.read(time.monotonic())
    page = render(
        LocalReading(devices, reasons=reasons, observed_at=0.0), sampled_at=0.0, version="1"
    )

    [read, *_] = read_page(page).devices

    card = devices[0]
    assert (read.key, read.kind, read.name) == (card.key, card.kind, card.name)
    assert read.total_bytes == card.total_bytes
    assert read.free_bytes == card.free_bytes
    assert read.used_bytes == card.used_bytes


def test_the_agent_tells_it_on_loopback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "hydra_llm", "agent", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        url = next(word for word in process.stdout.readline().split() if word.startswith("http"))
        before = read_page(httpx.get(url, trust_env=False).text).devices[0].free_bytes
        with taken(3 * GIB):
            time.sleep(0.5)  # a reading serves for a quarter of a second
            during = read_page(httpx.get(url, trust_env=False).text).devices[0].free_bytes
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()

    assert before is not None
    assert during is not None
    assert 3 * GIB <= before - during <= 3 * GIB + CONTEXT_BYTES
