"""Where a model could run, with how much context, and how fast."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hydra_llm.resources import ModelFits
from hydra_llm.scheduling import Moment
from hydra_llm.scheduling.fitting import fits_of
from hydra_llm.scheduling.memory import fit_of
from hydra_llm.types import GB, NodeSnapshot, RunnerOptions
from hydra_llm.vram.loading import FIRST_MODEL_MARGIN_BYTES
from tests.helpers import BIG, LLAMA, installed, request, snapshot


def fit(node: NodeSnapshot, model: str = LLAMA, **how: Any) -> dict[str, Any]:
    [one] = fits_of(model, [node], **how)
    return one


def test_the_figures_are_those_that_a_request_would_be_judged_by() -> None:
    node = snapshot(warm=(BIG,), models=(LLAMA, BIG), free_vram_gb=5.0)

    told = fit(node, num_ctx=16_384)

    judged = fit_of(request(options=RunnerOptions(num_ctx=16_384)), node, Moment())
    assert told["verdict"] == judged.verdict
    assert told["need_gb"] == pytest.approx(judged.need_bytes / GB, abs=0.001)
    assert told["evicts"] == list(judged.victims)
    assert (told["num_ctx"], told["free_gb"]) == (16_384, 5.0)
    assert told["need_low_gb"] < told["need_gb"] < told["need_high_gb"]
    json.dumps(told)


@pytest.mark.parametrize("free_gb", [4.0, 5.0, 8.0])
def test_the_longest_context_is_the_last_that_is_on_the_gpu_as_a_whole(free_gb: float) -> None:
    node = snapshot(free_vram_gb=free_gb, total_vram_gb=8.0)

    longest = fit(node)["largest_num_ctx"]

    def need(num_ctx: int) -> float:
        return float(fit(node, num_ctx=num_ctx)["need_gb"]) + FIRST_MODEL_MARGIN_BYTES / GB

    if longest < 32_768:
        assert longest % 256 == 0
        assert need(longest) <= free_gb < need(longest + 256)
    else:
        assert need(longest) <= free_gb


def test_it_is_no_longer_than_what_the_model_was_trained_with() -> None:
    assert fit(snapshot(free_vram_gb=24.0))["largest_num_ctx"] == 32_768


def test_where_not_even_the_weights_have_room_there_is_none() -> None:
    told = fit(snapshot(models=(BIG,), free_vram_gb=8.0), BIG)

    assert (told["verdict"], told["largest_num_ctx"]) == ("offloads", None)
    assert told["cpu_share"] > 0.4


def test_what_is_not_known_is_none() -> None:
    unknown = fit(snapshot(free_vram_gb=None))
    without_gpu = fit(snapshot(free_vram_gb=0.0, total_vram_gb=0.0))

    assert (unknown["verdict"], unknown["free_gb"], unknown["largest_num_ctx"]) == (
        "unknown",
        None,
        None,
    )
    assert (without_gpu["verdict"], without_gpu["largest_num_ctx"]) == ("offloads", None)


def test_a_loaded_model_is_told_with_the_context_that_it_has() -> None:
    told = fit(snapshot(warm=(LLAMA,)))

    assert (told["verdict"], told["loaded"], told["num_ctx"]) == ("loaded", True, 4096)
    assert told["need_gb"] > 2.0


def test_a_node_without_the_model_is_judged_by_what_another_tells() -> None:
    has, lacks = fits_of(LLAMA, [snapshot("a"), snapshot("b", models=())])

    assert (has["installed"], lacks["installed"]) == (True, False)
    assert {**lacks, "node": "a", "installed": True} == has


def test_who_knows_more_of_the_model_tells_of_it() -> None:
    plain = snapshot("a", installed=installed(LLAMA, shape=None))
    told = fits_of(LLAMA, [plain, snapshot("b"), snapshot("c", models=())])

    assert told[2]["need_gb"] == told[1]["need_gb"]
    assert told[2]["need_gb"] != told[0]["need_gb"]


def test_what_was_seen_moves_the_interval_too() -> None:
    plain, seen = fit(snapshot()), fit(snapshot(need_ratios={LLAMA: 1.5}))

    moved = seen["need_gb"] - plain["need_gb"]
    assert moved > 0.5
    assert seen["need_low_gb"] - plain["need_low_gb"] == pytest.approx(moved, abs=0.002)
    assert seen["need_high_gb"] - plain["need_high_gb"] == pytest.approx(moved, abs=0.002)


def test_of_a_node_that_is_down_and_of_a_model_that_nobody_has_there_is_nothing_to_say() -> None:
    down, up = fits_of(LLAMA, [snapshot("a", health="down"), snapshot("b")])
    [nobody] = fits_of("nobody:latest", [snapshot()])

    assert "verdict" not in down
    assert up["verdict"] == "fits"
    assert "verdict" not in nobody


@pytest.mark.parametrize(
    ("node", "model", "place"),
    [
        (snapshot(warm=(LLAMA,)), LLAMA, "loaded"),
        (snapshot(), LLAMA, "fits"),
        (snapshot(models=(LLAMA, BIG), warm=(LLAMA,), free_vram_gb=14.0), BIG, f"after {LLAMA}"),
        (snapshot(models=(BIG,), free_vram_gb=8.0), BIG, "54% in system memory"),
        (snapshot(free_vram_gb=None), LLAMA, "VRAM unknown"),
        (snapshot(health="down"), LLAMA, "down"),
        (snapshot(), "nobody:latest", "nobody has the model"),
    ],
)
def test_the_table_says_it_in_a_few_words(node: NodeSnapshot, model: str, place: str) -> None:
    fits = ModelFits(fits_of(model, [node], num_ctx=4096 if model == BIG else None))

    assert place in repr(fits)
    assert place in fits._repr_html_()
    assert fits == json.loads(json.dumps(fits))
