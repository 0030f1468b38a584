"""Block-scaled weights while a model is built: their buffers, a rank's cut of them, packed parts that must agree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Protocol

import torch

from engine.errors import CheckpointError, ConfigError
from engine.kernels.params import MX_GROUP, MXWeight, Weight
from engine.kernels.torch_mx import dequantise, quantise
from engine.quant_config import Format, QuantConfig

__all__ = [
    "Format",
    "QuantConfig",
    "agreed_format",
    "check_columns",
    "dequantise",
    "divided",
    "empty_weight",
    "quantise",
    "stored_shapes",
    "view",
]


class KnowsFormats(Protocol):
    """What `agreed_format` asks."""

    def weight_format(self, name: str) -> Format | None:
        """The block-scaled format of the weight `name`, None if it is plain."""


def agreed_format(source: KnowsFormats, names: Iterable[str]) -> Format | None:
    """The format of weights that are multiplied as one. Raises CheckpointError where they differ."""
    by_format: defaultdict[Format | None, list[str]] = defaultdict(list)
    for name in names:
        by_format[source.weight_format(name)].append(name)
    if len(by_format) > 1:
        found = "; ".join(f"{kind or 'not quantised'}: {_some(members)}" for kind, members in by_format.items())
        raise CheckpointError(f"weights that are multiplied as one must be stored in one format. {found}")
    [kind] = by_format
    return kind


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def stored_shapes(kind: Format, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the values and the scales of a weight of `shape`, [..., rows, columns]."""
    columns = shape[-1]
    return (*shape[:-1], columns // 2 if kind == "mxfp4" else columns), (*shape[:-1], columns // MX_GROUP)


def check_columns(name: str, total: int, columns: slice | None) -> None:
    """Scales are shared by groups of 32 columns. Raises CheckpointError if the `total` columns of the weight `name` are
    no whole number of groups, ConfigError if a rank's `columns` are none."""
    if total % MX_GROUP:
        raise CheckpointError(f"{name} has {total} columns, a block-scaled weight needs a multiple of {MX_GROUP}")
    if columns is not None and (columns.start % MX_GROUP or columns.stop % MX_GROUP):
        raise ConfigError(
            f"{name}: this rank's columns {columns.start} to {columns.stop} cut a group of {MX_GROUP} that shares a "
            "scale; choose a smaller tensor_parallel_size"
        )


def divided(columns: slice | None, by: int) -> slice | None:
    """The columns of a tensor that holds `by` of the weight's columns in one."""
    return columns if columns is None or by == 1 else slice(columns.start // by, columns.stop // by)


def empty_weight(kind: Format | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Weight:
    """Room for a weight of `shape`; `dtype` of a plain one."""
    if kind is None:
        return torch.empty(shape, dtype=dtype, device=device)
    values, scales = (torch.empty(each, dtype=torch.uint8, device=device) for each in stored_shapes(kind, shape))
    return MXWeight(kind, values, scales)


def view(weight: Weight, *index: int | slice) -> Weight:
    """weight[index], of dimensions before the columns."""
    if isinstance(weight, MXWeight):
        return MXWeight(weight.format, weight.values[index], weight.scales[index])
    return weight[index]
