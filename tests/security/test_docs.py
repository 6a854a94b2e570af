"""The limits that the page gives are those in the code."""

from __future__ import annotations

import re

from httpcore._sync.http11 import HTTP11Connection

from hydra_llm import HydraSettings, transport
from hydra_llm.agent.server import Limits
from hydra_llm.discovery import answers as found
from hydra_llm.discovery import exporters as beside
from hydra_llm.ollama import answers, catalogue
from hydra_llm.probes import api
from hydra_llm.probes.exporters import page, watch
from tests.docs.pages import ROOT, section, table

SECURITY = ROOT / "docs" / "security.md"

REAL = {
    "Status line and headers, each interim answer, trailers": (
        HTTP11Connection.MAX_INCOMPLETE_EVENT_SIZE
    ),
    "An answer in one piece, and all of a stream": (
        HydraSettings.model_fields["max_body_bytes"].default
    ),
    "A line of a stream": answers.MAX_LINE_BYTES,
    "Empty lines and comments between two parts of a stream": answers.MOST_BETWEEN_BYTES,
    "An error's body": transport.MAX_ERROR_BYTES,
    "An answer to a probe": api.MAX_BODY_BYTES,
    "Models that a node has, or has loaded": catalogue.MOST_MODELS,
    "Characters of a model's name, digest or a version": catalogue.MOST_CHARACTERS,
    "An exporter's page": watch.MAX_BODY_BYTES,
    "Of it, lines that are parsed": page.MAX_WANTED,
    "In a search, an answer": max(found.LIST_BYTES, beside.PAGE_BYTES, found.VERSION_BYTES),
}


def test_each_limit_in_the_table_is_the_real_one() -> None:
    rows = table(section(SECURITY, "What a node may send"))
    told = {row[0]: number_of(row[1]) for row in rows if "see" not in row[1]}

    assert told == REAL


def number_of(text: str) -> int:
    number, _, unit = text.partition(" ")
    return int(number) * {"": 1, "KiB": 1 << 10, "MiB": 1 << 20}[unit]


def test_the_agents_limits_are_the_real_ones() -> None:
    text = " ".join(section(SECURITY, "The agent, and searching").split())
    told = re.search(r"Questions may have (\d+) KiB, and (\d+) connections", text)

    assert told is not None
    assert (int(told[1]) << 10, int(told[2])) == (Limits().head_bytes, Limits().connections)
