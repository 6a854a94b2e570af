"""Who asks what in a soak, and what comes of it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any, Literal

from hydra_llm import AsyncClient, StreamBrokenError

__all__ = ["ANSWER_WORD", "MODELS", "PROMPT_WORD", "Asked", "ask_with_patience", "draw", "script"]

PROMPT_WORD = "Petersilie"
ANSWER_WORD = "Zwiebelkuchen"
"""In every prompt, and in every answer: what holds one of them has told too much."""

ANSWER_TOKENS = 40
MOST_PARTS = 100
"""A caller leaves a stream that has no end."""
MODELS = {"llama3.2:3b": 5.0, "qwen3:8b": 3.0, "gemma3:12b": 2.0, "mistral-small:24b": 1.0}
"""How often each is asked for; together they fit on no node but the largest."""
EMBEDDER = "nomic-embed-text"

Kind = Literal["chat stream", "chat", "generate stream", "generate", "embed"]
_KINDS: dict[Kind, float] = {
    "chat stream": 5.0,
    "chat": 2.0,
    "generate stream": 2.0,
    "generate": 1.0,
    "embed": 1.0,
}


def script(node_id: str) -> tuple[str, ...]:
    """What a node always answers: its own words, so that two nodes' answers cannot be mistaken."""
    return tuple(f" {ANSWER_WORD}-{node_id}-{number:03d}" for number in range(ANSWER_TOKENS))


@dataclass(slots=True, eq=False)
class Asked:
    """One request, and what came of it."""

    number: int
    kind: Kind
    model: str
    tokens: int
    words: dict[str, Any]
    prompt: str
    options: dict[str, Any]
    cancel_after: float | None = None
    """Seconds until its caller goes away."""
    drop_after: int | None = None
    """Parts until its caller forgets it without a word."""
    restarts: bool = False
    """Whether its caller asks once more where a stream breaks off."""
    began: float = 0.0
    ended: float = 0.0
    parts: int = 0
    texts: list[str] = field(default_factory=list)
    """What was received, one text for each time it was asked."""
    is_whole: bool = False
    is_cancelled: bool = False
    node_id: str | None = None
    """Who gave the whole answer."""
    error: BaseException | None = None
    broken: StreamBrokenError | None = None
    """How the first try ended, if there was a second one."""

    @property
    def pinned_to(self) -> str | None:
        """The one node that may serve it."""
        return self.words.get("node_id") if self.words.get("pin") == "require" else None

    def __str__(self) -> str:
        said = ", ".join(f"{name}={value!r}" for name, value in self.words.items())
        return f"request {self.number} ({self.kind}, {self.model}, {said}) of {self.began:.3f} s"


def draw(rng: random.Random, number: int, nodes: list[str], hurry: float) -> Asked:
    """Some request; ``hurry`` divides the callers' seconds."""
    kind = rng.choices(list(_KINDS), weights=list(_KINDS.values()))[0]
    model = rng.choices(list(MODELS), weights=list(MODELS.values()))[0]
    words: dict[str, Any] = {"priority": rng.randint(1, 10)}
    if rng.random() < 0.15:
        words["node_id"] = rng.choice(nodes)
        if rng.random() < 0.4:
            words["pin"] = "require"
    if rng.random() < 0.1:
        words["deadline_s"] = rng.uniform(0.5, 60.0) / hurry
    if rng.random() < 0.1:
        words["exclude_nodes"] = [rng.choice(nodes)]
    if rng.random() < 0.2:
        words["session"] = f"session {rng.randint(1, 20)}"
    if rng.random() < 0.05:
        words["min_vram_gb"] = rng.choice([2.0, 10.0, 20.0])
    options: dict[str, Any] = {"num_predict": rng.randint(2, 24)}
    if rng.random() < 0.03:
        options["num_ctx"] = 8192
    streams = "stream" in kind
    return Asked(
        number=number,
        kind=kind,
        model=EMBEDDER if kind == "embed" else model,
        tokens=options["num_predict"],
        words=words,
        options=options,
        # Of so many different prompts that those a router remembers (20,000) do not go on growing.
        prompt=f"{PROMPT_WORD} {rng.randint(1, 100)} "
        + "and so on " * rng.choice([1, 1, 1, 20, 200]),
        cancel_after=rng.uniform(0.0, 6.0) / hurry if rng.random() < 0.06 else None,
        drop_after=rng.randint(1, 5) if streams and rng.random() < 0.06 else None,
        restarts=rng.random() < 0.5,
    )


async def ask(client: AsyncClient, asked: Asked) -> None:
    """Ask, as its caller would; only what is no error of ours is raised."""
    try:
        await _once(client, asked)
    except StreamBrokenError as error:
        if not asked.restarts:
            raise
        asked.broken = error
        await _once(client, asked, restart_of=error)


async def _once(client: AsyncClient, asked: Asked, **more: Any) -> None:
    asked.texts.append("")
    if asked.kind == "embed":
        words = {name: said for name, said in asked.words.items() if name != "session"}
        answer = await client.embed(asked.model, asked.prompt, **words)
        asked.node_id, asked.is_whole = answer.node_id, True
        assert len(answer.embeddings) == 1
        return
    about = {"options": asked.options, **asked.words, **more}
    chats = asked.kind.startswith("chat")
    streams = asked.kind.endswith("stream")
    if chats:
        messages = [{"role": "user", "content": asked.prompt}]
        answer = await client.chat(asked.model, messages, stream=streams, **about)
    else:
        answer = await client.generate(asked.model, asked.prompt, stream=streams, **about)
    if not streams:
        asked.texts[-1] = answer.message.content if chats else answer.response
        asked.node_id, asked.is_whole = answer.node_id, True
        return
    async for part in answer:
        asked.texts[-1] += (part.message.content if chats else part.response) or ""
        asked.parts += 1
        if part.done:
            asked.node_id, asked.is_whole = part.node_id, True
        if asked.parts >= min(MOST_PARTS, asked.drop_after or MOST_PARTS):
            return  # and nobody closes it


async def ask_with_patience(client: AsyncClient, asked: Asked, patience_s: float) -> None:
    """Ask, and go away when its time is over."""
    task = asyncio.ensure_future(ask(client, asked))
    try:
        await asyncio.wait([task], timeout=asked.cancel_after or patience_s)
        if not task.done():
            asked.is_cancelled = True
            task.cancel()
        await task
    except asyncio.CancelledError:
        if not asked.is_cancelled:
            raise
    except BaseException as error:  # it is looked at later, whatever it is
        asked.error = error
