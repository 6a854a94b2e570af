"""The answer to a request, token by token, known before the first one is out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hydra_llm.simulation.catalog import SimulatedModel
from hydra_llm.simulation.schema import Hints, value_for
from hydra_llm.simulation.templates import text_of
from hydra_llm.simulation.text import prose, rng_of, tokens_of
from hydra_llm.simulation.toolcalls import ToolCall, choose_call, parse_call

__all__ = ["Answer", "Question", "Token", "answer"]

# "When one token repeats more than 30 times in a row the server stops silently."
_REPEATS = 31
_THINKING = 12


@dataclass(frozen=True, slots=True)
class Token:
    """
    One generated token and what of it is seen.

    ``tag`` opens or closes the thinking (an empty line on ``/api/generate``, nothing on
    ``/api/chat``); ``hidden`` is the end of the turn, or text held back for a tool call.
    """

    text: str
    kind: Literal["content", "thinking", "tag", "call", "hidden"] = "content"
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What decides an answer, and nothing that depends on the node."""

    model: SimulatedModel
    rendered: str
    messages: Sequence[Mapping[str, Any]]
    prefill: str | None = None
    """The last assistant message, where the template continues it."""
    repeats_prefill: bool = False
    tools: Sequence[Mapping[str, Any]] = ()
    format: object = None
    thinks: bool = False
    is_native: bool = False
    seed: object = None
    num_predict: int | None = None
    stop: tuple[str, ...] = ()
    token_output: int = 64
    room: int = 1_000_000
    """Tokens that fit in the context after the prompt, where it is not shifted."""


@dataclass(frozen=True, slots=True)
class Answer:
    """All tokens of an answer; ``done_reason`` is ``None`` when the server gives up silently."""

    tokens: tuple[Token, ...]
    done_reason: Literal["stop", "length"] | None
    text: str = field(default="")
    """What the model said, tags and all."""


def answer(question: Question) -> Answer:
    """Work out the whole answer to a question."""
    kind = question.model.behaviour.kind
    if kind == "loop" and not question.is_native:
        repeated = list(itertools.islice(_raw(question), _REPEATS + 1))
        if question.num_predict is None or question.num_predict > len(repeated):
            return Answer(tuple(map(Token, repeated)), None, "".join(repeated))
    tokens = _said(question)
    limit = min(question.num_predict or question.room, question.room)
    kept = tuple(itertools.islice(tokens, limit))
    kept, stopped = _cut_at_stop(kept, question.stop)
    done_reason: Literal["stop", "length"] = "stop"
    if not stopped:
        ended = bool(kept) and kept[-1].text == "" and kept[-1].kind == "hidden"
        done_reason = "stop" if ended or next(iter(tokens), None) is None else "length"
    if question.repeats_prefill and question.prefill and kept:
        kept = (Token(question.prefill + kept[0].text, kept[0].kind), *kept[1:])
    return Answer(kept, done_reason, "".join(token.text for token in kept))


def _said(question: Question) -> Iterator[Token]:
    """Give the tokens up to and with the end of the turn, each marked for what it is."""
    kind = question.model.behaviour.kind
    if kind == "script":
        return iter(_marked(list(_raw(question)), question))
    if kind == "length" and question.format is None:
        return _end(itertools.repeat(Token(" word"), _length_from(question) - 1))
    if kind != "prose" and question.format is None:
        return map(Token, _raw(question))
    if kind != "prose":
        return _end(map(Token, _formatted(question)))
    return _end(_thoughtful(question))


def _raw(question: Question) -> Iterator[str]:
    behaviour = question.model.behaviour
    if behaviour.kind == "count":
        start = _count_from(question)
        return (f" n{number:04d}" for number in itertools.count(start))
    if behaviour.kind == "loop":
        return itertools.chain(behaviour.tokens, itertools.repeat(behaviour.tokens[-1]))
    if behaviour.kind == "script":
        return iter(behaviour.tokens)
    return prose(rng_of(question.model.name, question.rendered, question.seed))


def _length_from(question: Question) -> int:
    """The number at the end of the last message; the usual length where there is none."""
    last = text_of(question.messages[-1]).rsplit(maxsplit=1) if question.messages else ()
    asked = last[-1] if last else ""
    return max(1, int(asked)) if asked.isdecimal() else question.token_output


def _count_from(question: Question) -> int:
    """The number after the last one of the prompt; some number where there is none."""
    tail = question.rendered.rsplit(maxsplit=1)
    last = tail[-1] if tail and not question.rendered[-1:].isspace() else ""
    if last.endswith(question.model.behaviour.go_token):
        return 1 if question.model.behaviour.go_token and last else 196
    return int(last[1:]) + 1 if last[:1] == "n" and last[1:].isdigit() else 196


