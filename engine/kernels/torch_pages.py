"""Reading and writing pages in plain torch, of the compute dtype or fp8 with one scale per stored vector."""

from __future__ import annotations

import torch
from torch import Tensor

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x / scale in fp8, scale float32 without the last dimension); the largest element of a vector maps to the
    largest of the dtype (448, or 240 for fnuz)."""
    limit = torch.finfo(dtype).max
    values = x.float()
    scale = values.abs().amax(-1, keepdim=True) / limit
    scale = torch.where(scale > 0, scale, 1.0)
    return (values / scale).clamp_(-limit, limit).to(dtype), scale.squeeze(-1)


def take_rows(pool: Tensor, scale: Tensor | None, rows: Tensor) -> Tensor:
    """Rows [n] of a pool seen as [rows, 128, dim]: [n, 128, dim], of the pool's dtype, or float32 from fp8."""
    page_size, dim = pool.shape[-2:]
    if scale is None:
        return pool.view(-1, page_size * dim).index_select(0, rows).view(-1, page_size, dim)
    taken = pool.view(torch.uint8).view(-1, page_size * dim).index_select(0, rows).view(-1, page_size, dim)
    return taken.view(pool.dtype).float() * scale.view(-1, page_size).index_select(0, rows).unsqueeze(-1)


def write_rows(pool: Tensor, scale: Tensor | None, page_ids: Tensor, offsets: Tensor, values: Tensor) -> None:
    """Store vectors at (page, offset).

    pool: [num_pages, 128, dim] or [num_pages, num_heads, 128, dim]; values: [n, dim] or [n, num_heads, dim].
    """
    cells = (page_ids, offsets) if pool.dim() == 3 else (page_ids, slice(None), offsets)
    if scale is None:
        pool[cells] = values.to(pool.dtype)
        return
    stored, scales = quantise(values, pool.dtype)
    pool.view(torch.uint8)[cells] = stored.view(torch.uint8)
    scale[cells] = scales
