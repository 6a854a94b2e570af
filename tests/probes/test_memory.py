from __future__ import annotations

from typing import Any

import pytest

from hydra_llm.probes.memory import (
    GPU_OVERHEAD_BYTES,
    UNKNOWN,
    Evidence,
    VramFigures,
    bytes_held,
    vram_figures,
)
from hydra_llm.types import GB, Device, LoadedModel, Node


def node(vram_gb: float | None = None) -> Node:
    return Node("http://rig:11434", id="rig", vram_gb=vram_gb)


def gpu(key: str, total_gb: float | None, free_gb: float | None = None, **about: Any) -> Device:
    return Device(
        key=key,
        vendor="nvidia",
        total_bytes=None if total_gb is None else int(total_gb * GB),
        free_bytes=None if free_gb is None else int(free_gb * GB),
        **{"source": "nvml", "observed_at": 5.0, **about},
    )


def holding(*gigabytes: float) -> dict[str, LoadedModel]:
    return {
        f"m{number}:latest": LoadedModel(
            name=f"m{number}:latest", size_bytes=9 * GB, size_vram_bytes=int(one * GB)
        )
        for number, one in enumerate(gigabytes)
    }


def test_a_node_of_which_nothing_is_known_is_unknown_and_not_zero() -> None:
    assert vram_figures(Evidence(node=node())) == UNKNOWN == (None, None, None, None)


def test_a_model_that_runs_on_the_cpu_tells_nothing_of_the_gpu() -> None:
    seen = Evidence(node=node(), loaded=holding(0.0), loaded_at=3.0)

    assert vram_figures(seen) == UNKNOWN


def test_devices_add_up_and_are_as_old_as_the_oldest() -> None:
    devices = (gpu("a", 24, 20), gpu("b", 8, 3, observed_at=4.0))

    figures = vram_figures(Evidence(node=node(), devices=devices))

    assert figures == VramFigures(32 * GB, 23 * GB, "nvml", 4.0)


def test_a_lost_gpu_gives_no_place_and_takes_none_away() -> None:
    figures = vram_figures(Evidence(node=node(), devices=(gpu("a", 24, 20), gpu("b", None))))

    assert figures[:2] == (24 * GB, 20 * GB)


def test_only_lost_gpus_leave_it_to_the_next_source() -> None:
    lost = (gpu("a", None),)

    assert vram_figures(Evidence(node=node(), devices=lost)) == UNKNOWN
    assert vram_figures(Evidence(node=node(8), devices=lost, loaded={})).source == (
        "config - /api/ps"
    )


def test_a_pool_shared_by_several_devices_counts_once() -> None:
    pool = tuple(gpu(key, 120, 100, kind="unified") for key in "ab")

    assert vram_figures(Evidence(node=node(), devices=pool))[:2] == (120 * GB, 100 * GB)


def test_configuration_less_what_is_loaded_and_its_overhead() -> None:
    seen = Evidence(node=node(24), loaded=holding(5, 0, 3), loaded_at=3.0)

    figures = vram_figures(seen)

    free = 24 * GB - 8 * GB - 2 * GPU_OVERHEAD_BYTES
    assert figures == VramFigures(24 * GB, free, "config - /api/ps", 3.0)


def test_a_full_gpu_has_nothing_free_rather_than_less() -> None:
    assert vram_figures(Evidence(node=node(8), loaded=holding(5, 5))).free_bytes == 0


def test_what_is_free_is_unknown_until_the_node_has_said_what_is_loaded() -> None:
    assert vram_figures(Evidence(node=node(24))) == VramFigures(24 * GB, None, "config", None)


@pytest.mark.parametrize("loaded", [None, {}, holding(2)])
def test_a_node_configured_without_vram_is_a_known_zero(loaded: Any) -> None:
    assert vram_figures(Evidence(node=node(0), loaded=loaded))[:3] == (0, 0, "config")


def test_what_was_ever_loaded_is_a_remark_and_no_total() -> None:
    seen = Evidence(node=node(), loaded={}, loaded_at=3.0, most_loaded_bytes=6 * GB)

    assert vram_figures(seen) == VramFigures(None, None, "/api/ps: at least 6.0 GB", 3.0)


def test_an_exporter_goes_before_what_is_measured_here() -> None:
    seen = Evidence(
        node=node(),
        exported=(gpu("a", 24, 6, source="dcgm-exporter", observed_at=2.0),),
        devices=(gpu("a", 24, 20),),
    )

    assert vram_figures(seen) == VramFigures(24 * GB, 6 * GB, "dcgm-exporter", 2.0)


def test_an_exporter_that_tells_no_memory_leaves_it_to_the_next_source() -> None:
    seen = Evidence(node=node(), exported=(gpu("a", None),), devices=(gpu("a", 24, 20),))

    assert vram_figures(seen).source == "nvml"


@pytest.mark.parametrize(
    ("about", "source"),
    [
        ({"devices": (gpu("a", 24, 20),)}, "nvml (exporter: no answer)"),
        ({"most_loaded_bytes": 6 * GB}, "/api/ps: at least 6.0 GB (exporter: no answer)"),
        ({}, "exporter: no answer"),
    ],
)
def test_an_exporter_that_is_of_no_use_is_named_with_its_trouble(
    about: dict[str, Any], source: str
) -> None:
    figures = vram_figures(Evidence(node=node(), exporter_trouble="no answer", **about))

    assert figures.source == source


# What is configured caps what is measured.


def test_devices_alone_are_taken_as_they_are() -> None:
    seen = Evidence(node=node(48), devices=(gpu("a", 24, 20),), loaded={})

    assert vram_figures(seen) == VramFigures(24 * GB, 20 * GB, "nvml", 5.0)


def test_configuration_caps_the_total_and_what_is_free() -> None:
    seen = Evidence(node=node(10), devices=(gpu("a", 24, 20),), loaded=holding(4))

    figures = vram_figures(seen)

    free = 6 * GB - GPU_OVERHEAD_BYTES
    assert figures == VramFigures(10 * GB, free, "nvml, capped by config", 5.0)


def test_what_other_programs_take_counts_under_the_cap() -> None:
    seen = Evidence(node=node(20), devices=(gpu("a", 24, 2),), loaded={})

    assert vram_figures(seen)[:2] == (20 * GB, 2 * GB)


def test_a_gpu_kept_from_the_router_is_a_zero_whatever_is_measured() -> None:
    assert vram_figures(Evidence(node=node(0), devices=(gpu("a", 24, 20),)))[:2] == (0, 0)


def test_a_new_source_goes_before_the_others_and_is_capped_too() -> None:
    def exporter(evidence: Evidence) -> VramFigures:
        return VramFigures(40 * GB, 30 * GB, "exporter", 9.0)

    assert vram_figures(Evidence(node=node()), [exporter]).source == "exporter"
    assert vram_figures(Evidence(node=node(16), loaded={}), [exporter])[:2] == (16 * GB, 16 * GB)


def test_only_models_on_the_gpu_cost_overhead() -> None:
    assert bytes_held(holding(0, 1).values()) == GB + GPU_OVERHEAD_BYTES
