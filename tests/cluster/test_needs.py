"""What was seen of loaded models corrects what the next load of them is expected to take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hydra_llm.types import InstalledModel, NodeSnapshot
from hydra_llm.vram import estimate
from tests.cluster.ledgers import ledger, node, seen, snapshot_of
from tests.helpers import LLAMA, installed, loaded

MODEL = installed(LLAMA)[LLAMA]


def expected(context: int, **settings: Any) -> int:
    return estimate(MODEL.shape, MODEL.size_bytes, context, **settings).reported_bytes


def after(
    size: float, context: int | None = 4096, model: InstalledModel = MODEL, **settings: Any
) -> NodeSnapshot:
    cluster = ledger(nodes=[node("a", **{"slots": None, **settings})])
    runner = loaded(LLAMA, size_bytes=int(size), size_vram_bytes=int(size))
    runner = {LLAMA: replace(runner[LLAMA], context_length=context)}
    cluster.observe(seen("a", installed={LLAMA: model}, loaded=runner))
    return snapshot_of(cluster)


def test_the_ratio_is_what_it_takes_to_what_was_expected_of_that_context() -> None:
    for context in (4096, 16_384):
        assert after(1.1 * expected(context), context).need_ratios[LLAMA] == pytest.approx(1.1)


def test_it_stays_when_the_model_has_gone() -> None:
    cluster = ledger(nodes=[node("a", slots=None)])
    size = int(1.2 * expected(4096))
    runner = loaded(LLAMA, size_bytes=size, size_vram_bytes=size)
    cluster.observe(seen("a", installed={LLAMA: MODEL}, loaded=runner))
    cluster.observe(seen("a", at=1.0, installed={LLAMA: MODEL}, loaded={}))

    assert snapshot_of(cluster).need_ratios[LLAMA] == pytest.approx(1.2)


def test_another_file_of_that_name_is_another_model() -> None:
    cluster = ledger(nodes=[node("a", slots=None)])
    size = int(1.2 * expected(4096))
    runner = loaded(LLAMA, size_bytes=size, size_vram_bytes=size)
    cluster.observe(seen("a", installed={LLAMA: MODEL}, loaded=runner))
    pulled = replace(MODEL, digest="another")
    cluster.observe(seen("a", at=1.0, installed={LLAMA: pulled}, loaded={}))

    assert snapshot_of(cluster).need_ratios == {}


def test_a_node_whose_settings_are_told_is_corrected_within_bounds() -> None:
    told: dict[str, Any] = {"slots": 1, "kv_cache_type": "f16"}
    fair = expected(4096)

    assert after(2.5 * fair, **told).need_ratios[LLAMA] == 1.3
    assert after(0.3 * fair, **told).need_ratios[LLAMA] == 0.8


def test_a_node_with_more_slots_than_anybody_told_is_corrected_further() -> None:
    four = expected(16_384, num_parallel=4)

    ratio = after(four, 16_384).need_ratios[LLAMA]

    assert ratio == pytest.approx(four / expected(16_384))
    assert ratio > 1.5


@pytest.mark.parametrize(
    ("size", "context", "model"),
    [(0, 4096, MODEL), (3e9, None, MODEL), (3e9, 4096, replace(MODEL, shape=None))],
)
def test_what_cannot_be_compared_teaches_nothing(
    size: float, context: int | None, model: InstalledModel
) -> None:
    assert after(size, context, model).need_ratios == {}
