from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

from hydra_llm.probes.apple import ASK_AGAIN_SECONDS, AppleReader, _run
from hydra_llm.types import Device, HostMemory

GIB = 1 << 30


class Mac:
    def __init__(self, memory_gib: int = 64, available_gib: int | None = 100) -> None:
        self.lines = {
            "hw.memsize": str(memory_gib * GIB),
            "hw.optional.arm64": "1",
            "machdep.cpu.brand_string": "Apple M2 Max",
            "iogpu.wired_limit_mb": "0",
        }
        self.available = available_gib
        self.commands: list[Sequence[str]] = []

    def run(self, command: Sequence[str]) -> str:
        self.commands.append(command)
        return "".join(f"{name}: {value}\n" for name, value in self.lines.items())

    def host(self, now: float) -> HostMemory:
        available = None if self.available is None else self.available * GIB
        return HostMemory(total_bytes=16 * GIB, available_bytes=available)

    def reader(self, platform: str = "darwin") -> AppleReader:
        return AppleReader(self.run, self.host, platform)

    def device(self) -> Device:
        (device,), reasons = self.reader().read(7.0)
        assert reasons == ()
        return device


def test_a_mac_tells_what_its_gpu_may_take() -> None:
    assert Mac().device() == Device(
        key="apple:0",
        vendor="apple",
        kind="unified",
        total_bytes=48 * GIB,
        free_bytes=48 * GIB,
        name="Apple M2 Max",
        source="sysctl + host memory",
        observed_at=7.0,
    )


@pytest.mark.parametrize(
    ("memory_gib", "limit_gib"), [(24, 16), (36, 24), (48, 36), (64, 48), (128, 96)]
)
def test_two_thirds_of_a_small_memory_and_three_quarters_of_a_big_one(
    memory_gib: int, limit_gib: int
) -> None:
    assert Mac(memory_gib).device().total_bytes == limit_gib * GIB


def test_a_limit_that_was_set_goes_before_the_share() -> None:
    mac = Mac()
    mac.lines["iogpu.wired_limit_mb"] = str(57344)

    assert mac.device().total_bytes == 56 * GIB


def test_an_old_macos_knows_no_such_limit() -> None:
    mac = Mac()
    del mac.lines["iogpu.wired_limit_mb"]

    assert mac.device().total_bytes == 48 * GIB


def test_no_more_is_free_than_the_system_has_available() -> None:
    assert Mac(available_gib=5).device().free_bytes == 5 * GIB
    assert Mac(available_gib=None).device().free_bytes is None


def test_without_its_size_the_host_tells_it() -> None:
    mac = Mac()
    del mac.lines["hw.memsize"]

    assert mac.device().total_bytes == 16 * GIB * 2 // 3


def test_without_any_size_there_is_a_reason() -> None:
    mac = Mac()
    mac.lines["hw.memsize"] = "?"

    reader = AppleReader(mac.run, lambda now: HostMemory(), "darwin")

    assert reader.read(7.0) == ((), ("Apple: sysctl does not tell how much memory there is",))


@pytest.mark.parametrize("arm64", ["0", None])
def test_a_mac_with_an_intel_processor_has_no_gpu_for_ollama(arm64: str | None) -> None:
    mac = Mac()
    del mac.lines["hw.optional.arm64"]
    if arm64 is not None:
        mac.lines["hw.optional.arm64"] = arm64

    assert mac.reader().read(7.0) == ((), ("Apple: no Apple silicon",))


def test_elsewhere_nothing_is_asked_and_nothing_amiss() -> None:
    mac = Mac()

    assert [mac.reader(platform).read(7.0) for platform in ("linux", "win32")] == [((), ())] * 2
    assert mac.commands == []


@pytest.mark.parametrize(
    "error", [FileNotFoundError(), subprocess.TimeoutExpired("sysctl", 2.0), ValueError()]
)
def test_a_command_that_fails_is_a_reason_and_tried_again(error: Exception) -> None:
    mac = Mac()
    failing = [error]

    def run(command: Sequence[str]) -> str:
        if failing:
            raise failing.pop()
        return mac.run(command)

    reader = AppleReader(run, mac.host, "darwin")

    assert reader.read(0.0) == ((), (f"Apple: sysctl: {type(error).__name__}",))
    assert len(reader.read(1.0)[0]) == 1


def test_the_limit_is_asked_for_once_a_minute_and_memory_each_time() -> None:
    mac = Mac()
    reader = mac.reader()

    reader.read(0.0)
    mac.lines["iogpu.wired_limit_mb"] = "2048"
    mac.available = 1
    (device,), _ = reader.read(ASK_AGAIN_SECONDS - 1)
    assert (len(mac.commands), device.free_bytes) == (1, GIB)
    (device,), _ = reader.read(ASK_AGAIN_SECONDS)
    assert (len(mac.commands), device.total_bytes) == (2, 2 * GIB)


def test_a_command_is_run_and_what_it_prints_returned_whatever_its_exit_code() -> None:
    printing = "import sys; print('hw.memsize: 1'); sys.exit(1)"

    assert _run([sys.executable, "-c", printing]).split() == ["hw.memsize:", "1"]
