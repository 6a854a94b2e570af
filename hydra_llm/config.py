"""Settings: from arguments, the environment and ``hydra.toml``, in that order.

The only reader of the environment. Whatever is wrong is told in one
:class:`~hydra_llm.exceptions.ConfigurationError`, a line for each problem, and no line
shows a password.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import os
import re
import ssl
import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainValidator,
    PrivateAttr,
    SecretStr,
    SerializationInfo,
    ValidationError,
    field_serializer,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from hydra_llm.exceptions import ConfigurationError
from hydra_llm.networks import MOST_PORTS, addresses_in, read_network
from hydra_llm.types import DEFAULT_PORT, Node, masked_url

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "HydraSettings",
    "Setting",
    "agent_token",
    "as_variables",
    "describe_settings",
    "settings_table",
]

PREFIX = "HYDRA_LLM_"
CONFIG_VARIABLE = "HYDRA_LLM_CONFIG"
CONFIG_FILE = "hydra.toml"
AGENT_TOKEN_VARIABLE = "HYDRA_LLM_AGENT_TOKEN"  # noqa: S105  the name of one
"""Of ``hydra-llm agent``; no setting of a router."""
DEFAULT_NODE = "http://localhost:11434"
RATES_FILE = "rates.json"
CORDONS_FILE = "cordoned.json"

OLDER_PREFIX = "SOLLOL_"
OLDER_NAMES = frozenset(
    {
        "dashboard_enabled",
        "dashboard_port",
        "discovery_enabled",
        "discovery_timeout",
        "health_check_interval",
        "vram_monitoring",
    }
)
"""Settings that are also read from ``SOLLOL_*``; the other variables of that name are not ours."""

WEEK_SECONDS = 7 * 24 * 3600.0

NodeLike: TypeAlias = "str | Node | Mapping[str, Any]"
"""A URL, ``id=url``, a Node, or Node's arguments by name."""


# ----------------------------------------------------------------- kinds of values


def _not_a_bool(value: object) -> object:
    # To Python, and so to pydantic, True is the number 1.
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")  # noqa: TRY004  pydantic's way
    return value


def _read_verify(value: object) -> bool | str | ssl.SSLContext:
    if isinstance(value, (bool, ssl.SSLContext)):
        return value
    text = str(value).strip() if isinstance(value, str | int | os.PathLike) else ""
    if text.lower() in ("1", "true", "t", "yes", "y", "on"):
        return True
    if text.lower() in ("0", "false", "f", "no", "n", "off"):
        return False
    if text and (path := Path(text).expanduser()).is_file():
        return str(path)
    raise ValueError("should be true, false, or the path of a file of CA certificates that exists")


def _check_redis_url(value: object) -> SecretStr | None:
    if value is None:
        return None
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    if not isinstance(text, str) or not re.match(r"(rediss?|unix)://.", text):
        raise ValueError("should look like redis://host:6379/0 (or rediss://, unix://)")
    if "@" in "".join(urlsplit(text)[2:]):
        # Cut there, the password would be taken for the host, and shown.
        raise ValueError("should have / # ? in a password written as %2F %23 %3F")
    return SecretStr(text)


def _read_folder(value: object) -> object:
    if isinstance(value, str | os.PathLike):
        try:
            return Path(value).expanduser().absolute()
        except (RuntimeError, TypeError):  # somebody else's home, or bytes
            pass
    elif value is None:
        return None
    raise ValueError("should be the path of a folder")


def _read_file_path(value: object) -> object:
    try:
        path = _read_folder(value)
    except ValueError:
        path = Path("/")
    if isinstance(path, Path) and path.is_dir():
        raise ValueError("should be the path of a file")
    return path


def _parts(value: object) -> object:
    """The items of a text with commas between them."""
    return (
        [part for part in re.split(r"[,\s]+", value) if part] if isinstance(value, str) else value
    )


def _read_networks(value: object) -> object:
    items = _parts(value)
    if not isinstance(items, list | tuple) or not all(isinstance(one, str) for one in items):
        raise ValueError("should be a list of networks, as 192.168.1.0/24")
    networks = tuple(dict.fromkeys(map(read_network, items)))
    addresses_in(networks)  # what is wrong with them is told now, not by a thread later
    return tuple(map(str, networks))


