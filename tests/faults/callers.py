"""Whoever asks: the plain client and LangChain, whole or part by part, in a thread or a loop."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from hydra_llm import AsyncClient, Client
from hydra_llm.integrations.langchain import ChatHydra
from tests.faults.catalogue import MODEL
from tests.faults.stage import GRACE_SECONDS, MESSAGES, Stage


@dataclass
class Seen:
    """What a caller got."""

    parts: list[str] = field(default_factory=list)
    error: BaseException | None = None

    @property
    def text(self) -> str:
        return "".join(self.parts)


class Caller(Protocol):
    """One way to ask; routing words and options go with every request."""

    def ask(self, *, stream: bool, seen: Seen, **words: Any) -> None: ...

    async def aask(self, *, stream: bool, seen: Seen, **words: Any) -> None: ...

    def close(self) -> None: ...


class PlainCaller:
    """``hydra_llm.Client``."""

    def __init__(self, stage: Stage) -> None:
        self._router = stage.router

    def ask(self, *, stream: bool, seen: Seen, **words: Any) -> None:
        with Client(router=self._router) as client:
            answer = client.chat(MODEL, MESSAGES, stream=stream, **_as_ollama_takes(words))
            for part in answer if stream else [answer]:
                seen.parts.append(part.message.content or "")

    async def aask(self, *, stream: bool, seen: Seen, **words: Any) -> None:
        async with AsyncClient(router=self._router) as client:
            answer = await client.chat(MODEL, MESSAGES, stream=stream, **_as_ollama_takes(words))
            if not stream:
                seen.parts.append(answer.message.content or "")
                return
            async for part in answer:
                seen.parts.append(part.message.content or "")

    def close(self) -> None:
        """Nothing is open but during a call."""


class LangChainCaller:
    """``ChatHydra``."""

    def __init__(self, stage: Stage) -> None:
        self._model = ChatHydra(model=MODEL, router=stage.router)

    def ask(self, *, stream: bool, seen: Seen, **words: Any) -> None:
        question = str(MESSAGES[0]["content"])
        if not stream:
            seen.parts.append(str(self._model.invoke(question, **words).content))
            return
        for chunk in self._model.stream(question, **words):
            seen.parts.append(str(chunk.content))

    async def aask(self, *, stream: bool, seen: Seen, **words: Any) -> None:
        question = str(MESSAGES[0]["content"])
        if not stream:
            seen.parts.append(str((await self._model.ainvoke(question, **words)).content))
            return
        async for chunk in self._model.astream(question, **words):
            seen.parts.append(str(chunk.content))

    def close(self) -> None:
        """The router is the stage's."""


def _as_ollama_takes(words: dict[str, Any]) -> dict[str, Any]:
    """Options have a dictionary of their own in Ollama's client."""
    if "num_ctx" not in words:
        return words
    rest = {name: value for name, value in words.items() if name != "num_ctx"}
    return {**rest, "options": {"num_ctx": words["num_ctx"]}}


def asked(caller: Caller, *, stream: bool, in_a_loop: bool, limit: float, **words: Any) -> Seen:
    """
    One request, however it ends.

    Args:
        caller: who asks.
        stream: part by part.
        in_a_loop: in an event loop of its own, which has to be empty when it is over.
        limit: seconds after which a loop gives it up: a test that hangs is a test that fails.
        words: of the request.
    """
    seen = Seen()
    try:
        if in_a_loop:
            asyncio.run(_in_a_loop(caller, stream=stream, seen=seen, limit=limit, **words))
        else:
            caller.ask(stream=stream, seen=seen, **words)
    except Exception as error:  # what it is, is looked at
        if isinstance(error, UnfinishedError):
            raise
        seen.error = error
    return seen


class UnfinishedError(AssertionError):
    """It hung, or left tasks behind."""


async def _in_a_loop(
    caller: Caller, *, stream: bool, seen: Seen, limit: float, **words: Any
) -> None:
    before = asyncio.all_tasks()
    asking = asyncio.ensure_future(caller.aask(stream=stream, seen=seen, **words))
    done, _ = await asyncio.wait({asking}, timeout=limit)
    if not done:
        asking.cancel()
        await asyncio.wait({asking})
        raise UnfinishedError(f"no end after {limit:g} s")
    deadline = time.monotonic() + GRACE_SECONDS
    while left := [task for task in asyncio.all_tasks() - before if _is_ours(task)]:
        if time.monotonic() > deadline:
            raise UnfinishedError(f"left behind: {left}")
        await asyncio.sleep(0.002)
    await asking


def _is_ours(task: asyncio.Task[Any]) -> bool:
    """LiteLLM logs in tasks of its own."""
    code = getattr(task.get_coro(), "cr_code", None)
    return not task.done() and "litellm/" not in getattr(code, "co_filename", "litellm/")
