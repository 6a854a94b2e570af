"""Where weights go, from a tensor table or from the size alone."""

from __future__ import annotations

from typing import Any

import pytest

from hydra_llm.vram import ModelShape
from hydra_llm.vram.tensors import BLOCKS, read_tensors, tensor_bytes
from tests.vram.files import LLAMA_BYTES, MIB, attention, llama, show, tensor
from tests.vram.points import published


def shape(tensors: list[dict[str, Any]], size: int | None = None, **more: Any) -> ModelShape:
    told = {"block_count": 1, "embedding_length": 64, **more}
    return ModelShape.from_show(show("llama", tensors, **told), size)


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        ("F32", 32),
        ("BF16", 16),
        ("Q8_0", 8.5),
        ("Q6_K", 6.5625),
        ("Q5_K", 5.5),
        ("Q4_K", 4.5),
        ("Q3_K", 3.4375),
        ("Q2_K", 2.625),
        ("IQ4_XS", 4.25),
        ("MXFP4", 4.25),
        ("Q4_0", 4.5),
    ],
)
def test_a_tensor_has_the_bytes_of_its_blocks(kind: str, bits: float) -> None:
    assert tensor_bytes(kind, [4096, 256]) == 4096 * 256 * bits / 8


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("Q9_X", [256]),
        (None, [256]),
        ("F16", None),
        ("F16", []),
        ("F16", [-1]),
        ("F16", [2**40]),
        ("F16", ["256"]),
        ("F16", [1.5]),
        ("F16", [1] * 5),
        ("F16", [0]),
    ],
)
def test_a_tensor_that_makes_no_sense_has_no_size(kind: object, sizes: object) -> None:
    assert tensor_bytes(kind, sizes) is None


def test_every_type_has_whole_bytes_in_a_block() -> None:
    assert all(elements > 0 and size > 0 for elements, size in BLOCKS.values())


def test_the_token_embedding_stays_on_the_host() -> None:
    tensors = [tensor("token_embd.weight", 64, 1000), tensor("output.weight", 64, 1000)]
    weights = shape([*tensors, *attention(0, 64, 64)]).weights

    assert weights.gpu == 2 * (64 * 1000 + 2 * 64 * 64)
    assert weights.host == 2 * 64 * 1000
    assert weights.all == weights.gpu + weights.host


def test_a_model_without_an_output_matrix_has_a_copy_of_its_embedding_on_the_gpu() -> None:
    weights = shape([tensor("token_embd.weight", 64, 1000), *attention(0, 64, 64)]).weights

    assert weights.gpu == weights.all == 2 * (64 * 1000 + 2 * 64 * 64)
    assert weights.host == 2 * 64 * 1000


def test_an_encoder_has_no_output_that_its_embedding_could_be() -> None:
    tensors = [tensor("token_embd.weight", 64, 1000), tensor("token_types.weight", 64, 2)]
    told = show("bert", [*tensors, *attention(0, 64, 64)], block_count=1)
    weights = ModelShape.from_show(told, None).weights

    assert weights.gpu == 2 * 2 * 64 * 64
    assert weights.host == 2 * 64 * 1002


def test_per_layer_embeddings_stay_on_the_host() -> None:
    tensors = [tensor("token_embd.weight", 64, 10), tensor("per_layer_token_embd.weight", 64, 99)]
    weights = shape([*tensors, *attention(0, 64, 64)]).weights

    assert weights.layer_embedding == 2 * 64 * 99
    assert weights.gpu == 2 * (64 * 10 + 2 * 64 * 64)


def test_a_projector_in_the_same_file_is_a_part_of_its_own() -> None:
    tensors = [tensor("token_embd.weight", 64, 10), tensor("v.blk.0.attn_q.weight", 64, 64)]
    tensors += [tensor("mm.0.weight", 64, 32), tensor("a.conv.weight", 8)]
    weights = shape([*tensors, *attention(0, 64, 64)]).weights

    assert weights.projector == 2 * (64 * 64 + 64 * 32 + 8)


