"""Frozen records that every other room speaks in.

Memory is in bytes, time in seconds of one monotonic clock, unless a name says otherwise.
Unknown is ``None``, never zero.
"""

from __future__ import annotations

import base64
import math
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from hydra_llm.exceptions import ConfigurationError
from hydra_llm.vram.cards import usual_bandwidth, usual_size
from hydra_llm.vram.layers import KV_BYTES
from hydra_llm.vram.loading import DEFAULT_KEEP_ALIVE_SECONDS
from hydra_llm.vram.shape import ModelShape

__all__ = [
    "Attempt",
    "Candidate",
    "Demand",
    "Device",
    "DeviceProcess",
    "Health",
    "HostMemory",
    "InferenceRequest",
    "InstalledModel",
    "LoadedModel",
    "Node",
    "NodeSnapshot",
    "Observation",
    "Rejection",
    "RunnerOptions",
    "RunningRequest",
    "Speed",
    "canonical_model_name",
]

GB = 1_000_000_000
"""Decimal gigabyte: the unit of ``vram_gb`` and ``min_vram_gb``, as on a card's box."""

DEFAULT_PORT = 11434

PENALTY_HALF_LIFE_SECONDS = 10.0

DEMAND_MEMORY_SECONDS = 300.0
"""How long an arrival counts towards a model's rate (time constant)."""

MIN_COUNTED_SECONDS = 10.0
"""A request in the first second is not yet one a second."""

RESIDUAL_SHARE = 0.8
"""What of an answer's expected length is at least still to come, however much has come already: the
mean residual life of a log-normal distribution with a sigma of 0.8 is 0.8 to 1.1 of its mean."""


Health = Literal["unknown", "up", "down", "misconfigured"]
"""What probes say of a node; ``misconfigured`` wants other credentials or is no Ollama."""


# --------------------------------------------------------------------------- nodes