def _read_ports(value: object) -> object:
    items = _parts(value)
    items = [items] if isinstance(items, int) else items
    if not isinstance(items, list | tuple) or not 0 < len(items) <= MOST_PORTS:
        raise ValueError(f"should be a list of 1 to {MOST_PORTS} ports")
    return tuple(dict.fromkeys(items))


_Number = BeforeValidator(_not_a_bool)
# A week is for ever, and far from what sleeping can count.
Seconds = Annotated[float, Field(gt=0, le=WEEK_SECONDS), _Number]
SecondsOrNone = Annotated[float, Field(ge=0, le=WEEK_SECONDS), _Number]
Count = Annotated[int, Field(ge=0), _Number]
CountFromOne = Annotated[int, Field(ge=1), _Number]
Port = Annotated[int, Field(ge=1, le=65535), _Number]


# ------------------------------------------------------------------------ settings


class HydraSettings(BaseSettings):
    """
    Everything that can be set, checked and frozen.

    ::

        HydraSettings()                                  # environment and hydra.toml
        HydraSettings(["http://rig:11434", "pc=http://10.0.0.5:11434"], max_queue=50)

    An argument beats ``HYDRA_LLM_<NAME>``, which beats ``hydra.toml`` (in the current
    directory, or the file that ``HYDRA_LLM_CONFIG`` names), which beats the default.

    Args:
        nodes: URLs, ``id=url``, Nodes, or mappings of Node's arguments; None is not given.
        settings: the other settings, by name.

    Raises:
        ConfigurationError: with a line for each misspelt name and each value that cannot be.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    nodes: tuple[InstanceOf[Node], ...]
    """The Ollama servers. Given nowhere, it is the one that `OLLAMA_HOST` names."""

    health_check_interval: Annotated[float, Field(ge=0.1, le=WEEK_SECONDS), _Number] = 5.0
    """Seconds between two rounds of probes."""
    health_check_timeout: Seconds = 2.0
    """Seconds that a node has to answer a probe."""
    connect_timeout: Seconds = 5.0
    """Seconds that a node has to accept a connection."""
    first_byte_timeout: Seconds = 300.0
    """Seconds until the first part of a stream is there; loading a model falls into them. Where a
    node's pace is known and another node could take over, it is ten times what is expected and 30
    seconds, if that is less."""
    whole_answer_timeout: Seconds = 1800.0
    """Seconds until an answer that comes in one piece is there; all of generating it falls into
    them."""
    stream_idle_timeout: Seconds = 120.0
    """Seconds until the next part of a stream that has begun is there. Where a node's pace is
    known it is the time of 50 tokens, if that is less, but 10 seconds at least."""
    continue_streams: bool = False
    """Whether another node goes on with a stream that breaks off, where the model's template
    allows for it."""
    max_body_bytes: CountFromOne = 67_108_864
    """Bytes that an answer may have."""
    verify: Annotated[bool | str | InstanceOf[ssl.SSLContext], PlainValidator(_read_verify)] = True
    """Whether to check TLS certificates; or the path of a file of CA certificates to trust; or, in
    Python, an `ssl.SSLContext`."""

    vram_monitoring: bool = True
    """Whether to ask this machine's GPUs, and the nodes' exporters, for their memory."""
    assumed_ram_gb: Annotated[float, Field(gt=0), _Number] = 256.0
    """System memory in decimal GB taken for a node where nothing tells it, when deciding
    whether it could run a request at all."""
    prefer_local_seconds: SecondsOrNone = 3.0
    """Seconds that running on this machine is worth to a request that prefers it."""
    prefer_label_seconds: SecondsOrNone = 2.0
    """Seconds that each label which a request prefers is worth."""
    default_output_tokens: CountFromOne = 256
    """Tokens expected of an answer while nothing is known of its model's answers."""
    max_queue: Count = 1000
    """Requests that may wait for a free slot; with one more the least urgent is refused. 0: none
    waits."""
    queue_timeout: Seconds = 600.0
    """Seconds that a request waits for a free slot; then it is refused."""
    manage_keep_alive: bool = False
    """Whether to ask for a `keep_alive` of 30 minutes where the caller says nothing, for models
    that are asked for at least once a minute: Ollama then pushes out others first."""

    breaker_failures: CountFromOne = 3
    """Failures in a row after which a node gets a pause."""
    breaker_open_seconds: Seconds = 5.0
    """Seconds of a node's first pause."""
    breaker_max_open_seconds: Seconds = 120.0
    """Seconds that the pause grows to while the node keeps failing."""
    slow_start_seconds: SecondsOrNone = 30.0
    """How long a node is held back a little after its circuit has closed: it begins with a
    price of a thirtieth of this, which halves every ten seconds."""
    retry_ratio: Annotated[float, Field(ge=0, le=10), _Number] = 0.2
    """Further attempts allowed for each request, over all requests."""
    retry_floor: Count = 100
    """Further attempts that are always allowed, however few the requests."""
    lease_ttl: Seconds = 600.0
    """Seconds after the end of its time limits when a request whose owner has vanished no
    longer counts as running."""

    discovery_enabled: bool = False
    """Whether a router searches `discovery_networks` for Ollama servers, and takes in those that
    it finds."""
    discovery_networks: Annotated[tuple[str, ...], BeforeValidator(_read_networks)] = ()
    """Networks to search, as `192.168.1.0/24`; private ones, of 1024 addresses at most in all."""
    discovery_ports: Annotated[tuple[Port, ...], BeforeValidator(_read_ports)] = (DEFAULT_PORT,)
    """TCP ports on which Ollama may listen there, 16 at most."""
    discovery_interval: Annotated[float, Field(ge=30, le=WEEK_SECONDS), _Number] = 600.0
    """Seconds from the end of one search of a router to the next."""
    discovery_timeout: Seconds = 60.0
    """Seconds after which a search begins with no further address."""
    dashboard_enabled: bool = False
    """Whether to serve the dashboard. There is none yet."""
    dashboard_port: Port = 8080
    """TCP port of the dashboard."""
    redis_url: Annotated[SecretStr | None, BeforeValidator(_check_redis_url)] = None
    """Redis through which several routers share what they hold and what they have learned, as
    `redis://user:password@host:6379/0`."""
    keep_rates: bool = True
    """Whether to keep in a file what has been learned of the nodes, for the next start."""
    state_dir: Annotated[Path | None, BeforeValidator(_read_folder)] = None
    """The folder of that file, and of the one that says which nodes are cordoned; made when it is
    needed; by default one of the user's own."""
    decision_log: Annotated[Path | None, BeforeValidator(_read_file_path)] = None
    """A file to write to what was predicted of each request, and what happened; none by default."""
    random_seed: Annotated[int | None, _Number] = None
    """Seed of the draw between nodes that are equally good, for a run that can be repeated."""

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)
    _config_file: Path | None = PrivateAttr(default=None)

    def __init__(
        self, nodes: str | Node | Iterable[NodeLike] | None = None, **settings: Any
    ) -> None:
        given = _read_layers(nodes, settings)
        try:
            super().__init__(**given.values)
        except ValidationError as exc:
            given.problems += [_explain(error, given) for error in exc.errors()]
        else:
            given.problems += _contradictions(self, given)
        if given.problems:
            # Not `from exc`: pydantic's own error holds the values.
            raise ConfigurationError(_in_lines(given.problems))
        self._sources = given.sources
        self._config_file = given.config_file

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what ``__init__`` hands over: it keeps where each value came from."""
        return (init_settings,)

    @property
    def nodes_source(self) -> str:
        """``argument``, ``HYDRA_LLM_NODES``, ``hydra.toml``, ``OLLAMA_HOST`` or ``default``."""
        return self._sources.get("nodes", "default")

    @property
    def nodes_configured(self) -> bool:
        """Whether anybody named a node."""
        return self.nodes_source != "default"

    @property
    def config_file(self) -> Path | None:
        """The file that was read; None without one."""
        return self._config_file

    @property
    def rates_file(self) -> Path | None:
        """Where learned rates are kept; None if they are not, or the user has no home."""
        folder = self.state_dir or _user_state_dir()
        return folder / RATES_FILE if self.keep_rates and folder is not None else None

    @property
    def cordons_file(self) -> Path | None:
        """Where nodes are cordoned for all of the user's routers; None if there is no home."""
        folder = self.state_dir or _user_state_dir()
        return None if folder is None else folder / CORDONS_FILE

    def __eq__(self, other: object) -> bool:
        # Where a value came from does not make it another one.
        if not isinstance(other, HydraSettings):
            return NotImplemented
        return self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.items()))

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """The nodes, and what differs from the default."""
        for name, setting in type(self).model_fields.items():
            value = getattr(self, name)
            if name == "nodes":
                yield name, _Verbatim(f"[{', '.join(map(repr, value))}]")
            elif value != setting.default:
                yield name, value

    @field_serializer("verify", when_used="json")
    def _verify_in_json(self, verify: bool | str | ssl.SSLContext) -> bool | str:
        return _TLS_CONTEXT if isinstance(verify, ssl.SSLContext) else verify

    @field_serializer("nodes")
    def _nodes_in_dumps(self, nodes: tuple[Node, ...], info: SerializationInfo) -> list[Any]:
        if info.mode == "json":
            return [repr(node) for node in nodes]
        # Node's arguments, headers in the wrapper that hides them: as with a SecretStr, new
        # settings can be made of a dump, and printing it shows no secret.
        return [{each.name: getattr(node, each.name) for each in fields(node)} for node in nodes]


