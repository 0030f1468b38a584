"""The triton backend's products with weights of the MX formats against torch's with what they stand for."""

from __future__ import annotations

import re
from typing import Literal

import pytest
import torch

from engine.kernels import configs_mx, torch_linear, torch_mx, triton_linear, triton_moe, triton_mx, triton_mx_decode
from engine.kernels.launch import Target
from engine.kernels.params import MXWeight, SwigluParams
from tests.kernels.devices import DEVICE, ON_GPU, TARGET

Kind = Literal["mxfp8", "mxfp4"]
KINDS: tuple[Kind, Kind] = ("mxfp8", "mxfp4")
ACT = SwigluParams(alpha=1.702, limit=7.0, beta=1.0)
BF16 = torch.bfloat16


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind: Kind, *shape: int, seed: int = 1) -> MXWeight:
    weight = torch_mx.quantise(randn(*shape, seed=seed) * shape[-1] ** -0.5, kind)
    return MXWeight(kind, weight.values.to(DEVICE), weight.scales.to(DEVICE))


def every_code(kind: Kind, scales: list[int]) -> MXWeight:
    """All codes with all of these scales."""
    codes = torch.arange(256, dtype=torch.uint8).view(-1, 32 if kind == "mxfp8" else 16)
    values = codes.repeat(len(scales), 1).view(len(scales), -1)
    all_scales = torch.tensor(scales, dtype=torch.uint8).view(-1, 1).expand(-1, len(codes)).contiguous()
    return MXWeight(kind, values.to(DEVICE), all_scales.to(DEVICE))


def target_of(decoding: str, monkeypatch: pytest.MonkeyPatch) -> Target:
    monkeypatch.setitem(configs_mx.DECODING, TARGET.arch, decoding)
    return TARGET


DECODINGS = ["asm", "scaled"] if ON_GPU else ["float", "scaled"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decoding", DECODINGS)
def test_every_code_and_scale(kind: Kind, decoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact, subnormal codes included, where scales are those of weights below 2 ** 60 and above 2 ** -70."""
    scales = [64, 90, 119, 120, 126, 127, 128, 134, 150, 187]
    weight = every_code(kind, scales)
    target = target_of(decoding, monkeypatch)
    out = triton_mx.dequantise(target, triton_mx.pack(target, weight), torch.float32)
    expected = torch_mx.dequantise(weight, torch.float32)
    if kind == "mxfp8":  # NaN of e4m3 must not be asked for: no kernel promises it
        keep = ~torch.isnan(expected)
        out, expected = out[keep], expected[keep]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_scales(kind: Kind) -> None:
    """The smallest vanish, or nearly so; the largest come out as they are, or not finite."""
    weight = every_code(kind, [0, 1, 40, 220, 254])
    out = triton_mx.dequantise(TARGET, triton_mx.pack(TARGET, weight), torch.float32)
    expected = torch_mx.dequantise(weight, torch.float32)
    finite = ~torch.isnan(expected)
    assert torch.allclose(out[:3][finite[:3]], expected[:3][finite[:3]], rtol=0, atol=2.0**-69)
    large, wanted = out[3:][finite[3:]], expected[3:][finite[3:]]
    assert bool(((large == wanted) | ~torch.isfinite(large)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_nan_scale_is_not_finite(kind: Kind) -> None:
    weight = make(kind, 40, 64)
    weight.scales[7, 1] = 255
    packed = triton_linear.pack_linear(TARGET, weight)
    for num_tokens in (1, 3, 70):
        out = triton_linear.linear(TARGET, randn(num_tokens, 64).to(DEVICE, BF16), packed)
        assert not torch.isfinite(out[:, 7]).any()
        assert torch.isfinite(out[:, :7]).all() and torch.isfinite(out[:, 8:]).all()


def check_linear(kind: Kind, num_tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, x = make(kind, *shape), randn(num_tokens, shape[1]).to(DEVICE, dtype)
    out = triton_linear.linear(TARGET, x, triton_linear.pack_linear(TARGET, weight))
    assert out.dtype is dtype
    expected = (x.double() @ torch_mx.dequantise(weight, torch.float32).double().t()).float()
    tolerance = {"atol": 2e-2, "rtol": 2.0**-7} if dtype is BF16 else {"atol": 1e-4, "rtol": 1e-5}
    torch.testing.assert_close(out.float(), expected, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 2, 16, 17, 70, 130])
@pytest.mark.parametrize("shape", [(72, 96), (40, 160)], ids=str)
def test_linear(kind: Kind, num_tokens: int, shape: tuple[int, int]) -> None:
    """Rows and columns that fill no tile; every kernel, and the vendor's GEMM on the converted weight."""
    check_linear(kind, num_tokens, shape, BF16 if ON_GPU else torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 5, 70])
def test_other_dtype(kind: Kind, num_tokens: int) -> None:
    check_linear(kind, num_tokens, (72, 96), torch.float32 if ON_GPU else BF16)


@pytest.mark.skipif(not ON_GPU, reason="too large for Triton's interpreter")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 2, 16, 17, 64, 65, 300])
@pytest.mark.parametrize("shape", [(2560, 6144), (6144, 2048), (6144, 1024), (6144, 3072), (6144, 1536)], ids=str)
def test_shapes_of_the_model(kind: Kind, num_tokens: int, shape: tuple[int, int]) -> None:
    check_linear(kind, num_tokens, shape, BF16)


