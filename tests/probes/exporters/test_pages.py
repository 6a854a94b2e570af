"""Each exporter's page makes the right devices, and no page at all makes an exception."""

from __future__ import annotations

import re
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.probes.exporters import ExporterReading, read_page
from hydra_llm.probes.exporters.page import MAX_LINE, MAX_WANTED
from hydra_llm.types import Device, DeviceProcess, HostMemory

PAGES = {file.stem: file.read_text() for file in Path(__file__).parent.glob("pages/*.prom")}
MIB = 1 << 20
GIB = 1 << 30


def read(name: str) -> ExporterReading:
    return read_page(PAGES[name])


def other(pid: int, name: str, used: int) -> DeviceProcess:
    return DeviceProcess(pid=pid, name=name, owner="other", used_bytes=used)


def nvidia(key: str, **about: Any) -> Device:
    return Device(key=f"GPU-{key}", vendor="nvidia", **about)


ZEROS = "00000000-0000-0000-0000-000000000000"
RTX_3090 = "0f0e0d0c-0b0a-0908-0706-050403020100"


def test_there_are_twenty_pages() -> None:
    assert len(PAGES) == 20


# ------------------------------------------------------------------ nvidia_gpu_exporter


def test_a_loaded_h100_and_who_holds_it() -> None:
    reading = read("nvidia_gpu_exporter-h100-load")

    assert reading == ExporterReading(
        exporter="nvidia_gpu_exporter",
        devices=(
            nvidia(
                ZEROS,
                name="NVIDIA H100 80GB HBM3",
                total_bytes=85_520_809_984,
                used_bytes=20_780_679_168,
                free_bytes=64_238_911_488,
                reserved_bytes=502_267_904,
                utilization=1.0,
                processes=(
                    other(11327, "memhog", 2_690_646_016),
                    other(11328, "memhog", 1_616_904_192),
                    other(11345, "gpu_burn", 16_452_157_440),
                ),
                source="nvidia_gpu_exporter",
            ),
        ),
    )
    held = sum(one.used_bytes or 0 for one in reading.devices[0].processes or ())
    assert (reading.devices[0].used_bytes or 0) - held == 20 * MIB


def test_a_desktop_card() -> None:
    [card] = read("nvidia_gpu_exporter-rtx4080s-load").devices

    assert (card.name, card.total_bytes, card.free_bytes) == (
        "NVIDIA GeForce RTX 4080 SUPER",
        17_171_480_576,
        15_172_894_720,
    )
    assert [one.name for one in card.processes or ()] == ["kwin_wayland", "ffmpeg", "ffmpeg"]


def test_windows_tells_of_no_program_and_so_it_is_unknown_who_holds_it() -> None:
    [card] = read("nvidia_gpu_exporter-windows-wddm").devices

    assert (card.total_bytes, card.used_bytes, card.free_bytes, card.reserved_bytes) == (
        8_589_934_592,
        1_432_354_816,
        6_943_670_272,
        214_958_080,
    )
    assert card.processes is None


def test_a_gpu_that_mig_has_cut_counts_by_its_instances_and_a_whole_one_as_it_is() -> None:
    reading = read("nvidia_gpu_exporter-mig-demo")

    cut, whole = "1c67088e-9ecb-4564-bb97-6151ecc2ef64", "ef427e4f-1970-42f2-ab0c-ecf0e56a33b9"
    assert [(one.key, one.kind, one.total_bytes, one.free_bytes) for one in reading.devices] == [
        (f"GPU-{whole}", "discrete", 150_754_820_096, 116_178_026_496),
        (f"GPU-{cut}/2", "mig", 76_235_669_504, 32_971_181_613),
        (f"GPU-{cut}/7", "mig", 19_327_352_832, 18_256_575_223),
    ]
    assert {one.name for one in reading.devices} == {"NVIDIA H200"}
    assert [[p.pid for p in one.processes or ()] for one in reading.devices] == [
        [10291, 10293, 10309],
        [10293, 10309],
        [10291],
    ]
    # How busy it is, is told of a whole GPU only.
    assert [one.utilization for one in reading.devices] == [1.0, None, None]


