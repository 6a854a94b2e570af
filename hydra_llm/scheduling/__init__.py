"""Chooses a node: request + snapshots → decision. No clock, no randomness, no sockets."""

from hydra_llm.scheduling.costs import COST_TERMS, CostTerm
from hydra_llm.scheduling.decision import RoutingDecision
from hydra_llm.scheduling.filters import REASONS, Filter
from hydra_llm.scheduling.memory import Fit
from hydra_llm.scheduling.moment import Moment, Prices
from hydra_llm.scheduling.outcome import TERMS, Ended, Outcome, Prospect
from hydra_llm.scheduling.scheduler import Choice, Scheduler, has_room

__all__ = [
    "COST_TERMS",
    "REASONS",
    "TERMS",
    "Choice",
    "CostTerm",
    "Ended",
    "Filter",
    "Fit",
    "Moment",
    "Outcome",
    "Prices",
    "Prospect",
    "RoutingDecision",
    "Scheduler",
    "has_room",
]
