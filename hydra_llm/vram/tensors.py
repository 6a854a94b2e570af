"""The tensor table of ``/api/show``: how many bytes each part of a model has.

Bytes of a tensor = elements / elements of a block * bytes of a block, by its ggml type
(ggml's ``type_traits``; Ollama's ``fs/ggml/ggml.go`` of v0.32.15 lists the same).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from hydra_llm.vram.metadata import whole

__all__ = ["BLOCKS", "TensorTable", "bits_per_element", "read_tensors", "tensor_bytes"]

BLOCKS: Mapping[str, tuple[int, int]] = {
    **{name: (1, size) for name, size in (("F64", 8), ("F32", 4), ("F16", 2), ("BF16", 2))},
    **{name: (1, size) for name, size in (("I8", 1), ("I16", 2), ("I32", 4), ("I64", 8))},
    **{"Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24)},
    **{"Q8_0": (32, 34), "Q8_1": (32, 36), "IQ4_NL": (32, 18), "MXFP4": (32, 17)},
    **{"Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176)},
    **{"Q6_K": (256, 210), "Q8_K": (256, 292), "TQ1_0": (256, 54), "TQ2_0": (256, 66)},
    **{"IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74)},
    **{"IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_XS": (256, 136)},
    **{"NVFP4": (64, 36), "Q1_0": (128, 18)},
}
"""Elements and bytes of a block, by ggml type."""

_BLOCK = re.compile(r"blk\.(\d{1,4})\.(.+)")
_PROJECTOR = ("v.", "mm.", "a.")
"""What Ollama counts as projector in a model's own file (``mmprojMemoryRequirement``)."""

_INPUT = ("token_types.", "position_embd.", "token_embd_norm.")
"""What llama.cpp keeps beside the token embedding on the host (``LLM_TENSOR_LAYER_INPUT``)."""


def bits_per_element(kind: str) -> float | None:
    """Bits that a weight of a ggml type takes; None for a type that is not known."""
    block = BLOCKS.get(kind)
    return None if block is None else 8 * block[1] / block[0]


def tensor_bytes(kind: object, shape: object) -> int | None:
    """Bytes of a tensor of a ggml type; None where type or shape make no sense."""
    block = BLOCKS.get(kind) if isinstance(kind, str) else None
    if block is None or not isinstance(shape, list) or not 0 < len(shape) <= 4:
        return None
    sizes = [size for one in shape if (size := whole(one))]
    if len(sizes) != len(shape):
        return None
    return -(-prod(sizes) * block[1] // block[0])


@dataclass(slots=True)
class BlockTensors:
    """What one block (layer) has."""

    bytes: int = 0
    key: int = 0
    """Width of what projects onto its keys; 0 if it has no such tensor."""
    value: int = 0
    fused: bool = False
    """Whether queries, keys and values come from one tensor."""
    latent: bool = False
    recurrent: bool = False
    short_convolution: bool = False
    next_n: bool = False
    """Predicts a further token; loaded for speculative decoding only."""


@dataclass(slots=True)
class TensorTable:
    """A model's tensors by what llama.cpp does with them, in bytes."""

    blocks: list[BlockTensors] = field(default_factory=list)
    output: int = 0
    """The output matrix; 0 for a model that uses its token embedding again."""
    norm: int = 0
    embedding: int = 0
    layer_embedding: int = 0
    inputs: int = 0
    projector: int = 0
    other: int = 0
    vocabulary: int = 0

    @property
    def total(self) -> int:
        """Bytes of all of them, each counted once."""
        parts = (self.output, self.norm, self.embedding, self.layer_embedding, self.inputs)
        return sum(b.bytes for b in self.blocks) + sum(parts) + self.projector + self.other


def read_tensors(tensors: object) -> TensorTable | None:
    """The table; None if there is none, or if an entry of it cannot be understood."""
    if not isinstance(tensors, list) or not tensors:
        return None
    table = TensorTable()
    blocks: dict[int, BlockTensors] = {}
    for entry in tensors:
        name = entry.get("name") if isinstance(entry, dict) else None
        size = tensor_bytes(entry.get("type"), entry.get("shape")) if name else None
        if not isinstance(name, str) or size is None:
            return None
        found = _BLOCK.fullmatch(name)
        if found:
            block = blocks.setdefault(int(found[1]), BlockTensors())
            block.bytes += size
            _note(block, found[2], int(entry["shape"][-1]))
        else:
            _sort(table, name, size, int(entry["shape"][-1]))
    if not blocks or max(blocks) + 1 != len(blocks):
        return None
    table.blocks = [blocks[i] for i in range(len(blocks))]
    return table


def _note(block: BlockTensors, name: str, width: int) -> None:
    if name == "attn_k.weight":
        block.key = width
    elif name == "attn_v.weight":
        block.value = width
    elif name == "attn_qkv.weight":
        block.fused = True
    elif name == "attn_kv_a_mqa.weight":
        block.latent = True
    elif name.startswith(("ssm_", "time_mix_")):
        block.recurrent = True
    elif name.startswith("shortconv."):
        block.short_convolution = True
    elif name.startswith("nextn."):
        block.next_n = True


def _sort(table: TensorTable, name: str, size: int, width: int) -> None:
    if name.startswith("token_embd."):
        table.embedding += size
        table.vocabulary = width
    elif name.startswith("per_layer_token_embd."):
        table.layer_embedding += size
    elif name.startswith(_INPUT):
        table.inputs += size
    elif name.startswith("output_norm."):
        table.norm += size
    elif name.startswith("output."):
        table.output += size
    elif name.startswith(_PROJECTOR):
        table.projector += size
    else:
        table.other += size
