"""Counter-based noise: a pure function of (seed, position, token id), in any batch and on any device."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_TEMPERATURE = 1e-30  # below, float32 division of a score would give 0/0

_MASK64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX1 = 0xBF58476D1CE4E5B9
MIX2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= _MASK64
    return value - 2**64 if value >= 2**63 else value


def _mix(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) of a 64-bit value."""
    value &= _MASK64
    value = ((value ^ (value >> 30)) * MIX1) & _MASK64
    value = ((value ^ (value >> 27)) * MIX2) & _MASK64
    return value ^ (value >> 31)


def noise_key(seed: int, position: int) -> int:
    """What the noise of all tokens of one (seed, position) starts from; int64."""
    return _signed(_mix(_mix(seed) + (position + 1) * GOLDEN))


def _xor_shift(z: Tensor, bits: int) -> Tensor:
    """z ^ (z >>> bits), in place. `>>` on int64 copies the sign, so its copies are masked off."""
    return z.bitwise_xor_((z >> bits).bitwise_and_((1 << (64 - bits)) - 1))


def gumbel_noise(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 [num_rows, n].

    keys: int64 [num_rows, 1] of `noise_key`.  token_ids: int64 [n] or [num_rows, n].
    The hash is exact wrapping 64-bit arithmetic, the same on every device; its upper 32 bits k give
    u = (k + 0.5) / 2^32. The token that wins has u near 0, where float32 is dense and log1p exact.
    """
    z = keys + (token_ids + 1) * _signed(GOLDEN)
    z = _xor_shift(z, 30).mul_(_signed(MIX1))
    z = _xor_shift(z, 27).mul_(_signed(MIX2))
    z = _xor_shift(z, 31)
    k = (z >> 32).bitwise_and_(2**32 - 1)
    u = k.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()
