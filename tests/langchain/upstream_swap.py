"""
A pytest plugin: langchain-ollama's own tests get ChatHydra and HydraEmbeddings instead.

They replace `langchain_ollama.chat_models.Client` by a mock and look at what it was told. Where
they do, the swapped classes take the mock's client for theirs.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import langchain_ollama
from langchain_ollama import chat_models, embeddings
from pydantic import model_validator
from typing_extensions import Self

from hydra_llm import Router
from hydra_llm.integrations.langchain import ChatHydra, HydraEmbeddings


class Mocked:
    """A mocked client that knows the model's router, as the real one does."""

    def __init__(self, client: Any, router: Router) -> None:
        self._client = client
        self.router = router

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def take_mocks(model: Any, module: Any) -> None:
    if isinstance(module.Client, Mock):
        model._client = Mocked(module.Client.return_value, model.router)
    if isinstance(module.AsyncClient, Mock):
        model._async_client = Mocked(module.AsyncClient.return_value, model.router)


class SwappedChat(ChatHydra):
    @model_validator(mode="after")
    def _set_clients(self) -> Self:
        ChatHydra._set_clients(self)  # type: ignore[operator]  # pydantic's wrapper is callable
        take_mocks(self, chat_models)
        return self


class SwappedEmbeddings(HydraEmbeddings):
    @model_validator(mode="after")
    def _set_clients(self) -> Self:
        HydraEmbeddings._set_clients(self)  # type: ignore[operator]  # as above
        take_mocks(self, embeddings)
        return self


for swapped, name, module in (
    (SwappedChat, "ChatOllama", chat_models),
    (SwappedEmbeddings, "OllamaEmbeddings", embeddings),
):
    setattr(langchain_ollama, name, swapped)
    setattr(module, name, swapped)
