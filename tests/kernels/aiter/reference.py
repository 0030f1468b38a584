"""What AITER's functions do, element by element, on CPU: their checks, layouts and arithmetic in the place of a GPU.

Written from what AITER's sources check and say: which shapes, dtypes and strides each function accepts, and what it
then reads and writes. They share no code with the adapters that they test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.kernels.aiter.signatures import Source


@dataclass
class Aiter:
    """AITER as one source has it. calls: (path, names that were passed) of every call, each bound to its signature.

    A function exists when `source` has its signature; calling one that has no implementation here is a KeyError.
    """

    source: Source
    calls: list[tuple[str, frozenset[str]]] = field(default_factory=list)

    def lookup(self, module: str, name: str) -> Callable[..., Any]:
        path = f"{module}.{name}"
        signature = self.source.signature(path)

        def function(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            self.calls.append((path, frozenset(bound.arguments)))
            return IMPLEMENTED[path](**bound.arguments)

        function.__signature__ = signature  # type: ignore[attr-defined]
        return function


def _rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x: float32 [dim].  cos_sin: [rotary_dim], cosines then sines."""
    half = len(cos_sin) // 2
    cos, sin = cos_sin[:half].float(), cos_sin[half:].float()
    low, high, rest = x[:half], x[half : 2 * half], x[2 * half :]
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest))


