"""Answers of ``/api/show`` as a test wants them."""

from __future__ import annotations

from typing import Any

MIB = 1 << 20

LLAMA = {
    "block_count": 32,
    "embedding_length": 4096,
    "context_length": 131_072,
    "attention.head_count": 32,
    "attention.head_count_kv": 8,
    "attention.key_length": 128,
    "attention.value_length": 128,
    "feed_forward_length": 14_336,
    "vocab_size": 128_256,
}
LLAMA_BYTES = 4_920_753_328


def show(architecture: str, tensors: list[dict[str, Any]] | None = None, **more: Any) -> Any:
    """``more`` are ``model_info`` with ``__`` for each dot."""
    info = {f"{architecture}.{key.replace('__', '.')}": value for key, value in more.items()}
    answer: dict[str, Any] = {"model_info": {"general.architecture": architecture, **info}}
    if tensors is not None:
        answer["tensors"] = tensors
    return answer


def llama(**more: Any) -> Any:
    told: dict[str, Any] = {key.replace(".", "__"): value for key, value in LLAMA.items()}
    return show("llama", **(told | more))


def tensor(name: str, *shape: int, kind: str = "F16") -> dict[str, Any]:
    return {"name": name, "type": kind, "shape": list(shape)}


def attention(i: int, key: int, value: int | None = None) -> list[dict[str, Any]]:
    """A layer's projections onto keys and values."""
    found = [tensor(f"blk.{i}.attn_k.weight", 64, key)]
    return [*found, tensor(f"blk.{i}.attn_v.weight", 64, value)] if value else found
