"""
The machines of a replay: built in, from ``cluster.toml``, or with one more of them.

::

    [[node]]
    id = "rig"
    vram_gb = 24
    bandwidth_gb_s = 700      # of its GPU's memory, as it is reached
    load_gb_s = 2.0           # from its disk

    [[model]]
    name = "llama3.1:8b"
    share = 5                 # of all requests, relative to the others
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from hydra_llm.exceptions import ConfigurationError
from hydra_llm.simulation.catalog import Behaviour, SimulatedModel, known_models
from hydra_llm.simulation.node import SimulatedNode

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["BUILT_IN", "Machine", "Machines", "Weights", "add_machine", "find_cluster"]

TOKENS_PER_PART = 16
"""Of the simulated streams. A router waits for fifty tokens before it finds one stalled."""
REMEMBERED_REQUESTS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """
    One node.

    Args:
        vram_gb: of its GPU in decimal GB; 0 is a node without one.
        used_vram_gb: what other programs hold of it.
        bandwidth_gb_s: of the GPU's memory, as it is reached: with a model's size it gives the
            time of a token.
        cpu_bandwidth_gb_s: the same of system memory.
        load_gb_s: how fast models come from its disk.
        slots: ``OLLAMA_NUM_PARALLEL``.
        models: names of those that it has; empty is all.
        vram_told: whether the router is told its memory; else it has to find out.
    """

    id: str
    vram_gb: float
    used_vram_gb: float = 0.0
    ram_gb: float = 64.0
    bandwidth_gb_s: float = 400.0
    cpu_bandwidth_gb_s: float = 40.0
    load_gb_s: float = 2.0
    slots: int = 1
    models: tuple[str, ...] = ()
    vram_told: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """
    One model.

    Args:
        size_gb: of its file in decimal GB.
        share: of all requests, relative to the other models.
    """

    name: str
    size_gb: float
    share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """A cluster: nodes, and the models that are asked for."""

    name: str
    machines: tuple[Machine, ...]
    models: tuple[Weights, ...]
    num_ctx: int = 4096
    """``OLLAMA_CONTEXT_LENGTH`` of every node."""

    @property
    def shares(self) -> dict[str, float]:
        """How much each model is asked for."""
        return {model.name: model.share for model in self.models}

    def untold(self, every: int = 1) -> Machines:
        """Give the same cluster, with a router not told the memory of one in ``every`` nodes."""
        machines = tuple(
            replace(machine, vram_told=machine.vram_told and number % every != 0)
            for number, machine in enumerate(self.machines, 1)
        )
        return replace(self, machines=machines)

    def installed(self, machine: Machine) -> tuple[str, ...]:
        """Names of the models that a node has."""
        return machine.models or tuple(model.name for model in self.models)

    def simulated(self) -> list[SimulatedNode]:
        """Make the nodes."""
        return [self._node(number, one) for number, one in enumerate(self.machines)]

    def model(self, name: str) -> SimulatedModel:
        """Make a model; its answers are as long as the request says."""
        size = next(one.size_gb for one in self.models if one.name == name)
        base = known_models().get(name) or SimulatedModel(name, **_shape(size))
        return replace(
            base,
            size_gb=size,
            capabilities=("completion", "tools"),
            behaviour=Behaviour(kind="length"),
        )

    def _node(self, number: int, machine: Machine) -> SimulatedNode:
        return SimulatedNode(
            machine.id,
            models=[self.model(name) for name in self.installed(machine)],
            vram_gb=machine.vram_gb or None,
            used_vram_gb=machine.used_vram_gb,
            ram_gb=machine.ram_gb,
            num_parallel=machine.slots,
            max_queue=1_000_000,  # what a policy does to a queue is to be seen, not cut off
            default_num_ctx=self.num_ctx,
            gpu_bandwidth_gb_s=machine.bandwidth_gb_s,
            cpu_bandwidth_gb_s=machine.cpu_bandwidth_gb_s,
            load_gb_s=machine.load_gb_s,
            tokens_per_part=TOKENS_PER_PART,
            keep_requests=REMEMBERED_REQUESTS,
            seed=number,
        )


def _shape(size_gb: float) -> dict[str, Any]:
    """What decides about a model's context: of about that size in 4 bits, with grouped heads."""
    layers, width = (
        (28, 2048) if size_gb < 1.8
        else (28, 3072) if size_gb < 3.5
        else (32, 4096) if size_gb < 7.0
        else (40, 5120) if size_gb < 15.0
        else (64, 5120) if size_gb < 30.0
        else (80, 8192)
    )  # fmt: skip
    heads = width // 128
    return {"block_count": layers, "embedding_length": width, "head_count": heads}


# ------------------------------------------------------------------------- built in