_TLS_CONTEXT = "a TLS context"


class Setting(NamedTuple):
    """One row of the table in ``docs/configuration.md``."""

    name: str
    env: str
    type: str
    default: str
    meaning: str


def settings_table() -> list[Setting]:
    """Every setting with its variable, type, default and meaning."""
    meanings = _field_docstrings(HydraSettings)
    return [
        Setting(
            name,
            _variable(name),
            _TYPE_NAMES.get(name) or str(getattr(info.annotation, "__name__", info.annotation)),
            DEFAULT_NODE if name == "nodes" else _show(name, info.default),
            meanings.get(name, ""),
        )
        for name, info in HydraSettings.model_fields.items()
    ]


_TYPE_NAMES = {
    "nodes": "nodes",
    "discovery_networks": "networks",
    "discovery_ports": "ports",
    "verify": "bool or path",
    "redis_url": "URL",
    "state_dir": "path",
    "decision_log": "path",
    "random_seed": "int",
}


def describe_settings(settings: HydraSettings) -> list[tuple[str, str, str]]:
    """
    Each setting's name, value without credentials, and source.

    The source is ``argument``, a variable's name, ``hydra.toml`` or ``default``.
    """
    return [
        (name, _show(name, getattr(settings, name)), settings._sources.get(name, "default"))
        for name in HydraSettings.model_fields
    ]


