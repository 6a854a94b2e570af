"""Which nodes still have the beginning of a prompt in their cache."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.cluster import PrefixKey
from hydra_llm.cluster.prompt_cache import PromptCacheIndex
from tests.helpers import LLAMA


def keeps_one(node_id: str) -> int:
    return 1


def keeps_three(node_id: str) -> int:
    return 3


def conversation(name: int, turns: int, *, system: int = 0) -> list[PrefixKey]:
    """A chain of turns of 100 tokens each, after an optional system prompt of its own."""
    chain = [PrefixKey(hash(("system", system)), 20)] if system else []
    return chain + [
        PrefixKey(hash((name, turn)), 100 * turn + len(chain) * 20) for turn in range(1, turns + 1)
    ]


def test_the_next_turn_finds_all_earlier_ones_on_the_node_that_had_them() -> None:
    index = PromptCacheIndex()
    index.remember(LLAMA, "a", conversation(1, 3))

    assert index.cached_tokens(LLAMA, conversation(1, 4), keeps_one) == {"a": 300}
    assert index.cached_tokens(LLAMA, conversation(2, 4), keeps_one) == {}
    assert index.cached_tokens("another:8b", conversation(1, 4), keeps_one) == {}


def test_each_node_counts_its_own_longest_beginning() -> None:
    index = PromptCacheIndex()
    index.remember(LLAMA, "a", conversation(1, 1))
    index.remember(LLAMA, "b", conversation(1, 3))

    assert index.cached_tokens(LLAMA, conversation(1, 5), keeps_one) == {"a": 100, "b": 300}


def test_an_old_runner_keeps_one_conversation_and_a_newer_one_several() -> None:
    index = PromptCacheIndex()
    for name in (1, 2, 3, 4):
        index.remember(LLAMA, "a", conversation(name, 2))

    assert index.cached_tokens(LLAMA, conversation(4, 2), keeps_one) == {"a": 200}
    assert index.cached_tokens(LLAMA, conversation(3, 2), keeps_one) == {}
    assert index.cached_tokens(LLAMA, conversation(2, 2), keeps_three) == {"a": 200}
    assert index.cached_tokens(LLAMA, conversation(1, 2), keeps_three) == {}


def test_a_conversation_that_goes_on_does_not_age_itself() -> None:
    index = PromptCacheIndex()
    for turns in range(1, 10):
        index.remember(LLAMA, "a", conversation(1, turns))

    assert index.cached_tokens(LLAMA, conversation(1, 9), keeps_one) == {"a": 900}


def test_a_shared_system_prompt_does_not_make_two_conversations_one() -> None:
    index = PromptCacheIndex()
    index.remember(LLAMA, "a", conversation(1, 2, system=7))
    index.remember(LLAMA, "a", conversation(2, 2, system=7))

    assert index.cached_tokens(LLAMA, conversation(1, 2, system=7), keeps_one) == {"a": 20}


def test_a_restarted_runner_has_forgotten_everything() -> None:
    index = PromptCacheIndex()
    index.remember(LLAMA, "a", conversation(1, 3))
    index.remember(LLAMA, "b", conversation(1, 3))

    index.forget("a", LLAMA)

    assert index.cached_tokens(LLAMA, conversation(1, 3), keeps_three) == {"b": 300}
    index.remember(LLAMA, "a", conversation(1, 4))
    assert index.cached_tokens(LLAMA, conversation(1, 4), keeps_three) == {"a": 400, "b": 300}


def test_the_table_is_bounded_and_drops_what_was_not_used_for_longest() -> None:
    index = PromptCacheIndex(max_entries=5)
    index.remember(LLAMA, "a", conversation(1, 3))
    index.remember(LLAMA, "a", conversation(2, 3))

    assert len(index) == 5
    assert index.cached_tokens(LLAMA, conversation(2, 3), keeps_three) == {"a": 300}


def test_a_prompt_that_nobody_looked_at_changes_nothing() -> None:
    index = PromptCacheIndex()
    index.remember(LLAMA, "a", [])

    assert len(index) == 0
    assert index.cached_tokens(LLAMA, [], keeps_one) == {}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["say", "say", "say", "restart"]),
            st.sampled_from(["a", "b"]),
            st.integers(1, 4),
            st.integers(1, 4),
        ),
        max_size=30,
    ),
    st.integers(1, 4),
    st.integers(1, 5),
)
def test_no_more_is_expected_than_was_said_there_since_the_last_start(
    steps: list[tuple[str, str, int, int]], name: int, turns: int
) -> None:
    index = PromptCacheIndex(max_entries=20)
    said: dict[str, dict[int, int]] = {"a": {}, "b": {}}
    for step, node_id, who, length in steps:
        if step == "restart":
            index.forget(node_id, LLAMA)
            said[node_id].clear()
        else:
            index.remember(LLAMA, node_id, conversation(who, length))
            said[node_id][who] = max(length, said[node_id].get(who, 0))

    found = index.cached_tokens(LLAMA, conversation(name, turns), keeps_three)

    for node_id, tokens in found.items():
        assert 0 < tokens <= 100 * min(turns, said[node_id].get(name, 0))
    assert len(index) <= 20
