"""The embedding endpoints: what is asked, and the documents that answer it."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from hydra_llm.simulation.asked import Asked
from hydra_llm.simulation.catalog import SimulatedModel
from hydra_llm.simulation.records import Ticket
from hydra_llm.simulation.text import embedding, tokens_of
from hydra_llm.simulation.wire import RequestError

__all__ = ["Embedding", "texts_of"]


def texts_of(asked: Asked, path: str) -> list[str]:
    """Give the texts to embed."""
    given = asked.prompt if path == "/api/embeddings" else asked.body.get("input", "")
    texts = [given] if isinstance(given, str) and given else given or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RequestError(400, "invalid input type")
    return texts


@dataclass(frozen=True, slots=True)
class Embedding:
    """Vectors for some texts, in the form of the endpoint that was asked."""

    path: str
    asked: Asked
    model: SimulatedModel
    texts: Sequence[str]
    num_ctx: int
    speed: float = 1.0

    @property
    def token_count(self) -> int:
        """Tokens of all texts, each cut to the context."""
        return sum(min(size, self.num_ctx) for size in self._sizes)

    @property
    def is_too_long(self) -> bool:
        """Whether a text would have to be cut."""
        return max(self._sizes, default=0) > self.num_ctx

    def document(self, ticket: Ticket) -> object:
        """Give the answer."""
        vectors = [self._vector(text) for text in self.texts]
        if self.path == "/api/embeddings":
            return {"embedding": vectors[0]}
        if self.path == "/v1/embeddings":
            data = [
                {"object": "embedding", "embedding": vector, "index": index}
                for index, vector in enumerate(vectors)
            ]
            count = self.token_count
            usage = {"prompt_tokens": count, "total_tokens": count}
            return {"object": "list", "data": data, "model": self.asked.model, "usage": usage}
        return {
            "model": self.asked.model,
            "embeddings": vectors,
            "total_duration": round(ticket.total_s / self.speed * 1e9) + 1,
            "load_duration": round(ticket.load_s / self.speed * 1e9) + 1,
            "prompt_eval_count": self.token_count,
        }

    @property
    def _sizes(self) -> list[int]:
        return [len(tokens_of(text)) for text in self.texts]

    def _vector(self, text: str) -> list[float] | str:
        vector = embedding(text, self.model.embedding_length, model=self.model.weights_digest)
        if self.asked.body.get("encoding_format") == "base64":
            return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        if self.path == "/api/embeddings":
            return vector
        # 32 bits of precision; the older endpoint says more than it knows.
        return [round(value, 9) for value in vector]
