"""Text, tokens and vectors that look like a model's and follow from their input alone."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterator

from hydra_llm.simulation.records import Prompt

__all__ = ["as_prompt", "embedding", "prose", "rng_of", "tokens_of"]

# A line break is a token of its own, so that a template's pieces are cut alike wherever they stand.
_TOKEN = re.compile(r"\n|[^\S\n]*\w{1,8}|[^\S\n]*[^\w\s]|[^\S\n]+")
_WORDS = (
    "the a this each one some most every light river stone field winter morning signal "
    "window garden letter market engine harbour copper silver paper thread table mountain "
    "moves carries keeps follows answers opens turns holds shows gives makes finds begins "
    "slowly often together always again below beyond under after before with and of to in "
    "small clear old quiet open early simple common steady bright long plain useful warm"
).split()


def rng_of(*parts: object) -> random.Random:
    """Make a random source that depends on ``parts`` alone, on every machine the same."""
    text = "\0".join(str(part) for part in parts)
    return random.Random(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())


def tokens_of(text: str) -> list[str]:
    """Split text into token-like pieces that join to the same text."""
    return _TOKEN.findall(text)


def as_prompt(text: str) -> Prompt:
    """Turn text into blocks of one token each."""
    return tuple((token, 1) for token in tokens_of(text))


def prose(rng: random.Random) -> Iterator[str]:
    """Give words for ever, in sentences, one token each."""
    while True:
        words = [rng.choice(_WORDS) for _ in range(rng.randint(5, 11))]
        words[0] = words[0].capitalize()
        words[-1] += "."
        yield from (f" {word}" for word in words)


def embedding(text: str, dimension: int, *, model: str) -> list[float]:
    """Give a vector of length one that depends on the model and the text."""
    rng = rng_of("embedding", model, text)
    values = [rng.gauss(0.0, 1.0) for _ in range(dimension)]
    norm = math.sqrt(sum(value * value for value in values)) or 1.0
    return [value / norm for value in values]