@dataclass(frozen=True, slots=True)
class Node:
    """
    One Ollama server, as configured.

    ::

        Node("http://rig:11434", id="rig", vram_gb=24, labels=("fast",))

    Args:
        url: where it listens. A bare host gets port 11434, as Ollama's own client does;
            ``user:password@`` becomes an ``Authorization`` header and leaves the URL.
        id: its name in answers, logs and ``node_id``; by default ``host:port``.
        vram_gb: memory of its GPUs in decimal GB, for a node that nothing measures.
        vram_reserved_gb: of ``vram_gb``, what other programs hold (a desktop, a game).
        ram_gb: its system memory in decimal GB.
        exporter: URL of a metrics exporter on the node, which tells its GPUs' memory: one of
            NVIDIA's, AMD's or Intel's, or ``hydra-llm agent``. Without a path it is asked for
            ``/metrics``; ``user:password@`` becomes a header and leaves the URL.
        labels: free words for ``require_labels`` and ``prefer_labels``.
        headers: sent to this node and to no other, e.g. ``{"Authorization": "Bearer ..."}``.
        local: whether it is this machine; found from the host name when not given.
        slots: its ``OLLAMA_NUM_PARALLEL``; learned when not given.
        kv_cache_type: its ``OLLAMA_KV_CACHE_TYPE``; ``f16`` is what Ollama takes by itself.
        max_loaded_models: its ``OLLAMA_MAX_LOADED_MODELS``; three for each GPU when not given.
        exporter_headers: sent to the exporter and to nobody else, e.g. the agent's token as
            ``{"Authorization": "Bearer ..."}``.

    Raises:
        ConfigurationError: for a malformed URL or a figure that cannot be.
    """

    url: str
    id: str = ""
    vram_gb: float | None = None
    vram_reserved_gb: float = 0.0
    ram_gb: float | None = None
    exporter: str | None = None
    labels: tuple[str, ...] = ()
    headers: Mapping[str, str] | None = None
    local: bool | None = None
    slots: int | None = None
    exporter_headers: Mapping[str, str] | None = None
    kv_cache_type: str | None = None
    max_loaded_models: int | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        url, authorization = _parse_url(self.url)
        put(self, "url", url)
        put(self, "headers", _with_authorization(self.headers, authorization))
        # An empty text is what a form or a variable has for none.
        exporter, authorization = _parse_exporter(self.exporter) if self.exporter else (None, None)
        put(self, "exporter", exporter)
        put(self, "exporter_headers", _with_authorization(self.exporter_headers, authorization))
        put(self, "id", self.id or urlsplit(url).netloc)
        labels: Iterable[str] = (self.labels,) if isinstance(self.labels, str) else self.labels
        put(self, "labels", tuple(labels))
        if self.local is None:
            put(self, "local", _is_this_machine(self.host))
        for name in ("vram_gb", "vram_reserved_gb", "ram_gb"):
            value = getattr(self, name)
            # `not >=` also catches NaN.
            if value is not None and (not value >= 0 or value == float("inf")):
                raise ConfigurationError(
                    f"node {self.id!r}: {name} must be a number of decimal GB, not {value!r}"
                )
        for name in ("slots", "max_loaded_models"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"node {self.id!r}: {name} must be at least 1")
        if self.kv_cache_type is not None and self.kv_cache_type not in KV_BYTES:
            raise ConfigurationError(
                f"node {self.id!r}: kv_cache_type must be one of {', '.join(KV_BYTES)}, "
                f"not {self.kv_cache_type!r}"
            )

    @property
    def host(self) -> str:
        """The host name or address, without port."""
        return urlsplit(self.url).hostname or ""

    @property
    def uses_tls(self) -> bool:
        """Whether it, or its exporter, is asked by https."""
        return any((url or "").startswith("https:") for url in (self.url, self.exporter))

    def answers_to(self, name: str) -> bool:
        """Whether ``name`` is this node's id, host, host:port or URL."""
        return name == self.id or _names_node(name, self.id, self.url)

    def __repr__(self) -> str:
        parts = [repr(self.url)]
        if self.id != urlsplit(self.url).netloc:
            parts.append(f"id={self.id!r}")
        if self.exporter:
            parts.append(f"exporter={self.exporter!r}")
        parts += [
            f"{name}={value!r}"
            for name in (
                *("vram_gb", "vram_reserved_gb", "ram_gb", "labels", "headers"),
                *("slots", "exporter_headers"),
            )
            if (value := getattr(self, name))
        ]
        return f"Node({', '.join(parts)})"


@lru_cache(maxsize=4096)
def _names_node(name: str, node_id: str, url: str) -> bool:
    wanted = name.strip().lower().rstrip("/")
    split = urlsplit(url)
    if wanted in (node_id.lower(), split.hostname, split.netloc.lower(), url.lower()):
        return True
    if "://" not in wanted:
        return False
    try:
        return _parse_url(wanted)[0].lower() == url.lower()
    except ConfigurationError:
        return False


class _Secrets(Mapping[str, str]):
    """Headers whose values never show in a repr."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> str:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{name!r}: '***'" for name in self._values) + "}"


class _ExporterUrl(str):
    """A URL whose query, which may hold a token, never shows in a repr."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(re.sub("[?].*", "?***", self))


def _with_authorization(headers: Mapping[str, str] | None, authorization: str | None) -> _Secrets:
    """The headers, and what a URL's userinfo stood for unless they say something else."""
    known = dict(headers or {})
    if authorization and not any(name.lower() == "authorization" for name in known):
        known["Authorization"] = authorization
    return _Secrets(known)


def masked_url(url: str) -> str:
    """``url`` without anything that could be part of a password, well formed or not."""
    if "@" not in url:
        return url
    return re.sub(r"^([a-zA-Z][a-zA-Z0-9+.-]*://|).*@", r"\1***@", url, flags=re.DOTALL)


