"""What notebooks show, and the text where they cannot."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from hydra_llm import Router
from hydra_llm.resources import NodeResources, resources_of
from hydra_llm.tables import html_table, stacked_bars, text_table
from hydra_llm.types import GB, Node, NodeSnapshot
from tests.helpers import loaded, snapshot

EVIL = "<script>alert(1)</script>"


def drawing(html: str) -> ET.Element:
    found = re.search(r"<svg.*</svg>", html)
    assert found is not None
    return ET.fromstring(found[0])  # noqa: S314  our own


def widths(html: str) -> list[float]:
    return [float(bar.attrib["width"]) for bar in drawing(html).iter() if bar.tag.endswith("rect")]


def test_a_text_table_is_aligned() -> None:
    assert text_table(["a", "bb"], [["xxx", "y"], ["", "z"]]) == "a    bb\nxxx  y\n     z"


def test_an_html_table_escapes_everything_and_keeps_line_breaks() -> None:
    html = html_table([EVIL], [[f"{EVIL}\nmore"], ["x"]], bold=1)

    assert "<script" not in html
    assert "<br>more" in html
    assert html.count("font-weight:bold") == 1
    ET.fromstring(html.replace("<br>", "<br/>"))  # noqa: S314  our own


def test_bars_are_as_long_as_what_they_stand_for() -> None:
    html = stacked_bars([("a", {"x": 1.0, "y": 3.0, "z": 0.0}), ("b", {"x": 2.0})], unit="s")

    assert widths(html) == pytest.approx([95.0, 285.0, 190.0], abs=0.1)
    assert re.findall(r">(\d[\d.]* s)<", html) == ["4.0 s", "2.0 s"]
    assert "z" not in re.sub(r"<[^>]*>", "", html).replace("size", "")


def test_a_part_has_one_colour_in_several_pictures() -> None:
    one = stacked_bars([("a", {"x": 1.0, "y": 1.0})], unit="s")
    two = stacked_bars([("a", {"x": 0.0, "y": 1.0})], unit="s")

    def colour(html: str, name: str) -> str | None:
        for bar in drawing(html).iter():
            if bar.tag.endswith("rect") and (bar[0].text or "").startswith(f"{name}:"):
                return bar.attrib["fill"]
        return None

    assert colour(one, "y") == colour(two, "y") is not None
    assert colour(one, "x") != colour(one, "y")


def test_bars_escape_names_and_draw_nothing_of_nothing() -> None:
    assert "<script" not in stacked_bars([(EVIL, {EVIL: 1.0})], unit="s", rest=EVIL)
    assert stacked_bars([], unit="s") == ""
    assert stacked_bars([("a", {"x": 0.0})], unit="s") == ""


# ------------------------------------------------------------------------- resources


@pytest.fixture
def resources() -> NodeResources:
    """Known, unknown, without a GPU, and down."""
    nodes = [
        snapshot("rig", warm=("llama3.2:3b",), free_vram_gb=19.0, vram_source="nvml"),
        snapshot("pc", total_vram_gb=None, free_vram_gb=None),
        snapshot("cpu", total_vram_gb=0.0, free_vram_gb=0.0),
        NodeSnapshot(
            node=Node("http://evil:1", id=EVIL),
            health="down",
            cordoned=True,
            circuit="open",
            loaded=loaded(EVIL),
            total_vram_bytes=8 * GB,
        ),
    ]
    return NodeResources(resources_of(node, 10.0) for node in nodes)


def test_resources_are_a_list_of_plain_data(resources: NodeResources) -> None:
    assert isinstance(resources, list)
    assert json.loads(json.dumps(resources)) == list(resources)
    assert resources[0]["vram_available_gb"] == 19.0
    assert resources[1]["vram_available_gb"] is None


def test_resources_read_as_a_table(resources: NodeResources) -> None:
    lines = repr(resources).splitlines()

    assert len(lines) == 5
    assert re.search(r"^rig +up +19.0 GB of 24.0 +nvml +llama3.2:3b 2.8 GB +0$", lines[1])
    assert re.search(r"^pc +up +unknown", lines[2])
    assert re.search(r"^cpu +up +none, CPU only", lines[3])
    assert "down, cordoned, circuit open" in lines[4]


def test_resources_are_drawn_where_they_are_known(resources: NodeResources) -> None:
    html = resources._repr_html_()

    assert "<script" not in html
    texts: list[Any] = [text.text for text in drawing(html).iter() if text.tag.endswith("text")]
    assert texts[0::2] == ["rig", EVIL]
    parts = [title.text for title in drawing(html).iter() if title.tag.endswith("title")]
    assert parts[:3] == ["llama3.2:3b: 2.80 GB", "in use: 2.20 GB", "free: 19.00 GB"]


def test_memory_that_nothing_measures_is_drawn_as_unknown() -> None:
    node = snapshot("rig", free_vram_gb=None, warm=("llama3.2:3b",))
    html = NodeResources([resources_of(node, 0.0)])._repr_html_()

    parts = [title.text for title in drawing(html).iter() if title.tag.endswith("title")]
    assert parts == ["llama3.2:3b: 2.80 GB", "unknown: 21.20 GB"]
    assert node.total_vram_bytes == 24 * GB


def test_a_router_shows_its_nodes_without_starting_anything() -> None:
    router = Router(["http://127.0.0.1:1"])
    html = router._repr_html_()

    assert "1 not seen yet" in html
    assert "127.0.0.1:1" in html
    # The watch on what a test leaves behind would see a thread or a socket.
