"""How fast an operation could be: the bytes that must move and the arithmetic that must be done, at the rates of the
device. Plain arithmetic, so that every measured time can stand beside its floor.

A floor counts what no implementation can avoid: every distinct input byte once, every output byte once, and the
products that the definition asks for. It leaves out launches and anything that a cache may hide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PAGE = 128
# A float32 scale stands beside every stored fp8 vector.
SCALE_BYTES = 4
BF16, FP8, FP32 = 2, 1, 4
# A weight's, by format: codes of one byte or half of one, and an e8m0 scale of one byte for every 32.
Kind = Literal["bf16", "mxfp8", "mxfp4"]
WEIGHT_BYTES: dict[Kind, float] = {"bf16": 2.0, "mxfp8": 1 + 1 / 32, "mxfp4": 1 / 2 + 1 / 32}


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device sustains: copy bandwidth, read plus write, in bytes/s, and bf16 matrix products in FLOP/s."""

    bytes_per_s: float
    flops_per_s: float


# One H100 SXM, measured as `m3serve bench kernels` measures it: where there is no device, floors assume this one.
H100 = Rates(3.02e12, 790e12)


@dataclass(frozen=True, slots=True)
class Floor:
    """The least work of one call. Data moves while arithmetic runs: the slower of the two counts."""

    num_bytes: float
    flops: float = 0.0

    def us(self, rates: Rates) -> float:
        return 1e6 * max(self.num_bytes / rates.bytes_per_s, self.flops / rates.flops_per_s)

    def kind(self, rates: Rates) -> str:
        """What bounds it: "bytes" or "FLOP"."""
        return "bytes" if self.num_bytes / rates.bytes_per_s >= self.flops / rates.flops_per_s else "FLOP"


