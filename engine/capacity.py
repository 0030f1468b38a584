"""What a rank keeps in memory, from config.json and the settings alone: no weights, no torch.

Weights and pages are exact: the model sizes its pages with `page_bytes`, and a rank's weights equal what it loads.
Buffers are exact but for rounding by the allocator. What a step needs on top, and what the device's runtime keeps for
itself, are estimates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from engine.model_config import PAGE_SIZE, ModelConfig
from engine.quant_config import Format, QuantConfig

GIB = 2**30
# Share of the memory that is free once the weights are loaded, for pages. The rest is for activations and graphs, and
# on CPU for the other processes of the machine.
CPU_MEMORY_FRACTION = 0.5
GPU_MEMORY_FRACTION = 0.85

# The most that a rank sends of a sum by kernels. From there on NCCL, which sends each number once, is faster.
ONE_SHOT_BYTES = 2**20
SAMPLE_CHUNK = 1024  # tokens of which a captured step names a winner
MX_GROUP = 32  # numbers that share one scale byte, along a row of a weight
FP8_SCALE_BYTES = 4  # beside every stored fp8 vector
FLOAT32 = 4
# The most that the scores of an indexer take at a time.
_SCORE_BYTES = 48 * 2**20
# Sampling by top_p alone sorts the vocabulary, so many elements at a time, with keys, indices and sums of 64 bits.
_SORTED_ELEMENTS, _SORTED_BYTES = 2**24, 80
# Memory of a device, as its driver reports it to a process.
DEVICES = {
    name: int(gib * GIB)
    for name, gib in {
        "mi300x": 191.98,
        "mi325x": 255.98,
        "mi350x": 287.98,
        "mi355x": 287.98,
        "h100": 79.1,
        "h200": 139.8,
    }.items()
}
# What the device's runtime keeps for itself: context, code and workspaces of libraries; in a group, buffers of
# collectives too. Estimates.
_RUNTIME_BYTES, _GROUP_BYTES = 3 * GIB // 4, GIB

FormatOf = Callable[[str], Format | None]


def unquantised(name: str) -> Format | None:
    """Every weight is of a plain dtype."""
    return None


def stored_formats(model: ModelConfig) -> FormatOf:
    """What config.json says about the linear layer of a name."""
    return unquantised if model.quantization is None else model.quantization.format_of


# How the released checkpoints store the linear layer of a name: MiniMaxAI/MiniMax-M3, its -MXFP8, and
# amd/MiniMax-M3-MXFP4, of which only the routed experts are block-scaled.
RELEASED: dict[str, FormatOf] = {
    "bf16": unquantised,
    "mxfp8": QuantConfig("mxfp8").format_of,
    "mxfp4": QuantConfig(None, (("block_sparse_moe.experts", "mxfp4"),)).format_of,
}


@dataclass(frozen=True, slots=True)
class WeightPart:
    """One tensor of the checkpoint, or all experts' of one projection, and the part of it that a rank takes.

    copies: how many there are; `name` is the first's (the others are stored like it).
    kind: "linear" may be stored in a block-scaled format; "table" (embedding, output head) has the compute dtype;
    "norm" and "router" are float32 on the rank, and on disk the router too.
    shape, local: of the whole tensor and of the rank's part.
    """

    name: str
    kind: Literal["linear", "table", "norm", "router"]
    shape: tuple[int, ...]
    local: tuple[int, ...]
    copies: int = 1

    @property
    def group(self) -> str:
        """What it belongs to, for people."""
        if self.kind != "linear":
            return "embedding and head" if self.kind == "table" else "norms and routers"
        return "attention" if ".self_attn." in self.name else "experts" if ".experts." in self.name else "other MLPs"


def split_error(model: ModelConfig, ranks: int) -> str | None:
    """Why the model cannot be split evenly over so many ranks; None where it can."""
    for name, count in (
        ("num_attention_heads", model.num_attention_heads),
        ("intermediate_size", model.intermediate_size),
        ("dense_intermediate_size", model.dense_intermediate_size),
        ("shared_intermediate_size", model.shared_intermediate_size),
        ("vocab_size", model.vocab_size),
    ):
        if count % ranks:
            return f"tensor_parallel_size={ranks} does not divide {name}={count}"
    for name, count in (
        ("num_key_value_heads", model.num_key_value_heads),
        ("sparse_num_index_heads", model.num_index_heads),
    ):
        if count % ranks and ranks % count:
            return f"tensor_parallel_size={ranks} and {name}={count}: one must divide the other"
    return None


def local_heads(num_heads: int, ranks: int) -> int:
    """How many of `num_heads` a rank holds; more ranks than heads hold copies."""
    return max(1, num_heads // ranks)


def weight_parts(model: ModelConfig, *, index_layers: Sequence[bool], ranks: int = 1) -> Iterator[WeightPart]:
    """All tensors of the text decoder. index_layers: which layers have an indexer of their own."""
    hidden, dim = model.hidden_size, model.head_dim
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads

    def rows(name: str, count: int, local: int, copies: int = 1) -> WeightPart:
        return WeightPart(f"{name}.weight", "linear", (count, hidden), (local, hidden), copies)

    def mlp(prefix: str, names: tuple[str, str, str], width: int, copies: int = 1) -> Iterator[WeightPart]:
        gate, up, down = names
        yield rows(f"{prefix}{gate}", width, width // ranks, copies)
        yield rows(f"{prefix}{up}", width, width // ranks, copies)
        yield WeightPart(f"{prefix}{down}.weight", "linear", (hidden, width), (hidden, width // ranks), copies)

    def norm(name: str, size: int) -> WeightPart:
        return WeightPart(f"{name}.weight", "norm", (size,), (size,))

    vocab = (model.vocab_size, hidden), (model.vocab_size // ranks, hidden)
    yield WeightPart("model.embed_tokens.weight", "table", *vocab)
    yield WeightPart("lm_head.weight", "table", *vocab)
    yield norm("model.norm", hidden)
    for layer_id in range(model.num_hidden_layers):
        layer = f"model.layers.{layer_id}."
        attention = f"{layer}self_attn."
        yield from (norm(f"{layer}input_layernorm", hidden), norm(f"{layer}post_attention_layernorm", hidden))
        yield rows(f"{attention}q_proj", heads * dim, heads // ranks * dim)
        for name in ("k_proj", "v_proj"):
            yield rows(f"{attention}{name}", kv_heads * dim, local_heads(kv_heads, ranks) * dim)
        out = (hidden, heads * dim), (hidden, heads * dim // ranks)
        yield WeightPart(f"{attention}o_proj.weight", "linear", *out)
        yield from (norm(f"{attention}{name}_norm", dim) for name in ("q", "k"))
        if index_layers[layer_id]:
            count, size = model.num_index_heads, model.index_dim
            yield rows(f"{attention}index_q_proj", count * size, local_heads(count, ranks) * size)
            yield rows(f"{attention}index_k_proj", size, size)
            yield from (norm(f"{attention}index_{name}_norm", size) for name in ("q", "k"))
        if not model.is_moe[layer_id]:
            yield from mlp(f"{layer}mlp.", ("gate_proj", "up_proj", "down_proj"), model.dense_intermediate_size)
            continue
        moe, num_experts = f"{layer}block_sparse_moe.", model.num_local_experts
        yield WeightPart(f"{moe}gate.weight", "router", (num_experts, hidden), (num_experts, hidden))
        yield WeightPart(f"{moe}e_score_correction_bias", "router", (num_experts,), (num_experts,))
        yield from mlp(f"{moe}experts.0.", ("w1", "w3", "w2"), model.intermediate_size, num_experts)
        names = ("gate_proj", "up_proj", "down_proj")
        yield from mlp(f"{moe}shared_experts.", names, model.shared_intermediate_size)


def weight_bytes(shape: Sequence[int], element: int, stored: Format | None) -> int:
    """Of a linear layer's weight. element: bytes of a number where it has no block-scaled format."""
    size = math.prod(shape)
    if stored is None:
        return size * element
    return size // (2 if stored == "mxfp4" else 1) + size // MX_GROUP


