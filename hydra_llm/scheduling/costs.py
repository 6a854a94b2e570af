"""What a node would cost a request, in seconds: one function a term.

A term is ``(request, node, moment) -> seconds``, never negative. Terms add up without
weights, so a person can argue with each of them, and a plug-in adds seconds of its own.
"""

from __future__ import annotations

import math
from typing import Protocol

from hydra_llm.scheduling.filters import MISSES_DEADLINE, vram_available_to
from hydra_llm.scheduling.memory import runner_serves
from hydra_llm.scheduling.moment import Moment
from hydra_llm.types import (
    GB,
    NO_OPTIONS,
    UNKNOWN_SPEED,
    InferenceRequest,
    NodeSnapshot,
    Rejection,
    RunningRequest,
)

GPU_PREFILL_SPEEDUP = 30.0
"""Prompt tokens a GPU evaluates in the time it decodes one (FACTS section 4)."""
CPU_PREFILL_SPEEDUP = 5.0
SHARING_SLOWDOWN = 0.5
"""What each further stream on the same GPU adds to a token's time (FACTS section 4)."""
OTHERS_TIME = tuple(math.pow(2.0, (5 - priority) / 4) for priority in range(1, 11))
"""What others' seconds count beside one's own, by priority 1 to 10: as much at 5, half of that four
steps up. If they count less, priority 10 pushes out what it needs itself soon after."""
COPY_ELSEWHERE_SHARE = 0.2
"""What of an eviction's price is left where another warm copy can take over."""
QUEUE_DURING_RELOAD = 3.0
"""How much the requests that come during a reload weigh: they wait for half of it in the mean, and
the reload pushes out others in turn. Found by replay (docs/how-a-decision-is-made.md)."""
LEAST_LOAD_SHARE = 0.3
"""What of its load a request pays at least for a further copy that others will use, too."""
UNKNOWN_MEMORY_SHARE = 0.1
"""What of a load is added where nothing tells the memory. Little, as that load will tell it: who
shuns such nodes never learns what they hold. Found by replay, too."""
MOST_BUSY = 0.9
"""Where queues are reckoned with: beyond this, formulas for steady ones say nothing."""


class CostTerm(Protocol):
    """Any callable that answers in seconds."""

    def __call__(self, request: InferenceRequest, node: NodeSnapshot, moment: Moment, /) -> float:
        """Seconds that this node costs the request, 0 or more."""
        ...


# ---------------------------------------------------------------------- estimates


def slots_of(node: NodeSnapshot, model: str) -> int:
    """Requests its runner serves at once: configured, learned, or Ollama's default of one."""
    if node.node.slots is not None:
        return node.node.slots
    speed = node.speeds.get(model)
    return speed.slots if speed is not None and speed.slots else 1