def _parse_url(text: str) -> tuple[str, str | None]:
    """The node's base URL and the Authorization header its userinfo stood for.

    Ports follow the ``ollama`` package: 11434 without a scheme, else the scheme's own.
    """
    split = _split_url(text, "a node URL", "http://rig:11434", default_port=DEFAULT_PORT)
    if split.query or split.fragment:
        raise split.bad("a query or fragment has no place in it")
    return f"{split.base}{split.path.rstrip('/')}", split.authorization


def _parse_exporter(text: str) -> tuple[str, str | None]:
    """The URL of an exporter's page and the Authorization header its userinfo stood for."""
    split = _split_url(text, "an exporter URL", "http://rig:9400", default_port=None)
    query = f"?{split.query}" if split.query else ""
    url = _ExporterUrl(f"{split.base}{split.path.rstrip('/') or '/metrics'}{query}")
    return url, split.authorization


class _SplitUrl(NamedTuple):
    base: str
    """Scheme, host and port."""
    path: str
    query: str
    fragment: str
    authorization: str | None
    bad: Callable[[str], ConfigurationError]
    """Makes the error that says what is wrong with it."""


def _split_url(text: str, what: str, example: str, *, default_port: int | None) -> _SplitUrl:
    """
    The parts of a URL, checked.

    ``default_port`` is that of a host without scheme; None: it has to be there.
    """
    shown = masked_url(str(text))

    def bad(why: str) -> ConfigurationError:
        return ConfigurationError(f"{shown!r} is not {what}: {why}; write it like {example!r}")

    if not isinstance(text, str) or not text.strip():
        raise bad("it is empty")
    text = text.strip()
    has_scheme = "://" in text
    try:
        split = urlsplit(text if has_scheme else f"http://{text}")
        port = split.port
    except ValueError:
        raise bad("its host or port cannot be read") from None
    if split.scheme not in ("http", "https"):
        raise bad(f"the scheme {split.scheme!r} is neither http nor https")
    is_port_alone = default_port is not None and not has_scheme and text.startswith(":")
    host = split.hostname or ("127.0.0.1" if is_port_alone else "")
    if not host or re.search(r"[\s%<>\\^`{|}\"']", host):
        raise bad("it names no host")
    if port == 0:
        raise bad("port 0 does not exist")
    if port is None:
        port = {"http": 80, "https": 443}[split.scheme] if has_scheme else default_port
    if port is None:
        raise bad("it names no port")
    # OLLAMA_HOST=0.0.0.0 is what a server listens on; a client has to call an address.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    host = f"[{host}]" if ":" in host else host
    authorization = None
    if split.username is not None:
        pair = f"{unquote(split.username)}:{unquote(split.password or '')}"
        authorization = "Basic " + base64.b64encode(pair.encode()).decode()
    return _SplitUrl(
        base=f"{split.scheme}://{host}:{port}",
        path=quote(unquote(split.path), safe="/-._~"),
        query=split.query,
        fragment=split.fragment,
        authorization=authorization,
        bad=bad,
    )


@lru_cache(maxsize=256)
def _is_this_machine(host: str) -> bool:
    if host in ("localhost", "::1") or host.startswith("127.") or host.endswith(".localhost"):
        return True
    own = platform.node().lower()
    return host in (own, f"{own}.local", own.partition(".")[0])


# -------------------------------------------------------------------------- models


@lru_cache(maxsize=4096)
def canonical_model_name(name: str) -> str:
    """
    One name for all the forms of a model's name.

    ``llama3``, ``LLAMA3:latest`` and ``registry.ollama.ai/library/llama3:latest`` are one
    model to Ollama (recorded scenario ``model-name-forms``).
    """
    name = name.strip().lower()
    name = name.removeprefix("https://").removeprefix("http://")
    name = name.removeprefix("registry.ollama.ai/").removeprefix("library/")
    if ":" not in name.rpartition("/")[2]:
        name += ":latest"
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOptions:
    """
    The options of a request that make Ollama restart a runner when they differ.

    ``None`` means that the caller said nothing. Source: the recorded scenario
    ``reload-triggers`` of both versions.
    """

    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    num_thread: int | None = None
    use_mmap: bool | None = None