def checkpoint_bytes(model: ModelConfig, format_of: FormatOf = unquantised, *, element: int = 2) -> int:
    """Of all tensors of the text decoder on disk. element: bytes of a number of the checkpoint's plain dtype."""
    total = 0
    for part in weight_parts(model, index_layers=model.is_sparse):
        stored = format_of(part.name) if part.kind == "linear" else None
        total += part.copies * weight_bytes(part.shape, FLOAT32 if part.kind == "router" else element, stored)
    return total


def vector_bytes(dim: int, element: int) -> int:
    """Of one stored key, value or index key; an fp8 one has a float32 scale."""
    return dim * element + (FP8_SCALE_BYTES if element == 1 else 0)


def kv_token_bytes(model: ModelConfig, ranks: int, kv_element: int) -> int:
    """Keys and values of one token over all layers, on one rank. kv_element: bytes of a stored number."""
    kv_heads = local_heads(model.num_key_value_heads, ranks)
    return model.num_hidden_layers * 2 * kv_heads * vector_bytes(model.head_dim, kv_element)


def index_token_bytes(model: ModelConfig, index_layers: int, index_element: int) -> int:
    """Index keys of one token, over the layers that own an indexer; every rank has all of them."""
    return index_layers * vector_bytes(model.index_dim, index_element)