def fused_qknorm_idxrqknorm(
    qkv: Tensor,
    q_norm_weight: Tensor,
    k_norm_weight: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    num_heads: int,
    num_kv_heads: int,
    rotary_dim: int,
    eps: float,
    index_q_norm_weight: Tensor | None,
    index_k_norm_weight: Tensor | None,
    num_index_heads: int,
    slot_mapping: Tensor,
    kv_cache_k: Tensor,
    kv_cache_v: Tensor,
    index_cache: Tensor | None,
    block_size: int,
    q_out: Tensor,
    index_q_out: Tensor | None,
    index_slot_mapping: Tensor | None,
    kv_cache_dtype: str,
    index_cache_dtype: str,
    asm_layout: bool,
) -> None:
    """With asm_layout and without fp8: the only mode that is used here."""
    assert asm_layout and kv_cache_dtype == index_cache_dtype == "auto"
    dim = 128
    has_index = num_index_heads > 0
    width = num_heads + 2 * num_kv_heads + (num_index_heads + 1 if has_index else 0)
    num_tokens = len(qkv)
    assert qkv.is_contiguous() and qkv.shape == (num_tokens, width * dim) and qkv.dtype == torch.bfloat16
    for name, each in (("positions", positions), ("slot_mapping", slot_mapping)):
        assert each.is_contiguous() and each.dtype == torch.int64 and each.shape[0] >= num_tokens, name
    assert cos_sin_cache.is_contiguous() and cos_sin_cache.dtype == qkv.dtype and cos_sin_cache.shape[1] == rotary_dim
    assert rotary_dim % 8 == 0 and 0 < rotary_dim <= dim
    weights = [q_norm_weight, k_norm_weight]
    if has_index:
        assert index_q_norm_weight is not None and index_k_norm_weight is not None
        assert index_cache is not None and index_q_out is not None and index_slot_mapping is not None
        weights += [index_q_norm_weight, index_k_norm_weight]
        assert index_cache.is_contiguous() and index_cache.dtype == qkv.dtype
        assert index_cache.numel() >= kv_cache_k.shape[0] * block_size * dim
        assert index_q_out.is_contiguous() and index_q_out.dtype == qkv.dtype
        assert index_q_out.numel() == num_tokens * num_index_heads * dim
    else:
        assert index_q_out is None and index_cache is None
    assert all(each.is_contiguous() and each.shape == (dim,) and each.dtype == qkv.dtype for each in weights)
    assert q_out.is_contiguous() and q_out.dtype == qkv.dtype and q_out.numel() == num_tokens * num_heads * dim
    x = 16 // kv_cache_k.element_size()
    assert kv_cache_k.dtype == kv_cache_v.dtype == qkv.dtype
    assert kv_cache_k.is_contiguous() and kv_cache_v.is_contiguous()
    assert kv_cache_k.shape[1:] == (num_kv_heads, dim // x, block_size, x)
    assert kv_cache_v.shape == (len(kv_cache_k), num_kv_heads, block_size // x, dim, x)

    def normed(values: Tensor, weight: Tensor, token: int) -> Tensor:
        values = values.float()
        values = values * torch.rsqrt(values.square().mean() + eps) * (1.0 + weight.float())
        return _rope(values, cos_sin_cache[positions[token]]).to(qkv.dtype)

    d = torch.arange(dim)
    heads = qkv.view(num_tokens, width, dim)
    q_rows = q_out.view(num_tokens, num_heads, dim)
    first_k, first_v, first_index = num_heads, num_heads + num_kv_heads, num_heads + 2 * num_kv_heads
    for token in range(num_tokens):
        for head in range(num_heads):
            q_rows[token, head] = normed(heads[token, head], q_norm_weight, token)
        slot = int(slot_mapping[token])
        block, offset = slot // block_size, slot % block_size
        for head in range(num_kv_heads if slot >= 0 else 0):
            k = normed(heads[token, first_k + head], k_norm_weight, token)
            v = heads[token, first_v + head]
            kv_cache_k[block, head, d // x, offset, d % x] = k
            kv_cache_v[block, head, offset // x, d, offset % x] = v
        if not has_index:
            continue
        for head in range(num_index_heads):
            index_q_out.view(num_tokens, num_index_heads, dim)[token, head] = normed(
                heads[token, first_index + head], index_q_norm_weight, token
            )
        slot = int(index_slot_mapping[token])
        if slot >= 0:
            index_k = normed(heads[token, first_index + num_index_heads], index_k_norm_weight, token)
            index_cache.view(-1, dim)[slot] = index_k


def pa_decode_gluon(
    output: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    context_lengths: Tensor,
    block_tables: Tensor,
    softmax_scale: float,
    query_length: int,
    max_context_partition_num: int,
    context_partition_size: int,
    compute_type: torch.dtype,
    exp_sums: Tensor,
    max_logits: Tensor,
    temporary_output: Tensor,
    ps: bool,
) -> None:
    """Each sequence attends to the first context_lengths[s] keys of the pages that block_tables[s] lists."""
    num_kv_heads, page = key_cache.shape[1], key_cache.shape[3]
    sequences, num_heads, dim = len(query) // query_length, query.shape[1], query.shape[2]
    group = num_heads // num_kv_heads
    x = 16 // key_cache.element_size()
    assert ps and compute_type == query.dtype == output.dtype == key_cache.dtype == value_cache.dtype
    assert query.dtype in (torch.bfloat16, torch.float16)
    assert query_length == 1 and query_length * group <= 64 and page in (16, 64, 1024)
    assert context_partition_size == 256 and max_context_partition_num >= 1
    assert query.shape == output.shape == (sequences, num_heads, dim) and output.is_contiguous()
    assert key_cache.dim() == value_cache.dim() == 5
    assert key_cache.shape[2:] == (dim // x, page, x) and value_cache.shape[1:] == (num_kv_heads, page // x, dim, x)
    assert context_lengths.dtype == block_tables.dtype == torch.int32
    assert len(context_lengths) == len(block_tables) == sequences and block_tables.stride(1) == 1
    shape = (sequences, num_kv_heads, max_context_partition_num, query_length * group)
    assert exp_sums.shape == max_logits.shape == shape and exp_sums.dtype == max_logits.dtype == torch.float32
    assert temporary_output.shape == (*shape, dim) and temporary_output.dtype == query.dtype
    for sequence in range(sequences):
        positions = torch.arange(int(context_lengths[sequence]))
        assert 0 < len(positions) <= block_tables.shape[1] * page
        pages = block_tables[sequence, positions // page].long()
        assert int(pages.min()) >= 0 and int(pages.max()) < len(key_cache)
        inside = positions % page
        for head in range(num_kv_heads):
            k = key_cache[pages, head, :, inside].reshape(-1, dim).double()
            v = value_cache[pages, head, inside // x, :, inside % x].double()
            for member in range(head * group, (head + 1) * group):
                weights = torch.softmax(k @ query[sequence, member].double() * softmax_scale, 0)
                output[sequence, member] = (weights @ v).to(output.dtype)


class CustomAllreduce:
    """Sums out of place what fills whole packs of 16 bytes and fits its buffer; over gloo here."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, max_size: int) -> None:
        assert dist.get_backend(group) != "nccl"
        self.group, self.max_size, self.disabled = group, max_size, dist.get_world_size(group) not in (1, 2, 4, 6, 8)

    def all_reduce(self, inp: Tensor) -> Tensor:
        assert inp.nbytes <= self.max_size and inp.nbytes % 16 == 0 and inp.is_contiguous()
        out = inp.clone()
        dist.all_reduce(out, group=self.group)
        return out


IMPLEMENTED: dict[str, Callable[..., Any]] = {
    "aiter.dist.device_communicators.custom_all_reduce.CustomAllreduce": CustomAllreduce,
    "aiter.fused_qknorm_idxrqknorm": fused_qknorm_idxrqknorm,
    "aiter.ops.triton.gluon.pa_decode_gluon.pa_decode_gluon": pa_decode_gluon,
}
