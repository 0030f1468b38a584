"""One step as tensors: what every layer and kernel reads."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

from torch import Tensor

Phase = Literal["decode", "prefill"]


class Probe(Protocol):
    """Times operations on a probed step; see engine/probes.py."""

    def start(self) -> object: ...

    def stop(self, started: object, op: str, layer_id: int, phase: Phase) -> None: ...


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of one kind: decode rows have one token each, prefill rows any number.

    Rows [row_start, row_end) hold tokens [token_start, token_end) of the step.
    """

    phase: Phase
    row_start: int
    row_end: int
    token_start: int
    token_end: int

    @property
    def num_rows(self) -> int:
        return self.row_end - self.row_start

    @property
    def num_tokens(self) -> int:
        return self.token_end - self.token_start

    @property
    def tokens(self) -> slice:
        return slice(self.token_start, self.token_end)

    @property
    def rows(self) -> slice:
        return slice(self.row_start, self.row_end)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The rows of one step, decode rows first.

    positions: int64 [num_tokens], absolute.  slot_mapping: int64 [num_tokens], page_id * 128 + offset; -1:
    the token's keys are written nowhere (padding of a captured batch).
    row_ids: int64 [num_tokens], the row of each token.
    block_table: int32 [num_rows, max_pages], logical block -> page id, 0 beyond the row's pages.
    seq_lens: int32 [num_rows], keys visible to the row's last token.
    query_start_loc: int32 [num_rows + 1], prefix sums of the rows' token counts.
    query_starts, seq_lens_host: query_start_loc and seq_lens as lists. In a captured graph, where the tensors change
    between replays, seq_lens_host holds upper bounds.
    audit: reuse layers also select afresh, in shadow.
    """

    positions: Tensor
    slot_mapping: Tensor
    row_ids: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    query_starts: list[int]
    seq_lens_host: list[int]
    segments: tuple[Segment, ...]
    probe: Probe | None = None
    audit: bool = False

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]

    def max_query_len(self, segment: Segment) -> int:
        """Tokens of the longest row of `segment`."""
        starts = self.query_starts[segment.row_start : segment.row_end + 1]
        return max(end - start for start, end in pairwise(starts))

    def max_seq_len(self, segment: Segment) -> int:
        """Most keys that a token of `segment` can see."""
        return max(self.seq_lens_host[segment.rows])
