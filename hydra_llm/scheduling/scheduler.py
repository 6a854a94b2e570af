"""Filter, cost, pick: one request and the nodes as last seen → a choice.

Pure: the time, the random source and the snapshots come in as arguments, so tests, the
replay and the live router run the very same code.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

from hydra_llm.exceptions import NoEligibleNodeError, NoNodeUpError, count_reasons
from hydra_llm.scheduling import costs, filters
from hydra_llm.scheduling.costs import COST_TERMS, CostTerm
from hydra_llm.scheduling.filters import Filter, figure, filters_for, vram_available_to
from hydra_llm.scheduling.moment import Moment
from hydra_llm.types import Candidate, InferenceRequest, NodeSnapshot, Rejection, masked_url

NEAR_TIE_SHARE = 0.05
NEAR_TIE_SECONDS = 0.05
"""Candidates this close to the best are drawn at random, so that routers do not stampede."""

HEADROOM_BY_PRIORITY = (0, 0, 0, 1, 1, 1, 1, 2, 2, 2)
"""Requests a runner may hold beyond its slots, by priority 1 to 10."""


class Relaxation(NamedTuple):
    """A wish that was given up because no node could fulfil it."""

    name: str
    warning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """
    The node that was picked, with all that is needed to explain it later.

    The explanation is worked out only when someone asks: the snapshots never change, so
    it comes out the same then.
    """

    request: InferenceRequest
    moment: Moment
    selected: NodeSnapshot
    eligible: tuple[NodeSnapshot, ...]
    rejections: tuple[Rejection, ...]
    terms: Mapping[str, CostTerm]
    relaxations: tuple[Relaxation, ...] = ()
    has_room: bool = True
    """Whether the runner may be handed this request now; else it waits in the router."""

    @property
    def room(self) -> int:
        """Requests for its model that the runner may hold together with this one."""
        return room_for(self.request, self.selected)

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each wish that could not be fulfilled."""
        return tuple(relaxation.warning for relaxation in self.relaxations)

    def candidate(self, node: NodeSnapshot) -> Candidate:
        """One eligible node with all its costs."""
        values = {
            name: float(term(self.request, node, self.moment)) for name, term in self.terms.items()
        }
        return Candidate(
            node_id=node.id,
            costs=values,
            total_seconds=sum(values.values()),
            note=_note(self.request, node, self.moment),
        )

    def candidates(self) -> tuple[Candidate, ...]:
        """Every eligible node with all its costs, cheapest first."""
        found = [self.candidate(node) for node in self.eligible]
        return tuple(sorted(found, key=lambda candidate: candidate.total_seconds))

    def predicted(self) -> dict[str, float]:
        """What is expected to happen on the selected node, in seconds."""
        values = costs.own_seconds(self.request, self.selected, self.moment)
        before = values["wait"] + values["load"] + values["prefill"]
        tokens = max(1.0, self.moment.output_tokens(self.request))
        first = before + values["decode"] / tokens
        return {**values, "first_token": first, "total": before + values["decode"]}


