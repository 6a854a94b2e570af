"""The routing words: what a caller may say, however it is said."""

from __future__ import annotations

import inspect
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hydra_llm
from hydra_llm.exceptions import ConfigurationError, RoutingWordError
from hydra_llm.words import (
    NO_WORDS,
    WORDS,
    RoutingWords,
    read_words,
    split_words,
    unknown_word,
    words_of_headers,
)

DEFAULTS: dict[str, Any] = {
    "node_id": None,
    "min_vram_gb": None,
    "prefer_local": True,
    "priority": 5,
    "session": None,
    "exclude_nodes": (),
    "require_labels": (),
    "prefer_labels": (),
    "deadline_s": None,
    "pin": "prefer",
    "vram": "prefer",
    "continue_streams": None,
}

# word, as Python says it, as a header says it, what it means
SAID: list[tuple[str, Any, str, Any]] = [
    ("node_id", "rig", "rig", "rig"),
    ("node_id", " http://rig:11434 ", " http://rig:11434 ", "http://rig:11434"),
    ("min_vram_gb", 20, "20", 20.0),
    ("min_vram_gb", 7.5, "7.5", 7.5),
    ("prefer_local", False, "false", False),
    ("prefer_local", True, "1", True),
    ("priority", 10, "10", 10),
    ("priority", 1, "1", 1),
    ("session", "chat-7", "chat-7", "chat-7"),
    ("exclude_nodes", ["a", "b"], "a,b", ("a", "b")),
    ("exclude_nodes", ("a",), " a , ", ("a",)),
    ("exclude_nodes", "a", "a", ("a",)),
    ("require_labels", ["gpu"], "gpu", ("gpu",)),
    ("prefer_labels", "quiet, near", "quiet,near", ("quiet", "near")),
    ("prefer_labels", [], "", ()),
    ("deadline_s", 2.5, "2.5", 2.5),
    ("pin", "require", "require", "require"),
    ("vram", "require", "require", "require"),
    ("continue_streams", True, "true", True),
    ("continue_streams", False, "0", False),
]

WRONG: list[tuple[str, Any]] = [
    ("node_id", ""),
    ("node_id", "  "),
    ("node_id", 7),
    ("node_id", "x" * 501),
    ("min_vram_gb", 0),
    ("min_vram_gb", -1),
    ("min_vram_gb", "much"),
    ("min_vram_gb", float("nan")),
    ("min_vram_gb", float("inf")),
    ("prefer_local", "perhaps"),
    ("priority", 0),
    ("priority", 11),
    ("priority", 5.5),
    ("priority", "high"),
    ("session", ""),
    ("exclude_nodes", 7),
    ("exclude_nodes", [""]),
    ("require_labels", [7]),
    ("prefer_labels", {"a": 1}),
    ("deadline_s", 0),
    ("deadline_s", -5),
    ("deadline_s", float("inf")),
    ("pin", "maybe"),
    ("vram", True),
    ("continue_streams", "perhaps"),
]


def test_the_words_and_what_they_mean_unsaid() -> None:
    assert NO_WORDS.model_dump() == DEFAULTS
    assert tuple(DEFAULTS) == WORDS
    assert read_words({}) is NO_WORDS
    assert read_words(dict.fromkeys(WORDS)) is NO_WORDS


def test_every_word_has_a_case_here() -> None:
    assert {word for word, *_ in SAID} == {word for word, _ in WRONG} == set(WORDS)


def test_every_word_says_what_it_is_for() -> None:
    source = inspect.getsource(RoutingWords)

    for word in WORDS:
        assert f"    {word}: " in source
    assert source.count('"""') == 2 * (len(WORDS) + 3)  # the class has one, and two methods


@pytest.mark.parametrize(("word", "python", "header", "meant"), SAID)
def test_a_word_means_the_same_in_python_and_in_a_header(
    word: str, python: Any, header: str, meant: Any
) -> None:
    headers = httpx.Headers({f"X-Hydra-{word.replace('_', '-').title()}": header})

    from_python = read_words({word: python})
    from_header = read_words(words_of_headers(headers.items()))

    assert getattr(from_python, word) == meant
    assert type(getattr(from_python, word)) is type(meant)
    assert from_header == from_python
    assert {**from_python.model_dump(), word: None} == {**DEFAULTS, word: None}


@pytest.mark.parametrize(("word", "value"), WRONG)
def test_a_wrong_value_is_named_with_what_would_be_right(word: str, value: Any) -> None:
    with pytest.raises(RoutingWordError) as caught:
        read_words({word: value})

    message = str(caught.value)
    assert message.startswith(word)
    assert ": " in message
    assert "\n" not in message
    assert len(message) < 250
    assert isinstance(caught.value, ConfigurationError)
    assert isinstance(caught.value, TypeError)
    assert caught.value.__cause__ is None


