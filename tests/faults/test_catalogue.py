"""That each case of the catalogue strikes as it says, and that a node is well after it."""

from __future__ import annotations

import ssl
from collections.abc import Iterator

import httpx
import pytest

from hydra_llm.testing import SimulatedNode
from tests.faults.catalogue import BY_NAME, CASES, MODEL, TRUSTED, Case

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
ENOUGH = 20_000
"""Bytes: more than a whole answer has."""


IN_THE_ISSUE = """
refused, black hole, DNS, TLS, 401, 403, 404 model, 429, 500 once, 500 always, 500 30 %,
instant 503, 200 with an error body, error line first, error line mid-stream, end without done,
repeated-token cut, reset after headers, killed at token k, stalled at token k,
hung before the first byte, hung load only, differing num_ctx under load, load out of memory,
silent CPU offload, 10x slower for a minute, flapping, stale /api/ps, wrong /api/ps,
/api/ps blocking 20 s, dead runner still listed, HTML, huge JSON, slow-loris, endless stream
"""


def test_all_that_was_asked_for_is_there() -> None:
    wanted = [name.strip() for name in IN_THE_ISSUE.replace("\n", " ").split(",")]
    missing = [name for name in wanted if not any(case.name.startswith(name) for case in CASES)]
    assert missing == []
    assert len(BY_NAME) == len(CASES)


@pytest.fixture
def node() -> Iterator[SimulatedNode]:
    # Five minutes would be over in half a second here.
    with SimulatedNode("a", speed=500.0, models=(MODEL, "qwen3:8b"), keep_alive_s=1e6) as node:
        yield node


def ask(case: Case, node: SimulatedNode, *, stream: bool, wait_s: float = 0.2) -> tuple[int, bool]:
    """Parts of an answer that came, and whether the answer is whole; a timeout ends it."""
    trusted = ssl.create_default_context(cafile=TRUSTED / "certificate.pem")
    # One door each: they share what is behind them.
    path = "/api/chat" if stream else "/v1/chat/completions"
    body = {**CHAT, "stream": stream}
    seen = b""
    try:
        with httpx.stream(
            "POST", case.url(node) + path, json=body, timeout=wait_s, verify=trusted
        ) as answer:
            for piece in answer.iter_bytes():
                seen += piece
                if len(seen) > ENOUGH:  # it would never end
                    break
    except httpx.HTTPError:
        pass
    return seen.count(b'"message":{"role"'), (b'"done":true' if stream else b'"stop"') in seen


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_case_strikes_where_it_says_and_is_over_when_it_is_well(
    case: Case, node: SimulatedNode, stream: bool
) -> None:
    with case.around([node]):
        if not case.loads_only:
            node.preload(MODEL)
        assert case.configured([node])[0].url == case.url(node)
        case.ill(node)
        seen = [ask(case, node, stream=stream) for _ in range(1 if case.chance == 1.0 else 20)]
        if case.strikes == "never":
            assert seen[0][1]
        elif case.strikes == "after":
            assert seen[0][0] > 0 or not stream
            assert not seen[0][1]
        else:
            assert (0, False) in seen
        case.well(node)
        assert ask(case, node, stream=stream, wait_s=5.0)[1]


@pytest.mark.parametrize("case", [case for case in CASES if case.loads_only], ids=str)
def test_what_concerns_loads_only_leaves_loaded_models_alone(
    case: Case, node: SimulatedNode
) -> None:
    node.preload(MODEL)
    case.ill(node)
    assert ask(case, node, stream=True)[1]


@pytest.mark.parametrize("case", [case for case in CASES if case.times is not None], ids=str)
def test_what_strikes_once_strikes_once(case: Case, node: SimulatedNode) -> None:
    node.preload(MODEL)
    case.ill(node)
    assert [ask(case, node, stream=True)[1] for _ in range(3)] == [False, True, True]
