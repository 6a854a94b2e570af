"""What each kind of layer keeps."""

from __future__ import annotations

from typing import Any

import pytest

from hydra_llm.vram import ModelShape, estimate
from tests.vram.files import MIB, attention, llama, show, tensor
from tests.vram.points import measured, read


def shape_of(name: str, **changes: Any) -> ModelShape:
    """A published model's shape; ``changes`` to its metadata have ``__`` for each dot."""
    info = dict(read("models.json")[name]["model_info"])
    family = info["general.architecture"]
    info |= {f"{family}.{key.replace('__', '.')}": value for key, value in changes.items()}
    return ModelShape.from_show({"model_info": info}, read("models.json")[name]["size"])


# MiB of cache and state at f16: 4096 tokens, 32 768, 131 072, and 4096 in four slots.
KEPT = {
    "llama3.2-3b": (448, 3584, 14_336, 1792),
    "llama3.1-8b": (512, 4096, 16_384, 2048),
    "qwen3-coder-30b": (384, 3072, 12_288, 1536),
    "gemma3-12b": (736, 2688, 9152, 3584),
    "gpt-oss-20b": (114, 798, 3126, 504),
    "deepseek-v2-lite": (121.5, 972, 3888, 486),
    "qwen3.5-9b": (178.25, 1074.25, 4146.25, 713),
    "granite4-tiny-h": (87.37, 311.37, 1079.37, 349.48),
}


@pytest.mark.parametrize("model", KEPT)
def test_models_keep_what_the_planner_says(model: str) -> None:
    shape = shape_of(model)
    asked = ((4096, 1, 512), (32_768, 1, 1024), (131_072, 1, 2048), (4096, 4, 1024))

    for mib, (num_ctx, slots, batch) in zip(KEPT[model], asked, strict=True):
        kept = shape.kv_bytes(num_ctx, slots, batch=batch)
        assert kept == pytest.approx(mib * MIB, abs=MIB / 100)


def test_a_cache_has_a_multiple_of_256_cells() -> None:
    shape = ModelShape.from_show(llama(), None)

    assert shape.kv_bytes(257) == shape.kv_bytes(512) == 2 * shape.kv_bytes(256)


def test_context_beyond_training_is_not_given() -> None:
    shape = ModelShape.from_show(llama(context_length=8192), None)

    assert shape.kv_bytes(1_000_000) == shape.kv_bytes(8192)


def test_a_window_and_a_batch_bound_the_cells_of_layers_that_look_back_so_far() -> None:
    shape = shape_of("gemma3-4b")  # 5 global layers of 34, window 1024, 4 heads of 256
    layer = 4 * 2 * 256 * 2

    assert shape.kv_bytes(32_768, batch=512) == layer * (5 * 32_768 + 29 * 1536)
    assert shape.kv_bytes(1024, batch=512) == layer * 34 * 1024


@pytest.mark.parametrize(
    ("model", "nulled"),
    [
        ("gemma3-12b", ["attention.sliding_window_pattern"]),
        ("gpt-oss-20b", ["attention.sliding_window_pattern"]),
        ("command-r7b", ["attention.sliding_window_pattern"]),
        ("gemma4-e4b", ["attention.sliding_window_pattern"]),
        ("qwen3.5-4b", ["rope.dimension_sections"]),
    ],
)
def test_without_verbose_the_period_of_global_layers_is_known(
    model: str, nulled: list[str]
) -> None:
    given = shape_of(model)
    nulls = shape_of(model, **{key.replace(".", "__"): None for key in nulled})

    assert nulls.layers.each == given.layers.each
    assert nulls.layers.least is None


def test_the_last_layer_of_a_period_sees_everything() -> None:
    sees = [layer.sees for layer in shape_of("gpt-oss-20b").layers.each]

    assert sees == ["window", "all"] * 12


