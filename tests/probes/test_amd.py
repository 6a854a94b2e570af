from __future__ import annotations

from pathlib import Path

import pytest

from hydra_llm.probes.amd import AmdReader, is_integrated
from hydra_llm.types import Device, HostMemory

GIB = 1 << 30


class Sys:
    """A ``/sys`` of our own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.available: int | None = 40 * GIB

    def card(self, number: int, *, vram: int, used: int, gtt: int = 0, **files: str) -> Path:
        amdgpu = {
            "vendor": "0x1002",
            "device": "0x744c",
            "mem_info_vram_total": str(vram),
            "mem_info_vram_used": str(used),
            "mem_info_gtt_total": str(gtt),
            "mem_info_gtt_used": "0",
        }
        return self.bare(number, **{**amdgpu, **files})

    def bare(self, number: int, **files: str) -> Path:
        folder = self.root / f"sys/class/drm/card{number}/device"
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(f"{text}\n")
        return folder

    def read(self) -> tuple[tuple[Device, ...], tuple[str, ...]]:
        return AmdReader(self.root, lambda now: HostMemory(available_bytes=self.available)).read(7)


@pytest.fixture
def sys(tmp_path: Path) -> Sys:
    return Sys(tmp_path)


def test_a_card_tells_its_memory_without_rocm(sys: Sys) -> None:
    sys.card(
        0,
        vram=24 * GIB,
        used=5 * GIB,
        gtt=32 * GIB,
        gpu_busy_percent="37",
        unique_id="59a0c5b1d2f3a4e6",
        product_name="AMD Radeon RX 7900 XTX",
    )

    assert sys.read() == (
        (
            Device(
                key="GPU-59a0c5b1d2f3a4e6",
                vendor="amd",
                kind="discrete",
                total_bytes=24 * GIB,
                used_bytes=5 * GIB,
                free_bytes=19 * GIB,
                utilization=0.37,
                name="AMD Radeon RX 7900 XTX",
                source="sysfs",
                observed_at=7,
            ),
        ),
        (),
    )


def test_what_a_card_does_not_tell_is_unknown(sys: Sys) -> None:
    sys.card(1, vram=8 * GIB, used=GIB, unique_id="0")

    (device,), _ = sys.read()

    assert (device.key, device.name) == ("amd:card1", "AMD GPU 0x744c")
    assert (device.utilization, device.processes, device.reserved_bytes) == (None, None, None)


@pytest.mark.parametrize("busy", ["", "-1", "200", "N/A"])
def test_a_busy_share_that_is_none_is_unknown(sys: Sys, busy: str) -> None:
    sys.card(0, vram=8 * GIB, used=GIB, gpu_busy_percent=busy)

    (device,), reasons = sys.read()

    assert (device.utilization, reasons) == (None, ())


def test_cards_come_in_the_order_of_their_numbers_without_their_sockets(sys: Sys) -> None:
    for number in (10, 2):
        sys.card(number, vram=8 * GIB, used=number * GIB, unique_id=str(number))
    (sys.root / "sys/class/drm/card2-DP-1/device").mkdir(parents=True)
    (sys.root / "sys/class/drm/renderD128").mkdir()
    (sys.root / "sys/class/drm/version").touch()

    devices, reasons = sys.read()

    assert [device.key for device in devices] == ["GPU-2", "GPU-10"]
    assert reasons == ()


def test_where_a_card_is_plugged_in_tells_it_apart(sys: Sys) -> None:
    slot = sys.root / "sys/devices/pci0000:00/0000:03:00.0"
    sys.card(0, vram=8 * GIB, used=GIB)
    slot.parent.mkdir(parents=True)
    (sys.root / "sys/class/drm/card0/device").rename(slot)
    (sys.root / "sys/class/drm/card0/device").symlink_to(slot)

    (device,), _ = sys.read()

    assert device.key == "amd:0000:03:00.0"


# ------------------------------------------------------------------------ integrated


@pytest.mark.parametrize(
    ("vram", "gtt", "expected"),
    [
        (512 << 20, 16 * GIB, True),
        (4 * GIB, 16 * GIB, True),
        (4 * GIB, 16 * GIB - 1, False),
        (4 * GIB + 1, 64 * GIB, False),
        (2 * GIB, 8 * GIB, True),
        (GIB, 8 * GIB - 1, False),
        (24 * GIB, 32 * GIB, False),
    ],
)
def test_what_is_integrated_by_ollamas_test(vram: int, gtt: int, *, expected: bool) -> None:
    assert is_integrated(vram, gtt) is expected


def test_an_integrated_one_has_system_memory_too(sys: Sys) -> None:
    sys.card(0, vram=512 << 20, used=128 << 20, gtt=32 * GIB, mem_info_gtt_used=str(2 * GIB))

    (device,), reasons = sys.read()

    assert reasons == ()
    assert (device.kind, device.source) == ("unified", "sysfs + host memory")
    assert device.total_bytes == 32 * GIB + (512 << 20)
    assert device.used_bytes == 2 * GIB + (128 << 20)
    assert device.free_bytes == 30 * GIB + (384 << 20)


def test_an_integrated_one_has_no_more_than_the_system_has_available(sys: Sys) -> None:
    sys.card(0, vram=GIB, used=0, gtt=32 * GIB)
    sys.available = 3 * GIB

    (device,), _ = sys.read()

    assert (device.total_bytes, device.free_bytes) == (33 * GIB, 4 * GIB)


def test_an_integrated_one_where_nothing_tells_what_is_available(sys: Sys) -> None:
    sys.card(0, vram=GIB, used=0, gtt=32 * GIB)
    sys.available = None

    (device,), _ = sys.read()

    assert device.free_bytes == 33 * GIB


def test_without_gtt_figures_a_small_card_has_what_it_has(sys: Sys) -> None:
    card = sys.card(0, vram=2 * GIB, used=GIB)
    (card / "mem_info_gtt_total").unlink()

    (device,), reasons = sys.read()

    assert (device.kind, device.total_bytes, reasons) == ("discrete", 2 * GIB, ())


# ------------------------------------------------------------------------- failures


def test_a_machine_without_an_amd_card_is_no_failure(sys: Sys) -> None:
    assert sys.read() == ((), ())
    sys.bare(0, vendor="0x10de")
    sys.bare(1)
    assert sys.read() == ((), ())


def test_a_card_that_another_driver_runs_is_a_reason(sys: Sys) -> None:
    sys.bare(0, vendor="0x1002")

    assert sys.read() == ((), ("AMD: amd:card0: the driver amdgpu does not run it",))


def test_a_card_whose_figures_are_none_is_unknown_and_the_others_stay(sys: Sys) -> None:
    sys.card(0, vram=0, used=0, unique_id="1", mem_info_vram_total="")
    sys.card(1, vram=8 * GIB, used=GIB, unique_id="2")

    devices, reasons = sys.read()

    assert [(device.key, device.total_bytes) for device in devices] == [
        ("GPU-1", None),
        ("GPU-2", 8 * GIB),
    ]
    assert reasons == ("AMD: GPU-1: no number",)


def test_a_card_that_cannot_be_read_is_unknown(sys: Sys) -> None:
    card = sys.card(0, vram=8 * GIB, used=GIB, unique_id="1")
    (card / "mem_info_vram_used").unlink()
    (card / "mem_info_vram_used").mkdir()  # reading it fails, whoever we are

    (device,), (reason,) = sys.read()

    assert (device.key, device.total_bytes, device.free_bytes) == ("GPU-1", None, None)
    assert reason.startswith("AMD: GPU-1: ")


def test_cards_that_cannot_be_listed_are_a_reason(sys: Sys) -> None:
    (sys.root / "sys/class").mkdir(parents=True)
    (sys.root / "sys/class/drm").touch()

    devices, (reason,) = sys.read()

    assert devices == ()
    assert reason.startswith("AMD: ")
