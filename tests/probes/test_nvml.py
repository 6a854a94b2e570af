"""Every row of vram/FACTS.md section 1.2, against a made-up NVML."""

from __future__ import annotations

import builtins
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hydra_llm.probes.nvml import RETRY_SECONDS, NvmlReader, read_devices
from hydra_llm.types import Device, HostMemory

GIB = 1 << 30


class Code(Exception):  # noqa: N818  # pynvml's NVMLError has such a `value`
    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


@dataclass
class Gpu:
    total: int = 24 * GIB
    free: int = 20 * GIB
    reserved: int = GIB
    name: Any = "NVIDIA GeForce RTX 4090"
    uuid: Any = "GPU-1"
    v1: int | None = None
    """The error that version 1 answers with."""
    v2: int | None = None
    lost: int | None = None
    mig: list[Gpu | None] | None = None


@dataclass
class Nvml:
    gpus: list[Gpu] = field(default_factory=list)
    nvmlMemory_v2: int = 0x02000028  # noqa: N815
    init_error: int | None = None
    count_error: int | None = None
    inits: int = 0
    shutdowns: int = 0

    def nvmlInit(self) -> None:  # noqa: N802
        self.inits += 1
        if self.init_error is not None:
            raise Code(self.init_error)

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.shutdowns += 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        if self.count_error is not None:
            raise Code(self.count_error)
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:  # noqa: N802
        return self.gpus[index]

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> Any:  # noqa: N802
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu: Gpu) -> Any:  # noqa: N802
        return gpu.name

    def nvmlDeviceGetMigMode(self, gpu: Gpu) -> list[int]:  # noqa: N802
        if gpu.mig is None:
            raise Code(3)
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: Gpu) -> int:  # noqa: N802
        return len(gpu.mig or [])

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: Gpu, index: int) -> Gpu:  # noqa: N802
        instance = (gpu.mig or [])[index]
        if instance is None:
            raise Code(6)
        return instance

    def nvmlDeviceGetMemoryInfo(self, gpu: Gpu, version: int | None = None) -> Any:  # noqa: N802
        error = gpu.lost or (gpu.v1 if version is None else gpu.v2)
        if error is not None:
            raise Code(error)
        used = gpu.total - gpu.free
        if version is None:
            return SimpleNamespace(total=gpu.total, free=gpu.free, used=used)
        return SimpleNamespace(
            total=gpu.total, free=gpu.free, used=used - gpu.reserved, reserved=gpu.reserved
        )


def host(now: float) -> HostMemory:
    return HostMemory(total_bytes=119 * GIB, available_bytes=100 * GIB, observed_at=now)


def reader(nvml: Any) -> NvmlReader:
    return NvmlReader(load=lambda: nvml, host=host)


def read(*gpus: Gpu) -> tuple[tuple[Device, ...], tuple[str, ...]]:
    return reader(Nvml(list(gpus))).read(1.0)


def test_version_2_tells_reserved_memory_apart() -> None:
    (device,), reasons = read(Gpu())

    assert not reasons
    assert device == Device(
        key="GPU-1",
        vendor="nvidia",
        kind="discrete",
        total_bytes=24 * GIB,
        used_bytes=3 * GIB,
        free_bytes=20 * GIB,
        reserved_bytes=GIB,
        name="NVIDIA GeForce RTX 4090",
        source="nvml",
        observed_at=1.0,
    )


def test_before_driver_r510_version_1_serves() -> None:
    (device,), reasons = read(Gpu(v2=13))

    assert not reasons
    assert (device.used_bytes, device.reserved_bytes) == (4 * GIB, None)
    assert device.free_bytes == 20 * GIB


def test_a_binding_that_knows_no_version_2_is_asked_for_version_1() -> None:
    nvml = Nvml([Gpu(v2=2)])
    nvml.nvmlMemory_v2 = None  # type: ignore[assignment]

    (device,), _ = reader(nvml).read(1.0)

    assert device.free_bytes == 20 * GIB


def test_old_bindings_give_bytes() -> None:
    (device,), _ = read(Gpu(name=b"Tesla T4", uuid=b"GPU-9"))

    assert (device.name, device.key) == ("Tesla T4", "GPU-9")


def test_several_gpus_are_several_devices() -> None:
    devices, _ = read(Gpu(uuid="GPU-1"), Gpu(uuid="GPU-2", total=8 * GIB, free=GIB))

    assert [device.key for device in devices] == ["GPU-1", "GPU-2"]


def test_mig_instances_stand_in_for_the_gpu_they_are_cut_from() -> None:
    parts = [Gpu(uuid="MIG-1", total=10 * GIB, free=9 * GIB), None, Gpu(uuid="MIG-2")]

    devices, reasons = read(Gpu(mig=parts))

    assert not reasons
    assert [(device.key, device.kind) for device in devices] == [("MIG-1", "mig"), ("MIG-2", "mig")]


