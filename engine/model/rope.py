"""The table of cosines and sines that turns queries and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.rope import RopeScaling


def rope_table(num_positions: int, rotary_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """float32 [num_positions, rotary_dim]: cosines of the rotary_dim / 2 frequencies, then their sines."""
    angles = torch.outer(torch.arange(num_positions).float(), frequencies(rotary_dim, theta, scaling))
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return table if scaling is None else table * scaling.attention_factor


def frequencies(rotary_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """float32 [rotary_dim / 2], radians per position, falling."""
    periods = theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim)
    plain = 1.0 / periods
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    kept = _kept_share(rotary_dim, theta, scaling)
    return (1.0 / (scaling.factor * periods)) * (1 - kept) + plain * kept


def _kept_share(rotary_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """float32 [rotary_dim / 2]: 1 where YaRN keeps a frequency, 0 where it divides it, falling between."""

    def number_of(turns: float) -> float:
        """Which frequency, a fraction as may be, turns so often within the original context."""
        period = scaling.original_max_positions / (2 * math.pi * turns)
        return rotary_dim * math.log(period) / (2 * math.log(theta))

    first, last = number_of(scaling.beta_fast), number_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The upper bound is the reference's: it counts dimensions where frequencies are meant.
    first, last = max(first, 0), min(last, rotary_dim - 1)
    if first == last:
        last += 0.001
    ramp = (torch.arange(rotary_dim // 2, dtype=torch.float32) - first) / (last - first)
    return 1 - ramp.clamp(0, 1)
