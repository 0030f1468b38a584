"""From a checkpoint directory to a model: a dry pass first, then readers that run ahead of the build.

The dry pass builds the model of tensors without data. It finds what the checkpoint misses, holds in vain or holds in
another shape, what the rank will keep and whether that fits, and the order of all reads: 400 GB are not read in vain.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.capacity import gib
from engine.errors import ConfigError
from engine.kernels.api import KernelSet
from engine.kernels.params import MXWeight, Weight
from engine.model.minimax_m3 import MiniMaxM3
from engine.model.read_ahead import READERS, ReadAhead, Recorder, Request
from engine.model.shards import Shards
from engine.model.weight_cache import WeightCache
from engine.model.weights import CheckpointWeights, WeightSource
from engine.parallel import TensorParallel
from engine.quant_config import FORMATS, QuantConfig

Build = Callable[[WeightSource, KernelSet], MiniMaxM3]

_META = torch.device("meta")


class _Packer:
    """Packs nothing. extra_bytes: what weights take beyond what was read for them, where the backend multiplies another
    format than the stored one and they are converted."""

    def __init__(self, dtype: torch.dtype, formats: frozenset[str]) -> None:
        """formats: that are multiplied as they are stored; others become `dtype`."""
        self._dtype = dtype
        self._formats = formats
        self.extra_bytes = 0

    def linear(self, weight: Weight) -> Weight:
        """In place of KernelSet.pack_linear."""
        if isinstance(weight, MXWeight) and weight.format not in self._formats:
            self.extra_bytes += math.prod(weight.shape) * self._dtype.itemsize - weight.nbytes
        return weight

    def experts(self, w13: Weight, w2: Weight) -> Any:
        """In place of KernelSet.pack_experts."""
        return self.linear(w13), self.linear(w2)


def dry_pass(
    shards: Shards, quant: QuantConfig | None, kernels: KernelSet, dtype: torch.dtype, build: Build
) -> tuple[list[Request], int]:
    """What `build` will read, in order, and the bytes of weights that it keeps. dtype: of computation."""
    recorder = Recorder(shards)
    packer = _Packer(dtype, kernels.mx_formats)
    dry = replace(
        kernels,
        device=_META,
        mx_formats=FORMATS,
        pack_linear=packer.linear,
        pack_experts=packer.experts,
        pack_gains=lambda gains, layout: gains,
    )
    weights = CheckpointWeights(shards, quant, _META, recorder)
    build(weights, dry)
    return recorder.requests, weights.num_bytes + packer.extra_bytes


def check_fit(num_bytes: int, free_bytes: int, device: torch.device, parallel: TensorParallel) -> None:
    """Raises ConfigError when weights of `num_bytes` do not fit into `free_bytes`."""
    if num_bytes <= free_bytes:
        return
    where = "in memory" if device.type == "cpu" else "on the GPU"
    raise ConfigError(
        f"rank {parallel.rank} keeps {gib(num_bytes)} of weights, {gib(free_bytes)} are free {where}, "
        f"{gib(num_bytes - free_bytes)} too few: raise tensor_parallel_size={parallel.size}, serve a checkpoint with "
        "MXFP8 or MXFP4 weights, or free memory; m3serve plan tells what fits where"
    )


def load_model(
    path: Path,
    quant: QuantConfig | None,
    kernels: KernelSet,
    dtype: torch.dtype,
    parallel: TensorParallel,
    build: Build,
    *,
    free_bytes: int,
    cache_dir: Path | None = None,
    readers: int = READERS,
) -> MiniMaxM3:
    """Build the model of the checkpoint in the directory `path`; `build` is called twice.

    dtype: of computation.  free_bytes: of the device.  cache_dir: see weight_cache.  readers: threads that read.
    Raises CheckpointError, and ConfigError when the weights do not fit, before any tensor is read.
    """
    with ExitStack() as stack:
        shards = stack.enter_context(closing(Shards(path)))
        requests, num_bytes = dry_pass(shards, quant, kernels, dtype, build)
        check_fit(num_bytes, free_bytes, kernels.device, parallel)
        cache = cut = None
        if cache_dir is not None:
            cache = stack.enter_context(closing(WeightCache(cache_dir, shards, requests, parallel)))
            if (cut := cache.find()) is not None:
                stack.callback(cut.close)
                cache = None
            else:
                cache.begin()
        label = f"rank {parallel.rank}" + (", from the weight cache" if cut is not None else "")
        sink = None if cache is None else cache.write
        ahead = stack.enter_context(
            closing(ReadAhead(shards, requests, kernels.device, label=label, readers=readers, cut=cut, sink=sink))
        )
        model = build(CheckpointWeights(shards, quant, kernels.device, ahead), kernels)
        ahead.finish()
        if cache is not None:
            cache.commit()
    return model
