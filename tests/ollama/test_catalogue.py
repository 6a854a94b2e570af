from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.ollama.catalogue import (
    MOST_MODELS,
    parse_ps,
    parse_show,
    parse_tags,
    parse_version,
)
from hydra_llm.types import InstalledModel

RECORDINGS = Path(__file__).parents[1] / "recordings"
VERSIONS = ("0.24.0", "0.32.15")


def recorded(name: str) -> Any:
    return json.loads((RECORDINGS / f"{name}.json").read_text())["response"]["body"]


def recordings(pattern: str) -> list[str]:
    return sorted(file.stem for file in RECORDINGS.glob(f"{pattern}.json"))


def ps(**entry: Any) -> Any:
    return {"models": [{"name": "a", **entry}]}


INSTALLED = InstalledModel(name="a:latest", digest="d", size_bytes=7)

# ------------------------------------------------------------------- recordings


@pytest.mark.parametrize("version", VERSIONS)
def test_the_version_is_what_the_server_says(version: str) -> None:
    assert parse_version(recorded(f"v{version}-version")) == version


@pytest.mark.parametrize("name", recordings("v*-tags"))
def test_every_recorded_installed_model_is_found(name: str) -> None:
    body = recorded(name)

    found = parse_tags(body)

    assert len(found) == len(body["models"])
    for entry in body["models"]:
        model = found[entry["name"]]
        assert (model.name, model.size_bytes) == (entry["name"], entry["size"])
        assert model.digest == entry["digest"]


def test_only_newer_servers_say_what_a_model_can_do() -> None:
    old, new = (parse_tags(recorded(f"v{one}-tags"))["script-think:latest"] for one in VERSIONS)

    assert (old.capabilities, old.context_length) == (None, None)
    assert new.capabilities == frozenset({"completion", "tools", "thinking"})
    assert new.context_length == 8192


@pytest.mark.parametrize("name", [*recordings("v*[0-9]-ps-*"), *recordings("v*-simgpu-ps")])
def test_every_recorded_loaded_model_is_found(name: str) -> None:
    body = recorded(name)

    found = parse_ps(body)

    assert list(found) == [entry["name"] for entry in body["models"] or []]
    for entry in body["models"] or []:
        model = found[entry["name"]]
        assert model.size_bytes == entry["size"]
        assert model.size_vram_bytes == entry["size_vram"]
        assert model.context_length == entry["context_length"]
        assert model.expires_at is not None
        assert model.expires_at > 1.7e9


@pytest.mark.parametrize("version", VERSIONS)
def test_kept_for_ever_is_the_year_2319(version: str) -> None:
    found = parse_ps(recorded(f"v{version}-ps-keep-forever"))

    assert (found["rand-tiny:latest"].expires_at or 0) > 11_000_000_000


@pytest.mark.parametrize("name", recordings("v*-show-*"))
def test_every_recorded_description_is_understood(name: str) -> None:
    body = recorded(name)

    model = parse_show(body, INSTALLED)

    assert model.capabilities == frozenset(body["capabilities"])
    assert model.context_length in (512, 8192)
    assert model.shape is not None
    assert model.shape.layer_count
    assert model.weights_file.startswith("sha256-")


def cache_per_token(model: InstalledModel) -> float:
    assert model.shape is not None
    return (model.shape.kv_bytes(512) - model.shape.kv_bytes(256)) / 256


@pytest.mark.parametrize("version", VERSIONS)
def test_the_cache_per_token_follows_from_the_metadata(version: str) -> None:
    # 2 layers, 2 key/value heads of 128 / 4 values, keys and values, 2 bytes.
    model = parse_show(recorded(f"v{version}-show-rand-tiny"), INSTALLED)
    assert cache_per_token(model) == 2 * 2 * (32 + 32) * 2


@pytest.mark.parametrize("version", VERSIONS)
def test_the_cache_per_token_of_a_known_size_is_exact(version: str) -> None:
    # BEHAVIOUR section 11: E 1024, L 12, G 4, D 64; halving 4096 tokens saved 24 MiB.
    model = parse_show(recorded(f"v{version}-show-rand-mid"), INSTALLED)
    assert cache_per_token(model) * 2048 == 24 << 20


@pytest.mark.parametrize("version", VERSIONS)
def test_an_encoder_without_causal_attention_keeps_no_cache(version: str) -> None:
    assert cache_per_token(parse_show(recorded(f"v{version}-show-rand-embed"), INSTALLED)) == 0


def test_the_weights_are_known_by_the_name_of_their_file() -> None:
    def file_of(modelfile: Any) -> str:
        return parse_show({"modelfile": modelfile}, INSTALLED).weights_file

    blob = "sha256-" + 64 * "a"
    assert (
        file_of(
            f"# Modelfile\n# FROM x:latest\n\nFROM /usr/share/ollama/.ollama/models/blobs/{blob}\n"
        )
        == blob
    )
    assert file_of(f"FROM D:\\models\\blobs\\{blob}  \nTEMPLATE x") == blob
    assert file_of("TEMPLATE x") == file_of(None) == ""


LAYERS = (
    "general.architecture",
    "x.block_count",
    "x.embedding_length",
    "x.attention.head_count",
)


def test_a_description_without_metadata_leaves_what_was_known() -> None:
    known = InstalledModel(
        name="a:latest",
        capabilities=frozenset({"tools"}),
        context_length=4096,
        weights_file="sha256-1",
    )

    for document in ({}, {"model_info": None, "capabilities": "tools"}):
        assert replace(parse_show(document, known), shape=None) == known


