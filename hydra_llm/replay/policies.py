"""
Who chooses: rules of other routers, each with what its original can know and nothing more.

They are written anew from descriptions and from reading; names say whose rule it is. None of them
tries a second node, waits before it sends, or sees more of a node than its own requests and, where
the original asks for it, ``/api/ps`` from time to time.
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from hydra_llm.replay.placing import Placed
from hydra_llm.replay.workload import Asked

__all__ = ["RULES", "Answered", "Rule", "Seen", "Told"]


@dataclass(slots=True, eq=False)
class Seen:
    """A node as who chooses sees it."""

    id: str
    vram_bytes: int
    """As somebody may have configured it."""
    in_flight: int = 0
    """Requests of this router."""
    of_model: Counter[str] = field(default_factory=Counter)
    """The same for each model."""
    loaded: Mapping[str, int] = field(default_factory=dict)
    """Models and their bytes of VRAM, as ``/api/ps`` said last."""

    @property
    def used_bytes(self) -> int:
        """What loaded models hold."""
        return sum(self.loaded.values())


@dataclass(frozen=True, slots=True)
class Answered:
    """How a request went: seconds since it was sent, when it ended, and whether all came."""

    ok: bool
    first_s: float | None
    whole_s: float
    at: float


@dataclass(frozen=True, slots=True)
class Told:
    """What somebody who sets a router up knows of the cluster and the load."""

    sizes: Mapping[str, int]
    """Bytes of the models' files."""
    placed: Callable[[], Placed]
    """The placement of somebody who knows the load."""


class Rule:
    """
    One way to choose a node.

    ``choose`` is given the nodes that have the model; ``told`` hears how each request went.
    """

    polls_s: float | None = None
    """How often it asks ``/api/ps``; ``None`` is never."""
    keep_alive: float | None = None

    def __init__(self, rng: random.Random, told: Told) -> None:
        self.rng = rng
        self.known = told

    def choose(self, asked: Asked, nodes: Sequence[Seen], now: float) -> Seen:
        """Choose a node."""
        raise NotImplementedError

    def told(self, asked: Asked, node: Seen, answered: Answered) -> None:
        """Hear how it went."""

    def _least(self, nodes: Sequence[Seen], cost: Callable[[Seen], float]) -> Seen:
        """The least; among equals one at random."""
        costs = [cost(node) for node in nodes]
        least = min(costs)
        return self.rng.choice(
            [node for node, own in zip(nodes, costs, strict=True) if own == least]
        )


class Random(Rule):
    """Any node: Open WebUI, and LiteLLM's simple-shuffle."""

    def choose(self, asked: Asked, nodes: Sequence[Seen], now: float) -> Seen:
        """Draw one."""
        return self.rng.choice(nodes)


class RoundRobin(Rule):
    """One after the other."""

    _next = 0

    def choose(self, asked: Asked, nodes: Sequence[Seen], now: float) -> Seen:
        """Take the next."""
        self._next += 1
        return nodes[(self._next - 1) % len(nodes)]


class LeastConnections(Rule):
    """The node with the fewest requests of ours: Olla."""

    def choose(self, asked: Asked, nodes: Sequence[Seen], now: float) -> Seen:
        """Count."""
        return self._least(nodes, lambda node: node.in_flight)


class PeakEwma(Rule):
    """
    Two drawn, and of these the one with less (latency × requests): Linkerd, Finagle.

    A slow answer counts at once, and is forgotten in ten seconds.
    """

    decay_s = 10.0

    def __init__(self, rng: random.Random, told: Told) -> None:
        super().__init__(rng, told)
        self._latency: dict[str, tuple[float, float]] = {}

    def choose(self, asked: Asked, nodes: Sequence[Seen], now: float) -> Seen:
        """Draw two and compare."""
        two = self.rng.sample(list(nodes), min(2, len(nodes)))
        return min(two, key=lambda node: self._cost(node, now))

    def _cost(self, node: Seen, now: float) -> float:
        value, at = self._latency.get(node.id, (0.0, now))
        latency = value * math.exp(-(now - at) / self.decay_s)
        # Not heard of yet, and asked already: worse than any that was heard of.
        if not latency and node.in_flight:
            return 1e6 + node.in_flight
        return latency * (node.in_flight + 1)

    def told(self, asked: Asked, node: Seen, answered: Answered) -> None:
        """Rise at once, fall slowly."""
        seen = answered.first_s if answered.first_s is not None else answered.whole_s
        value, at = self._latency.get(node.id, (0.0, answered.at))
        kept = math.exp(-(answered.at - at) / self.decay_s)
        value = seen if seen > value else value * kept + seen * (1.0 - kept)
        self._latency[node.id] = value, answered.at


