"""What a choice is made with besides the request and the nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hydra_llm.scheduling.memory import Fit, Needs, fit_of
from hydra_llm.types import Demand, InferenceRequest, NodeSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What preferences and unknowns are worth, in seconds, and the priors."""

    prefer_local_seconds: float = 3.0
    """How much sooner another node must be to beat this machine."""
    prefer_label_seconds: float = 2.0
    """The same for each preferred label that a node lacks."""
    short_vram_seconds_per_gb: float = 1.0
    """Per GB that a node falls short of ``min_vram_gb`` when none has that much."""
    assumed_ram_bytes: int = 256_000_000_000
    """System memory taken for a node of which nothing tells it."""
    default_output_tokens: int = 256
    """Expected length of an answer of a model never seen."""
    interactive_decode_share: float = 0.3
    """How much of the decode time counts when someone reads along."""
    reading_seconds_per_token: float = 0.1
    """Answers that come more slowly than this keep whoever reads along waiting."""
    eviction_horizon_seconds: float = 60.0
    """How far ahead an evicted model's next use is priced."""
    gpu_bytes_per_second: float = 300e9
    """Effective memory bandwidth of a GPU nobody has measured yet."""
    cpu_bytes_per_second: float = 40e9
    load_bytes_per_second: float = 1.5e9
    """Reading weights from a local NVMe disk."""
    load_fixed_seconds: float = 1.0
    evict_seconds: float = 1.0
    """Until VRAM is back after an unload (0.5 to 1.5 s, Ollama waits up to 5 s)."""


DEFAULT_PRICES = Prices()


@dataclass(slots=True)
class Moment:
    """The instant of one choice: the time, the cluster's demand, the queue, the prices."""

    now: float = 0.0
    demand: Mapping[str, Demand] = field(default_factory=dict)
    queue_ahead: int = 0
    """Requests for the same model that wait in the router and go first."""
    prices: Prices = DEFAULT_PRICES
    local_matters: bool = False
    """Some candidate is this machine, so being another one has a price."""
    expected_output: float | None = None
    """Scratch: the expected length of the answer."""
    fits: dict[str, Fit] = field(default_factory=dict)
    """Scratch: the verdict per node, worked out once per choice."""
    needs: dict[tuple[object, ...], Needs] = field(default_factory=dict)
    """Scratch: memory needs already worked out for this choice."""

    def output_tokens(self, request: InferenceRequest) -> float:
        """Length of the answer: what this model usually says, cut by the caller's limit."""
        if self.expected_output is None:
            expected = self.usual_tokens(request.model)
            limit = request.output_tokens
            self.expected_output = expected if limit is None else min(expected, limit)
        return self.expected_output

    def usual_tokens(self, model: str) -> float:
        """Length of an answer of this model."""
        demand = self.demand.get(model)
        if demand is None or demand.output_tokens is None:
            return self.prices.default_output_tokens
        return demand.output_tokens

    def fit(self, request: InferenceRequest, node: NodeSnapshot) -> Fit:
        """How the request's model finds its place on ``node``."""
        fit = self.fits.get(node.node.id)
        if fit is None:
            fit = self.fits[node.node.id] = fit_of(request, node, self)
        return fit
