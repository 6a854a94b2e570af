"""Where a model's weights go: the GPU's part block by block, what the host keeps, the projector.

llama.cpp puts all blocks and the output on the GPU and leaves the token embedding, from which it
only picks rows, on the host. A model without an output matrix uses its token embedding as one,
and the GPU gets a copy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hydra_llm.vram.layers import ENCODERS
from hydra_llm.vram.metadata import Metadata
from hydra_llm.vram.tensors import TensorTable, bits_per_element

__all__ = ["Weights", "read_weights"]

TIED = frozenset(
    "gemma gemma2 gemma3 gemma3n gemma4 cohere2 command-r granite granitemoe granitehybrid "
    "lfm2 lfm2moe".split()
)
"""Architectures without an output matrix: llama.cpp's loader makes none for Gemma and Command R,
and the published Granite and LFM2 have none."""

TIED_BELOW_PARAMETERS = 5_000_000_000
"""Published models of the other families share the embedding below about this size (Llama 3.2 3B,
Qwen 3 4B and Phi 4 mini do, Llama 3.1 8B and Qwen 3 8B do not). Used where nothing else tells."""

LARGEST_VOCABULARY = 270_000
"""Gemma's 262 144 is the largest in use: what looks larger is two matrices."""

USUAL_BITS = 4.85
"""Bits a weight at Q4_K_M, Ollama's default."""

TOKENIZER_BYTES = {True: 46, False: 23}
"""Of a vocabulary's entry: text with its length, type, and a merge if there are merges, a score
if there are none."""

PROJECTOR_LEAST_BYTES = 32 << 20
"""Less than this, left over beside the tensors, is a tokenizer and a licence."""

MISCOUNT = 0.02
"""A table whose bytes exceed the file's by more than this is not that file's."""

UNTOLD = 0.1
"""Nor is one that lacks more than this of the file, a projector and a vocabulary aside."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's weights in bytes, by where they go when all layers are on the GPU."""

    blocks: tuple[int, ...] = ()
    """Each block's, first to last; without a tensor table equal shares."""
    head: int = 0
    """Output matrix, or the copy of the embedding, and the last norm."""
    other: int = 0
    """What else the GPU holds."""
    embedding: int = 0
    """Token embedding, on the host; 0 where it is not known."""
    layer_embedding: int = 0
    """Per-layer embedding, on the host."""
    inputs: int = 0
    """What else the host holds."""
    projector: int = 0
    tied: bool = False
    low: int = 0
    """The least that the GPU's part can be."""
    high: int = 0
    """The most that it can be, projector left out."""
    exact: bool = False
    source: str = ""

    @property
    def gpu(self) -> int:
        """What the GPU holds of the language model."""
        return sum(self.blocks) + self.head + self.other

    @property
    def host(self) -> int:
        """What stays in system memory."""
        return self.embedding + self.layer_embedding + self.inputs

    @property
    def all(self) -> int:
        """All tensors once, as a node without a GPU holds them."""
        return self.gpu + self.host - (self.embedding if self.tied else 0)

    def known(self, gpu_bytes: int) -> Weights:
        """The same with the GPU's part as it was logged or measured."""
        scale = gpu_bytes / self.gpu if self.gpu else 1.0
        blocks = tuple(int(one * scale) for one in self.blocks)
        head = int(self.head * scale)
        return replace(
            self,
            blocks=blocks,
            head=head,
            other=gpu_bytes - sum(blocks) - head,
            low=gpu_bytes,
            high=gpu_bytes,
            exact=True,
            source="given by the caller",
        )


def read_weights(about: Metadata, table: TensorTable | None, size: int, layers: int) -> Weights:
    """From the tensor table if it is this file's, else from the file's size."""
    if table is not None and len(table.blocks) >= layers and _is_of_file(about, table, size):
        return _tabled(about, table, size, layers)
    return _sized(about, table, size, layers)


