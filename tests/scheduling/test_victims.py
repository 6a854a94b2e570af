"""Which models go for another one: as recorded, and as the simulated node does it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.ollama.catalogue import parse_ps, parse_show, parse_tags
from hydra_llm.probes.keepalive import with_keep_alive
from hydra_llm.scheduling import Fit, Moment
from hydra_llm.scheduling.memory import fit_of, needs_of
from hydra_llm.simulation import listings
from hydra_llm.simulation.catalog import SimulatedModel
from hydra_llm.simulation.model import OllamaServer
from hydra_llm.simulation.records import Job, Options
from hydra_llm.simulation.settings import Gpu, NodeSettings
from hydra_llm.types import (
    GB,
    Device,
    HostMemory,
    InferenceRequest,
    InstalledModel,
    LoadedModel,
    Node,
    NodeSnapshot,
    RunnerOptions,
    canonical_model_name,
)
from hydra_llm.vram import ModelShape
from tests.helpers import running

RECORDINGS = Path(__file__).parents[1] / "recordings"
VERSIONS = ("0.24.0", "0.32.15")
MIB = 1 << 20


def recorded(version: str, name: str) -> Any:
    file = RECORDINGS / f"v{version}-{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))


def tags(version: str) -> dict[str, InstalledModel]:
    return parse_tags(recorded(version, "tags")["response"]["body"])


# ------------------------------------------------------------------------- recordings


KEEP_ALIVE = {None: 300.0, -1: math.inf, "5m": 300.0, "10m": 600.0, "30m": 1800.0}


def orders(steps: list[Any]) -> dict[str, str]:
    """Files in the order in which the models went: their paths were not recorded."""
    order: list[str] = []
    shown: set[str] = set()
    for step in steps:
        now = {name for name, _ in step["ps_after"]}
        order += sorted(shown - now)
        shown = now
    return {name: f"sha256-{place:064}" for place, name in enumerate([*order, *sorted(shown)])}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("most", ["1", "2", "default"])
def test_idle_models_go_in_the_recorded_order(version: str, most: str) -> None:
    steps = recorded(version, f"scenario-evict-max-{most}")["scenario"]
    files = orders(steps)
    disk = {
        name: InstalledModel(
            name=name, size_bytes=model.size_bytes, weights_file=files.get(name, "")
        )
        for name, model in tags(version).items()
    }
    limit = None if most == "default" else int(most)
    node = Node("http://a:11434", max_loaded_models=limit, local=False)
    loaded: dict[str, LoadedModel] = {}
    gone = 0
    for step in steps:
        model = canonical_model_name(step["load"])
        snapshot = NodeSnapshot(
            node=node, health="up", version=version, installed=disk, loaded=loaded,
            total_vram_bytes=0, measured_free_vram_bytes=0,
        )  # fmt: skip

        victims = fit_of(InferenceRequest(model=model), snapshot, Moment()).victims

        now = {name for name, _ in step["ps_after"]}
        assert set(victims) == loaded.keys() - now
        gone += len(victims)
        keep_alive = KEEP_ALIVE[step["keep_alive"]]
        own = LoadedModel(name=model, context_length=4096, keep_alive_seconds=keep_alive)
        loaded = {name: loaded.get(name, own) for name in now} | {model: own}
    assert gone


@pytest.mark.parametrize("version", VERSIONS)
def test_a_busy_model_is_waited_for(version: str) -> None:
    assert recorded(version, "scenario-evict-busy")["scenario"]
    snapshot = NodeSnapshot(
        node=Node("http://a:11434", max_loaded_models=1, local=False),
        health="up",
        version=version,
        installed=tags(version),
        loaded={"count-slow:latest": LoadedModel(name="count-slow:latest", context_length=4096)},
        total_vram_bytes=0,
        measured_free_vram_bytes=0,
        running=(running("count-slow", seconds=41.0),),
    )

    found = fit_of(InferenceRequest(model="count-fast:latest"), snapshot, Moment())

    assert found.victims == ("count-slow:latest",)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_can_never_fit_is_not_asked_for(version: str) -> None:
    """A real server first unloads all others, and then fails."""
    steps = recorded(version, "scenario-oom-evicts-others")["scenario"]
    assert (steps[1]["status"], steps[1]["ps"]) == (500, [])
    about = {
        "general.architecture": "llama",
        "llama.block_count": 12,
        "llama.embedding_length": 4096,
        "llama.attention.head_count": 32,
        "llama.context_length": 8_388_608,
    }
    name = "rand-hugectx:latest"
    disk = tags(version)
    size = disk[name].size_bytes
    shape = ModelShape.from_show({"model_info": about}, size)
    disk[name] = InstalledModel(name=name, size_bytes=size, shape=shape)
    snapshot = NodeSnapshot(
        node=Node("http://a:11434", local=False), health="up", version=version, installed=disk,
        total_vram_bytes=0, measured_free_vram_bytes=0,
        host=HostMemory(total_bytes=24_400_000_000),
    )  # fmt: skip

    asked = InferenceRequest(model=name, options=RunnerOptions(num_ctx=8_388_608))

    assert fit_of(asked, snapshot, Moment()).verdict == "cannot"


FORECAST_MIB = {"count-big:latest": 598.8, "count-slow:latest": 313.8, "rand-mid:latest": 309.9}
"""As the scheduler's log has them (``simgpu-*``)."""


