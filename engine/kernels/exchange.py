"""What kernels need to reach the memory of the other ranks, and a rank's share of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Exchange:
    """Buffers through which the ranks of a group hand each other rows of 4-byte words.

    peers: int64 [size], where this process finds each rank's buffer, its own too: int64 [2, size, rows, width], by
    turn, sender, row and word; zeros at first.
    counters: int32 [rows], how often each row was exchanged; zeros at first.
    All ranks exchange the same rows in the same order, which a stream keeps.
    """

    rank: int
    size: int
    rows: int
    width: int
    peers: Tensor
    counters: Tensor

    @staticmethod
    def num_words(size: int, rows: int, width: int) -> int:
        """Words of 8 bytes in a rank's buffer."""
        return 2 * size * rows * width


@dataclass(frozen=True, slots=True)
class VocabShare:
    """The neighbouring token ids whose logits a rank of `size` computes; ranks hold equal shares, in order.

    gather: [...] of each rank -> [size, ...].  exchange: what takes its place where kernels reach the other ranks.
    """

    rank: int
    size: int
    first_id: int
    gather: Callable[[Tensor], Tensor]
    exchange: Exchange | None