def test_several_mistakes_are_named_at_once() -> None:
    with pytest.raises(RoutingWordError) as caught:
        read_words({"priority": 0, "nod_id": "a", "pin": "x"})

    assert "priority=0" in str(caught.value)
    assert "did you mean 'node_id'?" in str(caught.value)
    assert "pin='x'" in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["http://user:hush-hush@rig:11434", "user:hush-hush@rig", "http://a@b:hush-hush@rig"],
)
def test_no_password_is_repeated(url: str) -> None:
    for said in ({"min_vram_gb": url}, {"pin": url}, {"priority": url}):
        with pytest.raises(RoutingWordError) as caught:
            read_words(said)
        assert "hush" not in str(caught.value)
        assert "***" in str(caught.value)


# --------------------------------------------------------------------------- levels


def test_what_a_call_says_goes_before_what_the_client_says() -> None:
    client = read_words({"node_id": "a", "priority": 2, "pin": "require"})

    call = read_words({"node_id": "b", "priority": None, "deadline_s": 3}, defaults=client)

    assert (call.node_id, call.priority, call.pin, call.deadline_s) == ("b", 2, "require", 3.0)
    assert read_words({}, defaults=client) is client


def test_a_default_value_said_aloud_undoes_the_clients() -> None:
    client = read_words({"prefer_local": False, "priority": 9, "exclude_nodes": "a"})

    call = read_words({"prefer_local": True, "priority": 5, "exclude_nodes": ()}, defaults=client)

    assert call == NO_WORDS


NAMES = st.text("abc-.", min_size=1, max_size=5)
SOME_WORDS = st.fixed_dictionaries(
    {},
    optional={
        "node_id": NAMES,
        "min_vram_gb": st.floats(0.1, 100),
        "prefer_local": st.booleans(),
        "priority": st.integers(1, 10),
        "exclude_nodes": st.lists(NAMES, max_size=3),
        "deadline_s": st.integers(1, 9),
        "pin": st.sampled_from(["prefer", "require"]),
    },
)


@given(client=SOME_WORDS, call=SOME_WORDS)
def test_two_levels_are_as_one_dictionary_over_the_other(
    client: dict[str, Any], call: dict[str, Any]
) -> None:
    assert read_words(call, defaults=read_words(client)) == read_words({**client, **call})


# ----------------------------------------------------------------------- misspelling


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("nod_id", "node_id"),
        ("node", "node_id"),
        ("nodeid", "node_id"),
        ("min_vram", "min_vram_gb"),
        ("prefered_local", "prefer_local"),
        ("priorty", "priority"),
        ("deadline", "deadline_s"),
        ("exclude_node", "exclude_nodes"),
        ("require_label", "require_labels"),
    ],
)
def test_a_misspelt_word_is_recognised(written: str, meant: str) -> None:
    assert unknown_word(written) == f"{written!r} is no routing word; did you mean {meant!r}?"
    with pytest.raises(RoutingWordError, match=f"did you mean {meant!r}"):
        read_words({written: "x"})


def test_a_word_like_no_other_gets_the_whole_list() -> None:
    assert unknown_word("zzz") == f"'zzz' is no routing word; known are {', '.join(WORDS)}"


@pytest.mark.parametrize("door", [hydra_llm.Client, hydra_llm.AsyncClient])
def test_a_client_takes_no_misspelt_word_and_no_host(door: Any) -> None:
    with pytest.raises(RoutingWordError, match="did you mean 'node_id'"):
        door(["http://127.0.0.1:1"], nod_id="a")
    with pytest.raises(ConfigurationError, match="not host"):
        door(host="http://127.0.0.1:1")


# --------------------------------------------------------------------------- headers


def test_only_our_own_headers_are_words() -> None:
    headers = httpx.Headers(
        {"x-hydra-node-id": "a", "x-request-id": "7", "node-id": "b", "hydra-pin": "require"}
    )

    assert words_of_headers(headers.items()) == {"node_id": "a"}


def test_a_misspelt_header_is_a_misspelt_word() -> None:
    headers = httpx.Headers({"X-Hydra-Nod-Id": "a"})

    with pytest.raises(RoutingWordError, match="did you mean 'node_id'"):
        read_words(words_of_headers(headers.items()))


# -------------------------------------------------------------------------- keywords


@given(words=SOME_WORDS, rest=st.dictionaries(st.sampled_from(["model", "think", "x"]), NAMES))
def test_keywords_are_parted_and_none_is_lost(words: dict[str, Any], rest: dict[str, Any]) -> None:
    keywords = {**rest, **words}

    assert split_words(keywords) == (words, rest)
    assert keywords == {**rest, **words}


# ------------------------------------------------------------------- the public way in


def test_the_model_itself_reads_and_splits() -> None:
    assert RoutingWords.read({"priority": 7, "node_id": None}) == RoutingWords(priority=7)
    with pytest.raises(RoutingWordError, match="did you mean 'node_id'"):
        RoutingWords.read({"nod_id": "a"})

    words, rest = RoutingWords.split({"priority": 99, "temperature": 0.1})
    assert (words, rest) == ({"priority": 99}, {"temperature": 0.1})