def test_instances_give_away_a_cut_gpu_whose_mode_is_not_told() -> None:
    page = PAGES["nvidia_gpu_exporter-mig-demo"]
    silent = "\n".join(line for line in page.splitlines() if "mig_mode_current" not in line)

    assert read_page(silent).devices == read_page(page).devices


def test_of_a_cut_gpu_without_instances_nothing_is_known() -> None:
    page = PAGES["nvidia_gpu_exporter-mig-demo"]
    bare = "\n".join(line for line in page.splitlines() if "mig_memory" not in line)

    reading = read_page(bare)

    assert [one.key for one in reading.devices] == ["GPU-ef427e4f-1970-42f2-ab0c-ecf0e56a33b9"]
    assert "MIG instances" in reading.reasons[0]


# ------------------------------------------------------------------------ dcgm-exporter


def test_dcgm_tells_a_gpu_in_three_parts() -> None:
    about: Any = {
        "name": "NVIDIA H100 80GB HBM3",
        "total_bytes": (61262 + 19818 + 479) * MIB,
        "reserved_bytes": 479 * MIB,
        "source": "dcgm-exporter",
    }
    assert read("dcgm-exporter-4.8") == ExporterReading(
        exporter="dcgm-exporter",
        refresh_seconds=30.0,
        devices=(
            nvidia(
                "11111111-2222-3333-4444-555555555555",
                used_bytes=19818 * MIB,
                free_bytes=61262 * MIB,
                utilization=1.0,
                **about,
            ),
            nvidia(
                "66666666-7777-8888-9999-000000000000",
                used_bytes=1 * MIB,
                free_bytes=81079 * MIB,
                utilization=0.0,
                **about,
            ),
        ),
    )


def test_an_older_dcgm_lacks_the_reserved_part_and_prints_blanks_as_numbers() -> None:
    reading = read("dcgm-exporter-3.x-k8s")

    assert reading.devices == (
        nvidia(
            "604ac76c-d9cf-fef3-62e9-d92044ab6e52",
            name="Tesla T4",
            total_bytes=(8861 + 6048) * MIB,
            used_bytes=6048 * MIB,
            free_bytes=8861 * MIB,
            utilization=0.37,
            source="dcgm-exporter",
        ),
    )
    assert reading.reasons == ()


def test_dcgm_tells_of_instances() -> None:
    devices = read("dcgm-exporter-mig").devices

    card = "GPU-aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
    assert [(one.key, one.kind, one.total_bytes, one.free_bytes) for one in devices] == [
        (f"{card}/1", "mig", (13877 + 6093 + 126) * MIB, 13877 * MIB),
        (f"{card}/2", "mig", (19938 + 32 + 126) * MIB, 19938 * MIB),
    ]


@pytest.mark.parametrize(
    "blank", ["9223372036854775794", "140737488355328", "2147483632", "NaN", "-1", "+Inf", "1e400"]
)
def test_no_value_is_none_and_never_zero(blank: str) -> None:
    text = re.sub(r"(FB_FREE\{gpu=\"1\".*) \d+", rf"\1 {blank}", PAGES["dcgm-exporter-4.8"])

    whole, lacking = read_page(text).devices

    assert whole.free_bytes == 61262 * MIB
    assert (lacking.total_bytes, lacking.free_bytes) == (None, None)


@pytest.mark.parametrize(("free", "used", "left"), [(None, 99, 0), (99, 1, 24), (None, 4, 20)])
def test_more_than_all_is_neither_used_nor_free(free: int | None, used: int, left: int) -> None:
    page = "".join(
        f'gpu_memory_{name}_MiB{{uuid="x"}} {value}\n'
        for name, value in {"total": 24, "used": used, "free": free}.items()
        if value is not None
    )

    assert [one.free_bytes for one in read_page(page).devices] == [left * MIB]


def test_the_sum_over_a_cut_gpu_is_left_out_beside_its_instances() -> None:
    page = PAGES["dcgm-exporter-mig"]
    parent = re.sub(r'GPU_I_PROFILE="[^"]*",GPU_I_ID="\d+",', "", page)

    assert len(read_page(parent).devices) == 1
    assert read_page(parent + page).devices == read_page(page).devices


# ------------------------------------------------------------------------------ nvitop