def routing(num_tokens: int, num_experts: int, top_k: int, shared: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(num_tokens)])
    if shared:
        ids = torch.cat((ids, torch.full((num_tokens, 1), num_experts)), 1)
    return ids.contiguous()


def check_experts(
    kind: Kind, num_tokens: int, hidden: int, width: int, num_experts: int, dtype: torch.dtype, *, shared: bool = True
) -> None:
    ids, total = routing(num_tokens, num_experts, 3, shared), num_experts + shared
    # Gates and ups on both sides of the clamp.
    w13 = torch_mx.quantise(randn(total, 2 * width, hidden, seed=1) * 4 * hidden**-0.5, kind)
    w2 = torch_mx.quantise(randn(total, hidden, width, seed=2) * width**-0.5, kind)
    w13, w2 = (MXWeight(kind, each.values.to(DEVICE), each.scales.to(DEVICE)) for each in (w13, w2))
    weights, ids = randn(*ids.shape, seed=3).abs().to(DEVICE), ids.to(DEVICE)
    x = randn(num_tokens, hidden).to(DEVICE, dtype)
    out = triton_moe.experts(TARGET, x, triton_moe.pack_experts(TARGET, w13, w2), weights, ids, ACT)
    assert out.dtype is dtype
    reference = torch_linear.pack_experts(*(torch_mx.dequantise(each, torch.float32) for each in (w13, w2)))
    expected = torch_linear.experts(x.float(), reference, weights, ids, ACT)
    if dtype is torch.float32:
        torch.testing.assert_close(out, expected, atol=2e-4, rtol=1e-4)
        return
    error = out.float() - expected
    # Triton's interpreter truncates to bf16, and that adds up.
    limit = 1e-2 if ON_GPU else 4e-2
    assert error.norm() < limit * expected.norm()
    assert error.abs().max() < 3 * limit * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 3, 17, 70])
def test_experts(kind: Kind, num_tokens: int) -> None:
    """Sizes that fill no tile, a shared expert as the last column."""
    check_experts(kind, num_tokens, 96, 64, 8, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 3, 70])
def test_experts_in_bfloat16(kind: Kind, num_tokens: int) -> None:
    check_experts(kind, num_tokens, 64, 96, 24, BF16, shared=False)


@pytest.mark.skipif(not ON_GPU, reason="too large for Triton's interpreter")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 2, 16, 17, 64, 65, 500, 2048])
@pytest.mark.parametrize("width", [768, 384])
def test_experts_of_the_model(kind: Kind, num_tokens: int, width: int) -> None:
    check_experts(kind, num_tokens, 6144, width, 32, BF16)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_do_not_depend_on_the_batch(kind: Kind) -> None:
    """Bit for bit, from 2 to 16."""
    dtype = BF16 if ON_GPU else torch.float32
    packed, x = triton_linear.pack_linear(TARGET, make(kind, 72, 96)), randn(16, 96).to(DEVICE, dtype)
    together = triton_linear.linear(TARGET, x, packed)
    for count in (2, 9):
        assert torch.equal(triton_linear.linear(TARGET, x[:count], packed), together[:count])