# -------------------------------------------------------------------------- times


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-01T00:01:00Z", 60.0),
        ("1970-01-01T00:01:00.500000001Z", 60.500000001),
        ("1970-01-01T01:01:00.25+01:00", 60.25),
        ("1969-12-31T18:31:00-05:30", 60.0),
        ("2319-03-05T08:39:56.583223651Z", 11_018_795_996.583223),
        ("0001-01-01T00:00:00Z", None),
        ("0001-01-01T00:53:28+00:53", None),
        ("9999-12-31T23:59:59-14:00", None),
        ("2026-13-01T00:00:00Z", None),
        ("2026-11-23 08:57:39", None),
        ("", None),
        (12, None),
    ],
)
def test_times_are_read_to_the_microsecond_in_any_zone(text: Any, seconds: float | None) -> None:
    model = parse_ps(ps(expires_at=text))["a:latest"]

    assert model.expires_at == (None if seconds is None else pytest.approx(seconds, abs=1e-6))


# --------------------------------------------------------------------------- junk


def test_names_are_keyed_by_their_canonical_form() -> None:
    tags = {"models": [{"name": "registry.ollama.ai/library/LLAMA3"}, {"model": "ns/x:v1"}]}

    assert list(parse_tags(tags)) == ["llama3:latest", "ns/x:v1"]


def test_bad_entries_are_left_out_and_the_others_stay() -> None:
    entries: list[Any] = [None, 3, "x", [], {}, {"name": 5}, {"name": "  "}, {"name": "good"}]

    assert list(parse_tags({"models": entries})) == ["good:latest"]
    assert list(parse_ps({"models": entries})) == ["good:latest"]


@pytest.mark.parametrize("name", ["x" * 501, "a\x1b[2Jb", "a\nb", "\ud800", "\u202ea"], ids=ascii)
def test_a_name_that_no_line_and_no_terminal_could_take_is_none(name: str) -> None:
    entries = [{"name": name, "digest": "d"}, {"name": "good", "digest": name}]

    found = parse_tags({"models": entries})

    assert {model.name: model.digest for model in found.values()} == {"good:latest": ""}
    assert parse_version({"version": name}) is None


def test_of_a_list_without_end_the_first_models_count() -> None:
    entries = [{"name": f"m{n}"} for n in range(MOST_MODELS + 1)]

    assert len(parse_tags({"models": entries})) == MOST_MODELS
    assert len(parse_ps({"models": entries})) == MOST_MODELS


def test_a_modelfile_that_is_made_to_be_hard_to_read_takes_no_longer() -> None:
    modelfile = "FROM a" + " " * 500_000 + "b\x00" + "\nFROM " * 50_000

    began = time.process_time()
    shown = parse_show({"modelfile": modelfile}, InstalledModel(name="x"))

    # A pattern that tries every split of the blanks takes ten minutes.
    assert time.process_time() - began < 2
    assert shown.weights_file == ""


def test_a_model_in_the_cloud_needs_no_size() -> None:
    tags = {"models": [{"name": "big:cloud", "remote_host": "https://ollama.com:443"}]}

    assert parse_tags(tags)["big:cloud"].size_bytes == 0


@pytest.mark.parametrize("size", [None, "7", -1, True, 1.5, float("nan"), float("inf"), {}, []])
def test_a_figure_of_the_wrong_kind_counts_as_not_given(size: Any) -> None:
    model = parse_ps(ps(size=size, size_vram=size, context_length=size))["a:latest"]

    assert (model.size_bytes, model.size_vram_bytes, model.context_length) == (0, 0, None)


def test_a_model_is_never_smaller_than_its_part_on_the_gpu() -> None:
    assert parse_ps(ps(size=5, size_vram=9))["a:latest"].gpu_share == 1.0


@pytest.mark.parametrize("parse", [parse_tags, parse_ps])
@pytest.mark.parametrize("data", [None, [], "models", 3, {}, {"models": {}}, {"error": "no"}])
def test_a_document_that_lists_no_models_is_not_ollamas(parse: Any, data: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse(data)


@pytest.mark.parametrize("parse", [parse_tags, parse_ps])
def test_a_list_that_go_writes_as_null_is_empty(parse: Any) -> None:
    assert parse({"models": None}) == {}


@pytest.mark.parametrize("data", [None, [], "0.32.15"])
def test_a_version_comes_in_an_object(data: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_version(data)


@pytest.mark.parametrize("data", [{}, {"version": 32}, {"version": ""}])
def test_a_missing_version_is_unknown(data: Any) -> None:
    assert parse_version(data) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        ("name", "model", "size", "size_vram", "digest", "details", "expires_at", "capabilities"),
        JSON,
    ),
)


@given(st.lists(ENTRY | JSON, max_size=4))
def test_no_entry_breaks_a_list(entries: list[Any]) -> None:
    assert len(parse_tags({"models": entries})) == len(parse_ps({"models": entries}))


@given(
    st.fixed_dictionaries(
        {"model_info": st.dictionaries(st.sampled_from([*LAYERS, "x.attention.head_count_kv",
                                                        "x.attention.key_length"]), JSON)},
        optional={"tensors": JSON, "capabilities": JSON},
    )
)  # fmt: skip
def test_no_description_breaks_what_is_known(document: Any) -> None:
    document["model_info"]["general.architecture"] = "x"

    model = parse_show(document, INSTALLED)

    assert (model.name, model.size_bytes) == ("a:latest", 7)
    assert model.shape is not None
    assert model.shape.kv_bytes(4096) >= 0