def test_nvitop_tells_whose_programs_hold_it() -> None:
    assert read("nvitop-exporter") == ExporterReading(
        exporter="nvitop-exporter",
        refresh_seconds=1.0,
        devices=(
            nvidia(
                RTX_3090,
                name="NVIDIA GeForce RTX 3090",
                total_bytes=24576 * MIB,
                used_bytes=round(6502.4375 * MIB),
                free_bytes=round(17622.125 * MIB),
                utilization=0.0,
                processes=(DeviceProcess(pid=4711, owner="ollama", used_bytes=6216 * MIB),),
                source="nvitop-exporter",
            ),
        ),
        host=HostMemory(
            total_bytes=round(64096.4 * MIB),
            available_bytes=round(51230.2 * MIB),
            source="nvitop-exporter",
        ),
    )


def test_a_chip_without_memory_of_its_own_has_the_hosts() -> None:
    [chip] = read("nvitop-exporter-gb10-nan").devices

    assert (chip.kind, chip.total_bytes, chip.used_bytes, chip.free_bytes) == (
        "unified",
        122500 * MIB,
        (122500 - 81920) * MIB,
        81920 * MIB,
    )


def test_a_card_that_fell_off_the_bus_is_unknown_and_not_given_the_hosts_memory() -> None:
    text = PAGES["nvitop-exporter-gb10-nan"].replace("NVIDIA GB10", "NVIDIA GeForce RTX 3090")

    reading = read_page(text)

    assert [one.total_bytes for one in reading.devices] == [None]
    assert reading.reasons == ("no memory is told of NVIDIA GeForce RTX 3090",)


# --------------------------------------------------------------------------------- AMD

CARDS = ((196592, 42873, 153719, 0.88), (196592, 283, 196309, None))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            "amd-device-metrics-exporter",
            (
                "72ff740f-0000-1000-804c-3b58bf67050e",
                "27ff740f-0000-1000-80cc-64f1fa2db67b",
            ),
        ),
        ("amd-device-metrics-exporter-prefixed", ("692251001124", "692251001125")),
    ],
)
def test_amds_exporter_means_mib_and_may_put_a_prefix_before_its_names(
    name: str, keys: tuple[str, str]
) -> None:
    assert read(name).devices == tuple(
        Device(
            key=key,
            vendor="amd",
            total_bytes=total * MIB,
            used_bytes=used * MIB,
            free_bytes=free * MIB,
            utilization=busy,
            source="device-metrics-exporter",
        )
        for key, (total, used, free, busy) in zip(keys, CARDS, strict=True)
    )


def test_partitions_of_a_card_that_share_its_memory_count_once() -> None:
    page = PAGES["amd-device-metrics-exporter"]
    second = page.replace('gpu_partition_id="0"', 'gpu_partition_id="1"')

    assert read_page(second + page).devices == read_page(page).devices
    apart = (second + page).replace('"nps1"', '"nps4"')
    assert len(read_page(apart).devices) == 4


def test_node_exporter_tells_of_amds_cards_and_of_the_host() -> None:
    assert read("node-exporter-drm-amd") == ExporterReading(
        exporter="node_exporter",
        devices=(
            Device(
                key="0123456789abcdef",
                vendor="amd",
                total_bytes=25_753_026_560,
                used_bytes=1_719_664_640,
                free_bytes=24_033_361_920,
                utilization=0.04,
                source="node_exporter",
            ),
        ),
        host=HostMemory(
            total_bytes=67_209_535_488, available_bytes=56_189_390_848, source="node_exporter"
        ),
    )


def test_a_processors_own_gpu_has_the_hosts_memory_too() -> None:
    text = PAGES["node-exporter-drm-amd"]
    text = re.sub(r"(vram_size_bytes\{.*) .*", rf"\1 {GIB}", text)
    text = re.sub(r"(vram_used_bytes\{.*) .*", rf"\1 {GIB // 2}", text)

    [chip] = read_page(text).devices

    assert chip.kind == "unified"
    assert chip.total_bytes == GIB + 33_604_763_648
    assert chip.used_bytes == GIB // 2 + 141_557_760


