"""The engine: MiniMax-M3 with block-sparse attention and a shared index cache, usable without Ray.

Names resolve on first use, so that a process which only needs types never loads torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# Read by the OpenMP runtime when torch loads it. Its threads would otherwise spin at every barrier for as long as it
# takes: where a step's threads share their cores with Ray, the HTTP front or another rank, decoding on CPU gets several
# times slower. A thousand turns of spinning are as good as any larger number on idle cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.llm import LLM
    from engine.msa.plan import IndexPlan
    from engine.types import Output, SamplingParams

__all__ = ["LLM", "EngineConfig", "IndexPlan", "Output", "SamplingParams"]

_HOME = {
    "LLM": "engine.llm",
    "EngineConfig": "engine.config",
    "IndexPlan": "engine.msa.plan",
    "Output": "engine.types",
    "SamplingParams": "engine.types",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