def simgpu_disk() -> dict[str, InstalledModel]:
    version = "0.32.15"
    disk = tags(version)
    shown = parse_show(
        recorded(version, "show-rand-mid")["response"]["body"], disk["rand-mid:latest"]
    )
    disk["rand-mid:latest"] = shown
    for name, model in disk.items():
        disk[name] = replace(model, weights_file=f"sha256-9 {name}")
    # The others were not described: count-slow is as deep and wide as rand-mid, count-big deeper.
    for name, layers in (("count-slow:latest", 12), ("count-big:latest", 16)):
        about = {
            "general.architecture": "llama",
            "llama.block_count": layers,
            "llama.embedding_length": 1024,
            "llama.attention.head_count": 16,
            "llama.attention.head_count_kv": 4,
            "llama.context_length": 8192,
        }
        size = disk[name].size_bytes
        shape = ModelShape.from_show({"model_info": about}, size)
        # By path count-big comes before the others, as its eviction shows.
        file = f"sha256-{0 if 'big' in name else 9}"
        disk[name] = InstalledModel(name=name, size_bytes=size, shape=shape, weights_file=file)
    return disk


@pytest.mark.parametrize("total_mib", [450, 900, 1600])
def test_what_goes_for_memory_is_what_went(total_mib: int) -> None:
    steps = recorded("0.32.15", f"scenario-simgpu-{total_mib}MiB")["scenario"]["loads"]
    disk, loaded = simgpu_disk(), dict[str, LoadedModel]()
    gone = 0
    for step in steps:
        model = canonical_model_name(step["load"])
        held = sum(one.size_vram_bytes for one in loaded.values())
        snapshot = NodeSnapshot(
            node=Node("http://a:11434", local=False), health="up", version="0.32.15",
            installed=disk, loaded=loaded, total_vram_bytes=total_mib * MIB,
            measured_free_vram_bytes=total_mib * MIB - held,
        )  # fmt: skip
        request = InferenceRequest(model=model)
        if model in FORECAST_MIB:
            forecast = needs_of(request, snapshot, Moment()).forecast_bytes
            assert forecast / MIB == pytest.approx(FORECAST_MIB[model], abs=0.06)

        victims = fit_of(request, snapshot, Moment()).victims

        now = {one["name"]: one for one in step["ps_after"]}
        assert set(victims) == loaded.keys() - now.keys()
        gone += len(victims)
        loaded = {
            name: LoadedModel(
                name=name,
                size_bytes=one["size"],
                size_vram_bytes=one["size_vram"],
                context_length=one["context_length"],
                keep_alive_seconds=300.0,
            )
            for name, one in now.items()
        }
    assert gone


# --------------------------------------------------------------------- simulated node


