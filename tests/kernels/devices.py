"""Where the Triton kernels are tested: on the GPU if there is one, else in Triton's interpreter on CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from engine.kernels.launch import detect
from tests.kernels.reference import Step

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
TARGET = detect()


def moved(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A dataclass of tensors (or a tensor, or a tuple) on the device; floating tensors cast to `dtype`."""
    if isinstance(value, Tensor):
        return value.to(DEVICE, dtype if value.is_floating_point() else None)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: moved(getattr(value, name), dtype) for name in names})
    return value


def to_device(step: Step, dtype: torch.dtype | None = None) -> Step:
    """The step's tensors on the device, pages, q and index_q cast to `dtype`."""
    return Step(moved(step.batch), moved(step.pages, dtype), moved(step.q, dtype), moved(step.index_q, dtype))