def test_a_mig_instance_without_an_answer_is_unknown() -> None:
    devices, reasons = read(Gpu(mig=[Gpu(uuid="MIG-1", v1=4, v2=4), Gpu(uuid="MIG-2")]))

    assert [device.total_bytes for device in devices] == [None, 24 * GIB]
    assert reasons == ("NVML: MIG-1: no permission (code 4)",)


@pytest.mark.parametrize("code", [15, 16])
def test_a_lost_gpu_is_unknown_and_the_others_stay(code: int) -> None:
    devices, reasons = read(Gpu(uuid="GPU-1", lost=code), Gpu(uuid="GPU-2"))

    lost, well = devices
    assert (lost.key, lost.total_bytes, lost.free_bytes) == ("GPU-1", None, None)
    assert well.free_bytes == 20 * GIB
    assert "GPU-1: the GPU" in reasons[0]


def test_a_gpu_without_a_handle_is_unknown() -> None:
    nvml = Nvml([Gpu()])
    nvml.nvmlDeviceGetHandleByIndex = lambda index: (_ for _ in ()).throw(Code(15))  # type: ignore[method-assign]

    (device,), reasons = reader(nvml).read(1.0)

    assert (device.key, device.total_bytes) == ("nvidia:0", None)
    assert reasons == ("NVML: nvidia:0: the GPU is lost (code 15)",)


@pytest.mark.parametrize(
    "gpu",
    [
        Gpu(name="NVIDIA GB10", v1=3, v2=3),
        Gpu(name="nvgpu", total=0, free=0, reserved=0),
        Gpu(name="NVIDIA N1X", total=8128 << 20, free=8000 << 20),
    ],
    ids=["not supported", "total of zero", "small pool"],
)
def test_unified_memory_is_the_hosts(gpu: Gpu) -> None:
    (device,), reasons = read(gpu)

    assert not reasons
    assert (device.kind, device.source) == ("unified", "nvml + host memory")
    assert (device.total_bytes, device.free_bytes) == (119 * GIB, 100 * GIB)
    assert device.used_bytes == 19 * GIB


@pytest.mark.parametrize(
    ("code", "meaning"),
    [
        (12, "the driver's library is not installed"),
        (9, "the driver is not loaded"),
        (4, "no permission"),
        (18, "reboot"),
        (999, "unknown error"),
        (777, "error (code 777)"),
    ],
)
def test_whatever_keeps_nvml_from_starting_is_a_reason(code: int, meaning: str) -> None:
    devices, (reason,) = reader(Nvml(init_error=code)).read(1.0)

    assert devices == ()
    assert meaning in reason


def test_a_library_that_does_not_start_is_tried_again_after_a_minute() -> None:
    nvml = Nvml([Gpu()], init_error=9)
    asked = reader(nvml)

    assert asked.read(0.0) == asked.read(RETRY_SECONDS - 1)
    assert nvml.inits == 1
    nvml.init_error = None
    assert len(asked.read(RETRY_SECONDS)[0]) == 1


def test_the_library_is_started_once_for_many_readings() -> None:
    nvml = Nvml([Gpu()])
    asked = reader(nvml)

    for now in range(3):
        asked.read(float(now))
    asked.close()
    asked.close()

    assert (nvml.inits, nvml.shutdowns) == (1, 1)


def test_a_driver_that_goes_away_is_a_reason_and_its_library_started_anew() -> None:
    nvml = Nvml([Gpu()])
    asked = reader(nvml)
    asked.read(0.0)

    nvml.count_error = 1
    assert asked.read(1.0) == ((), ("NVML: the library was shut down (code 1)",))
    nvml.count_error = None
    assert len(asked.read(2.0)[0]) == 1
    assert nvml.inits == 2


# ------------------------------------------------------------------- the module pynvml


def test_a_foreign_pynvml_is_told_from_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", ModuleType("pynvml"))

    devices, (reason,) = read_devices(1.0)

    assert devices == ()
    assert "not NVIDIA's" in reason


def test_without_the_package_the_reason_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)

    assert read_devices(1.0) == ((), ("NVML: not installed; pip install 'hydra-llm[gpu]'",))


def test_a_shim_that_warns_on_import_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def importing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pynvml":
            raise FutureWarning("The pynvml package is deprecated.")
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", importing)

    assert read_devices(1.0) == ((), ("NVML: FutureWarning",))


def test_a_machine_is_read_without_an_exception_whatever_it_has() -> None:
    devices, reasons = read_devices(1.0)

    assert devices or reasons