NO_OPTIONS = RunnerOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledModel:
    """A model on a node's disk, from ``/api/tags`` and, once known, ``/api/show``."""

    name: str
    digest: str = ""
    size_bytes: int = 0
    """Sum of the model's files: weights, projector, template."""
    capabilities: frozenset[str] | None = None
    """``completion``, ``tools``, ``thinking``, ``vision``, ``embedding``, ``insert``; None on
    an old server that does not say."""
    context_length: int | None = None
    """The context it was trained with; Ollama clamps ``num_ctx`` to it."""
    shape: ModelShape | None = None
    """What decides how much memory it takes; None until ``/api/show`` has told."""
    weights_file: str = ""
    """The name of its weights' file, by which Ollama picks among models to unload."""


WHOLE_SHARE = 0.995
"""A runner with this much of it on GPUs lies there as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A runner, as ``/api/ps`` shows it."""

    name: str
    digest: str = ""
    size_bytes: int = 0
    size_vram_bytes: int = 0
    context_length: int | None = None
    """Context per slot: what a request's ``num_ctx`` is compared with."""
    expires_at: float | None = None
    """Unix time at which it will be unloaded if idle; stale while it generates."""
    keep_alive_seconds: float | None = None
    """How long it stays when idle, as far as ``expires_at`` has shown; infinite: for ever."""
    options: RunnerOptions = NO_OPTIONS
    """What this router knows of the options it was started with."""

    @property
    def gpu_share(self) -> float:
        """The part of it that lies in GPU memory, 0 to 1."""
        return min(1.0, self.size_vram_bytes / self.size_bytes) if self.size_bytes else 0.0

    @property
    def is_on_gpu(self) -> bool:
        """Whether it is there as a whole, as far as rounding tells."""
        return self.gpu_share >= WHOLE_SHARE


