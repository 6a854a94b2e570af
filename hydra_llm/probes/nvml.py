"""Memory of this machine's NVIDIA GPUs, through ``pynvml`` of the package nvidia-ml-py.

Whatever fails is a reason, never an exception. A GPU that is lost is unknown, not empty.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra_llm.probes.host import read_uncut
from hydra_llm.probes.memory import SHARES_HOST_MEMORY
from hydra_llm.probes.programs import Programs
from hydra_llm.types import Device, DeviceProcess, HostMemory

__all__ = ["NvmlReader", "read_devices"]

RETRY_SECONDS = 60.0
"""Between two attempts to start the library where it did not start."""

WSL_LIBRARY = Path("/usr/lib/wsl/lib/libnvidia-ml.so.1")

# NVML's codes; older bindings lack names for some.
NOT_SUPPORTED = 3
NOT_FOUND = 6
FUNCTION_NOT_FOUND = 13
GPU_IS_LOST = 15
RESET_REQUIRED = 16

_MEANINGS = {
    1: "the library was shut down",
    NOT_SUPPORTED: "not supported",
    4: "no permission",
    NOT_FOUND: "not found",
    9: "the driver is not loaded",
    12: "the driver's library is not installed",
    FUNCTION_NOT_FOUND: "the driver is too old",
    GPU_IS_LOST: "the GPU is lost",
    RESET_REQUIRED: "the GPU needs a reset",
    18: "driver and library differ, as after an update; reboot",
    999: "unknown error",
}


NO_PIDS = "NVML: processes are not told: PIDs differ in this container; give it --pid=host"


class NvmlReader:
    """
    Reads the GPUs again and again. One thread at a time.

    The library is started once and kept: on a machine without persistence mode each start
    wakes the GPU.

    Args:
        load: imports the module pynvml.
        host: reads the memory that a GPU without its own shares.
        programs: tells whose a PID is.
    """

    def __init__(
        self,
        load: Callable[[], Any] | None = None,
        host: Callable[[float], HostMemory] | None = None,
        programs: Programs | None = None,
    ) -> None:
        self._load = _import_pynvml if load is None else load
        self._host = read_uncut if host is None else host
        self._programs = Programs() if programs is None else programs
        self._tells_processes = True
        self._nvml: Any = None  # the module pynvml, which carries no types
        self._retry_at = float("-inf")
        self._reasons: tuple[str, ...] = ()

    def read(self, now: float) -> tuple[tuple[Device, ...], tuple[str, ...]]:
        """The devices, and why there are fewer than one might expect. Never raises."""
        nvml = self._started(now) if self._nvml is None else self._nvml
        if nvml is None:
            return (), self._reasons
        try:
            count = int(nvml.nvmlDeviceGetCount())
        except Exception as error:  # a driver that goes away raises whatever ctypes does
            # It may work again once it is started anew.
            self.close()
            return (), (f"NVML: {_meaning(error)}",)
        devices: list[Device] = []
        reasons: list[str] = []
        self._tells_processes = self._programs.are_the_hosts()
        for index in range(count):
            devices += self._devices_at(index, now, reasons)
        if devices and not self._tells_processes:
            reasons.append(NO_PIDS)
        return tuple(devices), tuple(reasons)

    def close(self) -> None:
        """Let go of the library. Safe to call twice."""
        nvml, self._nvml = self._nvml, None
        if nvml is not None:
            with suppress(Exception):
                nvml.nvmlShutdown()

    def _started(self, now: float) -> Any:
        """The module, ready for use; None where it cannot be, for which there is a reason."""
        if now < self._retry_at:
            return None
        try:
            nvml = self._load()
            nvml.nvmlInit()
        except Exception as error:  # a foreign pynvml may raise anything on import
            self._retry_at = now + RETRY_SECONDS
            self._reasons = (f"NVML: {_meaning(error)}",)
            return None
        self._nvml = nvml
        return nvml

    # -------------------------------------------------------------- one GPU

    def _devices_at(self, index: int, now: float, reasons: list[str]) -> Iterator[Device]:
        """The GPU, or the instances it is cut into."""
        nvml = self._nvml
        key = f"nvidia:{index}"
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            key = self._text(nvml.nvmlDeviceGetUUID, handle) or key
            name = self._text(nvml.nvmlDeviceGetName, handle)
            if self._is_cut(handle):
                yield from self._instances(handle, key, name, now, reasons)
            else:
                yield self._device(handle, key, name, now)
        except Exception as error:
            reasons.append(f"NVML: {key}: {_meaning(error)}")
            yield _unknown_device(key, now)

    def _device(self, handle: Any, key: str, name: str, now: float) -> Device:
        memory = self._own_memory(handle, name)
        device = (
            self._unified(key, name, now)
            if memory is None
            else _device_of(memory, "discrete", key, name, now)
        )
        return replace(
            device, utilization=self._utilization(handle), processes=self._processes(handle)
        )

    def _own_memory(self, handle: Any, name: str) -> Any:
        """Its figures; None for a GPU that shares the host's memory."""
        try:
            memory = self._memory(handle)
        except Exception as error:
            if _code(error) != NOT_SUPPORTED:
                raise
            return None
        return None if not memory.total or SHARES_HOST_MEMORY.search(name) else memory

    def _unified(self, key: str, name: str, now: float) -> Device:
        host = self._host(now)
        total, free = host.total_bytes, host.available_bytes
        return Device(
            key=key,
            vendor="nvidia",
            kind="unified",
            total_bytes=total,
            used_bytes=None if total is None or free is None else max(0, total - free),
            free_bytes=free,
            name=name,
            source="nvml + host memory",
            observed_at=now,
        )

    def _is_cut(self, handle: Any) -> bool:
        """Whether the GPU is in MIG mode: its own figures are then a sum nobody can use."""
        mode = self._optional(lambda: self._nvml.nvmlDeviceGetMigMode(handle))
        return mode is not None and bool(mode[0])

    def _instances(
        self, parent: Any, key: str, name: str, now: float, reasons: list[str]
    ) -> Iterator[Device]:
        nvml = self._nvml
        for index in range(int(nvml.nvmlDeviceGetMaxMigDeviceCount(parent))):
            own_key = f"{key}/mig{index}"
            try:
                handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(parent, index)
                own_key = self._text(nvml.nvmlDeviceGetUUID, handle) or own_key
                device = _device_of(self._memory(handle), "mig", own_key, name, now)
                yield replace(device, processes=self._processes(handle))
            except Exception as error:
                if _code(error) == NOT_FOUND:  # the indices have gaps
                    continue
                reasons.append(f"NVML: {own_key}: {_meaning(error)}")
                yield _unknown_device(own_key, now)

    def _memory(self, handle: Any) -> Any:
        """Version 2 of the figures, which tells reserved memory apart, or else version 1."""
        nvml = self._nvml
        version = getattr(nvml, "nvmlMemory_v2", None)
        if version is not None:
            # Before driver R510: function not found.
            memory = self._optional(lambda: nvml.nvmlDeviceGetMemoryInfo(handle, version=version))
            if memory is not None:
                return memory
        return nvml.nvmlDeviceGetMemoryInfo(handle)

    def _utilization(self, handle: Any) -> float | None:
        rates = self._optional(lambda: self._nvml.nvmlDeviceGetUtilizationRates(handle))
        percent = getattr(rates, "gpu", None)
        return None if percent is None or not 0 <= percent <= 100 else percent / 100

    def _processes(self, handle: Any) -> tuple[DeviceProcess, ...] | None:
        """
        Who holds its memory, by PID; None where that is not told.

        That is so under WDDM and WSL, and for MIG without rights: there NVML lists the
        programs and not what they hold.
        """
        if not self._tells_processes:
            return None
        held: dict[int, int | None] = {}
        for work in ("Compute", "Graphics"):
            running = self._optional(partial(self._running, handle, work))
            if running is None:
                return None
            for one in running:
                # A program that does both is in both lists, each time with all that it holds.
                told = [used for used in (held.get(one.pid), one.usedGpuMemory) if used is not None]
                held[one.pid] = max(told, default=None)
        if held and all(used is None for used in held.values()):
            return None
        return tuple(self._process(pid, used) for pid, used in sorted(held.items()))

    def _running(self, handle: Any, work: str) -> Any:
        name = f"nvmlDeviceGet{work}RunningProcesses"
        try:
            return getattr(self._nvml, name)(handle)
        except Exception as error:
            if _code(error) != FUNCTION_NOT_FOUND:
                raise
            return getattr(self._nvml, f"{name}_v2")(handle)  # before driver R510

    def _process(self, pid: int, used: int | None) -> DeviceProcess:
        program = self._programs.program(pid)
        if not program.name:  # there is no /proc, or it is hidden from us
            told_name = self._text(self._nvml.nvmlSystemGetProcessName, pid)
            program = self._programs.program(pid, told_name)
        return DeviceProcess(pid=pid, name=program.name, owner=program.owner, used_bytes=used)

    def _text(self, ask: Callable[[Any], Any], about: Any) -> str:
        """A name or identifier, which old bindings give as bytes; empty if it has none."""
        value = self._optional(lambda: ask(about))
        if isinstance(value, bytes):
            return value.decode(errors="replace")
        return "" if value is None else str(value)

    @staticmethod
    def _optional(ask: Callable[[], Any]) -> Any:
        """What a GPU need not be able to tell, or None; one that is lost raises all the same."""
        try:
            return ask()
        except Exception as error:
            if _code(error) in (GPU_IS_LOST, RESET_REQUIRED):
                raise
            return None


