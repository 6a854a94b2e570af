"""Nodes and requests with only what a test is about."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra_llm.testing import SimulatedNode
from hydra_llm.types import (
    GB,
    InferenceRequest,
    InstalledModel,
    LoadedModel,
    Node,
    NodeSnapshot,
    RunningRequest,
    canonical_model_name,
)
from hydra_llm.vram import ModelShape

PROXY_PYTHON = (
    Path(__file__).parents[1]
    / ".venv"
    / "proxy"
    / ("Scripts" if sys.platform == "win32" else "bin")
    / "python"
)
"""Of the environment with LiteLLM's proxy, which `make test` sets up."""

LLAMA = "llama3.2:3b"
BIG = "mistral-small:24b"

SIZES_GB = {LLAMA: 2.0, "qwen3:8b": 5.2, "gemma3:12b": 8.1, BIG: 14.0}


@lru_cache(maxsize=256)
def shape_of(size_bytes: int) -> ModelShape:
    """A Llama of so many bytes, with 65,536 bytes of key/value cache a token."""
    about = {
        "general.architecture": "llama",
        "llama.block_count": 32,
        "llama.context_length": 32_768,
        "llama.embedding_length": 2048,
        "llama.feed_forward_length": 8192,
        "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": 8,
        "llama.vocab_size": 128_256,
    }
    return ModelShape.from_show({"model_info": about}, size_bytes)


def installed(*names: str, **about: Any) -> dict[str, InstalledModel]:
    """Models on a disk, 4 GB each unless they are known."""
    found = {}
    for given in names:
        name = canonical_model_name(given)
        size = int(SIZES_GB.get(name, 4.0) * GB)
        found[name] = InstalledModel(
            name=name,
            digest=f"digest of {name}",
            size_bytes=size,
            **{"context_length": 32_768, "shape": shape_of(size), **about},
        )
    return found


def loaded(*names: str, context_length: int = 4096, **about: Any) -> dict[str, LoadedModel]:
    """Runners, wholly on the GPU."""
    found = {}
    for given in names:
        name = canonical_model_name(given)
        size = int((SIZES_GB.get(name, 4.0) + 0.8) * GB)
        found[name] = LoadedModel(
            name=name,
            **{
                "size_bytes": size,
                "size_vram_bytes": size,
                "context_length": context_length,
                **about,
            },
        )
    return found


def snapshot(
    node_id: str = "a",
    *,
    models: tuple[str, ...] = (LLAMA,),
    warm: tuple[str, ...] = (),
    free_vram_gb: float | None = 20.0,
    total_vram_gb: float | None = 24.0,
    local: bool = False,
    labels: tuple[str, ...] = (),
    slots: int | None = None,
    **state: Any,
) -> NodeSnapshot:
    """A healthy 24 GB node with 20 GB free and 300 GB/s, unless the test says otherwise."""
    node = Node(f"http://{node_id}:11434", id=node_id, local=local, labels=labels, slots=slots)
    return NodeSnapshot(
        node=node,
        **{
            "health": "up",
            "installed": installed(*models),
            "loaded": loaded(*warm),
            "total_vram_bytes": None if total_vram_gb is None else int(total_vram_gb * GB),
            "measured_free_vram_bytes": None if free_vram_gb is None else int(free_vram_gb * GB),
            "bytes_per_second": 300e9,
            **state,
        },
    )


def request(model: str = LLAMA, **words: Any) -> InferenceRequest:
    """A request for a model, in its canonical name."""
    return InferenceRequest(model=canonical_model_name(model), **words)


def running(model: str = LLAMA, *, seconds: float = 4.0, **about: Any) -> RunningRequest:
    """A request of ours on a node, begun at 0, and served at once or after its load."""
    begun, load_seconds = about.get("started_at", 0.0), about.get("load_seconds", 0.0)
    return RunningRequest(
        **{
            "lease_id": 1,
            "model": canonical_model_name(model),
            "started_at": 0.0,
            "expected_seconds": seconds,
            "serving_since": None if about.get("loading") else begun + load_seconds,
            **about,
        }
    )


def most_at_once(node: SimulatedNode) -> int:
    """Chats that a simulated node had at one time; all of them have ended."""
    steps = []
    for record in node.requests:
        if record.path == "/api/chat":
            assert record.finished is not None
            steps += [(record.at, 1), (record.finished, -1)]
    most = held = 0
    for _, step in sorted(steps):
        held += step
        most = max(most, held)
    return most


@contextmanager
def full_queue() -> Iterator[int]:
    """A port where connections are not even accepted: the queue for them is full."""
    with closing(socket.socket()) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        waiting = [socket.socket() for _ in range(8)]
        try:
            for one in waiting:
                one.setblocking(False)
                one.connect_ex(listening.getsockname())
            yield int(listening.getsockname()[1])
        finally:
            for one in waiting:
                one.close()


def between_marks(page: str, start: str, end: str, text: str) -> str:
    """A page with what stands between two marks written anew."""
    before, rest = page.split(start)
    _, after = rest.split(end)
    return f"{before}{start}\n{text}\n{end}{after}"
