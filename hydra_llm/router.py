"""Puts the rooms together: what every door calls to have a request routed."""

from __future__ import annotations

import asyncio
import html
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hydra_llm.cluster import (
    CORDONS_KEY,
    Cluster,
    CordonsFile,
    DroppedRequests,
    Keeping,
    RatesFile,
    RedisStore,
    Rules,
    Sharing,
    StoreError,
    Waiter,
    name_of,
)
from hydra_llm.config import HydraSettings
from hydra_llm.dispatch import Dispatch
from hydra_llm.events import Event, NodeDiscovered
from hydra_llm.exceptions import ConfigurationError, NoEligibleNodeError, NoNodeUpError
from hydra_llm.networks import read_network
from hydra_llm.ollama.calls import Call, Framing, Route
from hydra_llm.pools import Pools
from hydra_llm.probes.collector import Collector
from hydra_llm.resources import ModelFits, NodeResources, resources_of
from hydra_llm.scheduling import (
    Choice,
    CostTerm,
    Filter,
    Moment,
    Prices,
    Prospect,
    RoutingDecision,
    Scheduler,
)
from hydra_llm.scheduling.costs import alone_seconds, load_wait
from hydra_llm.scheduling.fitting import fits_of
from hydra_llm.scheduling.memory import context_of
from hydra_llm.types import (
    GB,
    NO_OPTIONS,
    Demand,
    InferenceRequest,
    Node,
    NodeSnapshot,
    Observation,
    Placement,
    RunnerOptions,
    canonical_model_name,
)
from hydra_llm.words import RoutingWords, read_words
from hydra_llm.world import World

if TYPE_CHECKING:
    from hydra_llm.calibration.log import DecisionLog
    from hydra_llm.discovery import Search, SearchResult
    from hydra_llm.discovery.watch import DiscoveryWatch

__all__ = ["Router", "RouterShare", "shared_router"]

log = logging.getLogger("hydra_llm")

DRAIN_LOOK_SECONDS = 0.05
"""Between two looks at a node that is being drained."""


