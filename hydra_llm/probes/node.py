"""Asks one node over HTTP how it is and what it has."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import httpx

from hydra_llm.ollama.catalogue import parse_ps, parse_show, parse_tags, parse_version
from hydra_llm.probes.api import NodeApi, ProbeError
from hydra_llm.probes.exporters.watch import NOTHING, Exported, ExporterWatch
from hydra_llm.probes.keepalive import with_keep_alive
from hydra_llm.probes.local import LocalMemory, LocalReading
from hydra_llm.probes.memory import Evidence, bytes_held, vram_figures
from hydra_llm.probes.shown import ShowCache
from hydra_llm.types import InstalledModel, LoadedModel, Node, Observation

__all__ = ["NodeProbe"]


class NodeProbe:
    """
    One node, asked again and again.

    Args:
        node: whom to ask.
        transport: connections; it follows no redirect, keeps no cookie, knows no proxy.
        shown: what ``/api/show`` told of models, on any node.
        local: this machine's memory, for a node that runs on it.
        exporter: its exporter's page, for a node that has one.
        timeout_seconds: for each answer.
        clock: of ``observed_at``.
        wall_clock: Unix time, in which Ollama says when a model will go.
    """

    def __init__(
        self,
        node: Node,
        transport: httpx.AsyncBaseTransport,
        *,
        shown: ShowCache,
        local: LocalMemory | None = None,
        exporter: ExporterWatch | None = None,
        timeout_seconds: float,
        clock: Callable[[], float],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.node = node
        self._api = NodeApi(node, transport, timeout_seconds=timeout_seconds)
        self._shown = shown
        self._local = local
        self._exporter = exporter
        self._timeout = timeout_seconds
        self._clock = clock
        self._wall_clock = wall_clock
        self._installed: Mapping[str, InstalledModel] = {}
        self._loaded: Mapping[str, LoadedModel] | None = None
        self._loaded_at: float | None = None
        self._most_loaded_bytes = 0
        self._last: Observation | None = None
        self._was_silent = False

    def __repr__(self) -> str:
        return f"<NodeProbe {self.node.id}>"

    # ----------------------------------------------------------------- a round

    async def probe(self) -> Observation:
        """
        Look at the node once; whatever is wrong with it is in the observation.

        ``observed_at`` is when the round began: what changed after that may not be in it.
        """
        began = self._clock()
        if self._exporter is not None:
            self._exporter.begin()
        # One after the other over one connection: questions asked at once would have to be
        # cancelled when the first fails, and a connection cancelled while it is made is lost
        # to httpcore but not closed.
        try:
            self._installed = await self._api.ask("GET", "/api/tags", parse_tags)
        except ProbeError as trouble:
            return self._not_up(began, trouble)
        version, _ = await self._api.ask_if_possible("GET", "/api/version", parse_version)
        loaded, ps_trouble = await self._api.ask_if_possible("GET", "/api/ps", parse_ps)
        local = await self._read_local()
        exported = NOTHING if self._exporter is None else await self._exporter.latest()
        return self._up(began, version, loaded, ps_trouble, local=local, exported=exported)

    async def learn(self) -> bool:
        """Ask about one model that nobody has told of yet; whether there may be another."""
        model = self._shown.claim(self._installed, self._clock())
        if model is None:
            return False
        shown, _ = await self._api.ask_if_possible(
            "POST", "/api/show", lambda data: parse_show(data, model), {"model": model.name}
        )
        if shown is not None:
            self._shown.put(shown)
        return shown is not None

    def with_what_was_learned(self) -> Observation | None:
        """The last observation, if :meth:`learn` has more to say about its models."""
        completed = self._shown.completed(self._installed)
        if self._last is None or completed == self._last.installed:
            return None
        self._last = replace(self._last, installed=completed)
        return self._last

    def _not_up(self, began: float, trouble: ProbeError) -> Observation:
        if trouble.is_silence and self._last is not None and not self._was_silent:
            # A busy node misses a probe now and then; a refused connection is a fact. What was
            # last seen stays, with its age, until it is silent a second time.
            self._was_silent = True
            return replace(self._last, loaded=None, health_reason=trouble.reason)
        # Who comes back has empty runners, unless a probe says else.
        self._loaded = self._loaded_at = self._last = None
        return Observation(
            node_id=self.node.id,
            observed_at=began,
            health=trouble.health,
            health_reason=trouble.reason,
        )

    def _up(
        self,
        began: float,
        version: str | None,
        loaded: Mapping[str, LoadedModel] | None,
        ps_trouble: str,
        *,
        local: LocalReading,
        exported: Exported,
    ) -> Observation:
        if loaded is not None:
            loaded = with_keep_alive(
                loaded,
                self._loaded,
                now=self._wall_clock(),
                since=None if self._loaded_at is None else began - self._loaded_at,
            )
            self._loaded, self._loaded_at = loaded, began
            held = bytes_held(loaded.values())
            self._most_loaded_bytes = max(self._most_loaded_bytes, held)
        figures = vram_figures(
            Evidence(
                node=self.node,
                exported=exported.devices,
                exporter_trouble=exported.trouble,
                devices=local.devices or (),
                loaded=self._loaded,
                loaded_at=self._loaded_at,
                most_loaded_bytes=self._most_loaded_bytes,
            )
        )
        self._was_silent = False
        self._last = Observation(
            node_id=self.node.id,
            observed_at=began,
            health="up",
            health_reason=ps_trouble,
            version=version,
            installed=self._shown.completed(self._installed),
            loaded=loaded,
            devices=exported.devices or local.devices,
            host=exported.host or local.host,
            total_vram_bytes=figures.total_bytes,
            free_vram_bytes=figures.free_bytes,
            vram_source=figures.source,
            vram_observed_at=figures.observed_at,
            vram_reasons=(*(f"exporter: {why}" for why in exported.reasons), *local.reasons),
        )
        return self._last

    async def _read_local(self) -> LocalReading:
        if self._local is None:
            return LocalReading()
        return await self._local.read(self._timeout)
