"""Finds Ollama servers on networks that somebody named; nothing here runs unless it is asked to.

``calling`` asks one question at a pace, ``answers`` and ``exporters`` understand what comes
back, ``sameness`` says who is who, ``search`` puts them together. ``mdns`` listens for agents
that announce themselves, ``watch`` searches again and again for a router.
"""

from hydra_llm.discovery.calling import Limits
from hydra_llm.discovery.exporters import FoundExporter
from hydra_llm.discovery.search import (
    Announced,
    FoundNode,
    Progress,
    Search,
    SearchResult,
    search,
)

__all__ = [
    "Announced",
    "FoundExporter",
    "FoundNode",
    "Limits",
    "Progress",
    "Search",
    "SearchResult",
    "search",
]
