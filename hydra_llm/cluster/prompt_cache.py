"""Which prompt beginnings each node still has in its prompt cache, as far as we know.

A conversation is a chain of keys, one per message, each with the tokens up to there; or
the caller's session name. A runner keeps only so many conversations: an entry counts until
that many others have followed it on the same runner (BEHAVIOUR section 9).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

CacheKey = tuple[str, int]
"""Model and hash of the conversation so far."""


class PrefixKey(NamedTuple):
    """A prompt beginning: its hash and how many tokens it has."""

    hash: int
    tokens: int


class _Entry(NamedTuple):
    tokens: int
    conversation: int
    load: int


class PromptCacheIndex:
    """A bounded table; the owner holds the lock."""

    def __init__(self, *, max_entries: int = 20_000) -> None:
        self._entries: OrderedDict[CacheKey, dict[str, _Entry]] = OrderedDict()
        self._max_entries = max_entries
        self._conversations: dict[tuple[str, str], int] = {}
        self._loads: dict[tuple[str, str], int] = {}
        self._met: dict[tuple[str, str], int] = {}
        """Runners that had served others before: our conversations there until then."""

    def cached_tokens(
        self, model: str, chain: Sequence[PrefixKey], kept: Callable[[str], int]
    ) -> dict[str, int]:
        """
        Tokens of this prompt expected in each node's cache.

        Args:
            model: canonical name.
            chain: the prompt's beginnings, shortest first.
            kept: how many conversations a runner keeps, by its node's id.
        """
        found: dict[str, int] = {}
        for key in reversed(chain):
            nodes = self._entries.get((model, key.hash))
            if not nodes:
                continue
            for node_id, entry in nodes.items():
                if node_id not in found and self._is_alive(model, node_id, entry, kept):
                    found[node_id] = min(entry.tokens, key.tokens)
        return found

    def _is_alive(
        self, model: str, node_id: str, entry: _Entry, kept: Callable[[str], int]
    ) -> bool:
        runner = (node_id, model)
        if entry.load != self._loads.get(runner, 0):
            return False
        since = self._conversations.get(runner, 0) - entry.conversation
        return since < kept(node_id)

    def remember(self, model: str, node_id: str, chain: Sequence[PrefixKey]) -> None:
        """The node has just evaluated this prompt."""
        if not chain:
            return
        runner = (node_id, model)
        conversation = self._conversations.get(runner, 0)
        if not self._goes_on(model, node_id, chain, conversation):
            conversation += 1
            self._conversations[runner] = conversation
        load = self._loads.get(runner, 0)
        for key in chain:
            cache_key = (model, key.hash)
            nodes = self._entries.setdefault(cache_key, {})
            nodes[node_id] = _Entry(key.tokens, conversation, load)
            self._entries.move_to_end(cache_key)
        while len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    def _goes_on(
        self, model: str, node_id: str, chain: Sequence[PrefixKey], conversation: int
    ) -> bool:
        """Whether most of the prompt belongs to the conversation the runner saw last."""
        for key in reversed(chain):
            # A shared system prompt alone does not make it the same conversation.
            if key.tokens * 2 < chain[-1].tokens:
                return False
            entry = self._entries.get((model, key.hash), {}).get(node_id)
            if entry is not None:
                return entry.conversation == conversation
        return False

    def forget(self, node_id: str, model: str) -> None:
        """The runner was (re)started: its cache is empty."""
        runner = (node_id, model)
        self._loads[runner] = self._loads.get(runner, 0) + 1
        self._met.pop(runner, None)

    def meet(self, node_id: str, model: str) -> None:
        """The runner was there before we looked: who knows what is in its cache."""
        self.forget(node_id, model)
        runner = (node_id, model)
        self._met[runner] = self._conversations.get(runner, 0)

    def knows(self, model: str, node_id: str, kept: Callable[[str], int]) -> bool:
        """Whether a prompt that is not found here is not in the runner's cache either."""
        runner = (node_id, model)
        met = self._met.get(runner)
        # By then ours have pushed out whatever was there.
        return met is None or self._conversations.get(runner, 0) - met >= kept(node_id)

    def __len__(self) -> int:
        return len(self._entries)
