"""Block-scaled numbers against ml_dtypes, bit for bit, and weights made of them."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from engine.errors import CheckpointError, ConfigError
from engine.kernels import torch_linear
from engine.kernels.params import MXWeight, SwigluParams
from engine.kernels.torch_mx import E2M1, dequantise, e8m0, quantise
from engine.model.quant import check_columns, divided, empty_weight, stored_shapes, view
from engine.quant_config import Format

DTYPES = {torch.float32: (np.float32, np.int32), torch.bfloat16: (ml_dtypes.bfloat16, np.int16)}
FORMATS: list[Format] = ["mxfp8", "mxfp4"]


def every_pair(kind: Format) -> tuple[MXWeight, np.ndarray]:
    """Each byte of values with each scale, and what the values are: float32 [256, columns]."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    if kind == "mxfp8":
        numbers = codes.numpy().view(ml_dtypes.float8_e4m3fn)
    else:
        nibbles = np.stack((codes.numpy() & 15, codes.numpy() >> 4), -1).reshape(256, 512)
        numbers = nibbles.view(ml_dtypes.float4_e2m1fn)
    scales = torch.arange(256, dtype=torch.uint8).unsqueeze(1).expand(256, numbers.shape[1] // 32).contiguous()
    return MXWeight(kind, codes, scales), numbers.astype(np.float32)


def bits(x: Tensor) -> np.ndarray:
    return x.view({4: torch.int32, 2: torch.int16}[x.dtype.itemsize]).numpy()


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("kind", FORMATS)
def test_every_code_with_every_scale(kind: Format, dtype: torch.dtype) -> None:
    weight, numbers = every_pair(kind)
    powers = weight.scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    theirs, as_bits = DTYPES[dtype]
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (numbers * np.repeat(powers, 32, axis=1)).astype(theirs)
    ours = dequantise(weight, dtype)
    assert ours.dtype == dtype and ours.shape == weight.shape
    is_nan = np.isnan(expected.astype(np.float32))
    assert np.array_equal(torch.isnan(ours).numpy(), is_nan)
    assert np.array_equal(bits(ours)[~is_nan], expected.view(as_bits)[~is_nan])
    assert is_nan[255].all() and not is_nan[0, 0], "scale 255 is NaN, scale 0 is not"
    assert is_nan[:255].sum() == (2 * 255 if kind == "mxfp8" else 0), "two codes of e4m3 are NaN, none of e2m1"


def test_every_scale() -> None:
    ours = e8m0(torch.arange(256, dtype=torch.uint8))
    expected = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert np.array_equal(bits(ours)[:255], expected.view(np.int32)[:255])
    assert ours[0] == 2.0**-127 and ours[127] == 1 and ours[254] == 2.0**127 and ours[255].isnan()


def test_the_even_column_is_in_the_low_bits() -> None:
    packed = torch.zeros(1, 16, dtype=torch.uint8)
    packed[0, 0], packed[0, 15] = 0x21, 0xF7
    weight = MXWeight("mxfp4", packed, torch.tensor([[128]], dtype=torch.uint8))
    [row] = dequantise(weight, torch.float32).tolist()
    assert row == [1.0, 2.0, *[0.0] * 28, 12.0, -12.0]


@pytest.mark.parametrize("kind", FORMATS)
def test_rounding_is_to_the_nearest_even(kind: Format) -> None:
    """Of random numbers, of every halfway point, and of what saturates."""
    source = torch.Generator().manual_seed(5)
    weight = torch.randn(64, 256, generator=source) * torch.exp2(torch.randint(-30, 30, (64, 1), generator=source))
    # Groups with a scale of 1 for either format, full of ties: between e2m1 codes, between e4m3 codes of one binade.
    ties = [(low + high) / 2 for low, high in itertools.pairwise(E2M1)] + [0.0, -0.0, 6.5]
    weight[0, :32] = torch.tensor([*ties, *(-tie for tie in ties), *[7.9] * 12])
    weight[0, 32:64] = torch.tensor([*(1 + (2 * i + 1) / 16 for i in range(8)), *[-500.0] * 24])
    weight[1] = 0.0
    made = quantise(weight, kind)
    scale = e8m0(made.scales).repeat_interleave(32, -1)
    limit, theirs = (448.0, ml_dtypes.float8_e4m3fn) if kind == "mxfp8" else (6.0, ml_dtypes.float4_e2m1fn)
    scaled = (weight / scale).clamp(-limit, limit).numpy()
    expected = torch.from_numpy(scaled.astype(theirs).astype(np.float32)) * scale
    assert torch.equal(dequantise(made, torch.float32), expected)
    largest = weight.abs().view(64, -1, 32).amax(-1)
    ratio = largest / e8m0(made.scales)
    assert ((ratio >= limit / 1.75) & (ratio < 2 * 2 ** np.floor(np.log2(limit))))[largest > 0].all()
    assert made.scales[1].eq(0).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_what_was_quantised_stays(kind: Format) -> None:
    weight = torch.randn(3, 40, 96, generator=torch.Generator().manual_seed(1))
    once = dequantise(quantise(weight, kind), torch.bfloat16)
    assert torch.equal(dequantise(quantise(once, kind), torch.bfloat16), once)
    error = (once.float() - weight).abs().amax() / weight.abs().amax()
    # The largest of a group may be cut: 511 becomes 448, and 7.9 becomes 6.
    assert 0 < error < (0.125 if kind == "mxfp8" else 0.25)


@pytest.mark.parametrize("kind", FORMATS)
def test_cuts_and_parts(kind: Format) -> None:
    """A cut of the stored bytes is the cut of the weight; experts are dequantised one by one."""
    made = quantise(torch.randn(5, 64, 128, generator=torch.Generator().manual_seed(2)), kind)
    whole = dequantise(made, torch.float32)
    assert (made.shape, made.nbytes) == ((5, 64, 128), made.values.nbytes + made.scales.nbytes)
    one = view(made, 3, slice(16, 48))
    assert isinstance(one, MXWeight)
    assert torch.equal(dequantise(one, torch.float32), whole[3, 16:48])
    columns = slice(32, 96)
    cut = MXWeight(
        kind,
        made.values[..., divided(columns, 2 if kind == "mxfp4" else 1)],
        made.scales[..., divided(columns, 32)],
    )
    assert torch.equal(dequantise(cut, torch.float32), whole[..., columns])
    assert torch.equal(dequantise(MXWeight.cat([one, one]), torch.float32), torch.cat([whole[3, 16:48]] * 2))
    room = empty_weight(kind, made.shape, torch.float32, torch.device("cpu"))
    assert isinstance(room, MXWeight)
    assert (tuple(room.values.shape), tuple(room.scales.shape)) == stored_shapes(kind, made.shape)
    assert (room.values.shape, room.scales.shape) == (made.values.shape, made.scales.shape)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_torch_backend_multiplies_what_the_codes_stand_for(kind: Format) -> None:
    source = torch.Generator().manual_seed(3)
    x = torch.randn(6, 64, generator=source).bfloat16()
    w13, w2 = (quantise(torch.randn(*shape, generator=source) / 8, kind) for shape in ((4, 128, 64), (4, 64, 64)))
    plain = [dequantise(weight, torch.bfloat16) for weight in (w13, w2)]
    first = view(w13, 0)
    assert torch.equal(
        torch_linear.linear(x, torch_linear.pack_linear(first)),
        torch_linear.linear(x, torch_linear.pack_linear(plain[0][0])),
    )
    weights, ids = torch.rand(6, 2, generator=source), torch.tensor([[0, 1], [2, 3]] * 3)
    act = SwigluParams(1.702, 7.0, 1.0)
    out = [torch_linear.experts(x, torch_linear.pack_experts(a, b), weights, ids, act) for a, b in ((w13, w2), plain)]
    assert torch.equal(*out)


@pytest.mark.parametrize(
    ("total", "columns", "error"),
    [
        (80, None, CheckpointError),
        (128, slice(0, 16), ConfigError),
        (128, slice(48, 96), ConfigError),
        (128, slice(32, 96), None),
        (96, None, None),
    ],
)
def test_groups_are_not_cut(total: int, columns: slice | None, error: type[Exception] | None) -> None:
    if error is None:
        check_columns("a.weight", total, columns)
        return
    with pytest.raises(error, match=r"a\.weight"):
        check_columns("a.weight", total, columns)