class Watched:
    """A simulated server in virtual time, and what a probe every five seconds knows of it."""

    def __init__(self, rng: random.Random, version: str) -> None:
        gpus = tuple(
            Gpu(total_bytes=rng.choice([12, 16, 24]) * GB) for _ in range(rng.choice([1, 1, 2]))
        )
        self.server = OllamaServer(NodeSettings(version=version, gpus=gpus))
        self.total = sum(gpu.total_bytes for gpu in gpus)
        self.version = version
        self.models = [
            SimulatedModel(
                f"m{number}",
                size_gb=rng.uniform(0.5, 14.0),
                embedding_length=rng.choice([2048, 3072, 4096]),
                block_count=rng.choice([16, 28, 36]),
            )
            for number in range(8)
        ]
        is_modern = version != "0.24.0"
        entries = [listings.tag_entry(model, is_modern=is_modern) for model in self.models]
        shows = [listings.show(one, is_modern=is_modern, verbose=False) for one in self.models]
        listed = parse_tags({"models": entries}).items()
        self.disk = {
            name: parse_show(shown, model)
            for (name, model), shown in zip(listed, shows, strict=True)
        }
        self.now = 1_000_000.0
        self.loaded: dict[str, LoadedModel] = {}
        self.looked_at: float | None = None

    def look(self) -> None:
        """What a probe does."""
        runners = self.server.running(self.now)
        entries = [listings.ps_entry(one, wall_at=lambda at: at) for one in runners]
        self.loaded = with_keep_alive(
            parse_ps({"models": entries}),
            self.loaded if self.looked_at is not None else None,
            now=self.now,
            since=None if self.looked_at is None else self.now - self.looked_at,
        )
        self.looked_at = self.now

    def wait(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 5.0)
            self.server.advance(self.now)
            self.look()

    def snapshot(self) -> NodeSnapshot:
        self.look()
        busy = [r.model.parsed.short for r in self.server.running(self.now) if r.in_flight]
        held = sum(model.size_vram_bytes for model in self.loaded.values())
        return NodeSnapshot(
            node=Node("http://a:11434", local=False),
            health="up",
            version=self.version,
            installed=self.disk,
            loaded=self.loaded,
            devices=tuple(
                Device(
                    key=str(number), vendor="nvidia", total_bytes=gpu.total_bytes, free_bytes=free
                )
                for number, (gpu, free) in enumerate(
                    zip(self.server.settings.gpus, self.server.free_vram(), strict=True)
                )
            ),
            total_vram_bytes=self.total,
            measured_free_vram_bytes=self.total - held,
            running=tuple(running(name, lease_id=n) for n, name in enumerate(busy)),
        )

    def load(
        self, model: SimulatedModel, keep_alive: float | None, num_ctx: int, tokens: int
    ) -> set[str]:
        """Ask for it; who went for it."""
        before = len(self.server.evictions)
        job = Job(
            model=model,
            prompt=(("Hello", 1),),
            answer_tokens=tokens,
            options=Options(num_ctx=num_ctx),
            keep_alive=keep_alive,
        )
        ticket = self.server.submit(job, self.now)
        while ticket.handed_at is None and not ticket.is_over:
            at = self.server.next_event_at()
            assert at is not None
            self.now = at
            self.server.advance(at)
        return {
            canonical_model_name(gone.model)
            for gone in self.server.evictions[before:]
            if gone.reason in ("reload", "room", "memory")
        }


def loads(seed: int, version: str) -> Iterator[tuple[Fit, set[str]]]:
    """What was predicted of each load, and what happened."""
    rng = random.Random(seed)
    node = Watched(rng, version)
    for _ in range(60):
        node.wait(rng.uniform(0.0, 60.0))
        model = rng.choice(node.models)
        keep_alive = rng.choice([None, None, 60.0, 90.0, 120.0, 600.0, 1800.0, -1.0])
        num_ctx = rng.choice([4096, 4096, 8192, 16_384])
        request = InferenceRequest(
            model=canonical_model_name(model.name), options=RunnerOptions(num_ctx=num_ctx)
        )
        found = fit_of(request, node.snapshot(), Moment())
        gone = node.load(model, keep_alive, num_ctx, rng.choice([1, 1, 50, 400]))
        if found.verdict != "loaded":
            yield found, gone


@pytest.mark.parametrize("version", VERSIONS)
def test_19_of_20_loads_push_out_whom_they_were_foretold_to(version: str) -> None:
    told = [one for seed in range(10) for one in loads(seed, version)]

    right = sum(set(found.victims) == gone for found, gone in told)

    assert len(told) > 300
    assert sum(bool(gone) for _, gone in told) > 100
    print(
        f"{right} of {len(told)}; of {sum(bool(g) for _, g in told)} with victims "
        f"{sum(set(f.victims) == g for f, g in told if g)}"
    )
    assert right / len(told) >= 0.95
