"""Strict reading of checkpoint tensors: every one is used, or dropped for a stated reason.

The model asks for its tensors by their canonical names (those of the text model, without the wrapper's prefix) while
it is built, and for its rank's rows or columns only; `finish` then fails if anything is left over.

A block-scaled weight is two tensors on disk, values and scales; canonically they are X.weight and X.weight_scale.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.kernels.params import MX_GROUP, MXWeight, Weight
from engine.model.quant import check_columns, divided, quantise, stored_shapes
from engine.model.read_ahead import Reader
from engine.model.shards import DTYPES, Shards
from engine.quant_config import Format, QuantConfig

# Wrapper prefixes seen on released and re-saved checkpoints, longest first, and what they stand for.
_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
# Endings by which quantisers call the two tensors of a weight.
_ENDINGS = ((".weight_packed", ".weight"), (".weight_scale_inv", ".weight_scale"), (".scale", ".weight_scale"))
_EXPERT = re.compile(r"(.*\.block_sparse_moe\.experts\.\d+\.)(gate_proj|up_proj|down_proj)(\..*)")
_PROJECTIONS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_VISION = ("vision_tower.", "multi_modal_projector.", "patch_merge_mlp.")
_PLAIN = ("BF16", "F16", "F32")
_VALUES: dict[str, Format] = {"F8_E4M3": "mxfp8", "U8": "mxfp4"}
_SCALES = ("F8_E8M0", "U8")
_NAN_SCALE = 255


class WeightSource(Protocol):
    """Where the model's tensors come from.

    num_bytes: of what was taken, as it is stored: a block-scaled weight counts its values and scales.
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
        out: Tensor | None = None,
    ) -> Tensor:
        """The tensor `name`, whose full shape is `shape`, cut to `rows` and `columns`, cast to `dtype`, on the
        source's device. out: of that dtype and the cut's shape; filled and returned."""

    def weight_format(self, name: str) -> Format | None:
        """What the linear weight `name` is stored in; None: a plain dtype."""

    def take_weight(
        self,
        name: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        *,
        rows: slice | None = None,
        columns: slice | None = None,
        out: Weight | None = None,
    ) -> Weight:
        """As `take`, but a block-scaled weight comes as it is stored. out: of the weight's format."""

    def drop(self, name: str, reason: str) -> None:
        """The model does not want this tensor, because of `reason`; it need not exist."""

    def finish(self) -> dict[str, int]:
        """Nothing more is wanted. Returns how many tensors were used, and dropped by reason."""


