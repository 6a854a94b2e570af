"""What docs/agent.md says is what there is."""

from __future__ import annotations

import re
from plistlib import loads
from typing import Any

from hydra_llm.agent import Agent
from hydra_llm.agent.page import FAMILIES, render
from hydra_llm.agent.running import FRESH_SECONDS, READ_SECONDS
from hydra_llm.agent.server import Limits
from hydra_llm.probes.local import LocalReading
from hydra_llm.types import Device, DeviceProcess, HostMemory
from tests.docs.pages import ROOT, blocks, table, text_of

PAGE = ROOT / "docs" / "agent.md"
TEXT = " ".join(text_of(PAGE).split())


def test_every_metric_has_its_row_and_its_labels() -> None:
    process = DeviceProcess(pid=1, used_bytes=1)
    numbers: dict[str, Any] = {
        "total_bytes": 1,
        "used_bytes": 1,
        "free_bytes": 1,
        "reserved_bytes": 1,
        "utilization": 1.0,
    }
    device = Device(key="k", vendor="v", processes=(process,), **numbers)
    host = HostMemory(total_bytes=1, available_bytes=1)
    page = render(LocalReading((device,), host), sampled_at=1.0, version="1")
    labels = {
        name: re.findall(r'(\w+)="', about)
        for name, about in re.findall(r"(?m)^(\w+)(?:\{(.*)\})? \S+$", page)
    }

    told: dict[str, list[str]] = {}
    for row in table(text_of(PAGE)):
        if row[0].startswith("`hydra_node"):
            same = [*told.values()][-1] if row[1] == "the same" else None
            told[row[0].strip("`")] = same or re.findall(r"`(\w+)`", row[1])

    assert told == labels
    assert list(told) == list(FAMILIES)


def test_the_limits_are_those_that_hold() -> None:
    limits = Limits()

    assert f"{limits.head_bytes >> 10} KiB and take {limits.head_seconds:g} seconds" in TEXT
    assert f"all of it {limits.connection_seconds:g} seconds" in TEXT
    assert f"; {limits.connections} are answered at a time" in TEXT
    assert FRESH_SECONDS == 0.25
    assert f"within {READ_SECONDS:g} seconds" in TEXT
    assert f"`{Agent().host}` by default" in TEXT
    assert f"| {Agent().port} by default" in TEXT


def test_the_property_list_is_one() -> None:
    [block] = blocks(PAGE, "xml")

    assert loads(block.text.encode())["ProgramArguments"][1] == "agent"
