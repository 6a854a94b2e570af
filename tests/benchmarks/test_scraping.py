"""How long a metrics page takes to be read. No assertions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.probes.exporters import read_page

PAGES = Path(__file__).parents[1] / "probes" / "exporters" / "pages"


def of_eight_gpus() -> str:
    """dcgm-exporter's page of a full machine: 22 kB, most of them other metrics."""
    one = re.sub(r"(?m)^(#.*|.*gpu=\"1\".*)\n", "", (PAGES / "dcgm-exporter-4.8.prom").read_text())
    page = "".join(one.replace("GPU-1", f"GPU-{number}") for number in range(8))
    other = re.sub(r"FB_\w+|GPU_UTIL", "SM_CLOCK", page)
    return (page + 3 * other)[:22_000].rpartition("\n")[0]


@pytest.mark.benchmark(group="reading a metrics page")
def test_a_page_of_22_kb(benchmark: Any) -> None:
    text = of_eight_gpus()

    reading = benchmark(read_page, text)

    assert len(reading.devices) == 8


@pytest.mark.benchmark(group="reading a metrics page")
def test_a_page_of_22_kb_that_all_matters(benchmark: Any) -> None:
    one = (PAGES / "dcgm-exporter-4.8.prom").read_text()
    count = 22_000 // len(one) + 1
    text = "".join(one.replace("GPU-", f"GPU-{number:02}") for number in range(count))

    reading = benchmark(read_page, text)

    assert len(reading.devices) == 2 * count