class Router:
    """
    Knows the nodes, and decides which one a request goes to.

    ::

        with Router(["http://rig:11434", "http://gaming:11434"]) as router:
            print(router.explain("llama3.2").table())

    Nothing is started before it is first used: then one background thread asks the nodes
    how they are. One router serves any number of threads and event loops.

    Args:
        nodes: URLs or :class:`Node` objects; by default what the settings say.
        settings: everything else; by default from the environment and ``hydra.toml``.
        filters: further ``(request, node, moment) -> Rejection | None``.
        costs: further cost terms by name, ``(request, node, moment) -> seconds >= 0``.
        on_event: called with every :class:`hydra_llm.events.Event`, from any thread.
        on_decision: called with the :class:`RoutingDecision` of every finished request.
        clock: what time it is, in seconds that never go back.
        world: stands in for this machine and its network, as
            :class:`hydra_llm.testing.VirtualCluster` does; it has a clock of its own.

    Raises:
        ConfigurationError: a setting or a node is wrong.
    """

    def __init__(
        self,
        nodes: str | Node | Iterable[str | Node | Mapping[str, Any]] | None = None,
        *,
        settings: HydraSettings | None = None,
        filters: Iterable[Filter] = (),
        costs: Mapping[str, CostTerm] | None = None,
        on_event: Callable[[Event], None] | None = None,
        on_decision: Callable[[RoutingDecision], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        world: World | None = None,
    ) -> None:
        self.settings, self._configured = _settings_and_nodes(nodes, settings)
        self._world = world
        self._clock = clock = clock if world is None else world.clock
        self._wall_clock = time.time if world is None else world.wall_clock
        self._rng = random.Random(self.settings.random_seed)
        self._scheduler = Scheduler(filters=filters, costs=costs)
        self._prices = _prices(self.settings)
        self._on_event = on_event
        self._on_decision = on_decision
        self._cluster = Cluster(
            self._configured,
            self._place,
            clock=clock,
            rng=self._rng,
            rules=_rules(self.settings),
            on_event=self._handle_event,
        )
        path = self.settings.cordons_file
        self._cordons = None if path is None else CordonsFile(path)
        self._dropped = DroppedRequests()
        self._keeping = self._new_keeping()
        self._decision_log = self._new_decision_log()
        self._pools = Pools(verify=self.settings.verify, world=world)
        self._start_lock = threading.Lock()
        self._is_closed = False
        self._seen_by: Collector | None = None
        """The collector that has looked at every node once; another one has to, after more came."""
        self._process = os.getpid()
        self._retired: list[Collector] = []
        """Collectors of fewer nodes, whose threads may not have ended yet."""
        self._collector = self._new_collector()
        self._sharing = self._new_sharing()
        self._discovery = self._new_discovery()

    # --------------------------------------------------------------- life cycle

    def add_nodes(self, nodes: str | Node | Iterable[str | Node | Mapping[str, Any]]) -> None:
        """
        Take in further nodes; those known by their URL already stay as they are.

        Args:
            nodes: URLs, :class:`Node` objects or mappings of Node's arguments.

        Raises:
            ConfigurationError: a node is wrong, or has the id of another one.
        """
        nodes = nodes if isinstance(nodes, str | Node) else list(nodes)
        self._add(HydraSettings(nodes=nodes).nodes if nodes else ())

    def _add(self, given: Iterable[Node], *, wait: bool = True) -> tuple[Node, ...]:
        """Those of the nodes that were not known by their URL; requests may ``wait`` for them."""
        with self._start_lock:
            known = {node.url for node in self._configured}
            fresh = tuple(node for node in given if node.url not in known)
            if not fresh:
                return ()
            self._configured = HydraSettings(nodes=(*self._configured, *fresh)).nodes
            if self._sharing is not None:
                self._sharing.add_nodes(fresh)
            self._cluster.add_nodes(fresh)
            was_started = self._collector.is_started
            self._finalizer.detach()
            self._collector.stop(0.0)  # its thread ends when it can
            self._retired.append(self._collector)
            has_seen = self._seen_by is self._collector
            self._collector = self._new_collector()
            if has_seen and not wait:
                self._seen_by = self._collector
        if was_started:
            self._collector.start()
        return fresh

    def _new_collector(self) -> Collector:
        settings = self.settings
        # The thread must not keep a forgotten router alive; what keeps its rates does not either.
        observe = weakref.WeakMethod(self._cluster.observe)
        keeping = self._keeping

        def on_observation(seen: Observation) -> None:
            if keeping is not None:
                keeping.recall(seen.node_id)
            if (call := observe()) is not None:
                call(seen)

        collector = Collector(
            self._configured,
            on_observation,
            interval_seconds=settings.health_check_interval,
            timeout_seconds=settings.health_check_timeout,
            monitor_vram=settings.vram_monitoring,
            clock=self._clock,
            wall_clock=self._wall_clock,
            rng=random.Random(settings.random_seed),
            ssl_context=self._pools.ssl_context if _uses_tls(self._configured) else None,
            world=self._world,
        )
        collector.add_tick(_weakly(self._cluster.tick))
        if self._world is None:
            collector.add_tick(_weakly(self._look_for_dropped))
        collector.add_tick(_weakly(self._look_for_cordons))
        collector.add_tick(_weakly(self._pools.close_dropped))
        if keeping is not None:
            collector.add_tick(keeping.tick)
        if self._decision_log is not None:
            collector.add_tick(self._decision_log.write)
        self._finalizer = weakref.finalize(self, collector.stop)
        return collector

    def _new_keeping(self) -> Keeping | None:
        path = self.settings.rates_file
        if path is None:
            return None
        keeping = Keeping(
            RatesFile(path), self._cluster, clock=self._clock, wall_clock=self._wall_clock
        )
        # At the interpreter's end nobody may have closed the router.
        weakref.finalize(self, keeping.write)
        return keeping

    def _new_decision_log(self) -> DecisionLog | None:
        path = self.settings.decision_log
        if path is None:
            return None
        from hydra_llm.calibration.log import DecisionLog

        decisions = DecisionLog(path, wall_clock=self._wall_clock)
        weakref.finalize(self, decisions.write)
        return decisions

    def _new_sharing(self) -> Sharing | None:
        if self.settings.redis_url is None:
            return None
        url = self.settings.redis_url.get_secret_value()
        RedisStore(url).close()  # what is wrong with the setting is told now
        # Its thread must not keep a forgotten router alive either.
        refresh = weakref.WeakMethod(self._refresh)
        sharing = Sharing(
            lambda: RedisStore(url),
            self._cluster,
            self._configured,
            refresh=lambda node_id: (call := refresh()) and call(node_id),
            clock=self._clock,
        )
        weakref.finalize(self, sharing.stop)
        return sharing

    def _new_discovery(self) -> DiscoveryWatch | None:
        settings = self.settings
        if not settings.discovery_enabled:
            return None
        # Imported where it is wanted, which is hardly anywhere.
        from hydra_llm.discovery import Search
        from hydra_llm.discovery.watch import DiscoveryWatch

        networks = [read_network(text) for text in settings.discovery_networks]
        # Its thread must not keep a forgotten router alive.
        configured = weakref.WeakMethod(self._configured_now)
        take_in = weakref.WeakMethod(self._take_in)

        def plan() -> Search | None:
            call = configured()
            return call and Search(
                networks=networks,
                ports=settings.discovery_ports,
                known=call(),
                timeout_seconds=settings.discovery_timeout,
            )

        watch = DiscoveryWatch(
            plan,
            lambda result: (call := take_in()) and call(result),
            interval_seconds=settings.discovery_interval,
        )
        weakref.finalize(self, watch.stop)
        return watch

    def _configured_now(self) -> tuple[Node, ...]:
        return self._configured

    def _take_in(self, result: SearchResult) -> None:
        """Add what a search has found, if it is certainly none of the nodes that are there."""
        taken = {node.id for node in self._configured}
        fresh = {
            found.url: found
            for found in result.found
            if not found.known and not found.perhaps_same_as and found.node().id not in taken
        }
        if self._is_closed or not fresh:
            return
        # Requests go on among the others until the first probe has come back.
        for node in self._add((found.node() for found in fresh.values()), wait=False):
            self._handle_event(
                NodeDiscovered(
                    at=self._clock(),
                    node_id=node.id,
                    url=node.url,
                    version=fresh[node.url].version,
                    exporter=node.exporter,
                )
            )

    def start(self) -> None:
        """Begin to ask the nodes how they are; done by itself at the first use."""
        if self._is_closed:
            raise ConfigurationError("this router is closed; make a new one")
        if self._process != os.getpid():
            with self._start_lock:
                if self._process != os.getpid():
                    self._process = os.getpid()
                    self._seen_by = None
        self._collector.start()
        if self._sharing is not None:
            self._sharing.start()
        if self._discovery is not None:
            self._discovery.start()

    def wait_until_seen(self) -> None:
        """Have every node looked at once; later calls return at once."""
        # Where nodes are added meanwhile, their collector has to look first.
        while self._seen_by is not self._collector or self._process != os.getpid():
            self.start()
            collector = self._collector
            collector.wait_first(self.settings.health_check_timeout + 0.5)
            if self._sharing is not None:
                self._sharing.catch_up()
            self._look_for_cordons()
            self._seen_by = collector

    async def await_until_seen(self) -> None:
        """As :meth:`wait_until_seen`, without blocking the event loop."""
        while self._seen_by is not self._collector or self._process != os.getpid():
            self.start()
            collector = self._collector
            await collector.await_first(self.settings.health_check_timeout + 0.5)
            if self._sharing is not None:
                await self._sharing.acatch_up()
            self._look_for_cordons()
            self._seen_by = collector

    def close(self) -> None:
        """Stop the background thread and close all connections. Safe to call twice."""
        self._is_closed = True
        self._finalizer.detach()
        self._stop_threads()
        self._pools.close()

    def _stop_threads(self) -> None:
        if self._discovery is not None:
            self._discovery.stop()  # first: it makes collectors
        for collector in (*self._retired, self._collector):
            collector.stop()
        if self._sharing is not None:
            self._sharing.stop()
        if self._keeping is not None:
            self._keeping.write()
        if self._decision_log is not None:
            self._decision_log.write()

    async def aclose(self) -> None:
        """As :meth:`close`, from an event loop."""
        self._is_closed = True
        self._finalizer.detach()
        if self._world is None:
            await asyncio.to_thread(self._stop_threads)
        else:
            self._stop_threads()  # there are none to wait for
            for collector in (*self._retired, self._collector):
                await collector.astop()
        await self._pools.aclose()

    def __enter__(self) -> Router:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Router:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    # ------------------------------------------------------------------ looking

    @property
    def configured(self) -> tuple[Node, ...]:
        """The nodes, as configured; nobody is asked."""
        return self._configured

    def nodes(self) -> tuple[NodeSnapshot, ...]:
        """Every configured node as last seen."""
        self.wait_until_seen()
        return self._cluster.nodes()

    def refresh(self, *, timeout: float | None = None) -> tuple[NodeSnapshot, ...]:
        """Ask all nodes now, wait for them (``timeout`` seconds at most) and return them."""
        self.wait_until_seen()
        limit = self.settings.health_check_timeout + 0.5 if timeout is None else timeout
        self._collector.refresh_and_wait(timeout_seconds=limit)
        return self._cluster.nodes()

    def explain(
        self,
        model: str,
        *,
        num_ctx: int | None = None,
        input_tokens: int = 0,
        among: Iterable[str] | None = None,
        **routing: Any,
    ) -> RoutingDecision:
        """
        Where a request would go now, and why; nothing is sent.

        Args:
            model: the model's name.
            num_ctx: as the request's option of that name.
            input_tokens: length of the prompt.
            among: ids of the only nodes that may serve it; all by default.
            routing: routing words, e.g. ``min_vram_gb=20``.

        Returns:
            The decision; its ``selected_node`` is None if nobody could take the request.

        Raises:
            RoutingWordError: a word is misspelt or its value is wrong.
        """
        self.wait_until_seen()
        words = read_words(routing)
        options = NO_OPTIONS if num_ctx is None else RunnerOptions(num_ctx=num_ctx)
        call = Call(
            method="POST",
            path="/api/chat",
            route=Route.INFERENCE,
            framing=Framing.JSON,
            native=True,
            generates=True,
            model=model,
            options=options,
            input_tokens=input_tokens,
        )
        request = Dispatch(self, call, words, b"", among=among).request
        try:
            placement = self._cluster.preview(request)
        except NoEligibleNodeError as refusal:
            return RoutingDecision(model=model, requested_node=words.node_id, refusal=refusal)
        assert isinstance(placement.choice, Choice)
        return RoutingDecision(model=model, requested_node=words.node_id, choice=placement.choice)

    def get_node_resources(self) -> NodeResources:
        """
        Every node's state as plain data; what is unknown is None.

        Memory is in decimal GB, ages in seconds. In a notebook the list shows as a table.
        """
        nodes, now = self.nodes(), self._clock()
        return NodeResources(resources_of(node, now) for node in nodes)

    def get_model_info(
        self, model: str, *, num_ctx: int | None = None, **routing: Any
    ) -> dict[str, Any] | None:
        """
        What is known of one model on the nodes that are up and may be used for it.

        Args:
            model: the model's name.
            num_ctx: as the request's option of that name.
            routing: routing words; ``exclude_nodes`` and ``require_labels`` leave nodes out,
                ``node_id`` with ``pin="require"`` leaves one.

        Returns:
            Plain data, or None if none of these nodes has the model. ``context_length`` is what
            the model was trained with, ``usable_context_length`` the smallest that a request
            can be sure of on these nodes, both in tokens; ``capabilities`` are those that it
            has on any of them. What nobody told is None.

        Raises:
            RoutingWordError: a word is misspelt or its value is wrong.
        """
        self.wait_until_seen()
        words = read_words(routing)
        name = canonical_model_name(model)
        nodes = [n for n in self._allowed(words) if name in n.installed]
        if not nodes:
            return None
        told = [n.installed[name] for n in nodes]
        trained = [m.context_length for m in told if m.context_length]
        known = [m.capabilities for m in told if m.capabilities is not None]
        return {
            "name": name,
            "nodes": [n.id for n in nodes],
            "loaded_on": [n.id for n in nodes if name in n.loaded],
            "capabilities": sorted(frozenset().union(*known)) if known else None,
            "context_length": min(trained, default=None),
            "usable_context_length": min(context_of(n, name, num_ctx) for n in nodes),
        }

    def fit(self, model: str, *, num_ctx: int | None = None) -> ModelFits:
        """
        Where a model could run, and with how much context.

        ::

            print(router.fit("llama3.3:70b", num_ctx=16_384))

        Args:
            model: the model's name.
            num_ctx: tokens of context; what each node would take by itself if None.

        Returns:
            A dictionary a node, memory in decimal GB. Of a node that is up, and if any node has
            the model: ``verdict`` (``loaded``, ``loading``, ``fits``, ``evicts``, ``offloads``,
            ``cannot``, ``unknown``), ``num_ctx`` it would have, ``need_gb`` between
            ``need_low_gb`` and ``need_high_gb``, ``free_gb``, the models that it ``evicts``,
            ``cpu_share`` in system memory, ``tokens_per_second`` of one answer alone, and
            ``largest_num_ctx`` that is on the GPUs as a whole (None: none, or unknown). What is
            ``installed`` elsewhere only is judged by what is told of it there. It shows as a
            table in a notebook and when printed.
        """
        self.wait_until_seen()
        return ModelFits(
            fits_of(
                canonical_model_name(model),
                self._cluster.nodes(),
                num_ctx=num_ctx,
                prices=self._prices,
                now=self._clock(),
            )
        )

    def _allowed(self, words: RoutingWords) -> list[NodeSnapshot]:
        """The nodes that are up and that the caller's words do not rule out."""
        return [
            node
            for node in self._cluster.nodes()
            if node.health == "up"
            and not any(node.node.answers_to(name) for name in words.exclude_nodes)
            and set(words.require_labels) <= set(node.node.labels)
            and (
                words.node_id is None
                or words.pin != "require"
                or node.node.answers_to(words.node_id)
            )
        ]

    @property
    def in_flight(self) -> int:
        """Requests that are on some node now."""
        return self._cluster.in_flight

    @property
    def waiting(self) -> int:
        """Requests that wait in the router for a free slot."""
        return self._cluster.waiting

    @property
    def is_in_panic(self) -> bool:
        """
        Whether nodes are used although they fail, because more than half of all would be out.

        Only what is inferred from failing requests counts: a node that is down is down.
        """
        return self._cluster.is_in_panic

    def cordon(self, node_id: str, *, for_all: bool = False) -> None:
        """
        Send no new requests to a node; those under way go on.

        Args:
            node_id: its id, host or URL.
            for_all: have the other routers of this user on this machine, and all that share
                the same Redis, obey too; within a second or two, and those that start later.

        Raises:
            ConfigurationError: there is no such node, or nothing that the others look at.
        """
        node = self._node_named(node_id)
        if for_all:
            self._tell_all(node, cordoned=True)
        else:
            self._cluster.set_cordoned(node.id, True)

    def uncordon(self, node_id: str, *, for_all: bool = False) -> None:
        """
        Let requests come to a node again. Arguments as for :meth:`cordon`.

        What is cordoned for all routers has to be uncordoned for all.
        """
        node = self._node_named(node_id)
        if for_all:
            self._tell_all(node, cordoned=False)
        self._cluster.set_cordoned(node.id, False)

    def drain(self, node_id: str, *, timeout: float | None = None, for_all: bool = False) -> bool:
        """
        Cordon a node, and wait until nothing of ours is under way there.

        Counted are this router's requests and those of routers that share its Redis.

        Args:
            node_id: its id, host or URL.
            timeout: seconds to wait at most; None waits for as long as it takes.
            for_all: as for :meth:`cordon`.

        Returns:
            Whether the node is idle. It stays cordoned either way.
        """
        node = self._drained(node_id, for_all=for_all)
        ends = None if timeout is None else time.monotonic() + timeout
        while self._cluster.in_flight_on(node.id):
            if ends is not None and time.monotonic() >= ends:
                return False
            time.sleep(DRAIN_LOOK_SECONDS)
        return True

    async def adrain(
        self, node_id: str, *, timeout: float | None = None, for_all: bool = False
    ) -> bool:
        """As :meth:`drain`, without blocking the event loop."""
        node = self._drained(node_id, for_all=for_all)
        ends = None if timeout is None else time.monotonic() + timeout
        while self._cluster.in_flight_on(node.id):
            if ends is not None and time.monotonic() >= ends:
                return False
            await asyncio.sleep(DRAIN_LOOK_SECONDS)
        return True

    def _drained(self, node_id: str, *, for_all: bool) -> Node:
        node = self._node_named(node_id)
        self._cluster.set_cordoned(node.id, True)
        if for_all:
            self._tell_all(node, cordoned=True)
        return node

    def _tell_all(self, node: Node, *, cordoned: bool) -> None:
        file, url = self._cordons, self.settings.redis_url
        if file is None and url is None:
            raise ConfigurationError(
                "nowhere to tell other routers: this user has no home; set state_dir or redis_url"
            )
        try:
            if file is not None:
                file.change(node.url, cordoned=cordoned)
            if url is not None:
                store = RedisStore(url.get_secret_value())
                try:
                    store.cordon(CORDONS_KEY, name_of(node), cordoned=cordoned)
                finally:
                    store.close()
        except (OSError, ValueError, StoreError) as exc:
            raise ConfigurationError(f"other routers cannot be told of {node.id}: {exc}") from exc
        self._look_for_cordons()

    def _look_for_dropped(self) -> None:
        self._dropped.look(self._cluster, self._clock())

    def _look_for_cordons(self) -> None:
        if self._cordons is not None:
            urls = self._cordons.read()
            ids = {node.id for node in self._configured if node.url in urls}
            self._cluster.set_cordons("file", ids)

    def _node_named(self, name: str) -> Node:
        for node in self._configured:
            if node.answers_to(name):
                return node
        known = ", ".join(node.id for node in self._configured)
        raise ConfigurationError(f"no configured node is called {name!r}; there are {known}")

    # ------------------------------------------------------------------ routing

    def _place(
        self,
        request: InferenceRequest,
        nodes: Sequence[NodeSnapshot],
        demand: Mapping[str, Demand],
        now: float,
        queue_ahead: int,
    ) -> Placement:
        """The scheduler's choice, as the ledger wants it."""
        moment = Moment(now=now, demand=demand, queue_ahead=queue_ahead, prices=self._prices)
        choice = self._scheduler.schedule(request, nodes, moment, self._rng)
        request, node = choice.request, choice.selected
        fit = moment.fit(request, node)
        loaded = node.loaded.get(request.model)
        causes_load = fit.verdict not in ("loaded", "loading")
        load_seconds = load_wait(request, node, moment) if causes_load else 0.0
        if fit.verdict == "loaded" and loaded is not None:
            context = loaded.context_length
        else:
            context = request.options.num_ctx
        return Placement(
            node_id=node.node.id,
            has_room=choice.has_room,
            causes_load=causes_load,
            load_seconds=load_seconds,
            expected_seconds=alone_seconds(request, node, moment),
            reserved_bytes=fit.reserved_bytes if causes_load else 0,
            size_bytes=fit.need_bytes if causes_load else 0,
            evicts=frozenset(fit.victims) if causes_load else frozenset(),
            options=request.options,
            context_length=context,
            choice=choice,
        )

    def _prospect(self, waiter: Waiter) -> Prospect | None:
        """By what could be foreseen of a request when it joined the line."""
        seen = waiter.seen
        if seen is None:
            return None
        moment = Moment(
            now=seen.now, demand=seen.demand, queue_ahead=seen.queue_ahead, prices=self._prices
        )
        return Prospect(self._scheduler, waiter.request, seen.nodes, moment)

    def _refresh(self, node_id: str) -> None:
        self._collector.refresh([node_id])

    def _decided(self, dispatch: Dispatch) -> None:
        if self._decision_log is not None:
            self._decision_log.add(dispatch.decision(), dispatch.words.priority)
        if self._on_decision is not None:
            self._on_decision(dispatch.decision())

    def _handle_event(self, event: Event) -> None:
        log.info("%s", event)
        if self._on_event is not None:
            self._on_event(event)

    def _nodes_in_order(self, call: Call, words: RoutingWords) -> list[Node]:
        """
        Nodes to ask about something that needs no scheduling, best first.

        Raises:
            NoEligibleNodeError: no node is up, or none has the model.
        """
        if words.node_id is not None:
            return [self._node_named(words.node_id)]
        nodes = self._allowed(words)
        if call.model:
            name = canonical_model_name(call.model)
            # A model that nobody is known to have may still be known to Ollama (an alias).
            nodes = [n for n in nodes if name in n.installed] or nodes
        nodes.sort(key=lambda n: (not n.node.local, len(n.running)))
        if not nodes:
            count = len(self._configured)
            raise NoNodeUpError(f"0/{count} nodes are up", model=call.model, rejections=())
        return [n.node for n in nodes]

    # ------------------------------------------------------------------- looks

    def _repr_html_(self) -> str:
        """The nodes as last seen, for notebooks; nothing is started to show it."""
        now = self._clock()
        nodes = NodeResources(resources_of(node, now) for node in self._cluster.nodes())
        return f"<p>{html.escape(repr(self)[1:-1])}</p>{nodes._repr_html_()}"

    def __repr__(self) -> str:
        nodes = self._cluster.nodes()
        up = sum(1 for node in nodes if node.health == "up")
        unseen = sum(1 for node in nodes if node.health == "unknown")
        parts = [f"{up} node{'s' if up != 1 else ''} up"]
        if len(nodes) - up - unseen:
            parts.append(f"{len(nodes) - up - unseen} down")
        if unseen:
            parts.append(f"{unseen} not seen yet")
        state = ", ".join(parts) + f" | {self.in_flight} in flight"
        if self.waiting:
            state += f", {self.waiting} waiting"
        return f"<Router [{state}{' | closed' if self._is_closed else ''}]>"


# ------------------------------------------------------------------------- helpers


def _settings_and_nodes(
    nodes: str | Node | Iterable[str | Node | Mapping[str, Any]] | None,
    settings: HydraSettings | None,
) -> tuple[HydraSettings, tuple[Node, ...]]:
    if nodes is None:
        settings = settings or HydraSettings()
        return settings, settings.nodes
    named = HydraSettings(nodes=nodes)
    if settings is not None:
        named = settings.model_copy(update={"nodes": named.nodes})
    return named, named.nodes


def _weakly(method: Callable[[], object]) -> Callable[[], object]:
    """As the method, without keeping its object alive; nothing once that is gone."""
    held = weakref.WeakMethod(method)
    return lambda: (call := held()) and call()


def _uses_tls(nodes: Sequence[Node]) -> bool:
    return any(node.uses_tls for node in nodes)


def _prices(settings: HydraSettings) -> Prices:
    return Prices(
        prefer_local_seconds=settings.prefer_local_seconds,
        prefer_label_seconds=settings.prefer_label_seconds,
        assumed_ram_bytes=int(settings.assumed_ram_gb * GB),
        default_output_tokens=settings.default_output_tokens,
    )


def _rules(settings: HydraSettings) -> Rules:
    return Rules(
        default_output_tokens=settings.default_output_tokens,
        breaker_failures=settings.breaker_failures,
        breaker_open_seconds=settings.breaker_open_seconds,
        breaker_max_open_seconds=settings.breaker_max_open_seconds,
        slow_start_seconds=settings.slow_start_seconds,
        retry_ratio=settings.retry_ratio,
        retry_floor=settings.retry_floor,
        lease_ttl=settings.lease_ttl,
        max_queue=settings.max_queue,
        queue_timeout=settings.queue_timeout,
    )


# ------------------------------------------------------------------ shared routers

_shared_lock = threading.Lock()
_shared: dict[tuple[object, ...], tuple[Router, int]] = {}


class RouterShare:
    """One holder's part in a shared router; give it back with :meth:`close`."""

    def __init__(self, key: tuple[object, ...], router: Router) -> None:
        self.router = router
        self._finalizer = weakref.finalize(self, _close_share, key)
        self._key = key

    def close(self) -> None:
        """Close the router if this was its last holder. Safe to call twice."""
        self._finalizer()

    async def aclose(self) -> None:
        """As :meth:`close`, from an event loop."""
        if self._finalizer.detach() is not None:
            router = _give_back(self._key)
            if router is not None:
                await router.aclose()


def _close_share(key: tuple[object, ...]) -> None:
    router = _give_back(key)
    if router is not None:
        router.close()


def _give_back(key: tuple[object, ...]) -> Router | None:
    """The router, if nobody holds it any more."""
    with _shared_lock:
        router, holders = _shared[key]
        if holders > 1:
            _shared[key] = (router, holders - 1)
            return None
        del _shared[key]
        return router


def share_of(router: Router) -> RouterShare | None:
    """A further part in a router that is shared already; None for one that somebody made."""
    with _shared_lock:
        for key, (held, holders) in _shared.items():
            if held is router:
                _shared[key] = (held, holders + 1)
                return RouterShare(key, held)
    return None


def shared_router(
    nodes: str | Node | Iterable[str | Node | Mapping[str, Any]] | None = None,
    *,
    settings: HydraSettings | None = None,
) -> RouterShare:
    """
    The process's router for these nodes: clients of the same nodes share one ledger.

    Without one they would count each other's requests for nothing. The last holder to
    give it back closes it.
    """
    settings, configured = _settings_and_nodes(nodes, settings)
    key = (os.getpid(), configured, settings)
    with _shared_lock:
        held = _shared.get(key)
        if held is None:
            held = (Router(configured, settings=settings), 0)
        _shared[key] = (held[0], held[1] + 1)
    return RouterShare(key, held[0])
