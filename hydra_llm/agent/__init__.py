"""A small exporter for a machine that has none: its GPUs' memory, for Prometheus and for us.

``page`` renders a reading, ``server`` hands it out over HTTP, ``exposure`` says who may have
it, ``running`` puts them together until a signal comes.
"""

from hydra_llm.agent.running import Agent, run_agent

__all__ = ["Agent", "run_agent"]