def as_variables(settings: HydraSettings, names: Iterable[str]) -> dict[str, str]:
    """
    Some settings as the variables that say the same to another process.

    Credentials are in clear: that process needs them.
    """
    return {_variable(name): _in_variable(getattr(settings, name)) for name in names}


def _in_variable(value: object) -> str:
    if value is None:
        return ""  # counts as not set
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, tuple):
        if value and all(isinstance(one, Node) for one in value):
            return json.dumps([_table_of_node(node) for node in value])
        return ",".join(map(str, value))
    return str(value)


def _table_of_node(node: Node) -> dict[str, Any]:
    table = {each.name: getattr(node, each.name) for each in fields(node)}
    for name in ("headers", "exporter_headers"):
        table[name] = dict(table[name])
    return table


def _field_docstrings(model: type[BaseModel]) -> dict[str, str]:
    # Read when asked for: pydantic's use_attribute_docstrings would do it at every import.
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(model)))
    except OSError:
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    return {
        line.target.id: " ".join(text.value.value.split())
        for line, text in pairwise(body)
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


# -------------------------------------------------------------------------- layers


@dataclass
class _Layers:
    """What was given, by name: the strongest value, and where it came from."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    """What to call a setting in a message: its variable, or its key in the file."""
    problems: list[str] = field(default_factory=list)
    config_file: Path | None = None

    def offer(self, name: str, value: object, *, source: str, label: str) -> None:
        """Take ``value`` unless a stronger layer has given one."""
        if name not in self.values:
            self.values[name], self.sources[name], self.labels[name] = value, source, label


def _read_layers(nodes: object, settings: Mapping[str, Any]) -> _Layers:
    given = _Layers()
    known = HydraSettings.model_fields
    if nodes is not None:
        given.offer("nodes", nodes, source="argument", label="nodes")
    for name, value in settings.items():
        if name in known:
            given.offer(name, value, source="argument", label=name)
        else:
            given.problems.append(_unknown("argument", name, known))
    environment = _environment()
    _read_environment(given, environment)
    _read_file(given, environment.get(CONFIG_VARIABLE))
    # Ollama itself takes quotes off.
    if host := environment.get("OLLAMA_HOST", "").strip("\"' "):
        given.offer("nodes", [host], source="OLLAMA_HOST", label="OLLAMA_HOST")
    given.offer("nodes", [DEFAULT_NODE], source="default", label="nodes")
    given.values["nodes"] = _read_nodes(given)
    return given


def _environment() -> dict[str, str]:
    """The variables that are not empty, by name in capitals."""
    found: dict[str, str] = {}
    # Sorted by spelling: where a name is there in both, capitals come first and win.
    for name, value in sorted(os.environ.items()):
        if value.strip():
            found.setdefault(name.upper(), value.strip())
    return found


def _user_state_dir() -> Path | None:
    """Where programs of this user keep what they can do without; None if there is no telling."""
    environment = _environment()
    try:
        if sys.platform == "win32":
            local = environment.get("LOCALAPPDATA")
            return Path(local or Path.home() / "AppData" / "Local") / "hydra-llm"
        # The specification has relative paths passed over.
        if (given := Path(environment.get("XDG_STATE_HOME", ""))).is_absolute():
            return given / "hydra-llm"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Application Support" / "hydra-llm"
        return Path.home() / ".local" / "state" / "hydra-llm"
    except RuntimeError:  # a user of no name, in a container
        return None


def _variable(name: str) -> str:
    return PREFIX + name.upper()


def _read_environment(given: _Layers, environment: Mapping[str, str]) -> None:
    known = {_variable(name) for name in HydraSettings.model_fields} | {
        CONFIG_VARIABLE,
        AGENT_TOKEN_VARIABLE,
    }
    for name in HydraSettings.model_fields:
        names = [_variable(name)]
        if name in OLDER_NAMES:
            names.append(OLDER_PREFIX + name.upper())
        for variable in names:
            if variable in environment:
                given.offer(name, environment[variable], source=variable, label=variable)
    for variable in environment:
        if variable.startswith(PREFIX) and variable not in known:
            names = sorted(each.removeprefix(PREFIX) for each in known)
            given.problems.append(_unknown("variable", variable, names, lead=PREFIX))


def _read_file(given: _Layers, named: str | None) -> None:
    path = Path(named).expanduser() if named else Path(CONFIG_FILE)
    says = f"{CONFIG_VARIABLE}={named}" if named else CONFIG_FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if named:
            given.problems.append(f"{says}: there is no such file")
        return
    except OSError as exc:
        given.problems.append(f"{says}: it cannot be read ({exc.strerror})")
        return
    given.config_file = path
    try:
        # Editors on Windows put a mark in front of UTF-8.
        content = tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        given.problems.append(f"{path}: it is not UTF-8 (at line {line})")
        return
    except tomllib.TOMLDecodeError as exc:
        last = data.count(b"\n") + 1
        why = _lower(str(exc)).replace("at end of document", f"at line {last}, the last")
        given.problems.append(f"{path}: {why}")
        return
    known = HydraSettings.model_fields
    for key, value in content.items():
        if key in known:
            given.offer(key, value, source=CONFIG_FILE, label=f"{path}: {key}")
        else:
            given.problems.append(_unknown("key", key, known, where=f"{path}: "))


def _unknown(what: str, name: str, known: Iterable[str], *, where: str = "", lead: str = "") -> str:
    """As ``unknown variable HYDRA_LLM_NODE; did you mean HYDRA_LLM_NODES?``.

    ``lead`` is what all the names begin with, and says nothing of how alike they are.
    """
    # Underscores too: they make any two long names alike.
    near = {each.lower().replace("_", ""): each for each in known}
    plain = name.lower().removeprefix(lead.lower()).replace("_", "").replace("-", "")
    close = difflib.get_close_matches(plain, near, n=1, cutoff=0.6)
    if close:
        hint = f"did you mean {lead}{near[close[0]]}?"
    elif len(near) > 12:
        hint = "no setting is called anything like it"
    else:
        hint = f"known are {', '.join(near.values())}"
    return f"{where}unknown {what} {name}; {hint}"


def agent_token(file: Path | None) -> SecretStr | None:
    """
    What ``hydra-llm agent`` asks for: a file's text, else ``HYDRA_LLM_AGENT_TOKEN``, else None.

    Raises:
        ConfigurationError: the file cannot be read, or that is no token.
    """
    if file is None:
        text, label = _environment().get(AGENT_TOKEN_VARIABLE, ""), AGENT_TOKEN_VARIABLE
        if not text:
            return None
    else:
        label = f"--token-file {file}"
        try:
            text = file.expanduser().read_text(encoding="utf-8-sig").strip()
        except OSError as exc:
            raise ConfigurationError(f"{label}: it cannot be read ({exc.strerror})") from None
        except UnicodeDecodeError:
            text = "?"
    if not re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", text):
        # RFC 6750 says what a header can carry.
        raise ConfigurationError(
            f"{label}: a token is one word of letters, digits and -._~+/, as openssl rand -hex 32 "
            "makes it"
        )
    return SecretStr(text)


# --------------------------------------------------------------------------- nodes


def _one_label(value: object) -> object:
    return (value,) if isinstance(value, str) else value


_Gigabytes = Annotated[float, Field(ge=0), _Number]


class _NodeTable(BaseModel):
    """Node's arguments as they may stand in a file; Node itself trusts their types."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, defer_build=True)

    url: Annotated[str, Field(min_length=1)]
    id: str = ""
    vram_gb: _Gigabytes | None = None
    vram_reserved_gb: _Gigabytes = 0.0
    ram_gb: _Gigabytes | None = None
    exporter: str | None = None
    labels: Annotated[tuple[str, ...], BeforeValidator(_one_label)] = ()
    headers: dict[str, str] | None = None
    local: bool | None = None
    slots: Annotated[int, Field(ge=1), _Number] | None = None
    exporter_headers: dict[str, str] | None = None
    kv_cache_type: str | None = None
    max_loaded_models: Annotated[int, Field(ge=1), _Number] | None = None


_IS_JSON = re.compile(r"""\s*\[\s*[{"\]]""")
"""A list of tables or texts; ``[::1]:11434`` is an address."""


def _read_nodes(given: _Layers) -> tuple[Node, ...]:
    """The nodes that can be read; what is wrong with the others is added to the problems."""
    value, label = given.values["nodes"], given.labels["nodes"]
    if isinstance(value, str) and _IS_JSON.match(value):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as exc:
            # Not its text: there may be a password in it.
            where = f"at line {exc.lineno}, column {exc.colno}"
            given.problems.append(f"{label}: it begins like a list in JSON and is none ({where})")
            return ()
    whole = value if isinstance(value, str) else ""
    items: list[Any]
    if isinstance(value, str):
        items = [part for part in re.split(r"[,\s]*,[,\s]*", f",{value},") if part]
    elif isinstance(value, Node):
        items = [value]
    elif isinstance(value, Iterable) and not isinstance(value, Mapping | bytes):
        items = list(value)
    else:
        given.problems.append(f"{label}: should be a list of URLs or of tables of Node's arguments")
        return ()
    if not items:
        given.problems.append(f"{label}: it names no node; write it like {DEFAULT_NODE}")
    nodes: list[Node] = []
    for number, item in enumerate(items, 1):
        where = label if len(items) == 1 else f"{label}, number {number}"
        try:
            nodes.append(_read_node(item, whole))
        except ConfigurationError as exc:
            given.problems += [f"{where}: {problem}" for problem in str(exc).splitlines()]
    given.problems += [f"{label}: {problem}" for problem in _twins(nodes)]
    return tuple(nodes)


def _read_node(item: object, whole: str = "") -> Node:
    if isinstance(item, Node):
        return item
    if isinstance(item, Mapping):
        return _node_of_table(item)
    if not isinstance(item, str):
        raise ConfigurationError(
            f"a node is a URL, a Node or a table of its arguments, not {type(item).__name__}"
        )
    pair = re.fullmatch(r"\s*([^\s:/@=]+)\s*=\s*(.*)", item)
    if pair is None:
        return _node(item, whole)
    return _node(pair[2], whole, id=pair[1])


# Any: what Node takes, checked by _NodeTable.
def _node(url: str, whole: str = "", **arguments: Any) -> Node:
    try:
        return Node(url, **arguments)
    except ConfigurationError as exc:
        # A password with a comma is cut in two, and its first half does not look like one.
        shown = "***" if "@" in whole and "@" not in url else masked_url(url)
        hint = "; write a comma in a password as %2C" if shown == "***" else ""
        message = str(exc).replace(repr(masked_url(url)), repr(shown))
        raise ConfigurationError(message + hint) from None


def _node_of_table(table: Mapping[Any, Any]) -> Node:
    known = [each.name for each in fields(Node)]
    problems = [_unknown("key", str(key), known) for key in table if key not in known]
    try:
        checked = _NodeTable.model_validate(
            {key: value for key, value in table.items() if key in known}
        )
    except ValidationError as exc:
        problems += [_explain_node(error, table) for error in exc.errors()]
        raise ConfigurationError("\n".join(problems)) from None
    if problems:
        raise ConfigurationError("\n".join(problems))
    return _node(**checked.model_dump())


def _explain_node(error: ErrorDetails, table: Mapping[Any, Any]) -> str:
    key = str(error["loc"][0])
    if error["type"] == "missing":
        return f"{key} is missing; write it like {key} = {DEFAULT_NODE!r}"
    where = ".".join(map(str, error["loc"]))
    if key in ("headers", "exporter_headers"):  # their values are keys to the house
        return f"{where}: {_right(error)}"
    return f"{where} = {_show_input(table[key])}: {_right(error)}"


def _twins(nodes: Iterable[Node]) -> Iterable[str]:
    by_url: dict[str, Node] = {}
    by_id: dict[str, Node] = {}
    for node in nodes:
        if node.url in by_url:
            names = dict.fromkeys((by_url[node.url].id, node.id))
            yield f"{node.url} is there twice (as {' and '.join(map(repr, names))})"
        elif node.id in by_id:
            yield (
                f"{by_id[node.id].url} and {node.url} are both called {node.id!r}; "
                "give each its own id"
            )
        by_url.setdefault(node.url, node)
        by_id.setdefault(node.id, node)


# ------------------------------------------------------------------------ messages


def _in_lines(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return "\n  ".join([f"{len(problems)} problems in the settings:", *problems])


def _explain(error: ErrorDetails, given: _Layers) -> str:
    name = str(error["loc"][0])
    label = given.labels.get(name, name)
    if name == "redis_url":
        return f"{label}: {_right(error)}"
    joint = " = " if given.sources.get(name) == CONFIG_FILE else "="
    return f"{label}{joint}{_show_input(given.values.get(name))}: {_right(error)}"


def _right(error: ErrorDetails) -> str:
    """What would be right."""
    if error["type"] in ("bool_parsing", "bool_type"):
        return "should be true or false (also 1 and 0, yes and no, on and off)"
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return _lower(message)


def _contradictions(settings: HydraSettings, given: _Layers) -> Iterable[str]:
    first, last = settings.breaker_open_seconds, settings.breaker_max_open_seconds
    if first > last:
        name = "breaker_max_open_seconds"
        label = given.labels.get(name, name)
        yield f"{label}: {last} is less than breaker_open_seconds, {first}; raise one or lower one"
    if settings.discovery_enabled and not settings.discovery_networks:
        label = given.labels.get("discovery_enabled", "discovery_enabled")
        yield (
            f"{label}: it names no network to search; set {_variable('discovery_networks')}, as "
            "192.168.1.0/24, or discovery_networks in hydra.toml"
        )


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _show_input(value: object) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str | float | int):
        return f"a {type(value).__name__}"
    shown = repr(masked_url(value) if isinstance(value, str) else value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _show(name: str, value: object) -> str:
    if value is None:
        return ""
    if name == "nodes" and isinstance(value, tuple):
        return ", ".join(
            node.url if node.id in node.url else f"{node.id}={node.url}" for node in value
        )
    if isinstance(value, SecretStr):
        url = urlsplit(value.get_secret_value())
        return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return _TLS_CONTEXT if isinstance(value, ssl.SSLContext) else str(value)


class _Verbatim(str):
    """Text whose repr has no quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