class CheckpointWeights:
    """Tensors of a checkpoint directory.

    quant: what config.json says of the weights' formats; it must agree with what is stored.
    """

    def __init__(self, shards: Shards, quant: QuantConfig | None, device: torch.device, reader: Reader) -> None:
        """reader: what `shards` holds is read through it, `shards` itself where nothing reads ahead."""
        self._shards = shards
        self._quant = quant
        self._device = device
        self._reader = reader
        self._where: dict[str, str] = {}  # canonical name -> name on disk
        self._formats: dict[str, Format | None] = {}
        self._largest_scales: list[tuple[str, Tensor]] = []
        self._ledger: Counter[str] = Counter()
        self.num_bytes = 0
        for name in sorted(shards.names()):
            if (reason := _drop_reason(name)) is not None:
                self._ledger[f"dropped: {reason}"] += 1
            elif (canonical := _canonical(name)) in self._where:
                raise CheckpointError(f"tensor {name} is there twice, see {self._where[canonical]}")
            else:
                self._where[canonical] = name

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        rows: slice | None = None,
        columns: slice | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        on_disk = self._pop(name, shape, _PLAIN)
        if (scale := self._where.get(_scale_name(name))) is not None:
            raise CheckpointError(f"tensor {on_disk} is not quantised, but has the scales {scale}")
        self._ledger["used"] += 1
        return self._read(on_disk, dtype, rows, columns, out)

    def weight_format(self, name: str) -> Format | None:
        if name not in self._formats:
            self._formats[name] = self._find_format(name)
        return self._formats[name]

    def _find_format(self, name: str) -> Format | None:
        """As stored. Raises CheckpointError if config.json says otherwise."""
        if (on_disk := self._where.get(name)) is None:
            raise CheckpointError(f"the checkpoint misses tensor {name}")
        dtype = self._shards.dtype(on_disk)
        if dtype not in _PLAIN and dtype not in _VALUES:
            raise CheckpointError(
                f"tensor {on_disk} has dtype {dtype}, expected one of {', '.join((*_PLAIN, *_VALUES))}"
            )
        stored, told = _VALUES.get(dtype), None if self._quant is None else self._quant.format_of(name)
        if stored != told:
            if self._quant is None:
                why = "config.json has no quantization_config"
            else:
                why = f"by quantization_config of config.json it is {told or 'not quantised'}"
            raise CheckpointError(
                f"tensor {on_disk} has dtype {dtype}, which is {stored or 'not quantised'}, but {why}"
                "; hf_overrides can correct it"
            )
        return stored

    def take_weight(
        self,
        name: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        *,
        rows: slice | None = None,
        columns: slice | None = None,
        out: Weight | None = None,
    ) -> Weight:
        kind = self.weight_format(name)
        if kind is None:
            assert not isinstance(out, MXWeight)
            return self.take(name, shape, dtype, rows=rows, columns=columns, out=out)
        assert out is None or isinstance(out, MXWeight)
        check_columns(name, shape[-1], columns)
        values_shape, scales_shape = stored_shapes(kind, shape)
        values_on_disk = self._pop(name, values_shape, tuple(_VALUES))
        if (scale := _scale_name(name)) not in self._where:
            raise CheckpointError(
                f"tensor {values_on_disk} is {kind}, but the checkpoint misses its scales {scale} "
                f"of shape {list(scales_shape)}"
            )
        scales_on_disk = self._pop(scale, scales_shape, _SCALES)
        self._ledger["used"] += 2
        self._ledger[f"of these {kind}"] += 2
        target = (None, None) if out is None else (out.values, out.scales)
        per_byte, codes = 2 if kind == "mxfp4" else 1, torch.uint8
        values = self._read(values_on_disk, codes, rows, divided(columns, per_byte), target[0])
        scales = self._read(scales_on_disk, codes, rows, divided(columns, MX_GROUP), target[1])
        if not scales.is_meta:
            # Looked at in the end: on a GPU each look would wait for all that was queued.
            # On CPU by numpy, in this thread: torch's would wait in a spin for cores that the readers have.
            largest = scales.amax() if scales.device.type != "cpu" else torch.tensor(scales.numpy().max())
            self._largest_scales.append((scales_on_disk, largest))
        return MXWeight(kind, values, scales)

    def _pop(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> str:
        """The name on disk, which is then no longer left over. Checks shape and dtype."""
        if (on_disk := self._where.pop(name, None)) is None:
            raise CheckpointError(f"the checkpoint misses tensor {name} of shape {list(shape)}")
        if self._shards.shape(on_disk) != shape:
            raise CheckpointError(
                f"tensor {on_disk} has shape {list(self._shards.shape(on_disk))}, expected {list(shape)}"
            )
        if self._shards.dtype(on_disk) not in dtypes:
            raise CheckpointError(
                f"tensor {on_disk} has dtype {self._shards.dtype(on_disk)}, expected one of {', '.join(dtypes)}"
            )
        return on_disk

    def _read(
        self, on_disk: str, dtype: torch.dtype, rows: slice | None, columns: slice | None, out: Tensor | None
    ) -> Tensor:
        """Plain numbers are cast to `dtype`; codes are uint8, whatever they are called on disk."""
        stored = DTYPES[self._shards.dtype(on_disk)]
        is_code = dtype == torch.uint8
        # The shards themselves read into host memory alone.
        if out is not None and (self._reader is not self._shards or out.device.type == "cpu"):
            target = out.view(stored) if is_code else out
            if target.dtype == stored:
                self._reader.read(on_disk, rows, columns, out=target)
                self.num_bytes += out.nbytes
                return out
        tensor = self._reader.read(on_disk, rows, columns)
        tensor = tensor.view(dtype) if is_code else tensor.to(dtype)
        tensor = tensor.to(self._device) if out is None else out.copy_(tensor)
        self.num_bytes += tensor.nbytes
        return tensor

    def drop(self, name: str, reason: str) -> None:
        for each in (name, _scale_name(name)):
            if self._where.pop(each, None) is not None:
                self._ledger[f"dropped: {reason}"] += 1

    def finish(self) -> dict[str, int]:
        if left := sorted(self._where.values()):
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise CheckpointError(f"the checkpoint holds tensor {left[0]}{more}, which this model has no place for")
        if self._largest_scales:
            names, largest = zip(*self._largest_scales, strict=True)
            for i in torch.stack(largest).eq(_NAN_SCALE).nonzero().flatten().tolist():
                raise CheckpointError(f"tensor {names[i]} holds the e8m0 code {_NAN_SCALE}, which is NaN")
        return dict(self._ledger)


def _canonical(name: str) -> str:
    for prefix, canonical in _PREFIXES:
        if name.startswith(prefix):
            name = canonical + name[len(prefix) :]
            break
    for ending, canonical in _ENDINGS:
        if name.endswith(ending):
            name = name.removesuffix(ending) + canonical
            break
    if (match := _EXPERT.fullmatch(name)) is not None:
        return f"{match[1]}{_PROJECTIONS[match[2]]}{match[3]}"
    return name


def _scale_name(name: str) -> str:
    return name.removesuffix(".weight") + ".weight_scale"


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
    same one, and a block-scaled one is the plain one rounded. Made on the device: a GPU draws the billions of numbers
    of a large model in seconds.
    """

    def __init__(self, seed: int, device: torch.device, quant: QuantConfig | None = None) -> None:
        """quant: which weights are made block-scaled."""
        self._seed = seed
        self._device = device
        self._quant = quant
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
        out: Tensor | None = None,
    ) -> Tensor:
        values = self._draw(name, shape, rows, columns)
        self._count += 1
        tensor = values.to(dtype).contiguous() if out is None else out.copy_(values)
        self.num_bytes += tensor.nbytes
        return tensor

    def weight_format(self, name: str) -> Format | None:
        return None if self._quant is None else self._quant.format_of(name)

    def take_weight(
        self,
        name: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        *,
        rows: slice | None = None,
        columns: slice | None = None,
        out: Weight | None = None,
    ) -> Weight:
        if (kind := self.weight_format(name)) is None:
            assert not isinstance(out, MXWeight)
            return self.take(name, shape, dtype, rows=rows, columns=columns, out=out)
        check_columns(name, shape[-1], columns)
        weight = quantise(self._draw(name, shape, rows, columns), kind)
        if out is not None:
            assert isinstance(out, MXWeight)
            out.values.copy_(weight.values)
            out.scales.copy_(weight.scales)
            weight = out
        self._count += 1
        self.num_bytes += weight.nbytes
        return weight

    def _draw(self, name: str, shape: tuple[int, ...], rows: slice | None, columns: slice | None) -> Tensor:
        generator = torch.Generator(self._device).manual_seed((self._seed << 32) + zlib.crc32(name.encode()))
        values = torch.randn(shape, generator=generator, device=self._device)
        if len(shape) == 1:
            # The scores of the best experts are close to 1: a larger bias would choose for all tokens alike.
            values *= 0.01 if "correction_bias" in name else 0.1
            if "index_" in name:
                values += 0.2
        elif "embed_tokens" not in name:
            values *= _gain(name) / math.sqrt(shape[1])
        return values[(rows or slice(None), columns or slice(None))[: len(shape)]]

    def drop(self, name: str, reason: str) -> None:
        """Nothing to drop: what is not asked for is not made."""

    def finish(self) -> dict[str, int]:
        return {"random": self._count}


def _gain(name: str) -> float:
    if "lm_head" in name:
        return 3.0
    return 1.5 if name.endswith("gate.weight") else 1.0