def _is_of_file(about: Metadata, table: TensorTable, size: int) -> bool:
    """Whether a tensor table accounts for the file's size."""
    if not size:
        return True
    untold = size - table.total
    most = size * UNTOLD + 3 * _tokenizer_bytes(about, table.vocabulary)
    return -untold <= size * MISCOUNT and (untold <= most or _has_projector(about))


def _tabled(about: Metadata, table: TensorTable, size: int, layers: int) -> Weights:
    encoder = about.architecture in ENCODERS
    tied = not table.output and not encoder
    # Blocks that predict further tokens are loaded with a draft only; which releases load them
    # all the same is not known, so they are in the upper bound.
    further = sum(block.bytes for block in table.blocks if block.next_n)
    loaded = [0 if block.next_n else block.bytes for block in table.blocks]
    blocks, other = tuple(loaded[:layers]), table.other + sum(loaded[layers:])
    head = table.norm + (table.embedding if tied else table.output)
    projector = table.projector
    rest = size - table.total
    if not projector and _has_projector(about) and rest > PROJECTOR_LEAST_BYTES:
        projector = rest - _tokenizer_bytes(about, table.vocabulary)
    gpu = sum(blocks) + head + other
    return Weights(
        blocks=blocks,
        head=head,
        other=other,
        embedding=table.embedding,
        layer_embedding=table.layer_embedding,
        inputs=table.inputs,
        projector=projector,
        tied=tied,
        low=gpu,
        high=gpu + further,
        exact=True,
        source="tensor table of /api/show",
    )