def test_node_exporter_without_a_gpu_tells_the_host_and_how_to_have_more() -> None:
    reading = read("node-exporter-cpu-only")

    assert reading.devices == ()
    assert reading.host == HostMemory(
        total_bytes=33_594_830_848, available_bytes=28_191_145_984, source="node_exporter"
    )
    assert reading.reasons == ("it tells of no GPU; of AMD's it does with --collector.drm",)


def test_amds_first_exporter_tells_how_busy_memory_is_and_not_how_full() -> None:
    reading = read_page('amd_gpu_memory_use_percent{gpu_use_percent="0"} 12\n')

    assert (reading.exporter, reading.devices) == ("amd_smi_exporter", ())
    assert "not how full" in reading.reasons[0]


# ----------------------------------------------------------------------------- all-smi


def test_all_smi_tells_of_an_nvidia_card() -> None:
    assert read("all-smi-nvidia").devices == (
        nvidia(
            RTX_3090,
            name="NVIDIA GeForce RTX 3090",
            total_bytes=25_769_803_776,
            used_bytes=6_818_359_296,
            free_bytes=18_951_444_480,
            source="all-smi",
        ),
    )


def test_of_an_apple_only_what_the_whole_machine_has_left_is_free() -> None:
    reading = read("all-smi-apple")

    assert reading.refresh_seconds == 3.0
    assert reading.host == HostMemory(
        total_bytes=34_359_738_368, available_bytes=21_474_836_480, source="all-smi"
    )
    assert reading.devices == (
        Device(
            key="AppleSiliconGPU",
            vendor="apple",
            kind="unified",
            name="Apple M2 Max GPU",
            total_bytes=34_359_738_368,
            used_bytes=12_884_901_888,
            free_bytes=21_474_836_480,
            source="all-smi",
        ),
    )


def test_an_exporter_that_has_not_looked_yet_tells_nothing() -> None:
    reading = read("all-smi-not-ready")

    assert (reading.exporter, reading.devices) == ("all-smi", ())
    assert reading.reasons == ("it has not read the GPUs yet",)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("all-smi-nvidia", 'hostname="node-0058"} 1', 'hostname="node-0058"} 0'),
        (
            "nvidia_gpu_exporter-h100-load",
            "last_collect_success 1",
            "last_collect_success 0",
        ),
    ],
)
def test_figures_of_an_exporter_that_says_it_failed_do_not_count(
    name: str, good: str, bad: str
) -> None:
    assert good in PAGES[name]

    reading = read_page(PAGES[name].replace(good, bad))

    assert (reading.has_memory, len(reading.reasons)) == (False, 1)


def test_an_npu_is_no_gpu() -> None:
    text = PAGES["all-smi-apple"].replace('type="GPU"', 'type="NPU"')

    assert read_page(text).devices == ()


# ------------------------------------------------------------------------------- Intel


def test_xpumanager_tells_a_total_by_the_share_that_is_used() -> None:
    [card] = read("intel-xpumanager-1.x").devices

    assert (card.vendor, card.name) == ("intel", "Intel(R) Data Center GPU Flex 170")
    assert card.used_bytes == 5_368_709_120
    # 33.3 %, so that the total is somewhere between 16.10 and 16.15 GB.
    assert card.total_bytes == pytest.approx(16.12e9, rel=0.001)
    assert card.free_bytes == (card.total_bytes or 0) - 5_368_709_120


@pytest.mark.parametrize("percent", ["0", "0.2", "4.9", "101", "NaN"])
def test_a_share_too_small_to_tell_a_total_leaves_it_unknown(percent: str) -> None:
    reading = read_page(PAGES["intel-xpumanager-1.x"].replace(" 33.3", f" {percent}"))

    assert [(one.total_bytes, one.free_bytes) for one in reading.devices] == [(None, None)]
    assert reading.reasons[-1] == "it tells no total; set vram_gb"


def test_xpumd_tells_of_two_cards() -> None:
    devices = read("intel-xpumd-2.x").devices

    about: Any = {"vendor": "intel", "name": "Intel(R) Graphics [0xe211]", "source": "xpumd"}
    assert devices == (
        Device(
            key="0000:29:00.0",
            total_bytes=25_669_140_480,
            used_bytes=9_663_676_416,
            free_bytes=16_005_464_064,
            **about,
        ),
        Device(
            key="0000:2a:00.0",
            total_bytes=25_669_140_480,
            used_bytes=52_428_800,
            free_bytes=25_616_711_680,
            **about,
        ),
    )


