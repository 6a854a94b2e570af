"""Every call to NVML that there is, and each way in which it fails, against a made-up NVML."""

from __future__ import annotations

import builtins
import ctypes
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hydra_llm.probes import nvml as module
from hydra_llm.probes.nvml import NO_PIDS, RETRY_SECONDS, NvmlReader, read_devices
from hydra_llm.probes.programs import Program, Programs
from hydra_llm.types import Device, DeviceProcess, HostMemory
from tests.probes.fake_nvml import GIB, Code, Gpu, Known, Nvml


def host(now: float) -> HostMemory:
    return HostMemory(total_bytes=119 * GIB, available_bytes=100 * GIB, observed_at=now)


def reader(nvml: Any, programs: Programs | None = None) -> NvmlReader:
    return NvmlReader(load=lambda: nvml, host=host, programs=programs or Known())


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
        utilization=0.5,
        processes=(),
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
    "call",
    [
        "nvmlDeviceGetHandleByIndex",
        "nvmlDeviceGetUUID",
        "nvmlDeviceGetName",
        "nvmlDeviceGetMigMode",
        "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetUtilizationRates",
        "nvmlDeviceGetComputeRunningProcesses",
        "nvmlDeviceGetGraphicsRunningProcesses",
    ],
)
@pytest.mark.parametrize("code", [15, 16])
def test_whichever_call_finds_a_gpu_lost_all_of_it_is_unknown(call: str, code: int) -> None:
    (device,), (reason,) = reader(Nvml([Gpu()], fails={call: code})).read(1.0)

    assert device == Device(key=device.key, vendor="nvidia", source="nvml", observed_at=1.0)
    assert f"the GPU {'is lost' if code == 15 else 'needs a reset'} (code {code})" in reason


def test_a_gpu_that_is_lost_while_its_instances_are_counted_is_unknown() -> None:
    nvml = Nvml([Gpu(mig=[Gpu(uuid="MIG-1")])], fails={"nvmlDeviceGetMaxMigDeviceCount": 15})

    (device,), _ = reader(nvml).read(1.0)

    assert (device.key, device.total_bytes) == ("GPU-1", None)


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


# ------------------------------------------------------------------ busy, and by whom


@pytest.mark.parametrize(("percent", "share"), [(0, 0.0), (37, 0.37), (100, 1.0)])
def test_how_busy_it_is_is_a_share(percent: int, share: float) -> None:
    (device,), _ = read(Gpu(busy=percent))

    assert device.utilization == share


@pytest.mark.parametrize("percent", [None, 101, 0xFFFFFFFF])
def test_a_gpu_that_does_not_tell_how_busy_it_is_is_known_all_the_same(percent: int | None) -> None:
    (device,), reasons = read(Gpu(busy=percent))

    assert not reasons
    assert (device.utilization, device.free_bytes) == (None, 20 * GIB)


def test_a_mig_instance_is_not_asked_how_busy_it_is() -> None:
    (device,), _ = read(Gpu(mig=[Gpu(uuid="MIG-1", busy=50, compute={7: GIB})]))

    assert device.utilization is None
    assert device.processes == (DeviceProcess(pid=7, used_bytes=GIB),)


def test_who_holds_its_memory_computing_or_drawing() -> None:
    gpu = Gpu(compute={4711: 5 * GIB, 99: GIB}, graphics={7: 1 << 20, 99: GIB})
    programs = Known({4711: Program("llama-server", "ollama"), 7: Program("Xorg")})

    (device,), reasons = reader(Nvml([gpu]), programs).read(1.0)

    assert not reasons
    assert device.processes == (
        DeviceProcess(pid=7, name="Xorg", used_bytes=1 << 20),
        DeviceProcess(pid=99, used_bytes=GIB),
        DeviceProcess(pid=4711, name="llama-server", owner="ollama", used_bytes=5 * GIB),
    )