def page_bytes(model: ModelConfig, ranks: int, index_layers: int, kv_element: int, index_element: int) -> int:
    """Of one page over all layers, on one rank."""
    token = kv_token_bytes(model, ranks, kv_element) + index_token_bytes(model, index_layers, index_element)
    return PAGE_SIZE * token


def pages_of(num_tokens: int) -> int:
    """Pages that so many tokens of one request fill."""
    return -(-num_tokens // PAGE_SIZE)


def useful_pages(max_num_seqs: int, max_model_len: int) -> int:
    """More pages than all sequences can fill are of no use but to the prefix cache: it gets as many again."""
    return 2 * max_num_seqs * pages_of(max_model_len)


def page_budget(free_bytes: int, fraction: float, reserved_bytes: int) -> int:
    """What pages may take of the memory that is free once the weights are loaded: `fraction` of it, and not what a
    step needs."""
    return max(0, min(int(free_bytes * fraction), free_bytes - reserved_bytes))


def decode_buckets(max_num_seqs: int) -> list[int]:
    """Batch sizes of captured decode steps: 1, 2, 4, 8, then every multiple of 8, up to and including max_num_seqs."""
    sizes = [1, 2, 4, *range(8, max_num_seqs + 1, 8)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def exchange_rows(ranks: int, hidden_size: int, element: int, max_rows: int) -> int:
    """Up to how many rows of hidden states ranks exchange by kernels. element: bytes of a number.  max_rows: of a
    decode step."""
    return min(max_rows, ONE_SHOT_BYTES // ((ranks - 1) * hidden_size * element))


def exchange_bytes(ranks: int, hidden_size: int, element: int, max_rows: int, vocab: int) -> int:
    """Of the buffers in which a rank gets the other ranks' words, each of which takes twice its size, two exchanges at
    a time. vocab: tokens of a rank's share."""
    rows = exchange_rows(ranks, hidden_size, element, max_rows)
    winners = 3 * FLOAT32 * -(-vocab // SAMPLE_CHUNK)
    return 2 * ranks * 2 * (rows * hidden_size * element + max_rows * winners)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one rank of a replica takes. Bytes.

    plan: one letter per layer, D, F or S.  audited: S layers keep indexers too.  ranks: of one replica.
    element, kv_element, index_element: bytes of a number in the compute dtype, of a stored key or value, of a stored
    index key.  format_of: how the checkpoint stores the linear layer of that name.
    captured: decode steps run as captured graphs.  guarded: those of a second index plan too.
    """

    model: ModelConfig
    plan: str
    ranks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    element: int = 2
    kv_element: int = 2
    index_element: int = 2
    audited: bool = False
    format_of: FormatOf = unquantised
    captured: bool = True
    guarded: bool = False

    def split_error(self) -> str | None:
        """Why the model, stored like this, cannot be split over the ranks; None where it can."""
        if error := split_error(self.model, self.ranks):
            return error
        for part in weight_parts(self.model, index_layers=self.index_layers, ranks=self.ranks):
            if part.kind == "linear" and part.local[-1] % MX_GROUP and self.format_of(part.name):
                return (
                    f"tensor_parallel_size={self.ranks}: each rank would take {part.local[-1]} columns of {part.name}, "
                    f"and {MX_GROUP} share a scale"
                )
        return None

    @property
    def index_layers(self) -> tuple[bool, ...]:
        """Which layers own an indexer, with its weights and index keys."""
        return tuple(role == "F" or (self.audited and role == "S") for role in self.plan)

    def weights(self) -> dict[str, int]:
        """By group, as the rank holds them."""
        groups: Counter[str] = Counter()
        for part in weight_parts(self.model, index_layers=self.index_layers, ranks=self.ranks):
            element = self.element if part.kind in ("linear", "table") else FLOAT32
            stored = self.format_of(part.name) if part.kind == "linear" else None
            groups[part.group] += part.copies * weight_bytes(part.local, element, stored)
        return dict(groups)

    def kv_token_bytes(self) -> int:
        return kv_token_bytes(self.model, self.ranks, self.kv_element)

    def index_token_bytes(self) -> int:
        return index_token_bytes(self.model, sum(self.index_layers), self.index_element)

    def page_bytes(self) -> int:
        return PAGE_SIZE * (self.kv_token_bytes() + self.index_token_bytes())

    def request_bytes(self) -> int:
        """Pages of one request of max_model_len tokens."""
        return pages_of(self.max_model_len) * self.page_bytes()

    def buffer_bytes(self) -> int:
        """Made at load and kept: the table of rotations, the step's selection, block tables."""
        model, tokens, rows = self.model, self.max_num_batched_tokens, self.max_num_seqs
        rotations = self.max_model_len * model.rotary_dim * FLOAT32
        # The blocks of each token, and the unions of neighbouring tokens' blocks; a group of a row may be unfinished.
        sets = 2 + (self.audited and "S" in self.plan)
        selection = sets * local_heads(model.num_index_heads, self.ranks) * (tokens + 4 * rows) * model.topk_blocks * 4
        # Two block tables: that of the slots, and that which captured steps read.
        tables = 2 * 4 * rows * pages_of(self.max_model_len)
        if self.ranks == 1:
            return rotations + selection + tables
        share = model.vocab_size // self.ranks
        return rotations + selection + tables + exchange_bytes(self.ranks, model.hidden_size, self.element, rows, share)

    def _layer_bytes(self, tokens: int) -> int:
        """Tensors that are alive at the widest place of a layer."""
        model, ranks = self.model, self.ranks
        dim, heads = model.head_dim, model.num_attention_heads // ranks
        kv_heads, index_heads = (local_heads(n, ranks) for n in (model.num_key_value_heads, model.num_index_heads))
        # The residual stream, the layer's input and its norm, and the output that is being made.
        stream = 4 * model.hidden_size
        attention = (3 * heads + 2 * kv_heads) * dim + (2 * index_heads + 1) * model.index_dim
        dense = 3 * model.dense_intermediate_size // ranks
        moe = (model.num_experts_per_tok + 1) * (model.hidden_size + model.intermediate_size // ranks)
        widest = stream + max(attention, dense, moe)
        return tokens * self.element * widest + _SCORE_BYTES + self._scratch_bytes()

    def _scratch_bytes(self) -> int:
        """Products of many tokens read a block-scaled weight that is not an expert's as plain numbers, made for the
        while; the largest is two parts in one, gate and up."""
        parts = weight_parts(self.model, index_layers=self.index_layers, ranks=self.ranks)
        dense = [part for part in parts if part.kind == "linear" and part.copies == 1 and self.format_of(part.name)]
        return max((2 * self.element * math.prod(part.local) for part in dense), default=0)

    def _logit_bytes(self, rows: int) -> int:
        """The ranks' logits, side by side and in float32 for sampling, and what sorting them takes."""
        size = rows * self.model.vocab_size
        gathered = 1 if self.ranks == 1 else 2
        return size * (gathered * self.element + 2 * FLOAT32) + _SORTED_BYTES * min(_SORTED_ELEMENTS, size)

    def activation_bytes(self) -> int:
        """The most that a step which runs operation by operation needs: a full one, or its sampling. An estimate."""
        tokens = max(self.max_num_batched_tokens, self.max_num_seqs)
        hidden = tokens * self.model.hidden_size * self.element
        return max(self._layer_bytes(tokens), hidden + self._logit_bytes(self.max_num_seqs))

    def graph_bytes(self) -> int:
        """What captured decode steps keep: the tensors of the largest, and every bucket's logits. An estimate."""
        if not self.captured:
            return 0
        plans = 1 + (self.guarded and "S" in self.plan)
        share = self.model.vocab_size // self.ranks
        logits = plans * sum(decode_buckets(self.max_num_seqs)) * share * self.element
        return self._layer_bytes(self.max_num_seqs) + logits

    def step_bytes(self) -> int:
        """What a step needs beside weights, buffers and pages."""
        return self.activation_bytes() + self.graph_bytes()


@dataclass(frozen=True, slots=True)
class Fit:
    """A footprint on a device. Bytes of one rank.

    fixed_bytes: buffers, and what the device's runtime keeps.  free_bytes: once weights and these are there.
    step_bytes: of it, what a step needs.  pool_bytes: of it, what pages may take.
    num_pages: that so much makes, whether or not max_num_seqs sequences can fill them.
    reason: why it does not fit, with the sum; None where it fits.
    """

    footprint: Footprint
    memory_bytes: int
    weight_bytes: int
    fixed_bytes: int
    free_bytes: int
    step_bytes: int
    pool_bytes: int
    num_pages: int
    reason: str | None

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values the pages hold."""
        return self.num_pages * PAGE_SIZE

    @property
    def full_requests(self) -> int:
        """Requests of max_model_len tokens that run at the same time, were max_num_seqs no limit."""
        return self.num_pages // pages_of(self.footprint.max_model_len)


def fit(footprint: Footprint, weights: int, memory_bytes: int, fraction: float = GPU_MEMORY_FRACTION) -> Fit:
    """How many pages a device leaves for a rank. weights: bytes of the rank's, the sum of `Footprint.weights`."""
    page, step = footprint.page_bytes(), footprint.step_bytes()
    runtime = _RUNTIME_BYTES + (_GROUP_BYTES if footprint.ranks > 1 else 0)
    fixed = footprint.buffer_bytes() + runtime
    free = memory_bytes - weights - fixed
    pool = page_budget(free, fraction, step)
    request = footprint.request_bytes()
    reason = None
    if free <= 0:
        reason = f"weights {gib(weights)} + buffers and runtime {gib(fixed)} exceed {gib(memory_bytes)}"
    elif pool < request:
        limit = f"a step takes {gib(step)}" if free - step < int(free * fraction) else f"pages get {fraction:g} of that"
        reason = (
            f"{gib(memory_bytes)} - weights {gib(weights)} - buffers and runtime {gib(fixed)} = {gib(free)}; {limit}: "
            f"{gib(pool)} for pages, and one request of {footprint.max_model_len:,} tokens needs {gib(request)} "
            f"(max_model_len={pool // page * PAGE_SIZE} would fit)"
        )
    return Fit(footprint, memory_bytes, weights, fixed, max(0, free), step, pool, pool // page, reason)


def gib(num_bytes: int) -> str:
    """For messages."""
    return f"{num_bytes / GIB:.1f} GiB"