# -------------------------------------------------------------------------- memory


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProcess:
    """What one program holds of a device's memory."""

    pid: int
    name: str = ""
    """The program's name without path and arguments, as far as the system tells it."""
    owner: Literal["ollama", "other"] = "other"
    used_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Memory of one GPU (or MIG instance, or unified pool), as one source reported it."""

    key: str
    vendor: str
    kind: Literal["discrete", "mig", "unified"] = "discrete"
    total_bytes: int | None = None
    used_bytes: int | None = None
    free_bytes: int | None = None
    reserved_bytes: int | None = None
    utilization: float | None = None
    """Busy share, 0 to 1: a hint, and not told by MIG instances."""
    processes: tuple[DeviceProcess, ...] | None = None
    """Who holds its memory; None where the driver or the exporter does not tell."""
    name: str = ""
    source: str = ""
    observed_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """System memory of a node."""

    total_bytes: int | None = None
    available_bytes: int | None = None
    source: str = ""
    observed_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """
    What one round of probes saw of one node.

    A field that is None was not learned in this round: what was known before stays.
    """

    node_id: str
    observed_at: float
    health: Health
    health_reason: str = ""
    version: str | None = None
    installed: Mapping[str, InstalledModel] | None = None
    loaded: Mapping[str, LoadedModel] | None = None
    devices: tuple[Device, ...] | None = None
    host: HostMemory | None = None
    total_vram_bytes: int | None = None
    free_vram_bytes: int | None = None
    vram_source: str | None = None
    """Where the VRAM figures come from: ``nvml``, ``config - /api/ps`` ...; None: unknown."""
    vram_observed_at: float | None = None
    """When the source looked, which may be long before it was asked."""
    vram_reasons: tuple[str, ...] = ()
    """Why sources tell less than they might; each begins with whose reason it is."""


# ------------------------------------------------------------------------- requests


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceRequest:
    """What the scheduler needs to know of one request; no word of the prompt is in it."""

    model: str
    """Canonical name."""
    capabilities: frozenset[str] = frozenset()
    """What the model must be able to do for it (``tools``, ``vision``, ``embedding`` ...)."""
    options: RunnerOptions = NO_OPTIONS
    input_tokens: int = 0
    output_tokens: int | None = None
    """The caller's own limit (``num_predict``); None without one."""
    interactive: bool = False
    """Someone reads along: time to the first token counts more than completion."""
    node_id: str | None = None
    min_vram_bytes: int | None = None
    prefer_local: bool = True
    priority: int = 5
    exclude_nodes: frozenset[str] = frozenset()
    require_labels: frozenset[str] = frozenset()
    prefer_labels: frozenset[str] = frozenset()
    deadline_seconds: float | None = None
    """How long the caller will wait, counted from ``submitted_at``."""
    strict_pin: bool = False
    strict_vram: bool = False
    submitted_at: float = 0.0
    tried: frozenset[str] = frozenset()
    """Nodes that have failed this very request."""
    among: frozenset[str] | None = None
    """Ids of the only nodes that may serve it; None: all."""
    cached_tokens: Mapping[str, int] = field(default_factory=dict)
    """Prompt tokens expected in each node's prompt cache, by node id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRequest:
    """A request that a router has in flight on a node, as the scheduler sees it."""

    lease_id: int
    model: str
    started_at: float
    expected_seconds: float
    """Predicted work of its own: prefill and decode, without waiting."""
    priority: int = 5
    load_seconds: float = 0.0
    """Predicted load that it causes; 0 when the model was loaded."""
    reserved_bytes: int = 0
    """GPU memory that its load will take and no source shows yet."""
    cpu_share: float = 0.0
    """The part of the model that its load is expected to put into system memory."""
    evicts: frozenset[str] = frozenset()
    """Models that Ollama is expected to unload for it."""
    loading: bool = False
    """Its load has not finished."""
    options: RunnerOptions = NO_OPTIONS
    serving_since: float | None = None
    """When one of its runner's slots was its own; None while it waits for that."""

    def load_left(self, now: float) -> float:
        """Seconds its load is still expected to take; a fifth of it once overdue."""
        if not self.loading:
            return 0.0
        return max(self.started_at + self.load_seconds - now, 0.2 * self.load_seconds)

    def seconds_left(self, now: float) -> float:
        """
        Mean residual of its own work, without its load.

        Lengths of answers are heavy-tailed: whatever of one has come, about as much as at first
        is still to be expected (:data:`RESIDUAL_SHARE`). What waits for a slot does not progress.
        """
        if self.serving_since is None:
            return self.expected_seconds
        left = self.expected_seconds - (now - self.serving_since)
        floor = RESIDUAL_SHARE * self.expected_seconds
        return left if left > floor else floor


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast one node runs one model; None where nothing was measured yet."""

    prefill_seconds_per_token: float | None = None
    decode_seconds_per_token: float | None = None
    load_seconds: float | None = None
    output_tokens: float | None = None
    """Mean length of its answers."""
    slots: int | None = None
    """Requests seen to run at once without waiting for one another."""
    samples: int = 0


UNKNOWN_SPEED = Speed()


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """How much one model is asked for, over the whole cluster."""

    per_second: float = 0.0
    """Arrival rate at ``seen_at``, as if nothing had come before anybody counted; it fades with
    :data:`DEMAND_MEMORY_SECONDS`."""
    seen_at: float = 0.0
    counted_since: float = float("-inf")
    """When the router was first asked for anything."""
    warm_nodes: int = 0
    """Healthy nodes that have it loaded."""
    output_tokens: float | None = None
    """Mean length of its answers, whichever node gave them."""

    def faded(self, now: float) -> float:
        """``per_second`` as of ``now``."""
        return self.per_second * math.exp(-max(0.0, now - self.seen_at) / DEMAND_MEMORY_SECONDS)

    def rate(self, now: float) -> float:
        """Requests per second as of ``now``, judged by the time that was counted at all."""
        counted = max(MIN_COUNTED_SECONDS, now - self.counted_since)
        return self.faded(now) / -math.expm1(-counted / DEMAND_MEMORY_SECONDS)


@dataclass(frozen=True, kw_only=True)
class NodeSnapshot:
    """
    What was last known of one node, and when it was seen.

    A snapshot never changes: newer knowledge is a new snapshot.
    """

    node: Node
    observed_at: float | None = None
    """When a probe last answered; None before the first."""
    health: Health = "unknown"
    health_reason: str = ""
    version: str | None = None
    installed: Mapping[str, InstalledModel] = field(default_factory=dict)
    loaded: Mapping[str, LoadedModel] = field(default_factory=dict)
    devices: tuple[Device, ...] = ()
    host: HostMemory | None = None

    total_vram_bytes: int | None = None
    measured_free_vram_bytes: int | None = None
    """As the source reported it, less what has been loaded since it looked; before this
    router's own pending loads."""
    vram_source: str | None = None
    vram_observed_at: float | None = None
    """When the source looked."""
    vram_reasons: tuple[str, ...] = ()
    """Why sources tell less than they might."""

    running: tuple[RunningRequest, ...] = ()
    cordoned: bool = False
    circuit: Literal["closed", "open"] = "closed"
    circuit_reason: str = ""
    circuit_retry_at: float | None = None
    """When an open circuit lets one request through to see; None while that one is out."""
    paused_until: float | None = None
    """It said "busy": no new work before this time."""
    load_retry_at: Mapping[str, float] = field(default_factory=dict)
    """Models whose loads have failed here, and when the next may be tried."""
    load_path_stuck: bool = False
    """Loads hang although the node answers; what is loaded stays usable."""
    penalty_seconds: float = 0.0
    """Price of its recent errors at ``penalty_at``; it halves every ten seconds."""
    penalty_at: float = 0.0
    speeds: Mapping[str, Speed] = field(default_factory=dict)
    load_bytes_per_second: float | None = None
    bytes_per_second: float | None = None
    """Effective memory bandwidth, from the decode rates seen here."""
    need_ratios: Mapping[str, float] = field(default_factory=dict)
    """Of models seen loaded here: what they took, as a part of what was expected."""
    default_context: int | None = None
    """``num_ctx`` that the node was seen to take by itself; before, that somebody was seen to have
    set on another node."""
    cache_ratio: float | None = None
    """What key/value caches were seen to take, as a part of what one slot in 16 bits takes, where
    nobody has told the slots: by it, models are judged that were not seen loaded there."""
    learned_room_bytes: int | None = None
    """What models may take of its GPUs together, by what Ollama did with them: a guess between
    bounds, used where no source tells; None where nothing was loaded yet."""
    has_shown_room: bool = False
    """Whether Ollama has shown how much that is at most."""

    @property
    def id(self) -> str:
        """The node's id."""
        return self.node.id

    def with_running(self, running: tuple[RunningRequest, ...]) -> NodeSnapshot:
        """As :func:`dataclasses.replace`, at a fifth of its price: it is done for each request."""
        copy = object.__new__(NodeSnapshot)
        copy.__dict__.update({name: self.__dict__[name] for name in _SNAPSHOT_FIELDS})
        copy.__dict__["running"] = running
        return copy

    @cached_property
    def paces(self) -> dict[str, tuple[object, float, float]]:
        """Scratch of the cost terms: prices, and a token's seconds at them, by loaded model."""
        return {}

    def penalty(self, now: float) -> float:
        """What is left of the price of its errors, in seconds."""
        return faded(self.penalty_seconds, now - self.penalty_at)

    @cached_property
    def is_available(self) -> bool:
        """Whether nothing about the node itself stands against using it."""
        return (
            self.health == "up"
            and not self.cordoned
            and self.circuit == "closed"
            and self.paused_until is None
        )

    @cached_property
    def reserved_bytes(self) -> int:
        """GPU memory promised to loads that no source shows yet."""
        return sum(request.reserved_bytes for request in self.running if request.loading)

    @cached_property
    def free_vram_bytes(self) -> int | None:
        """GPU memory a further model could take once pending loads are done; None: unknown."""
        free = self.measured_free_vram_bytes
        if free is None or not self.running:
            return free
        going = sum(m.size_vram_bytes for m in self.loaded.values() if m.name in self.leaving)
        return max(0, free - self.reserved_bytes + going)

    @cached_property
    def room_bytes(self) -> int | None:
        """
        As :attr:`free_vram_bytes`; where that is unknown, what was learned of the node.

        Of one where nothing is known yet, the first load is under way, or was there before us:
        the smallest usual card that has room for it is taken. None while nothing is there.
        """
        if self.measured_free_vram_bytes is not None:
            return self.free_vram_bytes
        staying = sum(m.size_vram_bytes for m in self.loaded.values() if m.name not in self.leaving)
        taken = staying + self.reserved_bytes
        room = self.learned_room_bytes
        if room is None:
            if not taken or self.total_vram_bytes is not None:
                return None
            room = usual_size(taken, self.bytes_per_second)
        return max(0, room - taken)

    @property
    def may_have_more_room(self) -> bool:
        """Whether :attr:`room_bytes` may be too small: nobody tells, and nothing has shown it."""
        return self.total_vram_bytes is None and not self.has_shown_room

    @cached_property
    def leaving(self) -> frozenset[str]:
        """Models that a pending load is about to push out: they take no new work."""
        return frozenset().union(*(r.evicts for r in self.running if r.loading))

    @cached_property
    def eviction_order(self) -> tuple[tuple[str, int], ...]:
        """
        Models in the order in which Ollama would unload them, and the bytes each gives back.

        Idle ones first, then by the shortest keep-alive, then by the path of the weights
        (``server/sched.go``, ``findRunnerToUnload``; recorded scenarios ``evict-*``). A model that
        is still being loaded stands at the end.
        """
        busy = {running.model for running in self.running}

        def place(model: LoadedModel) -> tuple[bool, float, str, str]:
            installed = self.installed.get(model.name)
            keep_alive = model.keep_alive_seconds
            return (
                model.name in busy,
                DEFAULT_KEEP_ALIVE_SECONDS if keep_alive is None else keep_alive,
                installed.weights_file if installed is not None else "",
                model.name,
            )

        there = [model for model in self.loaded.values() if model.name not in self.leaving]
        coming = [(r.model, r.reserved_bytes) for r in self.running if r.loading]
        return (*((m.name, m.size_vram_bytes) for m in sorted(there, key=place)), *coming)

    @cached_property
    def streams(self) -> Mapping[str, int]:
        """Requests that its GPU is at work for, by model: those that wait for a slot are not."""
        counts: dict[str, int] = {}
        for running in self.running:
            if running.serving_since is not None:
                counts[running.model] = counts.get(running.model, 0) + 1
        return counts

    @cached_property
    def arriving(self) -> frozenset[str]:
        """Models with a pending load here."""
        return frozenset(r.model for r in self.running if r.loading)

    @cached_property
    def has_gpu(self) -> bool:
        """Whether it has one, as far as is known."""
        total = self.total_vram_bytes
        return (self.learned_room_bytes if total is None else total) != 0

    @cached_property
    def usual_bytes_per_second(self) -> float | None:
        """Memory bandwidth that its largest GPU has, most likely; None: there is no telling."""
        if not self.total_vram_bytes or any(one.kind != "discrete" for one in self.devices):
            return None
        sizes = [one.total_bytes for one in self.devices if one.total_bytes]
        return usual_bandwidth(max(sizes, default=self.total_vram_bytes))

    @cached_property
    def ram_bytes(self) -> int | None:
        """System memory, measured or configured; None when unknown."""
        if self.host is not None and self.host.total_bytes is not None:
            return self.host.total_bytes
        return None if self.node.ram_gb is None else int(self.node.ram_gb * GB)

    def __repr__(self) -> str:
        free = self.free_vram_bytes
        vram = "VRAM unknown" if free is None else f"{free / GB:.1f} GB free"
        loaded = ", ".join(self.loaded) or "nothing loaded"
        return f"<NodeSnapshot {self.id} {self.health} | {vram} | {loaded}>"


