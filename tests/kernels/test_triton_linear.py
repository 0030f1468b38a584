"""The triton backend's linear layer against torch's."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import triton_linear
from tests.kernels.devices import DEVICE, ON_GPU, TARGET

BF16 = torch.bfloat16
# (out, in): rows that fill no tile; columns that fill no tile; a weight with many rows.
SHAPES = [(72, 96), (40, 50), (16400, 16)]
GPU_SHAPES = [(2560, 6144), (6144, 2048), (50016, 6144), (6144, 768)]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return triton_linear.linear(TARGET, x, triton_linear.pack_linear(TARGET, weight))


def check(num_tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = randn(num_tokens, shape[1]).to(DEVICE, dtype), randn(*shape, seed=1).to(DEVICE, dtype)
    out = run(x, weight)
    assert out.dtype is dtype
    expected = (x.double() @ weight.double().t()).float()
    # A bf16 result is off by half a unit of its last place; Triton's interpreter truncates instead of rounding.
    tolerance = {"atol": 2e-2, "rtol": 2.0**-7} if dtype is BF16 else {"atol": 1e-4, "rtol": 1e-5}
    torch.testing.assert_close(out.float(), expected, **tolerance)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 16, 17])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_linear(num_tokens: int, shape: tuple[int, int]) -> None:
    check(num_tokens, shape, BF16 if ON_GPU else torch.float32)


@pytest.mark.parametrize("num_tokens", [1, 5, 20])
def test_other_dtype(num_tokens: int) -> None:
    check(num_tokens, SHAPES[0], torch.float32 if ON_GPU else BF16)


def test_many_rows() -> None:
    check(3, SHAPES[2], BF16 if ON_GPU else torch.float32)


@pytest.mark.skipif(not ON_GPU, reason="too large for Triton's interpreter")
@pytest.mark.parametrize("num_tokens", [1, 2, 16, 17])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_shapes_of_the_model(num_tokens: int, shape: tuple[int, int]) -> None:
    check(num_tokens, shape, BF16)


def test_rows_do_not_depend_on_the_batch() -> None:
    """From 2 to 16, bit for bit."""
    dtype = BF16 if ON_GPU else torch.float32
    weight, x = randn(72, 96).to(DEVICE, dtype), randn(16, 96, seed=1).to(DEVICE, dtype)
    together = run(x, weight)
    for count in (2, 3, 9):
        assert torch.equal(run(x[:count], weight), together[:count])
