"""A made-up NVML: as the module pynvml has it, and with its ways to fail."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from hydra_llm.probes.programs import Program, Programs

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
    busy: int | None = 50
    """In percent; None is not supported."""
    compute: dict[int, int | None] | int = field(default_factory=dict)
    """What each PID holds; or the error that asking gives."""
    graphics: dict[int, int | None] | int = field(default_factory=dict)


@dataclass
class Nvml:
    gpus: list[Gpu] = field(default_factory=list)
    names: dict[int, Any] = field(default_factory=dict)
    """What NVML itself calls a PID."""
    fails: dict[str, int] = field(default_factory=dict)
    """The code that a function of this name fails with."""
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

    def __getattribute__(self, name: str) -> Any:
        fails = object.__getattribute__(self, "fails")
        if name not in fails:
            return object.__getattribute__(self, name)

        def fail(*args: Any, **kwargs: Any) -> None:
            raise Code(fails[name])

        return fail

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:  # noqa: N802
        return self.gpus[index]

    def nvmlDeviceGetUtilizationRates(self, gpu: Gpu) -> Any:  # noqa: N802
        if gpu.busy is None:
            raise Code(3)
        return SimpleNamespace(gpu=gpu.busy, memory=7)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: Gpu) -> Any:  # noqa: N802
        return running(gpu.compute)

    def nvmlDeviceGetGraphicsRunningProcesses(self, gpu: Gpu) -> Any:  # noqa: N802
        return running(gpu.graphics)

    def nvmlDeviceGetComputeRunningProcesses_v2(self, gpu: Gpu) -> Any:  # noqa: N802
        return running(gpu.compute)

    def nvmlDeviceGetGraphicsRunningProcesses_v2(self, gpu: Gpu) -> Any:  # noqa: N802
        return running(gpu.graphics)

    def nvmlSystemGetProcessName(self, pid: int) -> Any:  # noqa: N802
        if pid not in self.names:
            raise Code(6)
        return self.names[pid]

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


def running(held: dict[int, int | None] | int) -> list[Any]:
    if isinstance(held, int):
        raise Code(held)
    return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in held.items()]


@dataclass
class Known(Programs):
    """Programs by PID, without a ``/proc``."""

    programs: dict[int, Program] = field(default_factory=dict)
    is_host: bool = True

    def are_the_hosts(self) -> bool:
        return self.is_host

    def program(self, pid: int, told_name: str = "") -> Program:
        return self.programs.get(pid, Program(told_name))