_FIVE = (
    Weights(name="llama3.1:8b", size_gb=4.9, share=60.0),
    Weights(name="llama3.2:3b", size_gb=2.0, share=30.0),
    Weights(name="qwen3:14b", size_gb=9.0, share=20.0),
    Weights(name="qwen3:1.7b", size_gb=1.4, share=15.0),
    Weights(name="qwen3:32b", size_gb=20.0, share=12.0),
)
"""Popularity by Zipf's law; 1.4 to 20 GB."""

_DEMO = Machines(
    name="demo",
    machines=(
        Machine(
            id="workstation", vram_gb=8.0, used_vram_gb=6.5, ram_gb=32.0, bandwidth_gb_s=270.0,
            cpu_bandwidth_gb_s=50.0, models=("llama3.2:3b", "qwen3:8b"),
        ),
        Machine(
            id="rack", vram_gb=24.0, used_vram_gb=4.0, ram_gb=128.0, bandwidth_gb_s=700.0,
        ),
        Machine(
            id="gaming", vram_gb=12.0, ram_gb=32.0, bandwidth_gb_s=500.0,
            models=("llama3.2:3b", "qwen3:8b", "gemma3:12b"),
        ),
    ),
    models=(
        Weights(name="llama3.2:3b", size_gb=2.0, share=4.0),
        Weights(name="qwen3:8b", size_gb=5.2, share=3.0),
        Weights(name="gemma3:12b", size_gb=8.1, share=2.0),
        Weights(name="mistral-small:24b", size_gb=14.0, share=1.0),
    ),
)  # fmt: skip

BUILT_IN = {"demo": _DEMO}
"""Those with a name; sizes of GPUs joined by ``+`` are one too."""


def _speed(vram_gb: float) -> dict[str, float]:
    """What a card of that size does, about."""
    if vram_gb >= 20:
        return {"bandwidth_gb_s": 700.0, "load_gb_s": 2.0}
    if vram_gb >= 10:
        return {"bandwidth_gb_s": 400.0, "load_gb_s": 2.0}
    return {"bandwidth_gb_s": 300.0, "load_gb_s": 1.5}


def _of_sizes(text: str, sizes: Iterable[float]) -> Machines:
    machines = tuple(
        Machine(id=f"n{number}-{size:g}gb", vram_gb=size, **_speed(size))  # type: ignore[arg-type]
        for number, size in enumerate(sizes, start=1)
    )
    return Machines(name=text, machines=machines, models=_FIVE)


