"""
Ollama nodes without GPUs, for tests of whatever routes to them.

::

    with SimulatedCluster([SimulatedNode("a"), SimulatedNode("b", vram_gb=8.0)]) as cluster:
        cluster["a"].kill()
        ...
"""

from __future__ import annotations

from hydra_llm.simulation.calls import RequestRecord
from hydra_llm.simulation.catalog import Behaviour, SimulatedModel
from hydra_llm.simulation.cluster import SimulatedCluster
from hydra_llm.simulation.faults import (
    CutFault,
    EndlessFault,
    ErrorBodyFault,
    ErrorLineFault,
    Fault,
    HangFault,
    HtmlFault,
    HugeFault,
    LoadFault,
    LoopFault,
    MissingModelFault,
    OffloadFault,
    PsFault,
    ResetFault,
    SlowFault,
    SlowLorisFault,
    StallFault,
    StatusFault,
    TokenFault,
)
from hydra_llm.simulation.names import HostNames
from hydra_llm.simulation.node import SimulatedNode
from hydra_llm.simulation.settings import Gpu
from hydra_llm.simulation.virtual import VirtualCluster

__all__ = [
    "Behaviour",
    "CutFault",
    "EndlessFault",
    "ErrorBodyFault",
    "ErrorLineFault",
    "Fault",
    "Gpu",
    "HangFault",
    "HostNames",
    "HtmlFault",
    "HugeFault",
    "LoadFault",
    "LoopFault",
    "MissingModelFault",
    "OffloadFault",
    "PsFault",
    "RequestRecord",
    "ResetFault",
    "SimulatedCluster",
    "SimulatedModel",
    "SimulatedNode",
    "SlowFault",
    "SlowLorisFault",
    "StallFault",
    "StatusFault",
    "TokenFault",
    "VirtualCluster",
]