def test_the_hosts_memory_that_an_intel_card_uses_is_not_its_own() -> None:
    page = PAGES["intel-xpumd-2.x"]
    host = page.replace('location="device"', 'location="host"')

    assert read_page(page + host).devices == read_page(page).devices


# ------------------------------------------------------------------------------- agent


def test_our_agent_tells_everything_and_when_it_looked() -> None:
    assert read("hydra-agent") == ExporterReading(
        exporter="hydra-agent",
        sampled_at=1_795_424_594.219613,
        devices=(
            nvidia(
                RTX_3090,
                name="NVIDIA GeForce RTX 3090",
                total_bytes=25_769_803_776,
                used_bytes=6_442_450_944,
                free_bytes=18_253_611_008,
                reserved_bytes=1_073_741_824,
                utilization=0.5,
                processes=(
                    DeviceProcess(
                        pid=4711, name="llama-server", owner="ollama", used_bytes=5_368_709_120
                    ),
                ),
                source="hydra-agent",
            ),
        ),
        host=HostMemory(
            total_bytes=137_438_953_472, available_bytes=85_899_345_920, source="hydra-agent"
        ),
    )


def test_our_agent_on_unified_memory_tells_what_is_free_and_not_what_is_used() -> None:
    reading = read("hydra-agent-gb10")

    [chip] = reading.devices
    assert (chip.kind, chip.total_bytes, chip.used_bytes, chip.free_bytes) == (
        "unified",
        128_450_560_000,
        None,
        85_899_345_920,
    )
    assert [one.owner for one in chip.processes or ()] == ["ollama"]
    assert reading.sampled_at == 1_795_424_600.0


def test_what_our_agent_could_not_read_is_a_reason() -> None:
    text = PAGES["hydra-agent"].replace('reasons=""', 'reasons="NVML: no permission"')

    assert read_page(text).reasons == ("NVML: no permission",)


# ------------------------------------------------------------------------- in general

LABEL = re.compile(r"([A-Za-z_]+)=\"")


@pytest.mark.parametrize("name", PAGES)
def test_the_case_of_label_names_does_not_matter(name: str) -> None:
    shouted = LABEL.sub(lambda found: f'{found[1].upper()}="', PAGES[name])

    assert read_page(shouted) == read(name)


@pytest.mark.parametrize("name", PAGES)
def test_line_ends_of_windows_do_not_matter(name: str) -> None:
    assert read_page(PAGES[name].replace("\n", "\r\n")) == read(name)


@pytest.mark.parametrize("name", PAGES)
def test_other_metrics_and_comments_do_not_matter(name: str) -> None:
    noise = 'go_gc_duration_seconds{quantile="0"} 1e-05\n# HELP x y\n\nsome }{ "rubbish\n'

    assert read_page(noise + PAGES[name] + noise) == read(name)


def test_a_bad_line_costs_itself() -> None:
    lines = PAGES["dcgm-exporter-4.8"].splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("DCGM_FI_DEV_FB_RESERVED"))
    lines[place] = lines[place].replace('"', "", 1)

    first, second = read_page("\n".join(lines)).devices

    assert (first.free_bytes, first.reserved_bytes) == (61262 * MIB, None)
    assert second.reserved_bytes == 479 * MIB
    assert read_page("\n".join(lines)).reasons == ("1 of its lines cannot be read",)


def test_a_line_beyond_measure_costs_itself() -> None:
    line = f'DCGM_FI_DEV_FB_FREE{{UUID="x",pod="{"y" * MAX_LINE}"}} 1\n'

    reading = read_page(line + PAGES["dcgm-exporter-4.8"])

    assert reading.devices == read("dcgm-exporter-4.8").devices
    assert reading.reasons == ("1 of its lines cannot be read",)