def find_cluster(text: str) -> Machines:
    """
    Find ``--cluster``: a name, GPU sizes in GB joined by ``+``, or the path of a TOML file.

    Raises:
        ConfigurationError: there is none, or the file is not as it should be.
    """
    if text in BUILT_IN:
        return BUILT_IN[text]
    sizes = _sizes(text)
    if sizes:
        return _of_sizes(text, sizes)
    path = Path(text).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(text, BUILT_IN, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigurationError(
            f"no cluster {text!r}: give demo, sizes of GPUs as 24+24+12+8, or a TOML file.{hint}"
        )
    return read_cluster(path)


def _sizes(text: str) -> list[float]:
    try:
        sizes = [float(part) for part in text.split("+")]
    except ValueError:
        return []
    if not all(0 < size <= 10_000 for size in sizes):
        raise ConfigurationError(f"--cluster {text}: a GPU has more than 0 GB")
    return sizes


# ------------------------------------------------------------------------- reading


def read_cluster(path: Path) -> Machines:
    """
    Read a ``cluster.toml``.

    Raises:
        ConfigurationError: with what is wrong and how it should be.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigurationError(f"{path} cannot be read as TOML: {exc}") from exc
    _known(document, {"node", "model", "num_ctx"}, str(path))
    models = tuple(_model(one, path) for one in _tables(document, "model", path))
    machines = tuple(_machine(one, path) for one in _tables(document, "node", path))
    _check_names(machines, models, path)
    num_ctx = document.get("num_ctx", 4096)
    if not isinstance(num_ctx, int) or isinstance(num_ctx, bool) or num_ctx < 256:
        raise ConfigurationError(f"{path}: num_ctx should be a whole number from 256 on")
    return Machines(name=path.stem, machines=machines, models=models, num_ctx=num_ctx)


def _tables(document: Mapping[str, Any], name: str, path: Path) -> list[Mapping[str, Any]]:
    found = document.get(name)
    if not isinstance(found, list) or not found or not all(isinstance(f, dict) for f in found):
        raise ConfigurationError(f"{path} needs a [[{name}]] for each {name}")
    return found


def _known(table: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    names = sorted(names)
    for key in table:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
            raise ConfigurationError(f"{where}: unknown {key!r}; {hint}")


def _number(
    table: Mapping[str, Any], key: str, where: str, default: float, *, or_zero: bool = False
) -> float:
    value = table.get(key, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0 or (value == 0 and not or_zero):
        least = "0 or more" if or_zero else "above 0"
        raise ConfigurationError(f"{where}: {key} should be a number {least}, not {value!r}")
    return float(value)


def _machine(table: Mapping[str, Any], path: Path) -> Machine:
    name = table.get("id")
    if not isinstance(name, str) or not name:
        raise ConfigurationError(f'{path}: every [[node]] needs an id, as id = "rig"')
    where = f"{path}: node {name!r}"
    _known(table, (one.name for one in fields(Machine)), where)
    if "vram_gb" not in table:
        raise ConfigurationError(f"{where} needs vram_gb; 0 is a node without a GPU")
    vram = _number(table, "vram_gb", where, 0.0, or_zero=True)
    usual = Machine(id=name, vram_gb=vram, **_speed(vram))  # type: ignore[arg-type]
    slots = table.get("slots", 1)
    if not isinstance(slots, int) or isinstance(slots, bool) or slots < 1:
        raise ConfigurationError(f"{where}: slots should be a whole number from 1 on")
    models = table.get("models", [])
    if not isinstance(models, list) or not all(isinstance(one, str) for one in models):
        raise ConfigurationError(f"{where}: models should be a list of names of [[model]]s")
    told = table.get("vram_told", True)
    if not isinstance(told, bool):
        raise ConfigurationError(f"{where}: vram_told should be true or false")
    used = _number(table, "used_vram_gb", where, 0.0, or_zero=True)
    if used > vram:
        raise ConfigurationError(f"{where}: used_vram_gb should be at most its vram_gb")
    speeds = ("ram_gb", "bandwidth_gb_s", "cpu_bandwidth_gb_s", "load_gb_s")
    return replace(
        usual,
        used_vram_gb=used,
        slots=slots,
        models=tuple(models),
        vram_told=told,
        **{key: _number(table, key, where, getattr(usual, key)) for key in speeds},  # type: ignore[arg-type]
    )


def _model(table: Mapping[str, Any], path: Path) -> Weights:
    name = table.get("name")
    if not isinstance(name, str) or not name:
        raise ConfigurationError(f'{path}: every [[model]] needs a name, as name = "qwen3:8b"')
    where = f"{path}: model {name!r}"
    _known(table, (one.name for one in fields(Weights)), where)
    known = known_models().get(name)
    if "size_gb" not in table and known is None:
        raise ConfigurationError(f"{where} needs size_gb, as 'ollama list' shows it")
    size = _number(table, "size_gb", where, known.size_gb if known else 0.0)
    try:
        SimulatedModel(name, size_gb=size)
    except ValueError as exc:
        raise ConfigurationError(f"{where}: {exc}") from exc
    return Weights(name=name, size_gb=size, share=_number(table, "share", where, 1.0))


def _check_names(machines: tuple[Machine, ...], models: tuple[Weights, ...], path: Path) -> None:
    for kind, names in (("node", [m.id for m in machines]), ("model", [m.name for m in models])):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigurationError(f"{path}: two of [[{kind}]] are called {twice[0]!r}")
    known = {model.name for model in models}
    for machine in machines:
        for name in machine.models:
            if name not in known:
                raise ConfigurationError(
                    f"{path}: node {machine.id!r} has {name!r}, which is no [[model]]"
                )
    for name in sorted(known):
        if all(machine.models and name not in machine.models for machine in machines):
            raise ConfigurationError(f"{path}: no node has model {name!r}; add it to one's models")


# ------------------------------------------------------------------------- what if

_SHORT = {
    "bandwidth": "bandwidth_gb_s",
    "load": "load_gb_s",
    "slots": "slots",
    "used": "used_vram_gb",
    "ram": "ram_gb",
}


def add_machine(cluster: Machines, text: str) -> Machines:
    """
    Give the cluster with one more node, as ``gpu24=24`` or ``gpu24=24,bandwidth=900,slots=2``.

    Raises:
        ConfigurationError: it is not written like that, or the name is taken.
    """
    name, _, rest = text.partition("=")
    vram, *more = (part.strip() for part in rest.split(","))
    where = f"--add {text}"
    if not name.strip() or not vram:
        raise ConfigurationError(f"{where}: write NAME=GB, as gpu24=24")
    table: dict[str, Any] = {"id": name.strip(), "vram_gb": _parsed(vram, where)}
    for part in more:
        key, _, value = part.partition("=")
        _known({key: value}, _SHORT, where)
        number = _parsed(value, where)
        table[_SHORT[key]] = int(number) if key == "slots" else number
    machine = _machine(table, Path("--add"))
    if any(one.id == machine.id for one in cluster.machines):
        raise ConfigurationError(f"{where}: the cluster has a node {machine.id!r} already")
    return replace(cluster, machines=(*cluster.machines, machine))


def _parsed(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigurationError(f"{where}: {text!r} is no number") from None
