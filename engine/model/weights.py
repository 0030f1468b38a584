"""Strict reading of checkpoint tensors: every one is used, or dropped for a stated reason.

The model asks for its tensors by their canonical names (those of the text model, without the wrapper's prefix) while
it is built, and for its rank's rows or columns only; `finish` then fails if anything is left over.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.config import read_json
from engine.errors import CheckpointError

# Wrapper prefixes seen on released and re-saved checkpoints, longest first, and what they stand for.
_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
_VISION = ("vision_tower.", "multi_modal_projector.", "patch_merge_mlp.")
_DTYPES = {"BF16", "F16", "F32"}


class WeightSource(Protocol):
    """Where the model's tensors come from.

    num_bytes: of what was taken, as this rank holds it.
    """

    num_bytes: int

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        rows: slice | None = None,
        columns: slice | None = None,
    ) -> Tensor:
        """The tensor `name`, whose full shape is `shape`, cut to `rows` and `columns`, cast to `dtype`, on the
        source's device."""

    def drop(self, name: str, reason: str) -> None:
        """The model does not want this tensor, because of `reason`; it need not exist."""

    def finish(self) -> dict[str, int]:
        """Nothing more is wanted. Returns how many tensors were used, and dropped by reason."""


class CheckpointWeights:
    """Tensors of a directory of safetensors files."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._device = device
        self._files: dict[str, safe_open] = {}
        self._where: dict[str, tuple[str, str]] = {}  # canonical name -> (file, name in the file)
        self._ledger: Counter[str] = Counter()
        self.num_bytes = 0
        index = path / "model.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index} misses weight_map")
            files = sorted({str(file) for file in weight_map.values()})
        else:
            weight_map = None
            files = sorted(file.name for file in path.glob("*.safetensors"))
            if not files:
                raise CheckpointError(f"{path} holds no *.safetensors file")
        for file in files:
            if Path(file).name != file:
                raise CheckpointError(f"{index}: {file!r} is not a plain file name")
            self._open(path / file, weight_map)
        if weight_map is not None:
            present = {name for _, name in self._where.values()}
            if missing := sorted(weight_map.keys() - present - self._dropped_names(weight_map)):
                raise CheckpointError(f"{index} lists {missing[0]} in {weight_map[missing[0]]}, which lacks it")

    def _dropped_names(self, names: dict[str, str]) -> set[str]:
        return {name for name in names if _drop_reason(name) is not None}

    def _open(self, file: Path, weight_map: dict[str, str] | None) -> None:
        try:
            handle = safe_open(str(file), framework="pt")
            names = list(handle.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read, it may be truncated: {error}") from error
        self._files[file.name] = handle
        for name in names:
            if weight_map is not None and weight_map.get(name) != file.name:
                raise CheckpointError(f"{file} holds tensor {name}, which the index does not place there")
            if (reason := _drop_reason(name)) is not None:
                self._ledger[f"dropped: {reason}"] += 1
                continue
            canonical = _canonical(name)
            if canonical in self._where:
                raise CheckpointError(f"{file}: tensor {name} is there twice, see {self._where[canonical][0]}")
            self._where[canonical] = (file.name, name)

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        rows: slice | None = None,
        columns: slice | None = None,
    ) -> Tensor:
        if name not in self._where:
            raise CheckpointError(f"the checkpoint misses tensor {name} of shape {list(shape)}")
        file, on_disk = self._where.pop(name)
        stored = self._files[file].get_slice(on_disk)
        if tuple(stored.get_shape()) != shape:
            raise CheckpointError(f"tensor {on_disk} has shape {stored.get_shape()}, expected {list(shape)}")
        if stored.get_dtype() not in _DTYPES:
            raise CheckpointError(
                f"tensor {on_disk} has dtype {stored.get_dtype()}, expected one of {', '.join(sorted(_DTYPES))}"
            )
        self._ledger["used"] += 1
        cut = (rows or slice(None), columns or slice(None))[: len(shape)]
        tensor: Tensor = stored[cut].to(dtype).contiguous().to(self._device)
        self.num_bytes += tensor.nbytes
        return tensor

    def drop(self, name: str, reason: str) -> None:
        if self._where.pop(name, None) is not None:
            self._ledger[f"dropped: {reason}"] += 1

    def finish(self) -> dict[str, int]:
        if left := sorted(name for _, name in self._where.values()):
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise CheckpointError(f"the checkpoint holds tensor {left[0]}{more}, which this model has no place for")
        self._files.clear()
        return dict(self._ledger)


def _canonical(name: str) -> str:
    for prefix, canonical in _PREFIXES:
        if name.startswith(prefix):
            return canonical + name[len(prefix) :]
    return name


def _drop_reason(name: str) -> str | None:
    inner = name.removeprefix("model.")
    if inner.startswith(_VISION):
        return "vision, this is a text server"
    if "mtp." in name:
        return "multi-token prediction is not used"
    return None


class DummyWeights:
    """Seeded random tensors in place of a checkpoint's, scaled so that no layer is degenerate.

    Norm weights differ from 0, router logits and index scores are spread, so that routing covers the experts and
    block choices are not ties. A tensor depends on (seed, name) and the kind of device alone: every rank cuts the
    same one. Made on the device: a GPU draws the billions of numbers of a large model in seconds.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._device = device
        self._count = 0
        self.num_bytes = 0

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        rows: slice | None = None,
        columns: slice | None = None,
    ) -> Tensor:
        generator = torch.Generator(self._device).manual_seed((self._seed << 32) + zlib.crc32(name.encode()))
        values = torch.randn(shape, generator=generator, device=self._device)
        if len(shape) == 1:
            # The scores of the best experts are close to 1: a larger bias would choose for all tokens alike.
            values *= 0.01 if "correction_bias" in name else 0.1
            if "index_" in name:
                values += 0.2
        elif "embed_tokens" not in name:
            values *= _gain(name) / math.sqrt(shape[1])
        self._count += 1
        cut = (rows or slice(None), columns or slice(None))[: len(shape)]
        tensor = values[cut].to(dtype).contiguous()
        self.num_bytes += tensor.nbytes
        return tensor

    def drop(self, name: str, reason: str) -> None:
        """Nothing to drop: what is not asked for is not made."""

    def finish(self) -> dict[str, int]:
        return {"random": self._count}


def _gain(name: str) -> float:
    if "lm_head" in name:
        return 3.0
    return 1.5 if name.endswith("gate.weight") else 1.0
