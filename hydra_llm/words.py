"""The routing words: what a caller may say about where a request goes.

The same words everywhere: constructor, per call, headers of the transport, LiteLLM's
metadata. One model validates them, and none of them is ever sent to Ollama.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic import ValidationError as _ValidationError

from hydra_llm.exceptions import RoutingWordError
from hydra_llm.types import masked_url


def _as_tuple(value: Any) -> Any:
    """``"a,b"`` and ``"a"`` are lists too: headers know nothing else."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=500)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_as_tuple)]


class RoutingWords(BaseModel):
    """What a caller may say. Every word has a default that changes nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    node_id: Name | None = None
    """Pin: id, host or URL of a configured node. If it is down or unknown the request is
    routed and the decision says so; with ``pin="require"`` it fails instead."""
    min_vram_gb: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Only nodes with this much VRAM available, in decimal GB; what is loaded for the very
    model counts as available. None qualifies: the best that could run it, with a warning;
    with ``vram="require"`` an error."""
    prefer_local: bool = True
    """This machine first, if it is not slower by more than ``prefer_local_seconds``."""
    priority: int = Field(default=5, ge=1, le=10)
    """10 goes first when nodes are busy, 1 last."""
    session: Name | None = None
    """Conversation key: follow-up turns go where the prompt cache is warm."""
    exclude_nodes: Names = ()
    """Nodes not to use, by id, host or URL."""
    require_labels: Names = ()
    """Only nodes with all of these labels."""
    prefer_labels: Names = ()
    """Each is worth ``prefer_label_seconds``."""
    deadline_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Fail early if no node can complete it within this many seconds."""
    pin: Literal["prefer", "require"] = "prefer"
    """How strict ``node_id`` is."""
    vram: Literal["prefer", "require"] = "prefer"
    """How strict ``min_vram_gb`` is."""
    continue_streams: bool | None = None
    """Whether another node goes on with a stream that breaks off; None: as in the settings."""

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> RoutingWords:
        """
        Validate words by name; None leaves a word at its default.

        Raises:
            RoutingWordError: a word is misspelt or its value is wrong.
        """
        return read_words(given)

    @classmethod
    def split(cls, keywords: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Part keywords of a call into routing words, unchecked, and the rest."""
        return split_words(keywords)


WORDS = tuple(RoutingWords.model_fields)
_WORD_SET = frozenset(WORDS)
NO_WORDS = RoutingWords()

HEADER_PREFIX = "x-hydra-"


def read_words(given: Mapping[str, Any], *, defaults: RoutingWords = NO_WORDS) -> RoutingWords:
    """
    Validate what a caller said.

    Args:
        given: words by name; None leaves a word as it was.
        defaults: what the constructor said.

    Raises:
        RoutingWordError: a word is misspelt or its value is wrong.
    """
    said = {name: value for name, value in given.items() if value is not None}
    if not said:
        return defaults
    if defaults is not NO_WORDS:
        said = {**defaults.model_dump(exclude_unset=True), **said}
    try:
        return RoutingWords.model_validate(said)
    except _ValidationError as exc:
        raise RoutingWordError(_explain(exc)) from None


def _explain(exc: _ValidationError) -> str:
    problems: list[str] = []
    for error in exc.errors(include_url=False):
        name = str(error["loc"][0]) if error["loc"] else "?"
        if error["type"] == "extra_forbidden":
            problems.append(unknown_word(name))
            continue
        shown = masked_url(repr(error["input"]))
        problems.append(f"{name}={shown[:80]}: {error['msg'][0].lower()}{error['msg'][1:]}")
    return "; ".join(problems)


def unknown_word(name: str, known: Iterable[str] = WORDS) -> str:
    """Say ``'nod_id' is no routing word; did you mean 'node_id'?``."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return f"{name!r} is no routing word; {hint}"


@lru_cache(maxsize=256)
def _word_of_header(name: str) -> str:
    return name.removeprefix(HEADER_PREFIX).replace("-", "_")


def words_of_headers(headers: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """``x-hydra-node-id: rig`` as ``{"node_id": "rig"}``; names in lower case."""
    found: dict[str, Any] = {}
    for name, value in headers:
        if name.startswith(HEADER_PREFIX):
            found[_word_of_header(name)] = value
    return found


def split_words(keywords: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords of a call: the routing words, and the rest."""
    if _WORD_SET.isdisjoint(keywords):
        return {}, dict(keywords)
    words = {name: value for name, value in keywords.items() if name in _WORD_SET}
    rest = {name: value for name, value in keywords.items() if name not in _WORD_SET}
    return words, rest