class Scheduler:
    """
    Chooses the node that will answer soonest, all things considered.

    Args:
        filters: further ``(request, node, moment) -> Rejection | None``.
        costs: further terms by name, ``(request, node, moment) -> seconds >= 0``.
    """

    def __init__(
        self,
        *,
        filters: Iterable[Filter] = (),
        costs: Mapping[str, CostTerm] | None = None,
    ) -> None:
        self._extra_filters = tuple(filters)
        own = {name: _never_negative(term) for name, term in (costs or {}).items()}
        self._terms: dict[str, CostTerm] = {**COST_TERMS, **own}
        self._term_list = tuple(self._terms.values())
        self._extra_terms = tuple(own.values())
        # The short ways are short for our own terms only.
        self._knows_terms = not own.keys() & COST_TERMS.keys()

    def schedule(
        self,
        request: InferenceRequest,
        nodes: Sequence[NodeSnapshot],
        moment: Moment,
        rng: random.Random,
    ) -> Choice:
        """
        Pick a node.

        Raises:
            NoEligibleNodeError: no node may take the request; it holds each one's reason.
        """
        active = filters_for(request)
        if request.deadline_seconds is not None:
            active.append(costs.misses_deadline)
        active += self._extra_filters
        eligible, rejections = _sift(request, nodes, moment, active)
        relaxations: tuple[Relaxation, ...] = ()
        if not eligible:
            request, eligible, rejections, relaxations = self._relax(
                request, nodes, moment, active, rejections
            )
        selected, has_room = self._pick(request, eligible, moment, rng)
        return Choice(
            request=request,
            moment=moment,
            selected=selected,
            eligible=tuple(eligible),
            rejections=tuple(rejections),
            terms=self._terms,
            relaxations=relaxations,
            has_room=has_room,
        )

    # ------------------------------------------------------------------ pick

    def _pick(
        self,
        request: InferenceRequest,
        eligible: Sequence[NodeSnapshot],
        moment: Moment,
        rng: random.Random,
    ) -> tuple[NodeSnapshot, bool]:
        """The cheapest node; among near-ties one with room, drawn at random."""
        moment.local_matters = request.prefer_local and any(n.node.local for n in eligible)
        if len(eligible) == 1:
            return eligible[0], has_room(request, eligible[0])
        model = request.model
        terms, at_least = self._term_list, costs.at_least
        best = bar = float("inf")
        knows_terms, of_idle_runner = self._knows_terms, costs.of_idle_runner
        scored: list[tuple[float, NodeSnapshot]] = []
        # Warm nodes first: they set a bar that most cold ones fail at once.
        cold = [node for node in eligible if model not in node.loaded]
        warm = [node for node in eligible if model in node.loaded] if cold else eligible
        for group in (warm, cold):
            is_cold = group is cold
            for node in group:
                known = None
                if knows_terms:
                    if is_cold:
                        if scored and at_least(request, node, moment) > bar:
                            continue
                    else:
                        known = of_idle_runner(request, node, moment)
                total = 0.0 if known is None else known
                for term in terms if known is None else self._extra_terms:
                    total += term(request, node, moment)
                    if total > bar:
                        break
                if total <= bar:
                    scored.append((total, node))
                    if total < best:
                        best = total
                        bar = best + max(NEAR_TIE_SHARE * best, NEAR_TIE_SECONDS)
        near = [node for total, node in scored if total <= bar]
        if len(near) == 1:
            return near[0], has_room(request, near[0])
        roomy = [node for node in near if has_room(request, node)]
        return rng.choice(roomy or near), bool(roomy)

    # ------------------------------------------------------------- relaxations

    def _relax(
        self,
        request: InferenceRequest,
        nodes: Sequence[NodeSnapshot],
        moment: Moment,
        active: Sequence[Filter],
        rejections: Sequence[Rejection],
    ) -> tuple[InferenceRequest, list[NodeSnapshot], list[Rejection], tuple[Relaxation, ...]]:
        """Give up what the caller only preferred, the least first, until a node is left."""
        steps: list[_Step] = []
        if request.min_vram_bytes is not None and not request.strict_vram:
            steps.append(_without_min_vram)
        if request.capabilities:
            steps.append(_without_capabilities)
        if request.node_id is not None and not request.strict_pin:
            steps.append(_without_pin)
        first = list(rejections)
        for wanted in _combinations(steps):
            relaxed, chain = request, list(active)
            given_up: list[Relaxation] = []
            for step in wanted:
                relaxed, chain, relaxation = step(relaxed, chain, nodes, first)
                given_up.append(relaxation)
            moment.fits.clear()
            eligible, last = _sift(relaxed, nodes, moment, chain)
            if eligible:
                return relaxed, eligible, last, tuple(given_up)
            rejections = last
        raise _nobody(request, nodes, first, rejections)


_Step = Callable[
    [InferenceRequest, "list[Filter]", Sequence[NodeSnapshot], Sequence[Rejection]],
    "tuple[InferenceRequest, list[Filter], Relaxation]",
]


def _combinations(steps: Sequence[_Step]) -> list[tuple[_Step, ...]]:
    """Each step alone, then pairs, then all: as little as possible is given up."""
    return [c for size in range(1, len(steps) + 1) for c in combinations(steps, size)]


def _without_min_vram(
    request: InferenceRequest,
    chain: list[Filter],
    nodes: Sequence[NodeSnapshot],
    rejections: Sequence[Rejection],
) -> tuple[InferenceRequest, list[Filter], Relaxation]:
    chain = [
        filters.is_too_small_altogether if rule is filters.is_short_of_vram else rule
        for rule in chain
    ]
    figures = ", ".join(f"{node.id} {_figure_of(request, node)}" for node in nodes)
    wanted = figure(request.min_vram_bytes)
    warning = f"no node has {wanted} VRAM available ({figures}); took the best that could run it"
    return request, chain, Relaxation("min_vram_gb", warning)


def _figure_of(request: InferenceRequest, node: NodeSnapshot) -> str:
    return figure(vram_available_to(request, node)) if node.health == "up" else node.health


def _without_capabilities(
    request: InferenceRequest,
    chain: list[Filter],
    nodes: Sequence[NodeSnapshot],
    rejections: Sequence[Rejection],
) -> tuple[InferenceRequest, list[Filter], Relaxation]:
    # Ollama's own words on an unsupported capability are the ones that callers know.
    chain = [rule for rule in chain if rule is not filters.lacks_capability]
    wanted = ", ".join(sorted(request.capabilities))
    warning = f"no node's {request.model!r} is known to support {wanted}; Ollama may refuse"
    return replace(request, capabilities=frozenset()), chain, Relaxation("capabilities", warning)