# --- The assembly of "asm", which no CPU runs, worked through by hand ---


def run_ptx(text: str, inputs: dict[int, int]) -> dict[int, int]:
    """Registers $N after the instructions that triton_mx_decode uses, given some of them."""
    registers = {f"${number}": value for number, value in inputs.items()}

    def value(name: str) -> int:
        return int(name, 16 if name.startswith("0x") else 10) if name[0].isdigit() else registers[name]

    def byte(word: int, selector: int) -> int:
        found = word >> 8 * (selector & 3) & 0xFF if selector & 7 < 4 else 0
        return found if selector < 8 else 0xFF * (found >> 7)

    def product(left: int, right: int) -> int:
        pair = torch.tensor([left, right], dtype=torch.int64).to(torch.int32).view(BF16).view(2, 2)
        return int((pair[0] * pair[1]).view(torch.int32)) & 0xFFFFFFFF

    for line in text.strip("{} \n").split(";"):
        if not (found := re.match(r"\s*([a-z]+)\.\S+\s+(.*)", line, re.DOTALL)) or not found[2]:
            continue
        to, *arguments = (part.strip() for part in found[2].split(","))
        words = [value(name) for name in arguments]
        match found[1]:
            case "prmt":
                selectors = [words[2] >> 4 * i & 15 for i in range(4)]
                registers[to] = sum(byte(words[0], selector) << 8 * i for i, selector in enumerate(selectors))
            case "shl":
                registers[to] = words[0] << words[1] & 0xFFFFFFFF
            case "and":
                registers[to] = words[0] & words[1]
            case "mul":
                registers[to] = product(words[0], words[1])
            case "cvt":
                registers[to] = words[0]
            case other:
                raise AssertionError(f"unknown instruction {other}")
    return {int(name[1:]): found for name, found in registers.items() if name[0] == "$"}


def bf16s(words: list[int]) -> list[float]:
    return [float(v) for v in torch.tensor(words, dtype=torch.int64).to(torch.int32).view(BF16)]


def floats(words: list[int]) -> list[float]:
    return [float(v) for v in torch.tensor(words, dtype=torch.int64).to(torch.int32).view(torch.float32)]


@pytest.mark.parametrize("scale", [64, 120, 127, 187])
def test_assembly_of_e4m3(scale: int) -> None:
    register = (scale + 60 << 7) * 0x10001
    for first in range(0, 256, 4):
        codes = torch.arange(first, first + 4, dtype=torch.uint8)
        word = int(codes.view(torch.int32)) & 0xFFFFFFFF
        expected = [v * 2.0 ** (scale - 187) for v in codes.view(torch.float8_e4m3fn).tolist()]
        four = run_ptx(triton_mx_decode._E4M3_BY_4.value, {2: word, 3: register, 5: register})
        as_floats = run_ptx(triton_mx_decode._E4M3_FLOATS.value, {4: word, 5: register, 7: register})
        two = run_ptx(triton_mx_decode._E4M3_BY_2.value, {1: word & 0xFFFF, 2: register})
        if first % 128 == 124:  # the last code is NaN, which the assembly takes for a number
            expected[3:] = []
        count = len(expected)
        assert bf16s([four[0], four[1]])[:count] == expected
        assert floats([as_floats[i] for i in range(4)])[:count] == expected
        assert bf16s([two[0]]) == expected[:2]


@pytest.mark.parametrize("scale", [64, 120, 127, 187])
def test_assembly_of_e2m1(scale: int) -> None:
    register = (scale + 66 << 7) * 0x10001
    table = [sign * v * 2.0 ** (scale - 187) for sign in (1.0, -1.0) for v in torch_mx.E2M1]
    for first in range(0, 256, 4):
        word = sum(first + i << 8 * i for i in range(4))
        low, high = [table[first + i & 15] for i in range(4)], [table[first + i >> 4] for i in range(4)]
        four = run_ptx(triton_mx_decode._E2M1_BY_4.value, {4: word, 5: register, 7: register})
        as_floats = run_ptx(triton_mx_decode._E2M1_FLOATS.value, {8: word, 9: register, 11: register})
        assert bf16s([four[0], four[1]]) == low and bf16s([four[2], four[3]]) == high
        assert floats([as_floats[i] for i in range(8)]) == low + high
