"""
LangChain's standard tests, with the abilities that ChatOllama's own suite claims.

Nothing is marked as expected to fail, although ChatOllama's suite marks three. The same tests run
three times: on a healthy cluster, with the node that would be taken answering 503 to everything,
and with a node killed and revived all the time.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from langchain_tests.integration_tests import (
    ChatModelIntegrationTests,
    EmbeddingsIntegrationTests,
    chat_models,
)
from langchain_tests.unit_tests import ChatModelUnitTests, EmbeddingsUnitTests

from hydra_llm import Node, Router
from hydra_llm.integrations.langchain import ChatHydra, HydraEmbeddings
from hydra_llm.testing import SimulatedCluster, StatusFault, TokenFault
from tests.langchain.conftest import CHAT, EMBEDDING, OTHER, loaded_cluster
from tests.router.conftest import make_router

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
# "a" is preferred by 30 s, so that nobody else is chosen while it can be.
PREFERRED: dict[str, Any] = {"prefer_labels": ["preferred"]}


@pytest.fixture(scope="module")
def nodes() -> Iterator[SimulatedCluster]:
    with loaded_cluster() as cluster:
        yield cluster


@pytest.fixture
def own_router(nodes: SimulatedCluster) -> Iterator[Router]:
    """One for each test: its connections are the test's to close."""
    known = [
        Node(node.url, id=node.id, vram_gb=24, labels=("preferred",) * (node.id == "a"))
        for node in nodes
    ]
    with make_router(nodes, nodes=known, prefer_label_seconds=30.0) as router:
        yield router
        assert router.in_flight == router.waiting == 0


@pytest.fixture
def picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests with images would fetch one from the web."""
    answer = httpx.Response(200, content=PIXEL)
    monkeypatch.setattr(f"{chat_models.__name__}.httpx.get", lambda *args, **kwargs: answer)


class Routed:
    """Tests that have a router, over which "a" is taken while it can be."""

    router: Router

    @pytest.fixture(autouse=True)
    def with_a_router(self, own_router: Router, picture: None) -> None:
        type(self).router = own_router

    def params_of(self, model: str) -> dict[str, Any]:
        return {"model": model, "router": self.router, **PREFERRED}


class RoutedChat(Routed):
    @property
    def chat_model_class(self) -> type[ChatHydra]:
        return ChatHydra

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return self.params_of(CHAT)

    # ChatOllama's suite does not claim this one.
    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return OTHER


class RoutedEmbeddings(Routed):
    @property
    def embeddings_class(self) -> type[HydraEmbeddings]:
        return HydraEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return self.params_of(EMBEDDING)


class Chat(RoutedChat, ChatModelIntegrationTests):
    """What ChatOllama's own suite says of itself (langchain-ollama 1.1.0)."""

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return False

    @property
    def supports_image_inputs(self) -> bool:
        return True

    # Nor this one.
    @property
    def supports_image_tool_message(self) -> bool:
        return True


class Embeddings(RoutedEmbeddings, EmbeddingsIntegrationTests):
    pass


# ---------------------------------------------------------------------- all is well


@pytest.mark.filterwarnings("ignore:ChatHydra knows no argument 'streaming':UserWarning")
class TestChatUnit(RoutedChat, ChatModelUnitTests):
    pass


class TestEmbeddingsUnit(RoutedEmbeddings, EmbeddingsUnitTests):
    pass


class TestChat(Chat):
    pass


class TestEmbeddings(Embeddings):
    pass


# ------------------------------------------------------------- the best one is busy


class Busy:
    """The preferred node says 503 to all that is asked of a model, and is up for probes."""

    @pytest.fixture(autouse=True)
    def busy(self, nodes: SimulatedCluster, own_router: Router) -> Iterator[None]:
        own_router.refresh()
        assert own_router.explain(CHAT, **PREFERRED).selected_node == "a"
        asked = len(nodes["a"].requests)
        nodes["a"].inject(StatusFault(503))
        yield
        nodes["a"].clear_faults()
        served = [r for r in nodes["a"].requests[asked:] if r.path in ("/api/chat", "/api/embed")]
        assert all(request.status == 503 for request in served)


class TestChatWhileTheBestNodeIsBusy(Busy, Chat):
    pass


class TestEmbeddingsWhileTheBestNodeIsBusy(Busy, Embeddings):
    pass


# ----------------------------------------------------------- a node comes and goes


class Unsteady:
    """
    The preferred node dies again and again, and comes back.

    A stream that breaks after its first part is an error by design, so the node dies where it
    was just about to give that part, or between requests.
    """

    @pytest.fixture
    def nodes(self) -> Iterator[SimulatedCluster]:
        # A revived node listens on a new socket, which must not outlive the test.
        with loaded_cluster() as cluster:
            yield cluster

    @pytest.fixture(autouse=True)
    def unsteady(self, nodes: SimulatedCluster, own_router: Router) -> Iterator[None]:
        own_router.refresh()
        node, over = nodes["a"], threading.Event()
        node.inject(TokenFault(after=0), probability=0.5)

        def kill_and_revive() -> None:
            while not over.wait(0.05):
                node.kill(only_idle=True)
                over.wait(0.05)
                node.revive()
                for model in (CHAT, OTHER, EMBEDDING):
                    node.preload(model)

        thread = threading.Thread(target=kill_and_revive)
        thread.start()
        yield
        over.set()
        thread.join()


class TestChatWhileANodeComesAndGoes(Unsteady, Chat):
    pass


class TestEmbeddingsWhileANodeComesAndGoes(Unsteady, Embeddings):
    pass
