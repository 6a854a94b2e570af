"""`OllamaEmbeddings` over several nodes."""

from __future__ import annotations

import asyncio
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from langchain_ollama import OllamaEmbeddings
from pydantic import model_validator
from typing_extensions import Self

from hydra_llm.integrations.langchain.routed import RoutedModel
from hydra_llm.integrations.langchain.split import Pieces, nodes_worth_using


class HydraEmbeddings(RoutedModel, OllamaEmbeddings):
    """
    `OllamaEmbeddings` over several nodes.

    ::

        embeddings = HydraEmbeddings(model="nomic-embed-text", nodes=[...])
        vectors = embeddings.embed_documents(texts)

    A batch is shared out among several nodes when it is expected to be done sooner so, loading
    the model there included; vectors come back in the order of the texts. With a ``node_id``
    it stays together.

    The arguments about nodes, and the routing words, are those of :class:`RoutedModel`.

    Raises:
        hydra_llm.ConfigurationError: a node, a setting or a routing word is wrong.
        ValueError: with ``validate_model_on_init``, if no node has the model.
    """

    # By this name it takes the place of upstream's, which would open connections of its own.
    @model_validator(mode="after")
    def _set_clients(self) -> Self:
        """Have our clients stand where OllamaEmbeddings has those of one server."""
        # Embeddings take no keywords per call, so the words are the client's.
        self._client, self._async_client = self._connect(**self._own_words())
        if self.validate_model_on_init:
            self._validate_model(self.model)
        return self

    def with_routing(self, **words: Any) -> Self:
        """As :meth:`RoutedModel.with_routing`."""
        copy = super().with_routing(**words)
        copy._client, copy._async_client = self._connection.over(self.router, copy._own_words())
        return copy

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """
        Embed texts, on several nodes at once if that is faster.

        Raises:
            hydra_llm.HydraError: a part of them could be embedded nowhere.
        """
        pieces = self._pieces(texts) if self._client else Pieces.whole(texts)
        if len(pieces.node_ids) < 2:
            for piece in pieces:
                piece.vectors = super().embed_documents(piece.texts)
            return pieces.vectors()
        with ThreadPoolExecutor(len(pieces.node_ids), "hydra-llm-embed") as workers:
            try:
                running = [workers.submit(self._work, pieces, name) for name in pieces.node_ids]
                wait(running, return_when=FIRST_EXCEPTION)
            finally:
                pieces.stop()  # for whoever still works, if one failed or we are interrupted
        for one in running:
            one.result()
        return pieces.vectors()

    def _work(self, pieces: Pieces, node_id: str) -> None:
        there = self.with_routing(node_id=node_id)
        for piece in pieces:
            piece.vectors = OllamaEmbeddings.embed_documents(there, piece.texts)

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """As :meth:`embed_documents`, for an event loop."""
        if self._async_client:
            await self.router.await_until_seen()
        pieces = self._pieces(texts) if self._async_client else Pieces.whole(texts)
        if len(pieces.node_ids) < 2:
            for piece in pieces:
                piece.vectors = await super().aembed_documents(piece.texts)
            return pieces.vectors()
        tasks = [asyncio.create_task(self._awork(pieces, name)) for name in pieces.node_ids]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return pieces.vectors()

    async def _awork(self, pieces: Pieces, node_id: str) -> None:
        there = self.with_routing(node_id=node_id)
        for piece in pieces:
            piece.vectors = await OllamaEmbeddings.aembed_documents(there, piece.texts)

    def _pieces(self, texts: list[str]) -> Pieces:
        """Cut the batch for the nodes that are worth using for it."""
        if len(texts) < 2:
            return Pieces.whole(texts)
        tokens = sum(map(len, texts)) // 4  # characters a token, as the router reckons
        decision = self.router.explain(
            self.model, num_ctx=self.num_ctx, input_tokens=tokens, **self._own_words()
        )
        return Pieces(texts, nodes_worth_using(decision.candidates, len(texts)))