def read_devices(now: float) -> tuple[tuple[Device, ...], tuple[str, ...]]:
    """This machine's NVIDIA devices, read once."""
    reader = NvmlReader()
    try:
        return reader.read(now)
    finally:
        reader.close()


def _device_of(memory: Any, kind: Any, key: str, name: str, now: float) -> Device:
    reserved = getattr(memory, "reserved", None)
    return Device(
        key=key,
        vendor="nvidia",
        kind=kind,
        total_bytes=int(memory.total),
        used_bytes=int(memory.used),
        free_bytes=int(memory.free),
        reserved_bytes=None if reserved is None else int(reserved),
        name=name,
        source="nvml",
        observed_at=now,
    )


def _unknown_device(key: str, now: float) -> Device:
    """One that is there and does not answer: unknown, not empty."""
    return Device(key=key, vendor="nvidia", source="nvml", observed_at=now)


def _import_pynvml() -> Any:
    if WSL_LIBRARY.exists():
        # Loaded first, it is the one that pynvml gets when it asks for that name.
        with suppress(OSError):
            ctypes.CDLL(str(WSL_LIBRARY))
    try:
        import pynvml
    except ImportError:
        raise RuntimeError("not installed; pip install 'hydra-llm[gpu]'") from None
    if not hasattr(pynvml, "nvmlDeviceGetMemoryInfo"):
        raise RuntimeError(
            "the module pynvml is not NVIDIA's; pip uninstall pynvml and install nvidia-ml-py"
        )
    return pynvml


def _code(error: BaseException) -> int | None:
    code = getattr(error, "value", None)
    return code if isinstance(code, int) else None


def _meaning(error: BaseException) -> str:
    code = _code(error)
    if code is not None:
        return f"{_MEANINGS.get(code, 'error')} (code {code})"
    return str(error) if isinstance(error, RuntimeError) else type(error).__name__