class WarmFirst(Rule):
    """Where the model is loaded, else anywhere; there the fewest requests: Olla's issue 166."""

    polls_s = 5.0

    def choose(self, asked: Asked, nodes: Sequence[Seen], now: float) -> Seen:
        """Look who has it."""
        warm = [node for node in nodes if asked.model in node.loaded]
        return self._least(warm or nodes, lambda node: node.in_flight)


class AdditiveScore(Rule):
    """
    Points that are added up: as Ollama Herd does.

    50 for a loaded model, up to 20 for room, less up to 30 for requests in line and up to 25 for
    the time that answers took there, 15 for a large model on the node with the most memory. It is
    given the models' true sizes.
    """

    polls_s = 5.0

    def __init__(self, rng: random.Random, told: Told) -> None:
        super().__init__(rng, told)
        self._seconds: dict[tuple[str, str], deque[float]] = {}

    def choose(self, asked: Asked, nodes: Sequence[Seen], now: float) -> Seen:
        """Add up."""
        most = max(node.vram_bytes for node in nodes)
        return self._least(nodes, lambda node: -self._score(asked, node, most))

    def _score(self, asked: Asked, node: Seen, most: int) -> float:
        size, free = self.known.sizes[asked.model], node.vram_bytes - node.used_bytes
        score = 0.0
        if asked.model in node.loaded:
            score += 50.0 + 20.0
        elif size <= free:
            score += 10.0 + 20.0 * (1.0 - size / free)
        elif size <= node.vram_bytes:
            score += 5.0
        score -= min(30.0, 6.0 * node.in_flight)
        taken = sorted(self._seconds.get((node.id, asked.model), ()))
        if taken:
            score -= min(25.0, 25.0 * taken[len(taken) * 3 // 4] / 60.0)
        if size > most / 2 and node.vram_bytes == most:
            score += 15.0
        return score

    def told(self, asked: Asked, node: Seen, answered: Answered) -> None:
        """Remember the last twenty."""
        taken = self._seconds.setdefault((node.id, asked.model), deque(maxlen=20))
        taken.append(answered.whole_s)


class Sollol(Rule):
    """
    SOLLOL's score: factors that are multiplied, for free memory, latency, requests and warmth.

    As its pool knows remote nodes: free memory is guessed from ``/api/ps`` every 30 seconds (8 GiB,
    or 2 GiB more than is in use; nothing where nothing is loaded), latency is the mean of all
    answers, and the load of the CPU is always taken for a half.
    """

    polls_s = 30.0
    _some_mb, _more_mb, _most_mb = 1000, 4000, 8000

    def __init__(self, rng: random.Random, told: Told) -> None:
        super().__init__(rng, told)
        self._latency: dict[str, tuple[int, float]] = {}
        self._failed: Counter[str] = Counter()

    def choose(self, asked: Asked, nodes: Sequence[Seen], now: float) -> Seen:
        """Take the first of the best."""
        # Long prompts want a GPU; where none seems to have room they do without.
        wants_gpu = asked.input_tokens >= 500
        short = all(self._free_mb(node) < self._some_mb for node in nodes)
        return max(nodes, key=lambda node: self._score(asked, node, wants_gpu, short))

    def _score(self, asked: Asked, node: Seen, wants_gpu: bool, short: bool) -> float:
        free, busy = self._free_mb(node), node.in_flight
        score = 100.0 * self._memory_factor(free, busy, wants_gpu, short)
        count, mean_ms = self._latency.get(node.id, (0, 0.0))
        score *= 1.0 - self._failed[node.id] / count if count else 1.0
        if free >= self._some_mb:
            score /= 1.0 + self._latency_penalty(mean_ms, asked.priority)
        if busy:
            score /= self._growth(free, mean_ms) ** busy * (1.0 + 0.15 * busy)
        score /= 1.0 + 0.5 * (3.0 if asked.priority >= 7 else 1.5)
        if asked.model in node.loaded:
            return score * 1.5
        return score * 0.95 if node.loaded else score

    def _memory_factor(self, free: float, busy: int, wants_gpu: bool, short: bool) -> float:
        if not wants_gpu:
            return 1.0
        if short:
            return 1.0 if free == 0 else 0.7
        if free == 0:
            return 0.2
        if free < self._some_mb:
            return 0.54 if busy else 0.9
        return 2.0 if free > self._most_mb else 1.5 if free > self._more_mb else 1.0

    def _latency_penalty(self, mean_ms: float, priority: int) -> float:
        weight = 1.0 + priority / 10.0
        return mean_ms / (1000.0 if mean_ms < 200.0 else 100.0) * weight

    def _growth(self, free: float, mean_ms: float) -> float:
        base = (
            1.5 if free < self._some_mb
            else 1.3 if free < self._more_mb
            else 1.2 if free < self._most_mb
            else 1.15
        )  # fmt: skip
        if mean_ms < 1000.0:
            return max(1.05, base * 0.8)
        return min(2.0, base * 1.3) if mean_ms > 5000.0 else base

    def _free_mb(self, node: Seen) -> float:
        used = node.used_bytes / 2**20
        return max(8192.0, used + 2048.0) - used if used else 0.0

    def told(self, asked: Asked, node: Seen, answered: Answered) -> None:
        """Keep the mean."""
        count, mean_ms = self._latency.get(node.id, (0, 0.0))
        mean_ms += (1000.0 * answered.whole_s - mean_ms) / (count + 1)
        self._latency[node.id] = count + 1, mean_ms
        self._failed[node.id] += not answered.ok


class LiteLlmLeastBusy(Rule):
    """LiteLLM's least-busy: the fewest requests for this very model; the first among equals."""

    def choose(self, asked: Asked, nodes: Sequence[Seen], now: float) -> Seen:
        """Count."""
        return min(nodes, key=lambda node: node.of_model[asked.model])


class LiteLlmLatency(Rule):
    """LiteLLM's latency-based: the least mean time to a first token of the last ten, per model."""

    def __init__(self, rng: random.Random, told: Told) -> None:
        super().__init__(rng, told)
        self._first: dict[tuple[str, str], deque[float]] = {}

    def choose(self, asked: Asked, nodes: Sequence[Seen], now: float) -> Seen:
        """Compare means; one that was never heard of counts as 0."""

        def mean(node: Seen) -> float:
            seen = self._first.get((node.id, asked.model))
            return sum(seen) / len(seen) if seen else 0.0

        return self._least(nodes, mean)

    def told(self, asked: Asked, node: Seen, answered: Answered) -> None:
        """Remember the last ten."""
        if answered.ok and answered.first_s is not None:
            seen = self._first.setdefault((node.id, asked.model), deque(maxlen=10))
            seen.append(answered.first_s)


class HandPlaced(Rule):
    """
    Each model on the nodes that somebody who knows the load has given it; there the shortest queue.

    Models stay loaded for ever, as that somebody would have it, unless there is one without a
    place: it will need that of another. Where an answer takes longer, a request in line counts
    for more.
    """

    def __init__(self, rng: random.Random, told: Told) -> None:
        super().__init__(rng, told)
        self._placed = told.placed()
        # For ever and yet to be pushed out: Ollama's loads may get stuck (its issue 17408).
        self.keep_alive = -1.0 if all(self._placed.seconds.values()) else None
        self._ahead: dict[str, float] = {}

    def choose(self, asked: Asked, nodes: Sequence[Seen], now: float) -> Seen:
        """Look at those that are meant for it."""
        seconds = self._placed.seconds[asked.model]
        meant = [node for node in nodes if node.id in seconds] or list(nodes)
        chosen = self._least(
            meant, lambda node: self._ahead.get(node.id, 0.0) + seconds.get(node.id, 0.0)
        )
        self._ahead[chosen.id] = self._ahead.get(chosen.id, 0.0) + seconds.get(chosen.id, 0.0)
        return chosen

    def told(self, asked: Asked, node: Seen, answered: Answered) -> None:
        """One less."""
        self._ahead[node.id] -= self._placed.seconds[asked.model].get(node.id, 0.0)


RULES: Mapping[str, type[Rule]] = {
    "random": Random,
    "round-robin": RoundRobin,
    "least-connections": LeastConnections,
    "p2c-ewma": PeakEwma,
    "warm-first": WarmFirst,
    "additive": AdditiveScore,
    "sollol": Sollol,
    "litellm-least-busy": LiteLlmLeastBusy,
    "litellm-latency": LiteLlmLatency,
    "hand-placed": HandPlaced,
}
"""Rules by the names that ``--policy`` takes."""
