"""The recordings of a real Ollama, and the models they were made with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra_llm.simulation.catalog import Behaviour, SimulatedModel

FOLDER = Path(__file__).parent.parent / "recordings"

# What the recorded scripted models say, cut as they cut it: the end of turn is one more token.
PLAIN = ("The answer", " is", " forty", " two", " and", " not", " a word", " more.")
THINK = (
    "<think>\n", "The user", " greets", " me.\n", "</think>\n\n",
    "Hello!", " How can", " I help", " you", " today?",
)  # fmt: skip
CALL = (
    "<tool_call>\n", '{"name":', ' "get_weather",', ' "arguments":', ' {"city":',
    ' "Oslo"}}', "\n</tool_call>",
)  # fmt: skip


@dataclass(frozen=True)
class Recording:
    """One file: a request, and what the real server of that version answered."""

    path: Path
    version: str
    name: str
    env: dict[str, str]
    request: dict[str, Any]
    response: dict[str, Any]

    @property
    def body(self) -> bytes:
        body = self.request.get("body")
        if body is None:
            return b""
        return body.encode() if isinstance(body, str) else json.dumps(body).encode()

    @property
    def lines(self) -> list[str]:
        return [chunk["line"] for chunk in self.response.get("chunks", [])]


def all_paths() -> list[Path]:
    return sorted(FOLDER.glob("v*.json"))


def is_scenario(path: Path) -> bool:
    return "-scenario-" in path.name


def read(path: Path) -> Recording:
    file = json.loads(path.read_text("utf-8"))
    return Recording(
        path,
        file["ollama_version"].removeprefix("v"),
        file["name"],
        file["server_env"],
        file["request"],
        file["response"],
    )


def scenario(version: str, name: str) -> Any:
    path = FOLDER / f"v{version}-scenario-{name}.json"
    return json.loads(path.read_text("utf-8"))["scenario"]


_SHAPES: dict[str, dict[str, Any]] = {
    "rand-tiny": {"block_count": 2, "head_count": 4, "head_count_kv": 2, "vocab_size": 960},
    "rand-mid": {"block_count": 12, "head_count": 16, "head_count_kv": 4, "vocab_size": 960},
    "rand-big": {"block_count": 16, "head_count": 20, "head_count_kv": 5, "vocab_size": 960},
    "rand-hugectx": {"block_count": 24, "head_count": 4, "head_count_kv": 8, "vocab_size": 960},
    "rand-embed": {"block_count": 3, "head_count": 4, "head_count_kv": 4, "vocab_size": 681},
    "count-fast": {"block_count": 1, "head_count": 4, "head_count_kv": 4, "vocab_size": 1960},
    "count-slow": {"block_count": 12, "head_count": 16, "head_count_kv": 4, "vocab_size": 1960},
    "count-big": {"block_count": 16, "head_count": 20, "head_count_kv": 5, "vocab_size": 1960},
    "script": {"block_count": 1, "head_count": 4, "head_count_kv": 4, "vocab_size": 980},
}
_GO = "<|go_count|>"


@lru_cache
def models(version: str) -> tuple[SimulatedModel, ...]:
    """The installed models of a recorded server, from its ``/api/tags``."""
    tags = read(FOLDER / f"v{version}-tags.json").response["body"]["models"]
    newest = read(FOLDER / "v0.32.15-tags.json").response["body"]["models"]
    known = {tag["name"]: tag for tag in newest}
    return tuple(_model(tag, known[tag["name"]]) for tag in tags)


def _model(tag: dict[str, Any], known: dict[str, Any]) -> SimulatedModel:
    name = tag["name"].removesuffix(":latest")
    base = name.removesuffix("-jinja").removesuffix("-newturn")
    shape = _SHAPES.get(base) or _SHAPES["script"]
    return SimulatedModel(
        name,
        size_gb=tag["size"] / 1e9,
        capabilities=tuple(known["capabilities"]),
        native_capabilities=("completion",),
        context_length=known["details"]["context_length"],
        embedding_length=known["details"]["embedding_length"],
        parameter_size=tag["details"]["parameter_size"],
        quantization=tag["details"]["quantization_level"],
        family=tag["details"]["family"],
        digest=tag["digest"],
        # The variants of one model were made from one file.
        weights=f"{base:0>64}",
        system="You are a test model." if name == "rand-tiny" else "",
        stop=() if name == "rand-embed" else ("<|im_start|>", "<|im_end|>"),
        template="open" if base == name else "closed",
        behaviour=_behaviour(name),
        modified_at=tag["modified_at"],
        **shape,
    )


def _behaviour(name: str) -> Behaviour:
    if name.startswith("count"):
        # The template of the GGUF file opens an answer without the token that starts counting,
        # except on the native path.
        return Behaviour("count", go_token=_GO)
    scripts = {"script-plain": PLAIN, "script-think": THINK, "script-tool": CALL}
    if name in scripts:
        return Behaviour("script", scripts[name])
    if name == "script-loop":
        return Behaviour("loop", ("la la", " la"))
    return Behaviour("noise")