def _marked(tokens: list[str], question: Question) -> Iterable[Token]:
    """Mark a script's tokens: thinking, a call, or plain text; the end of turn comes last."""
    end = Token("", "hidden")
    text = "".join(tokens)
    if question.tools and (call := parse_call(text)) is not None:
        held = [Token(token, "hidden") for token in tokens[:-1]]
        return [*held, Token(tokens[-1], "call", (call,)), end]
    if not question.thinks or not text.startswith("<think>"):
        return [*map(Token, tokens), end]
    marked: list[Token] = []
    inside = False
    for token in tokens:
        if token.startswith(("<think>", "</think>")):
            inside = not token.startswith("</")
            marked.append(Token(token, "tag"))
        else:
            marked.append(Token(token, "thinking" if inside else "content"))
    return [*marked, end]


def _thoughtful(question: Question) -> Iterator[Token]:
    """Answer in prose, in JSON, or with a call, after some thinking if the model thinks."""
    if question.thinks:
        yield Token("<think>\n", "tag")
        thoughts = prose(rng_of("thinking", question.rendered, question.seed))
        yield from (Token(word, "thinking") for word in itertools.islice(thoughts, _THINKING))
        yield Token("</think>\n\n", "tag")
    if question.format is not None:
        yield from map(Token, _formatted(question))
        return
    last = question.messages[-1] if question.messages else {}
    if question.tools and last.get("role") == "user":
        prompt = text_of(last)
        call = choose_call(question.tools, prompt, rng_of("call", question.rendered))
        if call is not None:
            text = json.dumps({"name": call.name, "arguments": call.arguments})
            pieces = tokens_of(text)
            yield from (Token(piece, "hidden") for piece in pieces[:-1])
            yield Token(pieces[-1], "call", (call,))
            return
    yield from map(Token, _plain(question, last))


def _plain(question: Question, last: Mapping[str, Any]) -> list[str]:
    """Give a plain answer; a continued one goes on where the whole answer would."""
    length = question.token_output
    continued = last.get("role") == "assistant" and question.prefill is not None
    before = question.messages[:-1] if continued else question.messages
    words = list(itertools.islice(prose(_source(question, before)), length))
    words[:1] = [word.lstrip() for word in words[:1]]
    if before and before[-1].get("role") == "tool":
        words = [*tokens_of(f"The tool says: {text_of(before[-1])}"), *words[: length // 4]]
    if not continued:
        return words
    whole, prefill = "".join(words), question.prefill or ""
    if whole.startswith(prefill):
        return tokens_of(whole[len(prefill) :])
    return list(itertools.islice(prose(_source(question, question.messages)), length))


def _source(question: Question, messages: Sequence[Mapping[str, Any]]) -> Any:
    said = json.dumps(list(messages), sort_keys=True, default=str)
    return rng_of(question.model.name, said or question.rendered, question.seed)


def _formatted(question: Question) -> list[str]:
    asked = [message for message in question.messages if message.get("role") == "user"]
    rng = rng_of("format", question.rendered, question.seed)
    hints = Hints(text_of(asked[-1]) if asked else "")
    if question.format == "json":
        keys = hints.quoted if hints.mentions("key") or hints.mentions("keys") else []
        value: object = {
            key: "".join(itertools.islice(prose(rng), 5)).strip() for key in keys or ["answer"]
        }
    else:
        value = value_for(question.format, hints, rng)
    return tokens_of(json.dumps(value, ensure_ascii=False))


def _end(tokens: Iterator[Token]) -> Iterator[Token]:
    yield from tokens
    yield Token("", "hidden")


def _cut_at_stop(
    tokens: tuple[Token, ...], stops: tuple[str, ...]
) -> tuple[tuple[Token, ...], bool]:
    """Cut before the first stop sequence in the seen text."""
    stops = tuple(stop for stop in stops if stop)
    tail, longest = "", max(map(len, stops), default=0)
    for index, token in enumerate(tokens if stops else ()):
        if token.kind != "content":
            continue
        # Only what is new can end a stop sequence; all of it grows long.
        tail = tail[-longest:] + token.text
        found = [at for at in map(tail.find, stops) if at >= 0]
        if found:
            return _without_tail(tokens[: index + 1], len(tail) - min(found)), True
    return tokens, False


def _without_tail(tokens: tuple[Token, ...], surplus: int) -> tuple[Token, ...]:
    """Take ``surplus`` characters off the end; tokens that held them stay, as unseen."""
    kept = list(tokens)
    for index in range(len(kept) - 1, -1, -1):
        if surplus <= 0:
            break
        text = kept[index].text
        taken = min(len(text), surplus)
        surplus -= taken
        rest = text[: len(text) - taken]
        kept[index] = Token(rest) if rest else Token("", "hidden")
    return tuple(kept)
