"""docs/how-a-decision-is-made.md says what the code does."""

from __future__ import annotations

import importlib
import random
import re
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest

from hydra_llm.scheduling import COST_TERMS, REASONS, Moment, RoutingDecision, Scheduler
from hydra_llm.scheduling.costs import OTHERS_TIME
from hydra_llm.scheduling.decision import KEYS
from hydra_llm.scheduling.memory import Fit
from hydra_llm.scheduling.scheduler import HEADROOM_BY_PRIORITY
from hydra_llm.types import GB
from tests.docs.pages import DECISION, RELIABILITY, blocks, section, table, text_of
from tests.helpers import loaded, request, running, snapshot

QWEN = "qwen3:8b"
UNITS = {
    "": 1,
    "s": 1,
    "days": 86_400,
    "%": 0.01,
    "GB/s": GB,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
}
CONSTANTS = [
    row
    for page in (DECISION, RELIABILITY)
    for row in table(text_of(page))
    if re.fullmatch(r"`[a-z]+\.\S+`", row[-1])
]


def first_cells(title: str) -> list[str]:
    return [row[0].strip("`") for row in table(section(DECISION, title))]


def test_the_reasons_are_the_closed_list() -> None:
    reasons = first_cells("Why a node is not asked")

    assert sorted(reasons) == sorted(REASONS)


def test_every_reason_says_what_to_do() -> None:
    assert all(
        len(row) == 3 and all(row) for row in table(section(DECISION, "Why a node is not asked"))
    )


def test_the_terms_are_those_that_are_added_up_in_the_order_of_the_table() -> None:
    costs = section(DECISION, "What a node costs").split("Where the numbers come from")[0]

    assert [row[0].strip("`") for row in table(costs)] == list(COST_TERMS)


def test_the_verdicts_are_all_there() -> None:
    verdicts = get_args(get_type_hints(Fit)["verdict"])
    memory = section(DECISION, "Memory").split("**What it needs**")[0]

    assert [row[0].strip("`") for row in table(memory)] == list(verdicts)


def test_the_keys_of_a_decision_are_all_there() -> None:
    assert first_cells("Reading an explanation") == list(KEYS)


@pytest.mark.parametrize("row", CONSTANTS, ids=lambda row: row[-1].strip("`"))
def test_a_constant_has_the_value_that_the_page_gives(row: list[str]) -> None:
    number, _, unit = row[1].partition(" ")

    assert float(number) * UNITS[unit] == pytest.approx(constant(row[-1].strip("`")))


def constant(name: str) -> Any:
    """``scheduling.moment.Prices.evict_seconds``, or a plain name in a module."""
    parts = name.split(".")
    if parts[-2][0].isupper():
        kind = getattr(importlib.import_module(".".join(["hydra_llm", *parts[:-2]])), parts[-2])
        return {field.name: field.default for field in fields(kind)}[parts[-1]]
    return getattr(importlib.import_module(".".join(["hydra_llm", *parts[:-1]])), parts[-1])


def test_there_are_constants_to_compare() -> None:
    assert len(CONSTANTS) > 30


def test_the_headroom_of_each_priority() -> None:
    told: dict[int, int] = {}
    for row in table(section(DECISION, "The pick, and the waiting line")):
        if " to " in row[0]:
            first, last = map(int, row[0].split(" to "))
            told |= dict.fromkeys(range(first, last + 1), int(row[1]))

    assert [told[priority] for priority in range(1, 11)] == list(HEADROOM_BY_PRIORITY)


def test_whose_time_counts_is_told_for_each_priority() -> None:
    [told] = [row[1:] for row in table(text_of(DECISION)) if row[0] == "×"]
    assert [float(cell) for cell in told] == pytest.approx(list(OTHERS_TIME), rel=0.02)


# --------------------------------------------------------------- the worked example


def worked_example() -> RoutingDecision:
    size = int(5.8 * GB)
    nodes = [
        snapshot(
            "rig",
            models=(QWEN,),
            warm=(QWEN,),
            running=(running(QWEN, seconds=8.0),),
        ),
        snapshot("gaming", models=(QWEN,), total_vram_gb=24.0),
        snapshot(
            "workstation",
            models=(QWEN,),
            local=True,
            free_vram_gb=0.5,
            total_vram_gb=8.0,
            loaded=loaded(QWEN, size_bytes=size, size_vram_bytes=int(0.6 * size)),
        ),
    ]
    asked = request(QWEN, input_tokens=3000)
    choice = Scheduler().schedule(asked, nodes, Moment(now=2.0), random.Random(0))
    return RoutingDecision(model=QWEN, choice=choice)


def test_the_worked_example_is_what_the_scheduler_says() -> None:
    told = next(block.text for block in blocks(DECISION, "text") if block.mark == "worked")

    assert f"{worked_example().table()}\n" == told


def test_the_sums_of_the_worked_example_are_right() -> None:
    text = [block.text for block in blocks(DECISION, "text") if block.mark == "worked"][1]
    table_text = worked_example().table()
    for line in text.splitlines():
        found = re.fullmatch(r".*?  +([\d(].*?) += ([\d.]+) s", line)
        assert found is not None, line
        result = eval(found[1], {"__builtins__": {}})  # noqa: S307  our own page
        digits = len(found[2].partition(".")[2])
        assert f"{result:.{digits}f}" == found[2], line
        assert digits > 2 or found[2] in table_text, line
