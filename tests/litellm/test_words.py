"""Where routing words may stand, which one wins, and what is left of the call without them."""

from __future__ import annotations

from typing import Any

import pytest

from hydra_llm import RoutingWordError
from hydra_llm.integrations.litellm.words import default_words, without_words, words_of


def headers(**said: str) -> dict[str, Any]:
    return {f"x-hydra-{name.replace('_', '-')}": value for name, value in said.items()}


PLACES: list[dict[str, Any]] = [
    {"node_id": "here"},
    {"extra_body": {"node_id": "here"}},
    {"hydra": {"node_id": "here"}},
    {"extra_body": {"hydra": {"node_id": "here"}}},
    {"metadata": {"hydra": {"node_id": "here"}}},
    {"metadata": {"hydra": '{"node_id": "here"}'}},
    {"litellm_metadata": {"hydra": {"node_id": "here"}}},
    {"proxy_server_request": {"headers": headers(node_id="here")}},
    {"extra_headers": {"X-Hydra-Node-Id": "here"}},
]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_word_is_read_wherever_it_may_stand(place: dict[str, Any]) -> None:
    assert words_of(place) == {"node_id": "here"}


@pytest.mark.parametrize(
    ("nearer", "farther"),
    [
        (PLACES[0], PLACES[1]), (PLACES[1], PLACES[2]), (PLACES[2], PLACES[3]),
        (PLACES[3], PLACES[4]), (PLACES[4], PLACES[7]),
    ],
    ids=str,
)  # fmt: skip
def test_the_nearest_to_the_call_wins(nearer: dict[str, Any], farther: dict[str, Any]) -> None:
    other = _replaced(farther, "there")
    if nearer.keys() & other.keys():
        both = {"extra_body": {**nearer["extra_body"], **other["extra_body"]}}
    else:
        both = {**nearer, **other}

    assert words_of(both, {"node_id": "nowhere"}) == {"node_id": "here"}
    assert words_of(other, {"node_id": "nowhere"}) == {"node_id": "there"}
    assert words_of({}, {"node_id": "nowhere"}) == {"node_id": "nowhere"}


def _replaced(place: Any, name: str) -> Any:
    if isinstance(place, dict):
        return {key: _replaced(value, name) for key, value in place.items()}
    return name if place == "here" else place


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"min_vram_gb": "much"}, "min_vram_gb"),
        ({"hydra": {"nod_id": "a"}}, "nod_id"),
        ({"metadata": {"hydra": {"priority": 11}}}, "priority"),
        ({"metadata": {"hydra": "rig"}}, "metadata.hydra"),
        ({"hydra": 3}, "hydra"),
        ({"proxy_server_request": {"headers": headers(nodeid="a")}}, "nodeid"),
        ({"extra_body": {"hydra": {"pin": "must"}}}, "pin"),
    ],
)
def test_a_wrong_word_is_named(said: dict[str, Any], named: str) -> None:
    with pytest.raises(RoutingWordError, match=named):
        words_of(said)


def test_priority_as_a_key_of_the_call_is_litellms_own() -> None:
    assert words_of({"priority": 1, "hydra": {"priority": 9}}) == {"priority": 9}
    assert words_of({"priority": 1}) == {}
    assert without_words({"priority": 1}) == {"priority": 1}
    assert words_of({"proxy_server_request": {"headers": headers(priority="7")}}) == {
        "priority": "7"
    }


@pytest.mark.parametrize(
    ("asked", "limits", "given"),
    [
        (9, {"user_api_key_metadata": 4}, 4),
        (9, {"user_api_key_team_metadata": 6}, 6),
        (9, {"user_api_key_metadata": 7, "user_api_key_team_metadata": 3}, 3),
        (2, {"user_api_key_metadata": 4}, 2),
        (None, {"user_api_key_metadata": 4}, 4),
        (None, {"user_api_key_metadata": 9}, 5),
        (9, {"user_api_key_metadata": 0}, 1),
    ],
)
def test_a_key_or_team_can_be_limited_and_never_raised(
    asked: int | None, limits: dict[str, int], given: int
) -> None:
    metadata: dict[str, Any] = {
        owner: {"hydra": {"max_priority": limit}} for owner, limit in limits.items()
    }
    if asked is not None:
        metadata["hydra"] = {"priority": asked}

    assert words_of({"metadata": metadata})["priority"] == given
    assert words_of({"litellm_metadata": metadata})["priority"] == given


@pytest.mark.parametrize("limit", ["4", None, True, {}])
def test_a_limit_that_is_no_number_limits_nothing(limit: object) -> None:
    metadata = {"user_api_key_metadata": {"hydra": {"max_priority": limit}}}

    assert words_of({"metadata": {**metadata, "hydra": {"priority": 9}}})["priority"] == 9


def test_the_call_goes_on_without_the_words() -> None:
    call = {
        "model": "chat", "node_id": "a", "hydra": {}, "temperature": 0, "session": "s",
        "extra_body": {"node_id": "a", "hydra": {}, "num_ctx": 4096},
    }  # fmt: skip

    assert without_words(call) == {
        "model": "chat",
        "temperature": 0,
        "extra_body": {"num_ctx": 4096},
    }
    assert without_words({"extra_body": {"hydra": {}}}) == {}
    assert call["node_id"] == "a"


def test_what_a_deployment_says_is_of_the_node_or_a_word() -> None:
    said = {"node_id": "rig", "vram_gb": 24, "labels": ["x"], "min_vram_gb": 8, "priority": 3}

    assert default_words(said) == {"min_vram_gb": 8, "priority": 3}
    assert default_words({}) == {}