def _without_pin(
    request: InferenceRequest,
    chain: list[Filter],
    nodes: Sequence[NodeSnapshot],
    rejections: Sequence[Rejection],
) -> tuple[InferenceRequest, list[Filter], Relaxation]:
    wanted = request.node_id or ""
    pinned = next((node for node in nodes if node.node.answers_to(wanted)), None)
    if pinned is None:
        known = ", ".join(node.id for node in nodes)
        why = f"node_id {masked_url(wanted)!r} is no configured node ({known})"
    else:
        reason = next((r for r in rejections if r.node_id == pinned.id), None)
        why = f"the pinned node {pinned.id!r} cannot take it"
        if reason is not None:
            why += f" ({reason.reason}{': ' + reason.detail if reason.detail else ''})"
    chain = [rule for rule in chain if rule is not filters.is_pinned_elsewhere]
    return replace(request, node_id=None), chain, Relaxation("node_id", f"{why}; routed instead")


# ------------------------------------------------------------------------ helpers


def _sift(
    request: InferenceRequest,
    nodes: Sequence[NodeSnapshot],
    moment: Moment,
    active: Sequence[Filter],
) -> tuple[list[NodeSnapshot], list[Rejection]]:
    eligible: list[NodeSnapshot] = []
    rejections: list[Rejection] = []
    for node in nodes:
        for rule in active:
            rejection = rule(request, node, moment)
            if rejection is not None:
                rejections.append(rejection)
                break
        else:
            eligible.append(node)
    return eligible, rejections


def _never_negative(term: CostTerm) -> CostTerm:
    """A plug-in's term, held to its promise: the pick stops adding once a node is beaten."""

    def checked(request: InferenceRequest, node: NodeSnapshot, moment: Moment, /) -> float:
        # In this order NaN becomes 0.
        return max(0.0, float(term(request, node, moment)))

    return checked


def room_for(request: InferenceRequest, node: NodeSnapshot) -> int:
    """Requests for its model that a runner may hold when it takes this one: slots and headroom."""
    return costs.slots_of(node, request.model) + HEADROOM_BY_PRIORITY[request.priority - 1]


def has_room(request: InferenceRequest, node: NodeSnapshot) -> bool:
    """
    Whether the node may be handed the request now.

    A runner gets its slots and a little headroom, more for high priorities and none for
    low ones; Ollama's own queue is unbounded, blind to priority and cannot be left. A
    model that a pending load is about to push out takes no new work.
    """
    running = node.running
    if not running:
        return True
    if request.model in node.leaving:
        return False
    mine = sum(1 for other in running if other.model == request.model)
    return mine < room_for(request, node)


def _nobody(
    request: InferenceRequest,
    nodes: Sequence[NodeSnapshot],
    first: Sequence[Rejection],
    last: Sequence[Rejection],
) -> NoEligibleNodeError:
    """The error that counts the reasons, naming figures where memory was the matter."""
    rejections = last or first
    message = (
        f"0/{len(nodes)} nodes can take {request.model!r}: {count_reasons(rejections)}"
        if nodes
        else "no nodes are configured"
    )
    memory = {filters.SHORT_OF_VRAM, filters.TOO_SMALL}
    if request.min_vram_bytes is not None and any(r.reason in memory for r in rejections):
        figures = "; ".join(f"{r.node_id}: {r.detail or r.reason}" for r in rejections)
        message += f" (min_vram_gb={figure(request.min_vram_bytes)[:-3]}: {figures})"
    elif request.node_id is not None:
        pinned = [r for r in first if r.reason != filters.PINNED_ELSEWHERE]
        why = "; ".join(f"{r.node_id}: {r.reason}" for r in pinned) or "no such node"
        message += f" (node_id={masked_url(request.node_id)!r}: {why})"
    elif rejections and all(r.reason == filters.MODEL_MISSING for r in rejections):
        message += f"; try 'ollama pull {request.model}' on one of them"
    is_down = rejections and all(r.reason in (filters.DOWN, filters.NOT_SEEN) for r in rejections)
    kind = NoNodeUpError if is_down else NoEligibleNodeError
    return kind(message, model=request.model, rejections=rejections)


def _note(request: InferenceRequest, node: NodeSnapshot, moment: Moment) -> str:
    """A few words on the state of the model on a node."""
    fit = moment.fit(request, node)
    if fit.verdict == "loaded":
        loaded = node.loaded[request.model]
        where = "" if loaded.is_on_gpu else f", {loaded.gpu_share:.0%} on GPU"
        return f"loaded{where}"
    if fit.verdict == "loading":
        return "being loaded"
    if fit.verdict == "unknown":
        return "not loaded, VRAM unknown"
    text = f"not loaded, needs {figure(fit.need_bytes)}"
    others = [victim for victim in fit.victims if victim != request.model]
    if request.model in fit.victims:
        text += ", restarts its runner"
    if others:
        text += f", evicts {', '.join(others)}"
    if fit.verdict == "offloads":
        text += f", {fit.cpu_share:.0%} in system memory"
        seconds = costs.seconds_per_token(request, node, moment)
        if seconds:
            text += f": about {1 / seconds:.3g} tokens/s"
    return text if node.free_vram_bytes is not None else f"{text}, by its loads so far"
