"""Index plans on a command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from engine.config import EngineConfig, ModelConfig, resolve_model
from engine.errors import ConfigError
from engine.msa.plan import KNOBS


def plan_settings(spec: str) -> dict[str, Any]:
    """The index settings that one entry of --compare stands for; they replace any others.

    A number: one sparse layer in so many selects (1: all do).  F and S: one letter per sparse layer, or F alone for
    all.  Otherwise the path of a plan file. Raises ConfigError for what is none of them.
    """
    if spec in ("F", "1"):
        return {"use_index_cache": False}
    if re.fullmatch(r"\d{1,9}", spec):
        return {"use_index_cache": True, "index_topk_freq": int(spec)}
    if re.fullmatch(r"[FS]+", spec):
        return {"use_index_cache": True, "index_topk_pattern": spec}
    if Path(spec).is_file():
        return {"use_index_cache": True, "index_plan_file": spec}
    raise ConfigError(f"--compare {spec!r}: expected a number, letters F and S, or the path of a plan file")


def plan_specs(compare: str) -> list[str]:
    """The entries of --compare."""
    specs = [spec.strip() for spec in compare.split(",") if spec.strip()]
    if not specs:
        raise ConfigError("--compare names no plan")
    return specs


def with_plan(settings: dict[str, Any], spec: str | None) -> dict[str, Any]:
    """The engine's settings under a plan; None: under their own."""
    if spec is None:
        return settings
    return {name: value for name, value in settings.items() if name not in KNOBS} | plan_settings(spec)


def resolve(model: Path, settings: dict[str, Any], specs: list[str | None]) -> tuple[ModelConfig, list[str]]:
    """The model, and the letters of every plan: each is checked before any weight is read."""
    config, letters = None, []
    for spec in specs:
        config, knobs = resolve_model(EngineConfig.from_kwargs(model, **with_plan(settings, spec)))
        plan = str(knobs.build_plan(config.is_sparse))
        if plan in letters:
            raise ConfigError(f"--compare names the plan {plan} twice")
        letters.append(plan)
    assert config is not None
    return config, letters