@dataclass(frozen=True, slots=True)
class RankShape:
    """Sizes of one rank of the model, in elements. The defaults are one of four tensor-parallel ranks of MiniMax-M3;
    its full vocabulary is 200064."""

    hidden: int = 6144
    heads: int = 16
    kv_heads: int = 1
    index_heads: int = 1
    dim: int = 128
    rotary_dim: int = 64
    topk_blocks: int = 16
    dense_width: int = 3072
    experts: int = 128
    experts_per_token: int = 4
    expert_width: int = 768
    vocab: int = 50016
    full_vocab: int = 200064

    @property
    def qkv_width(self) -> int:
        """Rows of the packed q, k, v, index_q and index_k projection."""
        return (self.heads + 2 * self.kv_heads + self.index_heads + 1) * self.dim

    @property
    def expert_elements(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.expert_width * self.hidden


M3_RANK = RankShape()


def vector_bytes(dim: int, element: int) -> int:
    """Of one stored key, value or index key."""
    return dim * element + (SCALE_BYTES if element == FP8 else 0)


def causal_pairs(queries: int, context: int) -> int:
    """(query, visible key) pairs where the last `queries` of `context` tokens are new."""
    return queries * (context - queries) + queries * (queries + 1) // 2


def selected_pairs(queries: int, context: int, limit: int) -> int:
    """As `causal_pairs`, where a query attends to `limit` keys at most."""
    first = context - queries + 1  # keys that the first query sees
    ramp = max(0, min(context, limit - 1) - first + 1)  # queries that see fewer than the limit
    return ramp * first + ramp * (ramp - 1) // 2 + (queries - ramp) * limit


def indexer_decode(shape: RankShape, batch: int, context: int, element: int = BF16) -> Floor:
    """Every index key of every row is read once; one product each."""
    keys = batch * context
    return Floor(keys * vector_bytes(shape.dim, element), 2 * shape.dim * shape.index_heads * keys)


def sparse_decode(shape: RankShape, batch: int, context: int, element: int = BF16) -> Floor:
    """K and V of the selected blocks are read once."""
    keys = batch * min(context, shape.topk_blocks * PAGE)
    return _attention(shape, keys, keys, batch, element)


def dense_decode(shape: RankShape, batch: int, context: int, element: int = BF16) -> Floor:
    """K and V of the whole context are read once."""
    return _attention(shape, batch * context, batch * context, batch, element)


def indexer_prefill(shape: RankShape, queries: int, context: int) -> Floor:
    """One product per causal (query, key) pair; index keys and queries are read once, choices written once."""
    width = shape.index_heads * (BF16 * shape.dim + FP32 * shape.topk_blocks)
    return Floor(
        context * vector_bytes(shape.dim, BF16) + queries * width,
        2 * shape.dim * shape.index_heads * causal_pairs(queries, context),
    )


def sparse_prefill(shape: RankShape, queries: int, context: int) -> Floor:
    """Each query against the keys of its blocks."""
    pairs = selected_pairs(queries, context, shape.topk_blocks * PAGE)
    return _attention(shape, context, pairs, queries, BF16)


def dense_prefill(shape: RankShape, queries: int, context: int) -> Floor:
    """Each query against all keys before it."""
    return _attention(shape, context, causal_pairs(queries, context), queries, BF16)


def _attention(shape: RankShape, keys: int, pairs: int, queries: int, element: int) -> Floor:
    """keys: stored K and V vectors read once.  pairs: (query, key) pairs, of two products per head each."""
    kv_bytes = 2 * shape.kv_heads * vector_bytes(shape.dim, element) * keys
    q_bytes = 2 * queries * shape.heads * shape.dim * BF16  # q in, the result out
    return Floor(kv_bytes + q_bytes, 4 * shape.heads * shape.dim * pairs)


def block_unions(shape: RankShape, queries: int) -> Floor:
    """The selection is read and the lists are written; they may be as long."""
    return Floor(2 * FP32 * queries * shape.index_heads * shape.topk_blocks)


def qk_norm_rope_insert(shape: RankShape, tokens: int, *, index: bool) -> Floor:
    """The packed row is read and written once, into q and the pages."""
    width = shape.qkv_width - (0 if index else (shape.index_heads + 1) * shape.dim)
    return Floor(2 * BF16 * tokens * width)


def add_rms_norm(shape: RankShape, tokens: int) -> Floor:
    """x and the residual in, the norm and the residual out."""
    return Floor(4 * BF16 * tokens * shape.hidden)


def swiglu(width: int, tokens: int) -> Floor:
    """Gates and ups in, their product out."""
    return Floor(3 * BF16 * tokens * width)


def linear(rows: int, columns: int, tokens: int, kind: Kind = "bf16") -> Floor:
    """A weight [rows, columns] of that format is read once, and so are inputs and outputs."""
    num_bytes = WEIGHT_BYTES[kind] * rows * columns + BF16 * tokens * (rows + columns)
    return Floor(num_bytes, 2 * rows * columns * tokens)


def route(shape: RankShape, tokens: int) -> Floor:
    """The router's weight is fp32."""
    num_bytes = FP32 * shape.experts * shape.hidden + BF16 * tokens * shape.hidden
    return Floor(num_bytes, 2 * tokens * shape.experts * shape.hidden)


def expected_experts(num_experts: int, per_token: int, tokens: int) -> float:
    """Distinct routed experts that `tokens` tokens hit when each picks `per_token` uniformly."""
    return num_experts * (1.0 - (1.0 - per_token / num_experts) ** tokens)


def experts(shape: RankShape, tokens: int, distinct: float | None = None, kind: Kind = "bf16") -> Floor:
    """Weights of the experts that are hit, the shared one among them, are read once. kind: their format.

    distinct: routed experts that are hit; None: as many as uniform routing hits on average.
    """
    if distinct is None:
        distinct = expected_experts(shape.experts, shape.experts_per_token, tokens)
    weights = (distinct + 1) * shape.expert_elements
    flops = 2 * shape.expert_elements * (shape.experts_per_token + 1) * tokens
    return Floor(WEIGHT_BYTES[kind] * weights + BF16 * 2 * tokens * shape.hidden, flops)


def sample(shape: RankShape, batch: int, element: int = BF16) -> Floor:
    """One pass over the gathered logits."""
    return Floor(element * batch * shape.full_vocab)
