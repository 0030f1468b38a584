"""The triton backend's experts against torch's."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import torch_linear, triton_moe, triton_moe_many
from engine.kernels.params import SwigluParams
from tests.kernels.devices import DEVICE, ON_GPU, TARGET

ACT = SwigluParams(alpha=1.702, limit=7.0, beta=1.0)
BF16 = torch.bfloat16


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def routing(num_tokens: int, num_experts: int, top_k: int, shared: bool, kind: str) -> torch.Tensor:
    """Expert ids [num_tokens, top_k (+ 1)]; some experts get no token unless the batch is large."""
    if kind == "same":
        ids = torch.arange(num_experts - top_k, num_experts).expand(num_tokens, top_k)
    else:
        generator = torch.Generator().manual_seed(num_tokens)
        ids = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(num_tokens)])
    if shared:
        ids = torch.cat((ids, torch.full((num_tokens, 1), num_experts)), 1)
    return ids.contiguous()


def check(num_tokens: int, hidden: int, width: int, num_experts: int, ids: torch.Tensor, dtype: torch.dtype) -> None:
    total = num_experts + (ids.shape[1] > 3)
    # Gates and ups on both sides of the clamp.
    x, w13 = randn(num_tokens, hidden), randn(total, 2 * width, hidden, seed=1) * 4 * hidden**-0.5
    w2, weights = randn(total, hidden, width, seed=2) * width**-0.5, randn(*ids.shape, seed=3).abs()
    x, w13, w2 = (t.to(DEVICE, dtype) for t in (x, w13, w2))
    packed = triton_moe.pack_experts(TARGET, w13, w2)
    out = triton_moe.experts(TARGET, x, packed, weights.to(DEVICE), ids.to(DEVICE), ACT)
    assert out.dtype is dtype
    reference = torch_linear.pack_experts(w13.float(), w2.float())
    expected = torch_linear.experts(x.float(), reference, weights.to(DEVICE), ids.to(DEVICE), ACT)
    if dtype is torch.float32:
        torch.testing.assert_close(out, expected, atol=2e-4, rtol=1e-4)
        return
    error = out.float() - expected
    # Triton's interpreter truncates to bf16, and that adds up.
    limit = 1e-2 if ON_GPU else 4e-2
    assert error.norm() < limit * expected.norm()
    assert error.abs().max() < 3 * limit * expected.abs().max()


@pytest.mark.parametrize(
    "num_tokens, kind", [(n, "random") for n in (1, 2, 3, 16, 17, 33, 100)] + [(n, "same") for n in (3, 17, 100)]
)
def test_experts(num_tokens: int, kind: str) -> None:
    """Sizes that fill no tile, a shared expert as the last column."""
    check(num_tokens, 96, 48, 8, routing(num_tokens, 8, 3, True, kind), torch.float32)


@pytest.mark.parametrize("num_tokens", [1, 5, 70])
def test_small_routing(num_tokens: int) -> None:
    """No shared expert, int32 ids, more experts than pairs."""
    ids = routing(num_tokens, 24, 2, False, "random").int()
    check(num_tokens, 32, 32, 24, ids, torch.float32)


@pytest.mark.parametrize("num_tokens", [1, 3, 20, 70])
def test_bfloat16(num_tokens: int) -> None:
    check(num_tokens, 96, 48, 8, routing(num_tokens, 8, 3, True, "random"), BF16)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("kind", ["random", "same"])
def test_large_tiles(dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configurations for many pairs per expert, on sizes that fill no tile of theirs."""
    monkeypatch.setattr(triton_moe_many, "_FULL_TILES", 0)
    check(70, 96, 48, 8, routing(70, 8, 3, True, kind), dtype)


@pytest.mark.skipif(not ON_GPU, reason="too large for Triton's interpreter")
@pytest.mark.parametrize("num_tokens", [1, 2, 16, 17, 64, 65, 500, 2048])
@pytest.mark.parametrize("kind", ["random", "same"])
def test_sizes_of_the_model(num_tokens: int, kind: str) -> None:
    check(num_tokens, 6144, 768, 32, routing(num_tokens, 32, 4, True, kind), BF16)


def test_tokens_do_not_depend_on_the_batch() -> None:
    """Bit for bit, however the rows of the others are routed."""
    hidden, width, num_experts = 96, 48, 8
    dtype = BF16 if ON_GPU else torch.float32
    w13, w2 = (
        randn(num_experts, 2 * width, hidden).to(DEVICE, dtype),
        randn(num_experts, hidden, width).to(DEVICE, dtype),
    )
    x, weights = randn(20, hidden, seed=1).to(DEVICE, dtype), randn(20, 3, seed=2).abs().to(DEVICE)
    ids, packed = routing(20, num_experts, 3, False, "random").to(DEVICE), triton_moe.pack_experts(TARGET, w13, w2)
    together = triton_moe.experts(TARGET, x, packed, weights, ids, ACT)
    # The interpreter's matrix product depends on the shape of the tile.
    for count in (2, 16, 17) if ON_GPU else (17,):
        alone = triton_moe.experts(TARGET, x[:count], packed, weights[:count], ids[:count], ACT)
        assert torch.equal(alone, together[:count])
