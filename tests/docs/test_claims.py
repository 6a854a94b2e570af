"""What the pages list is what there is."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

import hydra_llm
from hydra_llm import exceptions, testing
from hydra_llm.scheduling import Prices
from hydra_llm.simulation.catalog import known_models
from hydra_llm.words import RoutingWords
from tests.docs.pages import PAGES, README, ROOT, blocks, section, table, text_of

SIMULATOR = ROOT / "docs" / "simulator.md"
ALL_TEXT = "\n".join(map(text_of, PAGES))


@pytest.mark.parametrize("name", hydra_llm.__all__)
def test_every_public_name_is_mentioned(name: str) -> None:
    assert re.search(rf"\b{name}\b", ALL_TEXT)


@pytest.mark.parametrize("name", testing.__all__)
def test_every_name_for_tests_is_mentioned(name: str) -> None:
    assert re.search(rf"\b{name}\b", text_of(SIMULATOR))


def test_every_routing_word_has_its_row_and_its_default() -> None:
    rows = table(section(README, "What you can say about a request"))
    told = {row[0].strip("`"): row[2].strip("`") for row in rows}

    assert told == {name: shown(field.default) for name, field in RoutingWords.model_fields.items()}


def shown(default: Any) -> str:
    if default is None or default == ():
        return "none"
    return f'"{default}"' if isinstance(default, str) else str(default)


def test_preferences_are_worth_what_the_table_says() -> None:
    rows = {row[0].strip("`"): row[3] for row in table(text_of(README)) if len(row) == 4}

    assert f"({Prices().prefer_local_seconds:g} s, a setting)" in rows["prefer_local"]
    assert f"({Prices().prefer_label_seconds:g} s, a setting)" in rows["prefer_labels"]


def test_the_tree_of_errors_is_the_real_one() -> None:
    [told] = [block.text for block in blocks(README, "text") if block.text.startswith("HydraError")]
    [drawn] = re.findall(r"::\n\n(.*?)\n\n", exceptions.__doc__ or "", re.DOTALL)

    assert told.strip() == textwrap.dedent(drawn).strip()
    for name in exceptions.__all__:
        assert name in told


def test_the_tree_of_errors_is_that_of_the_classes() -> None:
    [told] = [block.text for block in blocks(README, "text") if block.text.startswith("HydraError")]
    above: dict[int, str] = {}
    for line in told.splitlines():
        found = re.match(r"[│├└─ ]*", line)
        assert found is not None
        name, depth = line[found.end() :].split()[0], found.end() // 4
        above[depth] = name
        if depth:
            assert issubclass(getattr(exceptions, name), getattr(exceptions, above[depth - 1]))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name) if name else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def test_every_page_is_in_the_index() -> None:
    index = text_of(ROOT / "docs" / "index.md")

    for page in PAGES:
        assert page.name == "index.md" or f"{page.name})" in index


def test_every_argument_of_a_simulated_node_has_its_row_and_its_default() -> None:
    arguments = inspect.signature(testing.SimulatedNode).parameters
    rows = table(section(SIMULATOR, "A node"))

    assert {row[0].strip("`"): row[1].strip("`") for row in rows} == {
        name: as_written(one.default) for name, one in arguments.items() if name != "id"
    }


def as_written(default: object) -> str:
    return json.dumps(default) if isinstance(default, str) else repr(default).replace("'", '"')


def test_every_call_in_the_table_can_be_made() -> None:
    told, _, _ = section(SIMULATOR, "A node as a whole").partition("###")
    for row in table(told):
        name, _, words = row[0].strip("`").rstrip(")").partition("(")
        inspect.signature(getattr(testing.SimulatedNode, name)).bind(
            None, *(word for word in words.split(", ") if word and "=" not in word),
            **dict(word.split("=") for word in words.split(", ") if "=" in word),
        )  # fmt: skip


def test_every_fault_in_the_table_can_be_made() -> None:
    calls = [row[0].strip("`") for row in table(section(SIMULATOR, "Single requests"))]
    made = [eval(call, {**vars(testing)}) for call in calls]  # noqa: S307  our own page
    kinds = {
        kind
        for name in testing.__all__
        if isinstance(kind := getattr(testing, name), type)
        and issubclass(kind, testing.Fault)
        and kind is not testing.Fault
    }

    assert {type(fault) for fault in made} == kinds


def test_the_models_that_a_plain_name_stands_for() -> None:
    told = section(SIMULATOR, "Models and answers").partition(")")[0]

    assert re.findall(r"`([\w.:-]+)`", told) == list(known_models())