def seconds_per_token(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> float:
    """
    Time to decode one token alone on the node.

    Measured where the pair was seen; else the model's bytes over the memory bandwidth,
    the node's own where another model has shown it.
    """
    if request.model in node.loaded:
        return _pace(request.model, node, moment)[1]
    speed = node.speeds.get(request.model)
    if speed is not None and speed.decode_seconds_per_token is not None:
        return speed.decode_seconds_per_token
    cpu_share = moment.fit(request, node).cpu_share if node.has_gpu else 1.0
    return _seconds_for_bytes(request.model, node, moment, cpu_share)


def _pace(model: str, node: NodeSnapshot, moment: Moment) -> tuple[object, float, float]:
    """Seconds for a token of the answer and of the prompt, where the model is loaded."""
    pace = node.paces.get(model)
    if pace is None or pace[0] is not moment.prices:
        speed = node.speeds.get(model, UNKNOWN_SPEED)
        decoding = speed.decode_seconds_per_token
        if decoding is None:
            cpu_share = 1.0 - node.loaded[model].gpu_share
            decoding = _seconds_for_bytes(model, node, moment, cpu_share)
        prefilling = speed.prefill_seconds_per_token
        if prefilling is None:
            prefilling = decoding / _prefill_speedup(node)
        pace = node.paces[model] = (moment.prices, decoding, prefilling)
    return pace


def _prefill_speedup(node: NodeSnapshot) -> float:
    return GPU_PREFILL_SPEEDUP if node.has_gpu else CPU_PREFILL_SPEEDUP


def _seconds_for_bytes(model: str, node: NodeSnapshot, moment: Moment, cpu_share: float) -> float:
    """Reading all of a model once, a part of it from system memory."""
    prices = moment.prices
    size = float(node.installed[model].size_bytes)
    gpu_rate = _gpu_rate(node, moment)
    if not cpu_share:
        return size / gpu_rate
    return size * (1.0 - cpu_share) / gpu_rate + size * cpu_share / prices.cpu_bytes_per_second


def _gpu_rate(node: NodeSnapshot, moment: Moment) -> float:
    """Bytes per second from GPU memory: measured there, else as cards of its size have."""
    return (
        node.bytes_per_second or node.usual_bytes_per_second or moment.prices.gpu_bytes_per_second
    )


def prefill_tokens(request: InferenceRequest, node: NodeSnapshot) -> int:
    """Prompt tokens that are not in the node's prompt cache."""
    cached = request.cached_tokens
    if cached and request.model in node.loaded:
        return max(0, request.input_tokens - cached.get(node.node.id, 0))
    return request.input_tokens


def alone_seconds(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> float:
    """Prefill and decode as if nothing else ran there."""
    return _prefill_alone(request, node, moment) + (
        moment.output_tokens(request) * seconds_per_token(request, node, moment)
    )


def load_seconds_of(model: str, node: NodeSnapshot, moment: Moment) -> float:
    """
    Loading ``model`` on an idle node: measured there, else from the file's size.

    A bandwidth that was measured there is of whole loads, so their fixed part is in it.
    """
    speed = node.speeds.get(model, UNKNOWN_SPEED)
    if speed.load_seconds is not None:
        return speed.load_seconds
    installed = node.installed.get(model)
    loaded = node.loaded.get(model)
    size = installed.size_bytes if installed else (loaded.size_bytes if loaded else 0)
    prices = moment.prices
    if node.load_bytes_per_second is not None:
        return max(prices.load_fixed_seconds, size / node.load_bytes_per_second)
    return prices.load_fixed_seconds + size / prices.load_bytes_per_second


def at_least(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> float:
    """
    A bound that the terms below never undercut, cheap enough to skip most cold nodes.

    Loading, and decoding as if all of the model lay in the fastest memory. 0 for a node that has
    the model, or is just getting it.
    """
    model = request.model
    if model in node.loaded or (node.running and model in node.arriving):
        return 0.0
    speed = node.speeds.get(model)
    if speed is not None and speed.decode_seconds_per_token is not None:
        per_token = speed.decode_seconds_per_token
    else:
        # A GPU may turn out slower than a CPU is taken to be.
        rate = max(_gpu_rate(node, moment), moment.prices.cpu_bytes_per_second)
        per_token = node.installed[model].size_bytes / rate
    decoding = _minded(moment.output_tokens(request) * per_token, request, moment)
    # Whoever brings a copy that others will use pays a part of its load only.
    return LEAST_LOAD_SHARE * load_seconds_of(model, node, moment) + decoding


# -------------------------------------------------------------------------- terms


def wait(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> float:
    """Until the runner has a free slot: residual work ahead of it, divided by its slots."""
    running = node.running
    if not running and not moment.queue_ahead:
        return 0.0
    now = moment.now
    model = request.model
    ahead: list[RunningRequest] = [r for r in running if r.model == model]
    pending_load = 0.0
    for other in ahead:
        if other.loading:
            pending_load = max(pending_load, other.load_left(now))
    slots = slots_of(node, model)
    waiting = 0.0
    if len(ahead) >= slots:
        waiting = sum(r.seconds_left(now) for r in ahead) / slots * _sharing(model, node)
    if moment.queue_ahead and (ahead or model in node.loaded):
        waiting += moment.queue_ahead * alone_seconds(request, node, moment) / slots
    return pending_load + waiting


def _sharing(model: str, node: NodeSnapshot) -> float:
    """By how much other models' streams on the same GPU slow this one's down."""
    streams = node.streams
    if not streams:
        return 1.0
    return 1.0 + SHARING_SLOWDOWN * (sum(streams.values()) - streams.get(model, 0))


def load(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> float:
    """
    Until the model is loaded, as far as the request has to pay for it.

    A further copy of a model in memory that is free, or may be, serves others after it. What these
    will wait less within the eviction horizon is taken off, down to :data:`LEAST_LOAD_SHARE`.
    """
    seconds = load_wait(request, node, moment)
    if not seconds:
        return 0.0
    demand = moment.demand.get(request.model)
    if demand is None or not demand.warm_nodes:
        return seconds
    if not node.may_have_more_room and moment.fit(request, node).verdict != "fits":
        return seconds
    rate, own = demand.rate(moment.now), alone_seconds(request, node, moment)
    busy = min(MOST_BUSY, rate * own / demand.warm_nodes)
    saved = rate * moment.prices.eviction_horizon_seconds * own * busy / (1.0 - busy)
    return max(LEAST_LOAD_SHARE * seconds, seconds - saved)


def load_wait(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> float:
    """Until the model is loaded: loads ahead of it, busy victims, eviction, its own load."""
    fit = moment.fit(request, node)
    if fit.verdict in ("loaded", "loading"):
        return 0.0
    now = moment.now
    ahead = drain = answers = 0.0
    for other in node.running:
        # Ollama loads one model at a time.
        ahead += other.load_left(now)
        if other.model in fit.victims:
            if other.loading:
                # Those still loading must also have answered before they can be pushed out.
                answers += other.expected_seconds
            else:
                drain = max(drain, other.seconds_left(now))
    if fit.victims:
        drain = drain + answers + moment.prices.evict_seconds
    return ahead + drain + load_seconds_of(request.model, node, moment)


def prefill(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> float:
    """Evaluating the part of the prompt that the node has not cached."""
    return _prefill_alone(request, node, moment) * _sharing(request.model, node)


def _prefill_alone(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> float:
    model, tokens = request.model, prefill_tokens(request, node)
    if model in node.loaded:
        return tokens * _pace(model, node, moment)[2]
    speed = node.speeds.get(model)
    if speed is not None and speed.prefill_seconds_per_token is not None:
        return tokens * speed.prefill_seconds_per_token
    return tokens * seconds_per_token(request, node, moment) / _prefill_speedup(node)


def decode(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> float:
    """Generating the answer; somebody who reads along minds less."""
    return _minded(decode_seconds(request, node, moment), request, moment)


def _minded(seconds: float, request: InferenceRequest, moment: Moment) -> float:
    """What counts of an answer's seconds: nobody reads along more slowly than he can read."""
    if not request.interactive:
        return seconds
    prices = moment.prices
    reading = moment.output_tokens(request) * prices.reading_seconds_per_token
    late = seconds - reading if seconds > reading else 0.0
    return late + (seconds - late) * prices.interactive_decode_share


def decode_seconds(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> float:
    """Generating the answer, slowed by what else runs there."""
    tokens = moment.output_tokens(request)
    if not tokens:
        return 0.0
    per_token = seconds_per_token(request, node, moment)
    return tokens * per_token * _sharing(request.model, node)


def eviction(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> float:
    """
    What pushing other models out costs those who will want them again soon.

    The next request waits for a reload if it comes within the horizon, and before that for what is
    at work in the model's place. If many come, those that come meanwhile wait as well:
    ``rate × reload`` of them, half of it each.
    """
    fit = moment.fit(request, node)
    if not fit.victims:
        return 0.0
    price = 0.0
    # Where there may be more room than is taken for granted, perhaps nothing has to go at all.
    at_work = 0.0 if node.may_have_more_room else alone_seconds(request, node, moment)
    for victim in fit.victims:
        demand = moment.demand.get(victim)
        if demand is None or victim == request.model:
            continue
        rate = demand.rate(moment.now)
        wanted = -math.expm1(-rate * moment.prices.eviction_horizon_seconds)
        if not wanted:
            continue
        lost = _lost_on_cpu(victim, node, moment)
        waits = load_seconds_of(victim, node, moment) + still_at_work(at_work, rate) / wanted
        reload = max(0.0, waits - lost)
        waited = wanted * reload * (1.0 + QUEUE_DURING_RELOAD * rate * reload / 2.0)
        elsewhere = demand.warm_nodes - (victim in node.loaded)
        price += waited if elsewhere <= 0 else COPY_ELSEWHERE_SHARE * waited
    return price * OTHERS_TIME[request.priority - 1]


def still_at_work(seconds: float, rate: float) -> float:
    """
    What is left of ``seconds`` of work, in the mean, when the next of a stream of requests comes.

    They come at ``rate`` a second, independently of each other, so the next one's time T is
    exponentially distributed: the mean of max(0, ``seconds`` − T) is
    ``seconds`` − (1 − exp(−``rate`` × ``seconds``)) / ``rate``.
    """
    return max(0.0, seconds + math.expm1(-rate * seconds) / rate)


def _lost_on_cpu(model: str, node: NodeSnapshot, moment: Moment) -> float:
    """What an answer takes longer here than where all of the model is on GPUs."""
    loaded = node.loaded.get(model)
    if loaded is None or loaded.is_on_gpu or model not in node.installed:
        return 0.0
    best = _seconds_for_bytes(model, node, moment, 0.0)
    return moment.usual_tokens(model) * max(0.0, _pace(model, node, moment)[1] - best)


def slowdown(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> float:
    """What this request takes from those that run on the same GPU."""
    others = [r for r in node.running if r.model != request.model and r.serving_since is not None]
    if not others:
        return 0.0
    own = alone_seconds(request, node, moment)
    slowed = SHARING_SLOWDOWN * sum(min(own, r.seconds_left(moment.now)) for r in others)
    return slowed * OTHERS_TIME[request.priority - 1]


def preference(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> float:
    """What the caller asked for: this machine, labels, memory that nobody quite has."""
    prices = moment.prices
    price = 0.0
    if request.prefer_local and moment.local_matters and not node.node.local:
        price += prices.prefer_local_seconds
    if request.prefer_labels:
        missing = request.prefer_labels.difference(node.node.labels)
        price += prices.prefer_label_seconds * len(missing)
    if request.min_vram_bytes is not None:
        short = request.min_vram_bytes - (vram_available_to(request, node) or 0)
        if short > 0:
            price += prices.short_vram_seconds_per_gb * short / GB
    return price


def risk(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> float:
    """Recent errors, and loading into memory that nothing measures."""
    price = 0.0
    if node.penalty_seconds:
        price = node.penalty(moment.now)
    # Neither a pass nor a ban: it may end on the CPU.
    if moment.fit(request, node).verdict == "unknown":
        price += UNKNOWN_MEMORY_SHARE * load_seconds_of(request.model, node, moment)
    return price


COST_TERMS: dict[str, CostTerm] = {
    "load": load,
    "wait": wait,
    "preference": preference,
    "prefill": prefill,
    "decode": decode,
    "eviction": eviction,
    "slowdown": slowdown,
    "risk": risk,
}
"""Every term by name, the most decisive first, so that a hopeless node is given up early."""


def of_idle_runner(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> float | None:
    """
    The sum of all terms where it is short: an idle node with a runner that serves; else None.

    Most nodes of a large cluster are that, most of the time.
    """
    model = request.model
    loaded = node.loaded.get(model)
    if loaded is None or node.running or moment.queue_ahead or node.penalty_seconds:
        return None
    if request.options is not NO_OPTIONS and not runner_serves(
        request, loaded, node.installed[model].context_length
    ):
        return None
    _, decoding, prefilling = _pace(model, node, moment)
    return (
        prefill_tokens(request, node) * prefilling
        + _minded(moment.output_tokens(request) * decoding, request, moment)
        + preference(request, node, moment)
    )


def own_seconds(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> dict[str, float]:
    """The request's own expected completion there, term by term, nothing weighed down."""
    return {
        "wait": wait(request, node, moment),
        "load": load_wait(request, node, moment),
        "prefill": prefill(request, node, moment),
        "decode": decode_seconds(request, node, moment),
    }


def misses_deadline(
    request: InferenceRequest, node: NodeSnapshot, moment: Moment
) -> Rejection | None:
    """Reject a node that is not expected to be done in time."""
    if request.deadline_seconds is None:
        return None
    left = request.submitted_at + request.deadline_seconds - moment.now
    expected = sum(own_seconds(request, node, moment).values())
    if expected <= left:
        return None
    return Rejection(node.id, MISSES_DEADLINE, f"{expected:.1f} s expected, {left:.1f} s left")