def test_heads_that_are_null_are_read_off_the_tensors() -> None:
    widths = [1024, 1024, 512, 1024]
    tensors = [one for i, width in enumerate(widths) for one in attention(i, width, width)]
    tensors.append(tensor("token_embd.weight", 64, 100))
    shape = ModelShape.from_show(
        show("some", tensors, block_count=4, embedding_length=64, attention__head_count_kv=None),
        None,
    )

    assert [layer.key for layer in shape.layers.each] == widths
    assert shape.kv_bytes(256) == 256 * 2 * 2 * sum(widths)


def test_hybrids_are_read_off_the_tensors_when_their_arrays_are_null() -> None:
    given = shape_of("granite4-tiny-h")
    tensors = [tensor("token_embd.weight", 64, 100)]
    for i in range(40):
        own = attention(i, 512, 512) if i % 10 == 5 else [tensor(f"blk.{i}.ssm_a", 48)]
        tensors += own
    info = dict(read("models.json")["granite4-tiny-h"]["model_info"])
    info["granitehybrid.attention.head_count_kv"] = None

    shape = ModelShape.from_show({"model_info": info, "tensors": tensors}, None)

    assert shape.layers.each == given.layers.each


def test_layers_that_use_their_keys_as_values_store_both() -> None:
    tensors = [*attention(0, 2048), tensor("token_embd.weight", 64, 100)]
    shape = ModelShape.from_show(show("gemma4", tensors, block_count=1, embedding_length=64), None)

    assert shape.kv_bytes(256) == 256 * 2 * (2048 + 2048)


def test_where_nothing_tells_of_the_heads_the_interval_says_so() -> None:
    shape = shape_of("gemma4-31b", attention__head_count_kv=None)
    need = estimate(shape, None, 8192)
    [cache] = [part for part in need.parts if part.name == "key/value cache"]

    assert cache.low_bytes < cache.bytes < cache.high_bytes
    assert "null" in cache.source


def test_layers_that_share_a_cache_have_none_of_their_own() -> None:
    layers = shape_of("gemma4-e4b").layers.each

    assert [layer.sees for layer in layers[24:]] == ["nothing"] * 18
    assert layers[23].sees == "all"


def test_gemma_3n_shares_from_its_twentieth_layer_on() -> None:
    told: dict[str, Any] = {"block_count": 35, "embedding_length": 2048, "attention__head_count": 8}
    shape = ModelShape.from_show(
        show("gemma3n", **told, attention__head_count_kv=2, attention__sliding_window=512), None
    )

    assert shape.layers.attention == 20


def test_latent_attention_keeps_one_row() -> None:
    assert set(shape_of("deepseek-v2-lite").layers.counted) == {(("all", 576, 0, 0), 27)}


def test_older_conversions_of_deepseek_keep_all_keys_and_values() -> None:
    shape = ModelShape.from_show(
        show(
            "deepseek2",
            block_count=27,
            embedding_length=2048,
            attention__head_count=16,
            attention__head_count_kv=16,
            attention__key_length=192,
            attention__value_length=128,
            attention__kv_lora_rank=512,
        ),
        None,
    )

    assert shape.kv_bytes(256) == 256 * 27 * 16 * (192 + 128) * 2


def test_a_state_is_as_large_whatever_the_context() -> None:
    shape = shape_of("qwen3.5-9b")
    state = 24 * 4 * (3 * (4096 + 2 * 16 * 128) + 128 * 4096)

    assert shape.state_bytes() == state
    assert shape.kv_bytes(8192) - shape.kv_bytes(4096) == 8 * 4096 * 4 * 512 * 2


def test_predicting_ahead_keeps_more_states_and_one_more_layer() -> None:
    shape = shape_of("qwen3.5-9b")
    plain, ahead = estimate(shape, None, 4096), estimate(shape, None, 4096, draft=3)

    assert ahead.part("recurrent state") == 4 * plain.part("recurrent state")
    more = ahead.part("key/value cache") - plain.part("key/value cache")
    assert more == 4096 * 4 * 512 * 2
    assert ahead.part("draft") > 0


def test_a_modelfile_says_how_far_ahead_a_model_predicts() -> None:
    told = {**llama(), "parameters": "temperature  0.6\ndraft_num_predict    3\n"}

    assert ModelShape.from_show(told, None).draft == 3


