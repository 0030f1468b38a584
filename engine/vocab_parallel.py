"""The next token of each row where every rank has the logits of a share of the vocabulary.

Ranks bring their best together, two numbers a row and rank, in place of the logits. The tokens are those that
engine/sampler.py draws from the whole row, bit for bit, for rows that nothing but a temperature shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.noise import gumbel_noise
from engine.sampler import CHUNK_ELEMENTS
from engine.transfer import to_device
from engine.types import NOT_FINITE


def draw(
    logits: Tensor,
    first_id: int,
    temperatures: Sequence[float],
    keys: Sequence[int],
    gather: Callable[[Tensor], Tensor],
) -> Tensor:
    """int64 [num_rows], the same on all ranks; NOT_FINITE where a row's logits are not.

    logits: float32 [num_rows, share], of the token ids from first_id on; ranks hold neighbouring shares, in order.
    temperatures: 0 is greedy.  keys: of the noise, see noise.noise_key.  gather: [...] of each rank -> [size, ...].
    """
    device = logits.device
    low, high = torch.aminmax(logits, dim=1)
    best = torch.where(low.isfinite() & high.isfinite(), high, torch.nan)
    best = gather(best).amax(0)  # NaN wins
    temperature = to_device(list(temperatures), torch.float32, device)
    key = to_device(list(keys), torch.int64, device)
    token_ids = torch.arange(first_id, first_id + logits.shape[1], device=device)
    step = max(1, CHUNK_ELEMENTS // logits.shape[1])
    scores, winners = [], []
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        x = logits[rows]
        if any(temperatures[rows]):
            noisy = (x - best[rows, None]) / temperature[rows, None] + gumbel_noise(key[rows, None], token_ids)
            x = torch.where(temperature[rows, None] > 0, noisy, x)
        winner = x.argmax(1, keepdim=True)
        scores.append(x.gather(1, winner).squeeze(1))
        winners.append(winner.squeeze(1) + first_id)
    # Both are exact in float64.
    found = gather(torch.stack((torch.cat(scores).double(), torch.cat(winners).double())))
    # Of equal scores the first rank's: its token ids are lower.
    rank = found[:, 0].argmax(0, keepdim=True)
    return torch.where(best.isfinite(), found[:, 1].gather(0, rank).squeeze(0).long(), NOT_FINITE)