_SNAPSHOT_FIELDS = tuple(one.name for one in fields(NodeSnapshot))


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A choice, boiled down to what the ledger has to book."""

    node_id: str
    has_room: bool = True
    """Whether the node may be handed the request now; else it waits in the router."""
    causes_load: bool = False
    load_seconds: float = 0.0
    """Expected time until the model is loaded, loads ahead of it included."""
    expected_seconds: float = 0.0
    """Expected prefill and decode."""
    reserved_bytes: int = 0
    """GPU memory that the load will take."""
    size_bytes: int = 0
    """What the runner will take in all, system memory included."""
    evicts: frozenset[str] = frozenset()
    options: RunnerOptions = NO_OPTIONS
    context_length: int | None = None
    """Context of the runner that will serve it, where known."""
    choice: object = None
    """The scheduler's own record, for the explanation."""

    @property
    def cpu_share(self) -> float:
        """The part of what is loaded for it that goes into system memory."""
        return 1.0 - self.reserved_bytes / self.size_bytes if self.size_bytes else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an answer said of itself in its last part; durations in seconds.

    ``prompt_tokens`` counts cached ones, ``prefill_seconds`` does not (BEHAVIOUR section 3).
    """

    total_seconds: float | None = None
    load_seconds: float | None = None
    """Scheduler time on the node: queue for a load, eviction and the load itself."""
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None

    @property
    def slot_seconds(self) -> float | None:
        """Waiting for a slot, which only the total has in it (BEHAVIOUR section 3).

        None where that is not told, as of texts that are embedded.
        """
        if self.total_seconds is None or self.decode_seconds is None:
            return None
        known = (self.load_seconds or 0.0) + (self.prefill_seconds or 0.0) + self.decode_seconds
        return self.total_seconds - known


def faded(penalty_seconds: float, age_seconds: float) -> float:
    """A penalty after some time: it halves every ten seconds."""
    return penalty_seconds * math.pow(0.5, max(0.0, age_seconds) / PENALTY_HALF_LIFE_SECONDS)


# ------------------------------------------------------------------------- decisions


class Rejection(NamedTuple):
    """Why one node cannot take a request."""

    # A tuple and not a dataclass: choosing among 100 nodes makes up to 100 of them.
    node_id: str
    reason: str
    """One of the scheduler's closed list, e.g. ``short of VRAM``."""
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return self._asdict()


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A node that could take the request, and what it would cost, in seconds."""

    node_id: str
    costs: Mapping[str, float]
    total_seconds: float
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data, rounded to a tenth of a millisecond."""
        return {
            "node_id": self.node_id,
            "seconds": round(self.total_seconds, 4),
            # Most of them are nothing, and rounding takes its time.
            "costs": {n: round(value, 4) if value else 0.0 for n, value in self.costs.items()},
            "note": self.note,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try on one node."""

    node_id: str
    node_url: str
    outcome: str
    """``ok``, ``cancelled``, or the cause of the failure (``connect``, ``busy`` ...)."""
    seconds: float
    status_code: int | None = None
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "node_id": self.node_id,
            "node_url": self.node_url,
            "outcome": self.outcome,
            "seconds": round(self.seconds, 4),
            "status_code": self.status_code,
            "error": self.error,
        }