def test_short_convolutions_keep_next_to_nothing() -> None:
    assert shape_of("lfm2-2.6b").state_bytes() == 22 * 4 * 2 * 2048


def test_purely_recurrent_models_have_no_cache() -> None:
    shape = ModelShape.from_show(
        show(
            "rwkv7",
            block_count=24,
            embedding_length=2048,
            wkv__head_size=64,
            token_shift_count=2,
        ),
        None,
    )

    assert shape.kv_bytes(4096) == shape.kv_bytes(65_536) == 24 * 4 * (2 * 2048 + 2048 * 64)


def test_falcon_h1_has_attention_and_a_state_in_every_layer() -> None:
    shape = ModelShape.from_show(
        show(
            "falcon-h1",
            block_count=2,
            embedding_length=1024,
            attention__head_count=8,
            attention__head_count_kv=2,
            ssm__conv_kernel=4,
            ssm__inner_size=1536,
            ssm__state_size=128,
            ssm__group_count=1,
        ),
        None,
    )

    assert shape.layers.attention == 2
    assert shape.state_bytes() == 2 * 4 * (3 * (1536 + 256) + 128 * 1536)


def test_nemotrons_feed_forward_layers_keep_nothing() -> None:
    shape = ModelShape.from_show(
        show(
            "nemotron_h",
            block_count=3,
            embedding_length=1024,
            attention__head_count=8,
            attention__head_count_kv=[0, 0, 2],
            feed_forward_length=[0, 4096, 0],
            ssm__inner_size=2048,
            ssm__state_size=128,
        ),
        None,
    )

    assert [bool(layer.state) for layer in shape.layers.each] == [True, False, False]
    assert [layer.sees for layer in shape.layers.each] == ["nothing", "nothing", "all"]


def test_blocks_that_predict_further_tokens_keep_nothing() -> None:
    plain, further = (
        ModelShape.from_show(llama(block_count=n, nextn_predict_layers=n - 32), None)
        for n in (32, 33)
    )

    assert further.kv_bytes(4096) == plain.kv_bytes(4096)


def test_encoders_keep_nothing() -> None:
    assert shape_of("nomic-embed-text").kv_bytes(2048) == 0
    assert ModelShape.from_show(llama(attention__causal=False), None).kv_bytes(2048) == 0


def test_without_flash_attention_all_values_are_as_wide_as_the_widest() -> None:
    point = next(p for p in measured() if p.model == "gemma4-31b" and not p.asked["flash"])

    with_flash = estimate(point.show, point.size, **{**point.asked, "flash": True})

    assert point.estimate("size").kv_bytes() > with_flash.kv_bytes()


@pytest.mark.parametrize(
    ("kind", "share"),
    [("q8_0", 34 / 64), ("q5_1", 0.375), ("q5_0", 22 / 64), ("q4_1", 20 / 64), ("q4_0", 18 / 64)],
)
def test_a_quantised_cache_takes_its_share_of_16_bits(kind: str, share: float) -> None:
    shape = ModelShape.from_show(llama(), None)

    assert shape.kv_bytes(8192, kv_type=kind) == share * shape.kv_bytes(8192)


def test_without_flash_attention_a_quantised_cache_counts_as_16_bits() -> None:
    shape = ModelShape.from_show(llama(), None)
    plain = estimate(shape, None, 8192, flash=False)

    assert estimate(shape, None, 8192, kv_type="q8_0", flash=False).kv_bytes() == plain.kv_bytes()


@pytest.mark.parametrize(("family", "doubtful"), [("phi3", False), ("someone", True)])
def test_a_window_that_nothing_is_known_of_is_in_the_interval_only(
    family: str, doubtful: bool
) -> None:
    told: dict[str, Any] = {"block_count": 2, "embedding_length": 512, "attention__head_count": 4}
    shape = ModelShape.from_show(show(family, **told, attention__sliding_window=256), None)

    assert not shape.layers.windowed
    assert (shape.layers.least is not None) == doubtful