def test_a_projector_in_a_file_of_its_own_is_what_the_tensors_leave_of_the_size() -> None:
    tensors = [tensor("token_embd.weight", 64, 10), *attention(0, 64, 64)]
    told = {**show("llama", tensors, block_count=1), "projector_info": {"clip.has_vision": True}}
    table = read_tensors(tensors)
    assert table is not None

    weights = ModelShape.from_show(told, table.total + 800 * MIB).weights

    assert weights.projector == 800 * MIB


def test_blocks_that_predict_further_tokens_are_in_the_upper_bound_only() -> None:
    further = [tensor("blk.1.nextn.eh_proj.weight", 64, 128), *attention(1, 64, 64)]
    tensors = [tensor("token_embd.weight", 64, 10), *attention(0, 64, 64), *further]
    weights = shape(tensors, block_count=2).weights

    assert weights.high - weights.gpu == 2 * (64 * 128 + 2 * 64 * 64)


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_a_table_of_another_size_than_the_file_is_not_believed(factor: float) -> None:
    tensors = [tensor("token_embd.weight", 64, 10), *attention(0, 6400, 6400)]
    table = read_tensors(tensors)
    assert table is not None
    size = int(table.total * factor)

    weights = shape(tensors, size).weights

    assert not weights.exact
    assert weights.low < weights.gpu <= weights.high
    assert weights.gpu <= size


@pytest.mark.parametrize(
    "odd",
    [
        None,
        "tensor",
        {},
        {"name": 1},
        {"name": "blk.0.x", "type": "F16", "shape": "64"},
        tensor("blk.7.attn_k.weight", 64, 64),
        tensor("blk.0.x", 64, kind="ODD"),
    ],
)
def test_one_odd_entry_makes_the_table_none(odd: Any) -> None:
    assert read_tensors([tensor("token_embd.weight", 64, 10), *attention(0, 64, 64), odd]) is None


def test_by_size_an_untied_embedding_is_taken_off() -> None:
    told = {**llama(), "details": {"quantization_level": "Q4_K_M"}}
    told["model_info"]["general.parameter_count"] = 8_030_261_312
    weights = ModelShape.from_show(told, LLAMA_BYTES).weights

    assert not weights.tied
    assert weights.embedding == 128_256 * 4096 * 9 // 16
    assert weights.gpu == LLAMA_BYTES - weights.embedding


def test_the_count_of_parameters_tells_whether_the_embedding_is_tied() -> None:
    told = llama(
        block_count=28,
        embedding_length=3072,
        attention__head_count=24,
        feed_forward_length=8192,
    )
    counts = {3_212_749_888: True, 3_606_752_256: False}

    for count, tied in counts.items():
        told["model_info"]["general.parameter_count"] = count
        assert ModelShape.from_show(told, 2_019_393_189).weights.tied is tied


def test_by_size_the_answer_is_that_of_the_tensors_for_all_published_models() -> None:
    found = [point for point in published() if point.tabled]

    assert found
    for point in found:
        assert point.tabled is not None
        table = ModelShape.from_show(point.tabled, point.size).weights
        sized = ModelShape.from_show({**point.tabled, "tensors": None}, point.size).weights
        assert sized.tied == table.tied, point.name
        assert sized.gpu == pytest.approx(table.gpu, rel=0.006)
        assert sized.low <= table.gpu <= sized.high


def test_by_size_an_image_encoder_is_told_by_its_own_figures() -> None:
    vision = {"vision__block_count": 27, "vision__embedding_length": 1152}
    told = llama(**vision, vision__feed_forward_length=4304)

    weights = ModelShape.from_show(told, LLAMA_BYTES).weights

    assert weights.projector == 2 * 27 * (4 * 1152**2 + 2 * 1152 * 4304)
    assert weights.high >= LLAMA_BYTES


def test_weights_that_a_log_told_are_taken_as_they_are() -> None:
    weights = ModelShape.from_show(llama(), LLAMA_BYTES).with_weights(4_600_000_000).weights

    assert weights.gpu == weights.low == weights.high == 4_600_000_000
    assert len(weights.blocks) == 32
