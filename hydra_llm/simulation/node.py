"""A simulated Ollama node on a real port."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from hydra_llm.simulation.calls import RequestRecord
from hydra_llm.simulation.catalog import GB, SimulatedModel, known_models
from hydra_llm.simulation.faults import Fault, PsFault, SlowFault
from hydra_llm.simulation.records import Eviction, Job, LoadedRunner, LoadRecord, Options
from hydra_llm.simulation.server import Connection, LoopThread
from hydra_llm.simulation.serving import NodeServing
from hydra_llm.simulation.settings import Gpu, NodeSettings
from hydra_llm.simulation.stage import Port, Stage

if TYPE_CHECKING:
    from typing_extensions import Self

    from hydra_llm.types import Node

__all__ = ["SimulatedNode"]

_T = TypeVar("_T")
_STOPPING_S = 5.0
_ENDLESS = 10**9
"""Tokens that nobody waits for."""


class SimulatedNode:
    """
    An Ollama node without a GPU, on a real loopback port.

    ::

        with SimulatedNode("rig", vram_gb=24, speed=200) as node:
            node.preload("llama3.2:3b")
            httpx.post(f"{node.url}/api/chat", json={...})

    Args:
        id: its name.
        models: what is installed; a plain name stands for a model people know.
        vram_gb: of its GPU, in decimal GB; ``None`` is a node that computes on its CPU.
        used_vram_gb: what other programs hold of that.
        gpus: several GPUs, instead of ``vram_gb``.
        num_parallel, max_loaded_models, max_queue, keep_alive_s, default_num_ctx: as
            ``OLLAMA_NUM_PARALLEL`` and its like.
        gpu_bandwidth_gb_s: of the memory; with the model's size it gives the time of a token.
        prefill_ratio: how many times faster a prompt is read than an answer written.
        load_gb_s, load_fixed_s: how long a load takes.
        vram_recovery_s: how long freed VRAM takes to come back.
        go_template: ``False`` as ``OLLAMA_GO_TEMPLATE=0``.
        speed: simulated seconds in one real second.
        port: 0 takes a free one.
        token_output: tokens of a plain answer.
        tokens_per_part: tokens in each part of a stream but the first.
        keep_requests: how many of the latest requests are remembered; all by default.
    """

    def __init__(
        self,
        id: str = "a",  # noqa: A002  # the name hydra_llm.Node has for it
        *,
        models: Iterable[str | SimulatedModel] = ("llama3.2:3b",),
        vram_gb: float | None = 24.0,
        used_vram_gb: float = 0.0,
        gpus: Iterable[Gpu] | None = None,
        ram_gb: float = 64.0,
        version: str = "0.32.15",
        num_parallel: int = 1,
        max_loaded_models: int | None = None,
        max_queue: int = 512,
        keep_alive_s: float = 300.0,
        default_num_ctx: int | None = None,
        gpu_bandwidth_gb_s: float = 400.0,
        cpu_bandwidth_gb_s: float = 40.0,
        prefill_ratio: float = 30.0,
        load_gb_s: float = 2.0,
        load_fixed_s: float = 0.5,
        vram_recovery_s: float = 0.5,
        go_template: bool = True,
        speed: float = 1.0,
        host: str = "127.0.0.1",
        port: int = 0,
        token_output: int = 64,
        tokens_per_part: int = 1,
        seed: int = 0,
        keep_requests: int | None = None,
    ) -> None:
        self.id = id
        self.host = host
        self.speed = speed
        one_gpu = (
            ()
            if vram_gb is None
            else (
                Gpu(total_bytes=round(vram_gb * GB), used_by_others_bytes=round(used_vram_gb * GB)),
            )
        )
        self.settings = NodeSettings(
            version=version,
            gpus=one_gpu if gpus is None else tuple(gpus),
            ram_bytes=round(ram_gb * GB),
            num_parallel=num_parallel,
            max_loaded_models=max_loaded_models,
            max_queue=max_queue,
            keep_alive_s=keep_alive_s,
            default_num_ctx=default_num_ctx,
            gpu_bandwidth=gpu_bandwidth_gb_s * GB,
            cpu_bandwidth=cpu_bandwidth_gb_s * GB,
            prefill_ratio=prefill_ratio,
            load_bandwidth=load_gb_s * GB,
            load_fixed_s=load_fixed_s,
            vram_recovery_s=vram_recovery_s,
            go_template=go_template,
            token_output=token_output,
            tokens_per_part=tokens_per_part,
            seed=seed,
        )
        self._wanted_port = port
        installed = {model.parsed.key: model for model in map(_model, models)}
        self._serving = NodeServing(
            self, self.settings, installed, speed=speed, keep_requests=keep_requests
        )
        self._thread: Stage | None = None
        self._owns_thread = False
        self._listener: Port | None = None
        self._flapping: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        serving = self._serving
        state = "frozen" if serving.is_frozen else "up" if serving.is_up else "down"
        if self._listener is not None and self._listener.is_silent:
            state = "vanished"
        return f"<SimulatedNode {self.id} [{state} | {self.in_flight} in flight]>"

    # ------------------------------------------------------------------ life

    def start(self, thread: Stage | None = None) -> Self:
        """Listen; ``thread`` shares one with other nodes."""
        if self._thread is not None:
            raise RuntimeError(f"node {self.id} has been started already")
        self._owns_thread = thread is None
        thread = thread or LoopThread(f"simulated-ollama-{self.id}")
        try:
            self._listener = thread.port(self.host, self._wanted_port)
        except BaseException:
            if self._owns_thread:
                thread.close()
            raise
        self._thread = thread
        self._rise(thread, self._listener)
        return self

    def stop(self) -> None:
        """Give back the port, the connections and the thread."""
        thread, listener = self._thread, self._listener
        if thread is None or listener is None:
            return
        self._do(self._end_flapping)
        self._do(self._serving.fall)
        self._do(listener.close)
        thread.wait_until(lambda: not self.open_connections, _STOPPING_S)
        self._thread = self._listener = None
        if self._owns_thread:
            thread.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def kill(self, *, only_idle: bool = False) -> bool:
        """
        End as by SIGKILL: every connection breaks, the port refuses, runners are gone.

        Args:
            only_idle: do nothing if a request is being answered. Looking at ``in_flight`` first
                does not tell: one may come in between.

        Returns:
            whether the node was up and is down now.
        """

        def die() -> bool:
            serving, listener = self._serving, self._listener
            if not serving.is_up or listener is None or (only_idle and serving.in_flight):
                return False
            serving.fall()
            listener.refuse()
            return True

        return self._do(die)

    def revive(self) -> None:
        """Start again on the same port, with nothing loaded; one that is up stays as it is."""
        if self._serving.is_up:
            return
        if self._thread is not None and self._listener is not None:
            self._rise(self._thread, self._listener)

    def freeze(self) -> None:
        """Accept connections and never send a byte, until thawed: a stopped process."""
        self._do(self._serving.freeze)

    def thaw(self) -> None:
        """Go on where it was frozen."""
        self._do(self._serving.thaw)

    def vanish(self) -> None:
        """
        Be gone from the network: packets go nowhere, so to connect takes until a timeout.

        Connections there are already stay open and silent, and the node's clock stands still.

        Raises:
            NotImplementedError: on Windows, where the nearest is `freeze`.
        """

        def go() -> None:
            if self._listener is None:
                raise RuntimeError(f"node {self.id} has not been started")
            self._listener.silence()
            if self._serving.is_up:
                self._serving.freeze()

        self._do(go)

    def reappear(self) -> None:
        """Be back on the network, and go on with what was under way."""
        thread, listener = self._thread, self._listener
        if thread is None or listener is None or not listener.is_silent:
            return
        if self._serving.is_up:
            listener.listen(thread, self._connection)
        else:
            self._do(listener.refuse)
        self.thaw()

    def flap(self, *, up_s: float = 2.0, down_s: float = 2.0) -> None:
        """
        Die at once and come back, in turns, until `clear_faults` or `stop`.

        Args:
            up_s, down_s: real seconds.
        """

        def begin() -> None:
            self._end_flapping()
            if self._thread is None:
                raise RuntimeError(f"node {self.id} has not been started")
            loop = self._thread.loop

            def fall() -> None:
                self.kill()
                self._flapping = loop.call_later(down_s, rise)

            def rise() -> None:
                self.revive()
                self._flapping = loop.call_later(up_s, fall)

            fall()

        self._do(begin)

    def speak_tls(self, context: ssl.SSLContext | None) -> None:
        """
        Speak TLS from now on, or plain HTTP with ``None``; connections there are break.

        Args:
            context: of the server's side, with its certificate.
        """

        def change() -> None:
            self._serving.tls = context
            self._serving.hang_up()

        self._do(change)

    def hang_up(self) -> None:
        """Break every connection; the node is up, and what is loaded stays."""
        self._do(self._serving.hang_up)

    # ------------------------------------------------------------------ models

    def preload(
        self, model: str, *, num_ctx: int | None = None, keep_alive: float | None = None
    ) -> None:
        """Have a model loaded already, without the time of a load."""

        def load() -> None:
            found = self._installed(model)
            with self._serving.moment() as now:
                server = self._serving.api.server
                server.preload(found, now, num_ctx=num_ctx, keep_alive=keep_alive)

        self._do(load)

    def add_model(self, model: str | SimulatedModel) -> None:
        """Install a model."""
        added = _model(model)

        def add() -> None:
            self._serving.models[added.parsed.key] = added
            self._serving.api.models[added.parsed.key] = added

        self._do(add)

    def remove_model(self, name: str) -> None:
        """Delete a model; a loaded one goes when it is idle."""

        def remove() -> None:
            model = self._installed(name)
            self._serving.models.pop(model.parsed.key, None)
            self._serving.api.models.pop(model.parsed.key, None)
            with self._serving.moment() as now:
                self._serving.api.server.unload(model, now)

        self._do(remove)

    def kill_runner(self, name: str) -> None:
        """End the process of one model, as the kernel does when memory is short."""

        def end() -> None:
            model = self._installed(name)
            with self._serving.moment() as now:
                self._serving.api.server.kill_runner(model, now)

        self._do(end)

    def occupy(self, model: str, *, num_ctx: int | None = None) -> None:
        """
        Have a program of somebody else's generate with a model, without end, until `vacate`.

        Its request stands in ``loaded`` and not in ``requests`` or ``in_flight``.

        Args:
            num_ctx: of its request; one with another context has to wait for it and reload.
        """

        def take() -> None:
            job = Job(
                model=self._installed(model),
                prompt=((("somebody else", model), 1),),
                answer_tokens=_ENDLESS,
                options=Options(num_ctx=num_ctx),
            )
            self._serving.occupy(job)

        self._do(take)

    def vacate(self) -> None:
        """End what `occupy` began."""
        self._do(self._serving.vacate)

    # ------------------------------------------------------------------ faults

    def inject(self, fault: Fault, **limits: Any) -> None:
        """
        Have something go wrong from now on.

        Args:
            fault: what.
            limits: ``times``, ``paths``, ``models``, ``probability``, as on the fault.
        """
        armed = replace(fault, **limits) if limits else fault

        def arm() -> None:
            self._serving.faults.arm(armed)
            if isinstance(armed, SlowFault):
                self._serving.slow_down(armed)
            if isinstance(armed, PsFault) and armed.shows == "stale":
                self._serving.keep_ps()

        self._do(arm)

    def clear_faults(self) -> None:
        """Be well again, and up after `flap`; requests already struck stay struck."""

        def clear() -> bool:
            self._serving.faults.clear()
            with self._serving.moment() as now:
                self._serving.api.server.slow_down(1.0, now)
            return self._end_flapping()

        if self._do(clear):
            self.revive()

    # ------------------------------------------------------------------ what is so

    @property
    def port(self) -> int:
        """Where it listens."""
        if self._listener is None:
            raise RuntimeError(f"node {self.id} has not been started")
        return self._listener.port

    @property
    def url(self) -> str:
        """Where it listens, as a URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        scheme = "http" if self._serving.tls is None else "https"
        return f"{scheme}://{host}:{self.port}"

    @property
    def requests(self) -> list[RequestRecord]:
        """What it was asked, oldest first."""
        return self._do(self._serving.records)

    @property
    def peaks(self) -> dict[str, int]:
        """The most requests that each model, as requests spell it, ever had at one time."""
        return self._do(lambda: dict(self._serving.peaks))

    @property
    def in_flight(self) -> int:
        """Requests it has not answered yet."""
        return self._do(lambda: self._serving.in_flight)

    @property
    def open_connections(self) -> int:
        """Connections clients hold, idle ones included."""
        return self._do(lambda: len(self._serving.connections))

    @property
    def loaded(self) -> dict[str, LoadedRunner]:
        """What is loaded, by the name ``/api/ps`` gives."""

        def running() -> list[LoadedRunner]:
            with self._serving.moment() as now:
                return self._serving.api.server.running(now)

        return {runner.model.parsed.short: runner for runner in self._do(running)}

    @property
    def loads(self) -> list[LoadRecord]:
        """Every load so far, on the node's simulated clock."""
        return self._do(lambda: self._serving.loads)

    @property
    def load_count(self) -> int:
        """How many loads there were so far."""
        return len(self.loads)

    @property
    def evictions(self) -> list[Eviction]:
        """Every runner that was unloaded, and why."""
        return self._do(lambda: self._serving.evictions)

    @property
    def vram_used_bytes(self) -> int:
        """What Ollama holds of the GPUs."""
        return self._do(lambda: self._serving.api.server.vram_used_bytes)

    @property
    def peak_vram_bytes(self) -> int:
        """The most it ever held."""
        return self._do(lambda: self._serving.peak_vram_bytes)

    def node(self, **overrides: Any) -> Node:
        """Give the `hydra_llm.Node` a user would configure for it."""
        from hydra_llm.types import Node

        total = sum(gpu.total_bytes for gpu in self.settings.gpus)
        fields: dict[str, Any] = {
            "url": self.url,
            "id": self.id,
            "vram_gb": total / GB if total else None,
            "vram_reserved_gb": sum(g.used_by_others_bytes for g in self.settings.gpus) / GB,
            "ram_gb": self.settings.ram_bytes / GB,
        }
        return Node(**(fields | overrides))

    # ------------------------------------------------------------------ inside

    def _rise(self, thread: Stage, listener: Port) -> None:
        thread.call(lambda: self._serving.rise(thread))
        listener.listen(thread, self._connection)

    def _connection(self) -> Connection:
        return Connection(self._serving)

    def _end_flapping(self) -> bool:
        timer, self._flapping = self._flapping, None
        if timer is not None:
            timer.cancel()
        return timer is not None

    def _do(self, function: Callable[[], _T]) -> _T:
        """Run on the thread that owns the state; where there is none, here."""
        return function() if self._thread is None else self._thread.call(function)

    def _installed(self, name: str) -> SimulatedModel:
        model = self._serving.find(name)
        if model is None:
            raise KeyError(f"node {self.id} has no model {name!r}")
        return model


def _model(model: str | SimulatedModel) -> SimulatedModel:
    if isinstance(model, SimulatedModel):
        return model
    known = known_models()
    return known.get(model) or SimulatedModel(model)