@pytest.mark.parametrize(
    "gpu",
    [
        Gpu(compute={4: None}, graphics={5: None}),
        Gpu(compute={4: None}),
        Gpu(compute=4),
        Gpu(graphics=4),
        Gpu(compute=3, graphics=3),
    ],
    ids=["WDDM", "WSL", "no permission", "drawing alone", "not supported"],
)
def test_where_the_driver_does_not_tell_who_holds_its_memory_it_is_unknown(gpu: Gpu) -> None:
    (device,), reasons = read(gpu)

    assert not reasons
    assert (device.processes, device.free_bytes) == (None, 20 * GIB)


def test_one_program_of_which_nothing_is_told_takes_none_of_the_others_away() -> None:
    (device,), _ = read(Gpu(compute={4: None, 5: GIB}, graphics={5: None}))

    assert device.processes == (
        DeviceProcess(pid=4, used_bytes=None),
        DeviceProcess(pid=5, used_bytes=GIB),
    )


def test_a_mig_instance_whose_programs_we_may_not_see() -> None:
    (device,), reasons = read(Gpu(mig=[Gpu(uuid="MIG-1", compute={7: None})]))

    assert not reasons
    assert (device.processes, device.total_bytes) == (None, 24 * GIB)


def test_unified_memory_tells_its_programs() -> None:
    gpu = Gpu(name="NVIDIA GB10", v1=3, v2=3, compute={1203: 32 * GIB}, busy=None)
    (device,), _ = reader(Nvml([gpu]), Known({1203: Program("llama-server", "ollama")})).read(1.0)

    assert device.kind == "unified"
    assert device.processes == (
        DeviceProcess(pid=1203, name="llama-server", owner="ollama", used_bytes=32 * GIB),
    )


def test_before_driver_r510_an_older_call_tells_the_programs() -> None:
    missing = {f"nvmlDeviceGet{work}RunningProcesses": 13 for work in ("Compute", "Graphics")}

    (device,), _ = reader(Nvml([Gpu(compute={7: GIB})], fails=missing)).read(1.0)

    assert device.processes == (DeviceProcess(pid=7, used_bytes=GIB),)


def test_without_proc_nvml_names_the_programs() -> None:
    path = b"C:\\Users\\me\\AppData\\Local\\Programs\\Ollama\\lib\\ollama\\llama-server.exe"
    nvml = Nvml([Gpu(compute={7: GIB, 8: GIB})], names={7: path})

    (device,), _ = reader(nvml, Programs(Path("nowhere"))).read(1.0)

    assert device.processes == (
        DeviceProcess(pid=7, name="llama-server", owner="ollama", used_bytes=GIB),
        DeviceProcess(pid=8, used_bytes=GIB),
    )


def test_a_container_with_pids_of_its_own_names_nobody_and_says_why() -> None:
    nvml = Nvml([Gpu(compute={7: GIB})])

    (device,), reasons = reader(nvml, Known(is_host=False)).read(1.0)

    assert device.processes is None
    assert reasons == (NO_PIDS,)
    assert reader(Nvml([]), Known(is_host=False)).read(1.0) == ((), ())


# ------------------------------------------------------------------- the module pynvml


def test_wsls_own_library_goes_before_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(ctypes, "CDLL", opened.append)
    foreign = ModuleType("pynvml")
    monkeypatch.setitem(sys.modules, "pynvml", foreign)
    library = tmp_path / "libnvidia-ml.so.1"
    monkeypatch.setattr(module, "WSL_LIBRARY", library)

    read_devices(1.0)
    assert opened == []
    library.touch()
    read_devices(1.0)
    assert opened == [str(library)]


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


@pytest.mark.leaks(reason="NVIDIA's library, where there is one, keeps an eventfd of its own")
def test_a_machine_is_read_without_an_exception_whatever_it_has() -> None:
    devices, reasons = read_devices(1.0)

    assert devices or reasons