def _sized(about: Metadata, table: TensorTable | None, size: int, layers: int) -> Weights:
    vocabulary = about.whole("vocab_size") or (table.vocabulary if table else 0)
    width = about.whole("embedding_length") or 0
    encoder = about.architecture in ENCODERS
    tied = not encoder and _is_tied(about, size, vocabulary * width, layers)
    if not vocabulary and width:
        vocabulary = _rest_parameters(about, layers) // width // (1 if tied else 2)
    bits = _bits(about)
    # The tokenizer is in the file and in no tensor. Without a word of it in the metadata it is
    # taken for absent, which errs upwards.
    tensors = max(0, size - _tokenizer_bytes(about, vocabulary))
    embedding = min(int(vocabulary * width * bits / 8), tensors // 2)
    per_layer = (about.whole("embedding_length_per_layer_input") or 0) * layers
    layer_embedding = min(int(vocabulary * per_layer * bits / 8), tensors // 2)
    projector = min(_vision_bytes(about), tensors // 2)
    gpu = max(0, tensors - layer_embedding - projector - (0 if tied else embedding))
    head = 0 if encoder else min(embedding, gpu)
    each, left = divmod(gpu - head, layers) if layers else (0, gpu - head)
    known = bool(vocabulary and width)
    # The other answer to whether it is tied, and an embedding of 16 bits, may be the truth.
    wide = 2 * vocabulary * (width + per_layer) if known else tensors // 5
    least = tensors - projector - min(wide, tensors // 2)
    return Weights(
        blocks=(each,) * layers,
        head=head,
        other=left,
        embedding=embedding,
        layer_embedding=layer_embedding,
        projector=projector,
        tied=tied,
        low=max(0, min(least, gpu)),
        high=max(size, gpu),
        source="file size less the token embedding" if gpu < tensors else "file size",
    )


def _has_projector(about: Metadata) -> bool:
    if isinstance(about.show.get("projector_info"), dict) and about.show["projector_info"]:
        return True
    told = about.show.get("capabilities")
    return isinstance(told, list) and ("vision" in told or "audio" in told)


def _tokenizer_bytes(about: Metadata, vocabulary: int) -> int:
    return vocabulary * TOKENIZER_BYTES[about.has_merges] if about.has_tokenizer else 0


def _vision_bytes(about: Metadata) -> int:
    """
    An image encoder inside the file, at 16 bits: ``4 e² + 2 e f`` a block.

    Attention's four matrices and the two of the feed-forward network; what joins it to the
    language model is left out.
    """
    width = about.whole("vision.embedding_length") or 0
    feed_forward = about.whole("vision.feed_forward_length") or 4 * width
    blocks = about.whole("vision.block_count", 1024) or 0
    return 2 * blocks * (4 * width * width + 2 * width * feed_forward)


def _type_of(level: str) -> str:
    """The ggml type that most tensors of a quantisation level have: Q4_K for Q4_K_M."""
    parts = level.split("_")
    if len(parts) == 3 and parts[2] in {"S", "M", "L", "XL"}:
        return "_".join(parts[:2])
    # The original MXFP4 models keep their embeddings as they were.
    return "BF16" if level.startswith("MXFP4") else level


def _bits(about: Metadata) -> float:
    return bits_per_element(_type_of(about.quantization)) or USUAL_BITS


def _is_tied(about: Metadata, size: int, embedding: int, layers: int) -> bool:
    """Whether the output matrix is the token embedding, judged without a tensor table."""
    if about.architecture in TIED:
        return True
    body = _body_parameters(about, layers)
    parameters = about.general("parameter_count", 1 << 50)
    if body and embedding and parameters:
        return abs(parameters - body - embedding) < abs(parameters - body - 2 * embedding)
    width = about.whole("embedding_length") or 0
    if not embedding and _rest_parameters(about, layers) > LARGEST_VOCABULARY * width > 0:
        return False
    bits = bits_per_element(_type_of(about.quantization))
    if body and embedding and bits and not about.quantization.startswith("MXFP4"):
        most = bits * _richest(about.quantization)
        off = [_outside(8 * size / (body + times * embedding), bits, most) for times in (1, 2)]
        if off[0] != off[1]:
            return off[0] < off[1]
    return 8 * size / (bits or USUAL_BITS) < TIED_BELOW_PARAMETERS


def _rest_parameters(about: Metadata, layers: int) -> int:
    """Weights of a plain transformer outside of its blocks: one matrix of the vocabulary or two."""
    body = _body_parameters(about, layers)
    rest = (about.general("parameter_count", 1 << 50) or 0) - body if body else 0
    width = about.whole("embedding_length") or 0
    return rest if 0 < rest <= 2 * LARGEST_VOCABULARY * width else 0


def _richest(level: str) -> float:
    """How many times the bits of its main type a file of a level has at most."""
    if level.endswith(("_M", "_L", "_XL")):
        return 1.14  # half of some matrices have two bits more, and the output has
    return 1.06 if level.startswith("Q") and not level.startswith("Q8") else 1.01


def _outside(value: float, low: float, high: float) -> float:
    return max(low - value, value - high, 0.0)


def _body_parameters(about: Metadata, layers: int) -> int:
    """Weights of all blocks of a plain transformer; 0 for any other, or where a figure lacks."""
    if any(key in about for key in ("ssm.inner_size", "shortconv.l_cache", "wkv.head_size")):
        return 0
    width = about.whole("embedding_length") or 0
    heads = about.whole("attention.head_count") or 0
    if not width or not heads or about.whole("attention.kv_lora_rank"):
        return 0
    kv_heads = about.whole("attention.head_count_kv") or heads
    key = about.whole("attention.key_length") or width // heads
    value = about.whole("attention.value_length") or width // heads
    attention = width * (heads * (key + value) + kv_heads * (key + value))
    experts = about.whole("expert_count") or 0
    if experts:
        each = about.whole("expert_feed_forward_length") or about.whole("feed_forward_length") or 0
        feed_forward = experts * (3 * width * each + width)
    else:
        feed_forward = 3 * width * (about.whole("feed_forward_length") or 0)
    return layers * (attention + feed_forward) if feed_forward else 0
