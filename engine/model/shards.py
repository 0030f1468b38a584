"""The tensors of a directory of safetensors files, read by ranges, under the names they have on disk."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.tensor_files import TensorFiles

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
# Rows that are cut into columns go through a buffer of about this size, which a core's cache holds.
_SCRATCH_BYTES = 1 << 20


class Shards(TensorFiles):
    """An open checkpoint directory whose tensors can be read."""

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """The tensor `name` cut to `rows` and `columns` (of steps of 1), on CPU, in the dtype it has on disk.

        out: contiguous CPU tensor of the cut's shape, of as many bytes; it is filled and returned.

        Rows are read alone. A cut of columns reads its rows whole: those of M3 are shorter than what a file system
        fetches at once.
        """
        stored = self._tensors[name]
        shape = stored.cut(rows, columns)
        if out is None:
            out = torch.empty(shape, dtype=DTYPES[stored.dtype])
        assert out.is_contiguous() and tuple(out.shape) == shape and out.dtype.itemsize == DTYPES[stored.dtype].itemsize
        if out.numel() == 0:
            return out
        target: NDArray[np.uint8] = out.view(-1).view(torch.uint8).numpy()
        first, last, _ = (rows or slice(None)).indices(stored.shape[0] if stored.shape else 1)
        start = stored.offset + first * stored.row_bytes
        if columns is None:
            self.fill(name, start, target.data)
            return out
        left, right, _ = columns.indices(stored.shape[1])
        width = stored.row_bytes // stored.shape[1]
        step = max(1, _SCRATCH_BYTES // stored.row_bytes)
        pieces = target.reshape(last - first, -1)
        scratch: NDArray[np.uint8] = np.empty((min(step, last - first), stored.row_bytes), np.uint8)
        for row in range(0, last - first, step):
            part = scratch[: min(step, last - first - row)]
            self.fill(name, start + row * stored.row_bytes, part.reshape(-1).data)
            np.copyto(pieces[row : row + len(part)], part[:, left * width : right * width])
        return out
