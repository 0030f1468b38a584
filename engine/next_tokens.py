"""Logits of a step to its tokens, by the cheapest way that each row allows.

A row that only a temperature shapes needs no logits of other ranks: each finds the best of its share. Under the mask of
a grammar it is the same, where the kernels of a captured step can be had. All other rows are sampled as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine import vocab_parallel
from engine.batches import SlotTables
from engine.guided import GuidedSlots
from engine.kernels.api import DecodeKernels
from engine.parallel import TensorParallel
from engine.sampler import SamplerState
from engine.transfer import to_device


class NextTokens:
    """What one rank samples; the same on all ranks. What it finds is kept in the tables too.

    sampler, guided, tables: of the rank's slots, which others fill.  decode: None where the backend has no kernels for
    captured steps.
    """

    def __init__(
        self,
        vocab_size: int,
        parallel: TensorParallel,
        sampler: SamplerState,
        guided: GuidedSlots,
        tables: SlotTables,
        decode: DecodeKernels | None,
    ) -> None:
        self._vocab_size = vocab_size
        self._parallel = parallel
        self._share = parallel.vocab_share(vocab_size)
        self._sampler, self._guided, self._tables, self._decode = sampler, guided, tables, decode
        self._device = tables.device

    def sample(self, logits: Tensor, slots: list[int], positions: list[int]) -> Tensor:
        """int64 [len(slots)], the next tokens, NOT_FINITE where a row's logits are not.

        logits: [len(slots), vocab / ranks], of this rank's share.  positions: of the tokens to be sampled.
        """
        if (share := self._share) is None:
            if self._guided.any_of(slots):
                return self.resample(logits.new_empty(len(slots), dtype=torch.int64), logits, slots, positions)
            return self._sample_whole(logits, slots, positions, None)
        temperatures, keys, shaped = self._sampler.free_draws(slots, positions)
        tokens = vocab_parallel.draw(logits.float(), share.first_id, temperatures, keys, share.gather)
        self._tables.keep(slots, tokens)
        return self.resample(tokens, logits, slots, positions, shaped) if shaped else tokens

    def resample(
        self,
        tokens: Tensor,
        logits: Tensor,
        slots: list[int],
        positions: list[int],
        rows: Sequence[int] | None = None,
    ) -> Tensor:
        """`tokens`, with those of `rows` (None: of all) as their masks and all their parameters give them. The rest as
        `sample`."""
        left = list(range(len(slots)) if rows is None else rows)
        masks = self._masks([slots[i] for i in left])
        if masks is not None and self._decode is not None:
            guided = [i for i in left if self._guided.any_of([slots[i]])]
            draws = [self._sampler.free_draw(slots[i], positions[i]) for i in guided]
            drawn = [(k, i, draw) for k, (i, draw) in enumerate(zip(guided, draws, strict=True)) if draw is not None]
            if drawn:
                indices, simple, how = (list(each) for each in zip(*drawn, strict=True))
                found = self._draw_masked(
                    logits.index_select(0, self._index(simple)),
                    [temperature for temperature, _ in how],
                    [key for _, key in how],
                    [slots[i] for i in simple],
                    masks.index_select(0, self._index(indices)),
                )
                tokens = tokens.index_copy(0, self._index(simple), found)
                left = sorted({*left} - {*simple})
                masks = masks.index_select(0, self._index([k for k, draw in enumerate(draws) if draw is None]))
        if not left:
            return tokens
        picked = self._index(left)
        whole = self._parallel.all_gather_last(logits.index_select(0, picked))
        found = self._sample_whole(whole, [slots[i] for i in left], [positions[i] for i in left], masks)
        return tokens.index_copy(0, picked, found)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile the kernels of masked rows, on one for slot 0, which must be free. All ranks have to call."""
        width = self._vocab_size // self._parallel.size
        masks = torch.full((1, -(-self._vocab_size // 32)), -1, dtype=torch.int32, device=self._device)
        logits = torch.zeros(1, width, dtype=dtype, device=self._device)
        if self._decode is not None:
            self._draw_masked(logits, [0.0], [0], [0], masks)

    def _masks(self, slots: list[int]) -> Tensor | None:
        masks = self._guided.masks(slots)
        return None if masks is None else to_device(masks, torch.int32, self._device)

    def _draw_masked(
        self, logits: Tensor, temperatures: list[float], keys: list[int], slots: list[int], masks: Tensor
    ) -> Tensor:
        """As kernels/triton_sample.py draws; logits of this rank's share."""
        assert self._decode is not None
        tokens = torch.empty(len(slots), dtype=torch.int64, device=self._device)
        self._decode.sample(
            logits,
            to_device(temperatures, torch.float32, self._device),
            self._index(keys),
            tokens,
            self._tables.last_tokens,
            self._index(slots),
            self._share,
            masks,
        )
        return tokens

    def _sample_whole(self, logits: Tensor, slots: list[int], positions: list[int], masks: Tensor | None) -> Tensor:
        """logits: [len(slots), vocab].  masks: of the guided ones among the rows."""
        tokens = self._sampler.sample(logits.float(), slots, positions, masks)
        self._sampler.append(slots, tokens)
        self._tables.keep(slots, tokens)
        return tokens

    def _index(self, values: list[int]) -> Tensor:
        return to_device(values, torch.int64, self._device)
