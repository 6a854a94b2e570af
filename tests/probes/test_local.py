from __future__ import annotations

from typing import Any

from hydra_llm.probes.amd import AmdReader
from hydra_llm.probes.apple import AppleReader
from hydra_llm.probes.local import LocalDevices, LocalMemory
from hydra_llm.probes.nvml import NvmlReader
from hydra_llm.types import Device, HostMemory

GIB = 1 << 30


class Source:
    def __init__(self, *devices: Device, reasons: tuple[str, ...] = ()) -> None:
        self.answer = devices, reasons
        self.is_closed = False

    def read(self, now: float) -> Any:
        return self.answer

    def close(self) -> None:
        self.is_closed = True


class Broken(Source):
    def read(self, now: float) -> Any:
        raise RuntimeError("no")

    def close(self) -> None:
        raise RuntimeError("no")


def gpu(key: str, vendor: str = "nvidia", kind: Any = "discrete") -> Device:
    return Device(key=key, vendor=vendor, kind=kind, total_bytes=GIB, free_bytes=GIB)


def test_nvml_is_asked_first_then_amd_then_apple() -> None:
    assert [type(one) for one in LocalDevices()._readers] == [NvmlReader, AmdReader, AppleReader]


def test_what_several_sources_know_comes_in_their_order_with_all_reasons() -> None:
    devices = LocalDevices(
        [Source(reasons=("NVML: a",)), Source(gpu("b", "amd"), reasons=("AMD: c",))]
    )

    assert devices.read(1.0) == ((gpu("b", "amd"),), ("NVML: a", "AMD: c"))


def test_a_machine_of_which_no_source_knows_has_no_device() -> None:
    assert LocalDevices([Source(), Source()]).read(1.0) == ((), ())


def test_a_source_that_fails_is_a_reason_and_takes_no_other_with_it() -> None:
    last = Source(gpu("a"))
    devices = LocalDevices([Broken(), last])

    assert devices.read(1.0) == ((gpu("a"),), ("Broken: RuntimeError",))
    devices.close()
    assert last.is_closed


def test_an_integrated_amd_gpu_beside_another_is_left_out_and_it_is_said() -> None:
    integrated = gpu("GPU-7", "amd", "unified")

    for other in (gpu("a"), gpu("b", "amd"), gpu("c", "nvidia", "unified")):
        assert LocalDevices([Source(other), Source(integrated)]).read(1.0) == (
            (other,),
            ("AMD: GPU-7: integrated, left out beside another GPU",),
        )


def test_an_integrated_amd_gpu_alone_counts() -> None:
    integrated = gpu("GPU-7", "amd", "unified")

    assert LocalDevices([Source(), Source(integrated)]).read(1.0) == ((integrated,), ())


async def test_a_reading_tells_when_it_was_and_serves_as_long_as_asked() -> None:
    now = 5.0
    memory = LocalMemory(
        clock=lambda: now,
        reader=Source(gpu("a")),
        host=lambda now: HostMemory(observed_at=now),
        fresh_seconds=0.25,
    )

    assert (await memory.read(5.0)).observed_at == 5.0
    now = 5.2
    assert (await memory.read(5.0)).observed_at == 5.0
    now = 5.25
    assert (await memory.read(5.0)).observed_at == 5.25
