"""One step as tensors: what every layer and kernel reads."""

from __future__ import annotations

from dataclasses import dataclass
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

    positions: int64 [num_tokens], absolute.  slot_mapping: int64 [num_tokens], page_id * 128 + offset.
    row_ids: int64 [num_tokens], the row of each token.
    block_table: int32 [num_rows, max_pages], logical block -> page id, 0 beyond the row's pages.
    seq_lens: int32 [num_rows], keys visible to the row's last token.
    query_starts, seq_lens_host: the prefix sums of the rows' token counts ([num_rows + 1]) and seq_lens, as lists.
    audit: reuse layers also select afresh, in shadow.
    """

    positions: Tensor
    slot_mapping: Tensor
    row_ids: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_starts: list[int]
    seq_lens_host: list[int]
    segments: tuple[Segment, ...]
    probe: Probe | None = None
    audit: bool = False

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]
