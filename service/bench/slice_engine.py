"""The engine that `bench slice` measures: in this process, or a group of worker actors on several GPUs."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.engine import EngineCore
from engine.executor import Executor, InlineExecutor
from engine.model.minimax_m3 import MiniMaxM3
from engine.model.moe import MoE
from service.bench import floors
from service.bench.engine_load import BUDGET, Load, closed_loop
from service.bench.floors import Kind, RankShape
from service.bench.report import progress
from service.bench.slice_model import SliceFloors

_COVERAGE_DRAWS = 16


class _WatchedExecutor(InlineExecutor):
    """Lets the benchmark look at the model that it measures."""

    @property
    def model(self) -> MiniMaxM3:
        assert self._runner is not None, "the executor is closed"
        return self._runner.model


class SliceEngine:
    """One engine on the slice, and prompts for it. shape: of a rank; `ranks` of them make the model."""

    def __init__(
        self, directory: Path, shape: RankShape, kind: Kind, load: Load, settings: dict[str, Any], ranks: int
    ) -> None:
        merged = {"load_format": "dummy", "tensor_parallel_size": ranks, **load.engine_settings(), **settings}
        self.config = EngineConfig.from_kwargs(directory, **merged)
        self._leave_ray: Callable[[], None] | None = None
        self.watched = _WatchedExecutor(self.config) if ranks == 1 else None
        self.core = EngineCore(self.config, self.watched or self._group())
        info = self.core.info
        element = getattr(torch, info.dtype).itemsize
        kv, index = (
            floors.FP8 if merged.get(name) == "fp8" else element for name in ("kv_cache_dtype", "index_cache_dtype")
        )
        self.floors = SliceFloors(shape, info.plan, element, kv, index, kind)
        self.shape = shape
        self._rng = random.Random(0)

    def _group(self) -> Executor:
        # By name: one rank must work on a machine without Ray.
        ray_executor = importlib.import_module("engine.ray_executor")
        self._leave_ray = ray_executor.ensure_ray(num_cpus=self.config.tensor_parallel_size)
        executor: Executor = ray_executor.RayExecutor(self.config)
        return executor

    def prompt(self, length: int) -> list[int]:
        return [self._rng.randrange(self.core.info.vocab_size) for _ in range(length)]

    def close(self) -> None:
        self.core.close()
        if self._leave_ray is not None:
            self._leave_ray()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def _watch_routes(model: MiniMaxM3, seen: dict[int, Tensor]) -> Iterator[None]:
    """`seen` gets, by layer, the expert ids of the step that runs last; steps in captured graphs are not seen."""
    experts = {i: layer.feed_forward for i, layer in enumerate(model.layers) if isinstance(layer.feed_forward, MoE)}
    kernels = {i: moe.kernels for i, moe in experts.items()}

    def watched(layer_id: int) -> Any:
        def route(*args: Any) -> tuple[Tensor, Tensor]:
            weights, ids = kernels[layer_id].route(*args)
            seen[layer_id] = ids.clone()
            return weights, ids

        return route

    for layer_id, moe in experts.items():
        moe.kernels = dataclasses.replace(kernels[layer_id], route=watched(layer_id))
    try:
        yield
    finally:
        for layer_id, moe in experts.items():
            moe.kernels = kernels[layer_id]


def expert_coverage(engine: SliceEngine, concurrency: Sequence[int]) -> dict[int, float]:
    """Distinct routed experts that so many tokens hit in a layer, on average: random weights must not route alike, or
    a step would read too few of them. Taken from tokens of one prompt, as a stand-in for a decode step's rows. The
    model of a group is out of sight: it is expected to route evenly."""
    num_experts, chosen = engine.shape.experts, engine.shape.experts_per_token
    if engine.watched is None or not concurrency:
        return {rows: floors.expected_experts(num_experts, chosen, rows) for rows in concurrency}
    seen: dict[int, Tensor] = {}
    length = min(engine.core.info.max_model_len - 1, max(256, 4 * max(concurrency)), BUDGET)
    with _watch_routes(engine.watched.model, seen):
        closed_loop(engine.core, [engine.prompt(length)], concurrency=1, output_tokens=1)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for rows in concurrency:
        distinct = []
        for ids in (ids.cpu() for ids in seen.values()):
            for _ in range(_COVERAGE_DRAWS):
                picked = ids[torch.randperm(len(ids), generator=generator)[:rows]]
                distinct.append(len(picked[picked < num_experts].unique()))
        found[rows] = mean(distinct)
        uniform = floors.expected_experts(num_experts, chosen, rows)
        progress(f"{rows} tokens hit {found[rows]:.1f} of {num_experts} experts in a layer; uniform: {uniform:.1f}")
    return found