def test_a_page_beyond_measure_is_read_to_a_point_and_says_so() -> None:
    line = 'DCGM_FI_DEV_FB_FREE{UUID="x"} 1\n'

    reading = read_page(PAGES["dcgm-exporter-4.8"] + line * (2 * MAX_WANTED // len(line)))

    assert reading.devices[:2] == read("dcgm-exporter-4.8").devices
    assert reading.reasons[-1] == "it is too long to be read to its end"


def test_a_page_of_several_machines_is_of_no_node() -> None:
    page = PAGES["dcgm-exporter-4.8"]
    elsewhere = page.replace("gpu-node-a", "gpu-node-b").replace("GPU-1", "GPU-2")

    reading = read_page(page + elsewhere)

    assert (reading.exporter, reading.devices) == ("dcgm-exporter", ())
    assert reading.reasons == ("it is of 2 machines; name the node's own exporter",)


def test_of_two_exporters_on_one_page_one_counts_and_the_host_is_whosoever_tells_it() -> None:
    both = PAGES["node-exporter-cpu-only"] + PAGES["dcgm-exporter-4.8"]

    reading = read_page(both)

    assert reading.devices == read("dcgm-exporter-4.8").devices
    assert reading.host == read("node-exporter-cpu-only").host


def test_of_two_exporters_on_one_page_the_one_that_works_counts() -> None:
    broken = PAGES["nvidia_gpu_exporter-h100-load"].replace("success 1", "success 0")

    reading = read_page(broken + PAGES["dcgm-exporter-4.8"])

    assert reading.devices == read("dcgm-exporter-4.8").devices


def test_a_host_without_memory_is_none_that_is_told() -> None:
    text = re.sub(r"(MemTotal_bytes) .*", r"\1 0", PAGES["node-exporter-cpu-only"])

    assert read_page(text).host is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no exporter that is known"),
        ("go_goroutines 7\n", "no exporter that is known"),
        ("<html><a href='/metrics'>", "it is a web page"),
    ],
)
def test_a_page_of_something_else_is_told_from_one_without_gpus(text: str, why: str) -> None:
    reading = read_page(text)

    assert (reading.exporter, reading.devices, reading.host) == ("", (), None)
    assert why in reading.reasons[0]


def test_without_the_parser_the_reason_tells_how_to_have_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client.parser", None)

    reading = read("dcgm-exporter-4.8")

    assert reading == ExporterReading(
        reasons=("prometheus_client is not installed; pip install 'hydra-llm[gpu]'",)
    )


# --------------------------------------------------------------------------- mutations

RUBBISH = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            '"',
            "{",
            "}",
            ",",
            "=",
            "\\",
            "\n",
            " ",
            "NaN",
            "+Inf",
            "-1",
            "1e999",
            "9" * 400,
            "٣",
            "#",
        ]
    ),
)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A page with rubbish in place of a few of its stretches."""
    text = PAGES[draw(st.sampled_from(sorted(PAGES)))]
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 30)))
        text = text[:start] + draw(RUBBISH) + text[end:]
    return text


@st.composite
def revalued(draw: st.DrawFn) -> str:
    """A page with other values, and perhaps other labels, each line still well formed."""
    text = PAGES[draw(st.sampled_from(sorted(PAGES)))]
    numbers = st.one_of(st.floats().map(repr), st.integers().map(str), st.just("9" * 400))
    words = st.text("abz019-/ é[]:", max_size=8)
    values = cycle(draw(st.lists(numbers, min_size=1, max_size=7)))
    text = re.sub(r"(?m)^([^#].*) [^ ]+$", lambda found: f"{found[1]} {next(values)}", text)
    labels = cycle(draw(st.lists(words, min_size=1, max_size=5)))
    kept = draw(st.booleans())
    return re.sub(r'"[^"]*"', lambda found: found[0] if kept else f'"{next(labels)}"', text)


@given(st.one_of(mutated(), revalued(), st.text()))
def test_whatever_a_page_says_it_is_read_without_a_fault(text: str) -> None:
    reading = read_page(text)

    for device in reading.devices:
        for size in (
            device.total_bytes,
            device.used_bytes,
            device.free_bytes,
            device.reserved_bytes,
            *(one.used_bytes for one in device.processes or ()),
        ):
            assert size is None or size >= 0
        assert device.total_bytes != 0
        if device.total_bytes is not None and device.free_bytes is not None:
            assert device.free_bytes <= device.total_bytes
        assert device.key
        assert device.utilization is None or 0 <= device.utilization <= 1
