from __future__ import annotations

import ctypes
import struct
import sys
from pathlib import Path

import pytest

from hydra_llm.probes import host as module
from hydra_llm.probes.host import read_host
from hydra_llm.types import HostMemory

GIB = 1 << 30
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads files of Linux")

MEMINFO = f"MemTotal:  {64 << 20} kB\nMemFree:  1 kB\nMemAvailable:  {40 << 20} kB\nHuge: 0\n"


def put(root: Path, **files: str) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def figures(memory: HostMemory) -> tuple[float | None, float | None]:
    total, available = memory.total_bytes, memory.available_bytes
    return (
        None if total is None else total / GIB,
        None if available is None else available / GIB,
    )


@linux
def test_without_limits_it_is_the_machines(tmp_path: Path) -> None:
    memory = read_host(7.0, root=put(tmp_path))

    assert figures(memory) == (64, 40)
    assert (memory.source, memory.observed_at) == ("/proc/meminfo", 7.0)


@linux
def test_the_tightest_control_group_cuts_it(tmp_path: Path) -> None:
    root = put(
        tmp_path,
        **{
            "proc/self/cgroup": "0::/user/app\n",
            "sys/fs/cgroup/user/app/memory.max": f"{32 * GIB}\n",
            "sys/fs/cgroup/user/app/memory.current": f"{8 * GIB}\n",
            "sys/fs/cgroup/user/memory.max": f"{16 * GIB}\n",
            "sys/fs/cgroup/user/memory.current": f"{12 * GIB}\n",
            "sys/fs/cgroup/user/memory.stat": f"anon 5\ninactive_file {2 * GIB}\n",
        },
    )

    memory = read_host(7.0, root=root)

    assert figures(memory) == (16, 6)
    assert memory.source == "/proc/meminfo, cgroup"
    assert figures(read_host(7.0, root=root, limits=False)) == (64, 40)


@linux
def test_a_group_without_limit_cuts_nothing(tmp_path: Path) -> None:
    root = put(
        tmp_path,
        **{
            "proc/self/cgroup": "0::/app\n",
            "sys/fs/cgroup/app/memory.max": "max\n",
            "sys/fs/cgroup/app/memory.current": f"{8 * GIB}\n",
        },
    )

    assert figures(read_host(7.0, root=root)) == (64, 40)


@linux
def test_a_container_sees_its_limit_at_the_top_alone(tmp_path: Path) -> None:
    root = put(
        tmp_path,
        **{
            "proc/self/cgroup": "0::/../host/path\n",
            "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{GIB}\n",
        },
    )

    assert figures(read_host(7.0, root=root)) == (4, 3)


@linux
@pytest.mark.parametrize(("limit", "expected"), [(8 * GIB, (8, 5)), (1 << 63, (64, 40))])
def test_version_1_of_control_groups(
    tmp_path: Path, limit: int, expected: tuple[float, float]
) -> None:
    base = "sys/fs/cgroup/memory/app/memory"
    root = put(
        tmp_path,
        **{
            "proc/self/cgroup": "5:cpu:/x\n4:memory:/app\n0::/\nbroken",
            f"{base}.limit_in_bytes": f"{limit}\n",
            f"{base}.usage_in_bytes": f"{4 * GIB}\n",
            f"{base}.stat": f"total_inactive_file {GIB}\n",
        },
    )

    assert figures(read_host(7.0, root=root)) == expected


@linux
def test_without_proc_the_total_is_still_known(tmp_path: Path) -> None:
    memory = read_host(7.0, root=tmp_path)

    assert (memory.total_bytes or 0) > 0
    assert memory.available_bytes is None


def test_what_cannot_be_read_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(module, "_of_this_system", broken)

    assert read_host(7.0) == HostMemory(observed_at=7.0)


def test_this_machine_has_memory() -> None:
    memory = read_host(7.0)

    assert (memory.total_bytes or 0) > (memory.available_bytes or 1) > 0


def test_macos_counts_free_and_inactive_pages() -> None:
    figures = struct.pack("=4I", 100, 7, 30, 9) + bytes(136)

    assert module._free_and_inactive(figures) == 130


def test_the_windows_structure_has_the_size_windows_wants() -> None:
    assert ctypes.sizeof(module._MemoryStatus) == 64
