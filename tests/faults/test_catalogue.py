"""That each case of the catalogue strikes as it says, and that a node is well after it."""

from __future__ import annotations

import ssl
from collections.abc import Iterator

import httpx
import pytest

from hydra_llm.testing import SimulatedNode
from tests.faults.catalogue import CASES, MODEL, TRUSTED, Case

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
ENOUGH = 50_000
"""Bytes: more than a whole answer has."""


@pytest.fixture
def node() -> Iterator[SimulatedNode]:
    with SimulatedNode("a", speed=500.0, models=(MODEL, "qwen3:8b")) as node:
        yield node


def ask(case: Case, node: SimulatedNode, *, wait_s: float = 0.2) -> tuple[int, bool]:
    """Parts of an answer that came, and whether the answer is whole; a timeout ends it."""
    trusted = ssl.create_default_context(cafile=TRUSTED / "certificate.pem")
    seen = b""
    try:
        with httpx.stream(
            "POST", f"{case.url(node)}/api/chat", json=CHAT, timeout=wait_s, verify=trusted
        ) as answer:
            for piece in answer.iter_bytes():
                seen += piece
                if len(seen) > ENOUGH:  # it would never end
                    break
    except httpx.HTTPError:
        pass
    return seen.count(b'"message"'), b'"done":true' in seen


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case_strikes_where_it_says_and_is_over_when_it_is_well(
    case: Case, node: SimulatedNode
) -> None:
    with case.around([node]):
        if not case.loads_only:
            node.preload(MODEL)
        assert case.configured([node])[0].url == case.url(node)
        case.ill(node)
        seen = [ask(case, node) for _ in range(1 if case.chance == 1.0 else 20)]
        if case.strikes == "never":
            assert seen[0][1]
        elif case.strikes == "after":
            assert seen[0][0] > 0
            assert not seen[0][1]
        else:
            assert (0, False) in seen
        case.well(node)
        assert ask(case, node, wait_s=5.0)[1]
