"""As test_matrix.py, through LiteLLM's router: a module of its own, as its import takes seconds."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import litellm
import pytest
from litellm.router_python_host import PythonHost

from hydra_llm.integrations.litellm import HydraRoutingStrategy, install, uninstall
from tests.faults.callers import Seen
from tests.faults.catalogue import MODEL
from tests.faults.matrix import Case, over_all_cases, play
from tests.faults.stage import MESSAGES, Stage, ample_time
from tests.litellm.conftest import lite_router

__all__ = ["ample_time"]

# As in tests/litellm: threads, sessions and warnings of its own are its authors' business.
pytestmark = [
    pytest.mark.leaks(reason="LiteLLM's own threads and sessions stay"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class LiteLLMCaller:
    """`litellm.Router`, with its group `chat` over the stage's nodes."""

    def __init__(self, stage: Stage) -> None:
        self._strategy = HydraRoutingStrategy(stage.router)
        self._router: Any = lite_router(
            model_list=[
                {
                    "model_name": "chat",
                    "litellm_params": {"model": f"ollama_chat/{MODEL}", "api_base": node.url},
                    "model_info": {"id": node.id},
                }
                for node in stage.router.configured
            ],
            num_retries=2,
        )
        install(self._router, self._strategy)

    def ask(self, *, stream: bool, seen: Seen, **words: Any) -> None:
        answer = self._router.completion("chat", MESSAGES, stream=stream, **words)
        if not stream:
            seen.parts.append(answer.choices[0].message.content or "")
            return
        for part in answer:
            seen.parts.append(part.choices[0].delta.content or "")

    async def aask(self, *, stream: bool, seen: Seen, **words: Any) -> None:
        answer = await self._router.acompletion("chat", MESSAGES, stream=stream, **words)
        if not stream:
            seen.parts.append(answer.choices[0].message.content or "")
            return
        async for part in answer:
            seen.parts.append(part.choices[0].delta.content or "")

    def close(self) -> None:
        """LiteLLM's callbacks belong to the process."""
        uninstall(self._strategy)


@pytest.fixture(scope="module", autouse=True)
def nothing_of_litellm_is_left() -> Iterator[None]:
    """What LiteLLM leaves open would else be found, and blamed, in some later test."""
    yield
    litellm.in_memory_llm_clients_cache.flush_cache()
    gc.collect()


@pytest.fixture
def no_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a group has nobody left, LiteLLM waits for a second or two before each of its tries."""

    async def sleep(self: PythonHost, seconds: float) -> None:
        pass

    monkeypatch.setattr(PythonHost, "sleep", sleep)
    monkeypatch.setattr(PythonHost, "sleep_sync", lambda self, seconds: None)


@pytest.mark.usefixtures("ample_time", "no_back_off")
@over_all_cases(["LiteLLM"])
def test_fault(case: Case, front_end: str) -> None:
    play(case, LiteLLMCaller)
