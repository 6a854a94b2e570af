"""The estimate as a whole."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.vram import MemoryNeed, ModelShape, estimate
from hydra_llm.vram.layers import KV_BYTES
from hydra_llm.vram.shape import automatic_batch
from tests.vram.files import LLAMA_BYTES, MIB, llama
from tests.vram.points import measured, published, read, show_of

SHAPES = {
    name: ModelShape.from_show(show_of(model), model["size"])
    for name, model in read("models.json").items()
}
TABLED = {name: show_of(model) for name, model in read("shows.json").items()}

shapes = st.sampled_from(sorted(SHAPES)).map(SHAPES.__getitem__)
contexts = st.integers(1, 300_000)
versions = st.sampled_from([None, "0.9.6", "0.12.3", "0.30.0", "0.33.1"])
settings = st.fixed_dictionaries(
    {
        "num_parallel": st.integers(1, 8),
        "kv_type": st.sampled_from(sorted(KV_BYTES)),
        "gpus": st.integers(0, 4),
        "ollama_version": versions,
        "flash": st.booleans(),
        "backend": st.sampled_from([None, "cuda", "metal", "vulkan"]),
        "draft": st.integers(0, 3),
    }
)


def holds_together(need: MemoryNeed) -> None:
    assert 0 < need.low_bytes <= need.total_bytes <= need.high_bytes
    assert sum(need.per_gpu) == (need.total_bytes if need.gpus else 0)
    assert len(need.per_gpu) == need.gpus
    for part in need.parts:
        assert 0 <= part.low_bytes <= part.bytes <= part.high_bytes, part
        assert part.source


@given(shapes, contexts, settings)
def test_the_parts_add_up_and_the_interval_holds_the_total(
    shape: ModelShape, num_ctx: int, asked: dict[str, Any]
) -> None:
    need = estimate(shape, None, num_ctx, **asked)

    holds_together(need)
    if need.bytes_per_layer:
        layers = len(need.bytes_per_layer)
        assert need.gpu_bytes(layers) == (need.total_bytes if need.gpus else 0)


@given(shapes, contexts, contexts, settings)
def test_a_longer_context_never_needs_less(
    shape: ModelShape, one: int, other: int, asked: dict[str, Any]
) -> None:
    short, long = sorted((one, other))
    less, more = (estimate(shape, None, tokens, **asked) for tokens in (short, long))

    assert less.total_bytes <= more.total_bytes
    assert less.kv_bytes() <= more.kv_bytes()
    assert less.kv_bytes(long) == more.kv_bytes()
    assert less.at(long) == more


@given(shapes, contexts, st.integers(1, 8), st.integers(1, 8))
def test_more_slots_never_need_less(shape: ModelShape, num_ctx: int, one: int, other: int) -> None:
    few, many = sorted((one, other))

    assert (
        estimate(shape, None, num_ctx, few).total_bytes
        <= estimate(shape, None, num_ctx, many).total_bytes
    )


@given(shapes.filter(lambda shape: shape.layers.attention > 0), contexts, versions)
def test_a_quantised_cache_needs_less(shape: ModelShape, num_ctx: int, version: str | None) -> None:
    wide, half, quarter = (
        estimate(shape, None, num_ctx, kv_type=kind, ollama_version=version)
        for kind in ("f16", "q8_0", "q4_0")
    )

    assert quarter.kv_bytes() < half.kv_bytes() < wide.kv_bytes()
    assert quarter.total_bytes < half.total_bytes < wide.total_bytes


# -------------------------------------------------------------------- odd payloads

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=8),
    st.integers(-(10**30), 10**30),
    st.sampled_from([math.nan, math.inf, -math.inf, -1, 0, 1 << 63, 1e300, 0.5]),
    st.lists(st.one_of(st.none(), st.integers(-(10**20), 10**20), st.text(max_size=3)), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


PLAIN = [show_of(model) for model in read("models.json").values()]


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """An answer of ``/api/show`` with some of its values replaced by others."""
    answer = copy.deepcopy(draw(st.sampled_from([*TABLED.values(), *PLAIN])))
    info, tensors = answer["model_info"], answer.get("tensors")
    for _ in range(draw(st.integers(0, 3))):
        info[draw(st.sampled_from(sorted(info)))] = draw(ODD)
    if tensors and draw(st.booleans()):
        entry = draw(st.sampled_from(tensors))
        entry[draw(st.sampled_from(["name", "type", "shape"]))] = draw(ODD)
    if draw(st.booleans()):
        fields = ["model_info", "tensors", "details", "capabilities", "parameters"]
        answer[draw(st.sampled_from([*fields, "projector_info"]))] = draw(ODD)
    return answer


@given(mutated(), st.one_of(st.none(), st.just(LLAMA_BYTES), st.integers(-1, 10**20)), settings)
def test_no_answer_of_a_server_makes_it_fail(
    answer: Any, size: int | None, asked: dict[str, Any]
) -> None:
    need = estimate(answer, size, 8192, **asked)

    holds_together(need)
    assert repr(need)
    assert str(need)
    assert len(need.layer_kv_bytes) >= 1


@given(ODD, ODD)
def test_not_even_one_that_is_none(answer: Any, size: Any) -> None:
    holds_together(estimate(answer, size, 8192))


@pytest.mark.parametrize("odd", [None, "32", -32, 0, 10**12, [], {}, math.nan, True])
@pytest.mark.parametrize(
    "key", ["block_count", "embedding_length", "attention.head_count", "attention.key_length"]
)
def test_a_figure_that_makes_no_sense_does_not_blow_the_estimate_up(key: str, odd: Any) -> None:
    good = estimate(llama(), LLAMA_BYTES, 8192)
    need = estimate(llama(**{key.replace(".", "__"): odd}), LLAMA_BYTES, 8192)

    assert 0.5 * good.total_bytes < need.total_bytes < 2 * good.total_bytes
    assert need.low_bytes < good.total_bytes < need.high_bytes


def test_keys_far_wider_than_the_model_are_not_believed() -> None:
    good = estimate(llama(), LLAMA_BYTES, 8192)
    need = estimate(llama(attention__head_count_kv=1 << 20), LLAMA_BYTES, 8192)

    assert need.kv_bytes() <= good.kv_bytes()
    assert need.low_bytes < good.total_bytes < need.high_bytes


def test_knowing_less_widens_the_interval() -> None:
    payload = next(point for point in published() if point.tabled)
    assert payload.tabled is not None
    needs = [
        estimate(payload.tabled, payload.size, 4096),
        estimate({**payload.tabled, "tensors": None}, payload.size, 4096),
        estimate(None, payload.size, 4096),
        estimate(None, None, 4096),
    ]
    widths = [need.high_bytes - need.low_bytes for need in needs]

    assert widths == sorted(set(widths))
    for need in needs:
        assert need.low_bytes <= needs[0].total_bytes <= need.high_bytes


def test_the_size_alone_gives_an_answer() -> None:
    need = estimate(None, LLAMA_BYTES, 4096)

    assert need.part("weights") == LLAMA_BYTES
    assert need.layer_count is None
    assert need.bytes_per_layer == ()
    with pytest.raises(ValueError, match="nothing tells"):
        need.gpu_bytes(3)


def test_a_cache_type_that_llama_cpp_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"q8_0.*'q3_k'"):
        estimate(llama(), LLAMA_BYTES, 4096, kv_type="Q3_K")


# ------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("tokens", "slots", "batch"),
    [
        (4096, 1, 512),
        (4097, 1, 1024),
        (8192, 4, 1024),
        (32768, 1, 1024),
        (32769, 1, 2048),
        (100, 1, 100),
        (16384, 4, 2048),
    ],
)
def test_batches_grow_with_the_context(tokens: int, slots: int, batch: int) -> None:
    assert estimate(llama(), LLAMA_BYTES, tokens, slots).batch == batch


@pytest.mark.parametrize(
    ("available_gib", "batch"), [(None, 2048), (64, 2048), (18, 2048), (15, 1024), (12, 512)]
)
def test_where_little_is_free_batches_are_smaller(available_gib: int | None, batch: int) -> None:
    free = None if available_gib is None else available_gib << 30
    need = estimate(llama(), LLAMA_BYTES, 40_000, available_bytes=free)

    assert need.batch == batch


@pytest.mark.parametrize(
    ("predicted", "available", "batch"),
    [(2600, 5120, 1024), (2600, 8192, 2048), (2700, 4096, 512), (2400, 4096, 1024)],
)
def test_a_larger_batch_must_find_room_for_what_ollama_thinks_it_costs(
    predicted: int, available: int, batch: int
) -> None:
    assert automatic_batch(40_000, predicted * MIB, available * MIB) == batch


def test_a_batch_that_may_turn_out_smaller_lowers_the_lower_bound() -> None:
    def least(**more: Any) -> float:
        need = estimate(llama(), LLAMA_BYTES, 40_000, **more)
        [compute] = [part for part in need.parts if part.name == "compute"]
        return compute.low_bytes / compute.bytes

    assert least() < 0.3
    assert least(available_bytes=64 << 30) == pytest.approx(0.85)
    assert least(num_batch=2048) == pytest.approx(0.85)


def test_embedding_models_take_batches_as_long_as_their_context() -> None:
    assert estimate(SHAPES["nomic-embed-text"], None, 2048).batch == 2048
    told = {**llama(), "capabilities": ["embedding"]}
    assert estimate(told, LLAMA_BYTES, 1000).batch == 1000
    assert estimate(told, LLAMA_BYTES, 8192).batch == 2048


@pytest.mark.parametrize(
    ("model", "slots"), [("llama3.1-8b", 4), ("qwen3.5-9b", 1), ("lfm2-2.6b", 1)]
)
def test_some_models_are_given_one_slot_only(model: str, slots: int) -> None:
    assert SHAPES[model].slots(4) == slots


def test_a_model_is_split_by_layers_over_gpus() -> None:
    point = next(p for p in measured() if p.model == "llama3.1-8b" and p.asked["gpus"] == 2)
    need = point.estimate("weights")
    first, last = need.per_gpu

    assert first + last == need.total_bytes
    assert abs(first - last) < need.part("compute") + max(need.bytes_per_layer)


def test_several_gpus_need_more_than_one() -> None:
    one, two, three = (estimate(llama(), LLAMA_BYTES, 8192, gpus=n).total_bytes for n in (1, 2, 3))

    assert one + 457 * MIB < two
    assert two + 457 * MIB < three


def test_without_a_gpu_it_is_system_memory_that_is_needed() -> None:
    need = estimate(llama(), LLAMA_BYTES, 8192, gpus=0)

    assert need.total_bytes == need.host_bytes >= LLAMA_BYTES + need.kv_bytes()
    assert need.part("overhead") == 0
    assert need.gpu_bytes(33) == 0


@pytest.mark.parametrize("model", ["gemma3-4b", "llama3.1-8b"])
def test_without_a_gpu_an_embedding_is_there_once(model: str) -> None:
    shape = SHAPES[model]
    need = estimate(shape, None, 8192, gpus=0)

    assert need.part("weights") + need.part("token embedding") == shape.weights.all


def test_layers_are_left_on_the_host_from_the_first_on() -> None:
    need = estimate(llama(), LLAMA_BYTES, 8192)
    each = need.bytes_per_layer

    assert len(each) == 33
    assert need.gpu_bytes(33) == need.total_bytes
    assert need.gpu_bytes(32) == need.total_bytes - each[0]
    assert need.gpu_bytes(1) == need.total_bytes - sum(each[:32])
    assert need.gpu_bytes(0) == 0


@pytest.mark.parametrize(
    ("backend", "counted", "possible"),
    [("cuda", True, True), (None, False, True), ("metal", False, False)],
)
def test_cudas_copy_of_a_quantised_cache_is_counted_where_there_is_cuda(
    backend: str | None, counted: bool, possible: bool
) -> None:
    need = estimate(llama(), LLAMA_BYTES, 131_072, kv_type="q8_0", backend=backend)
    [copied] = [part for part in need.parts if part.name == "copy of the cache"]
    layer = 512 * MIB  # 131 072 cells of 8 heads with 128 + 128 elements of 2 bytes

    assert copied.bytes == (layer if counted else 0)
    assert copied.high_bytes == (layer if possible else 0)


def test_a_projector_may_need_a_gibibyte_more_for_its_graph() -> None:
    told = llama(vision__block_count=27, vision__embedding_length=1152)
    need = estimate(told, LLAMA_BYTES, 4096)
    [projector] = [part for part in need.parts if part.name == "projector"]

    assert projector.high_bytes - projector.bytes == 1 << 30
    assert not projector.reported


# ------------------------------------------------------------------------------ eras


@pytest.mark.parametrize(
    ("version", "era"),
    [
        ("0.9.6", "legacy"),
        ("0.11.10", "legacy"),
        ("0.11.11", "engine"),
        ("v0.24.0", "engine"),
        ("0.30.0-rc1", "llama_server"),
        ("0.32.15", "llama_server"),
        (None, "llama_server"),
        ("0.0.0", "llama_server"),
        ("main", "llama_server"),
        ("1.0", "llama_server"),
    ],
)
def test_versions_reckon_in_their_own_way(version: str | None, era: str) -> None:
    assert estimate(llama(), LLAMA_BYTES, 4096, ollama_version=version).era == era


def test_metal_had_a_larger_minimum_in_old_forecasts() -> None:
    cuda, metal = (
        estimate(llama(), LLAMA_BYTES, 4096, ollama_version="0.9.6", backend=backend)
        for backend in ("cuda", "metal")
    )

    assert metal.total_bytes - cuda.total_bytes == (512 - 457) * MIB


def test_the_overhead_is_needed_and_since_0_11_11_not_reported() -> None:
    for version, counted in (("0.9.6", True), ("0.20.0", False), (None, False)):
        need = estimate(llama(), LLAMA_BYTES, 4096, ollama_version=version)
        without = need.total_bytes - need.part("overhead")
        assert (need.reported_bytes == need.total_bytes) == counted
        assert counted or need.reported_bytes == without


def test_early_builds_made_room_for_the_logits_of_a_batch() -> None:
    early = estimate(llama(), LLAMA_BYTES, 4096, ollama_version="0.30.0")

    assert early.part("compute") == 4 * 512 * (128_256 + 4096)


# --------------------------------------------------------------------------- looking


def test_a_need_shows_itself_in_a_line_and_as_a_table() -> None:
    need = estimate(llama(), LLAMA_BYTES, 4096, 2, "q8_0")

    assert repr(need).startswith("<MemoryNeed 5.")
    assert repr(need).endswith("for llama, 4096 tokens x 2, q8_0>")
    first, *rows, last = str(need).splitlines()
    assert first.split() == ["part", "on", "GB", "between", "from"]
    assert [row.split("  ")[0] for row in rows][:3] == ["weights", "key/value cache", "compute"]
    assert last.startswith("total")
    assert repr(need.shape) == "<ModelShape llama, 32 layers, 4.92 GB>"


def test_a_shape_read_once_gives_the_same_answer() -> None:
    point = next(point for point in published() if point.tabled)
    shape = ModelShape.from_show(point.tabled, point.size)

    assert estimate(shape, None, 8192).parts == estimate(point.tabled, point.size, 8192).parts
