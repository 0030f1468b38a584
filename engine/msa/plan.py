"""Which layers run the lightning indexer and which reuse its last selection: decided once, at load.

The knobs are those of ATOM's MiniMax-M3 (`use_index_cache`, `index_topk_freq`, `index_topk_pattern`,
`index_skip_topk_offset`), with its rule: over the sparse layers, counted from 0, layer i reuses when
`max(i - offset, 0) % freq != 0`, and a pattern of F and S overrides both. The idea of sharing a top-k across
layers, and the searched patterns, come from IndexCache (arXiv 2603.12201).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.msa.plan_file import PlanFile, read_plan_file

KNOBS = ("use_index_cache", "index_topk_freq", "index_topk_pattern", "index_skip_topk_offset", "index_plan_file")
_SCHEDULES = ("index_topk_freq", "index_topk_pattern", "index_plan_file")


class Role(StrEnum):
    """What a layer does about its selection."""

    DENSE = "D"  # full attention, no selection
    COMPUTE = "F"  # runs the lightning indexer and writes the selection
    REUSE = "S"  # reads the selection of the nearest F above it


@dataclass(frozen=True, slots=True)
class IndexPlan:
    """The role of every layer. Built once at load, checked once, never changed. `str()` gives its letters."""

    roles: tuple[Role, ...]

    @classmethod
    def build(
        cls,
        is_sparse: Sequence[bool],
        *,
        freq: int = 1,
        offset: int = 0,
        pattern: str | None = None,
        stage_starts: Sequence[int] = (0,),
    ) -> IndexPlan:
        """Resolve the knobs to one role per layer.

        is_sparse: one entry per layer.  freq: one sparse layer in `freq` selects.  offset: how many sparse layers
        after the first still select each for itself.  pattern: F or S per sparse layer, overrides both.
        stage_starts: first layer of each pipeline stage; a stage cannot read a selection of another.
        Raises ConfigError when a reuse layer would have nothing to read.
        """
        num_sparse = sum(is_sparse)
        if freq < 1:
            raise ConfigError(f"index_topk_freq must be >= 1, got {freq}")
        if offset < 0:
            raise ConfigError(f"index_skip_topk_offset must be >= 0, got {offset}")
        if pattern is None:
            pattern = "".join("S" if max(i - offset, 0) % freq else "F" for i in range(num_sparse))
        if len(pattern) != num_sparse:
            raise ConfigError(
                f"index_topk_pattern needs {num_sparse} letters, one per sparse layer, got {len(pattern)}: {pattern!r}"
            )
        if wrong := sorted(set(pattern) - {"F", "S"}):
            raise ConfigError(f"index_topk_pattern may hold only the letters F and S, got {wrong} in {pattern!r}")
        letters = iter(pattern)
        roles = tuple(Role(next(letters)) if sparse else Role.DENSE for sparse in is_sparse)
        for start in stage_starts:
            first = next((role for role in roles[start:] if role is not Role.DENSE), Role.COMPUTE)
            if first is Role.REUSE:
                raise ConfigError(
                    f"the first sparse layer from layer {start} on must be F, since an S layer reads the selection "
                    f"of an F layer above it: {''.join(roles)}"
                )
        return cls(roles)

    @classmethod
    def parse(cls, letters: str) -> IndexPlan:
        """The plan whose `str` is `letters`, one of D, F and S per layer."""
        return cls(tuple(Role(letter) for letter in letters))

    def source(self, layer_id: int) -> int:
        """The F layer whose selection `layer_id` attends with: itself when it is one. ValueError on a dense layer."""
        if self.roles[layer_id] is Role.DENSE:
            raise ValueError(f"layer {layer_id} is dense: it has no selection")
        return next(i for i in range(layer_id, -1, -1) if self.roles[i] is Role.COMPUTE)

    def layers(self, role: Role) -> tuple[int, ...]:
        """Layer ids with this role, ascending."""
        return tuple(i for i, r in enumerate(self.roles) if r is role)

    def __str__(self) -> str:
        return "".join(self.roles)


@dataclass(frozen=True, slots=True)
class IndexKnobs:
    """The user's knobs after their sources were merged and checked; `build_plan` turns them into an IndexPlan.

    plan_file: where the pattern comes from, if from a file.  is_default: no source says anything.
    """

    freq: int = 1
    offset: int = 0
    pattern: str | None = None
    plan_file: PlanFile | None = field(default=None, compare=False)
    is_default: bool = field(default=False, compare=False)

    def build_plan(self, is_sparse: Sequence[bool]) -> IndexPlan:
        return IndexPlan.build(is_sparse, freq=self.freq, offset=self.offset, pattern=self.pattern)

    def note(self, model_dir: str, *, exact_tokens: int, max_tokens: int) -> tuple[int, str] | None:
        """What the user should know about where the plan comes from: level of logging and one line.

        exact_tokens: up to so many, all blocks are selected under every plan.  max_tokens: of a context.
        """
        if self.plan_file is not None:
            path = self.plan_file.path
            if self.plan_file.checkpoint_hash is None:
                unchecked = "it has no checkpoint_hash, so nothing says that it suits these weights"
                return logging.WARNING, f"index plan from {path}: {unchecked}"
            return logging.INFO, f"index plan from {path}, calibrated on these weights"
        if self.is_default and max_tokens > exact_tokens:
            return logging.INFO, (
                f"index plan: every sparse layer selects for itself; `m3serve calibrate --model {model_dir}` finds "
                f"which can share beyond {exact_tokens} tokens of context"
            )
        return None


def resolve_knobs(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> IndexKnobs:
    """Merge the knobs of several sources; a later source overrides an earlier one.

    layers: (name of the source, its knobs), e.g. ("config.json", {...}), ("hf_overrides", {...}), ("settings", {...}).

    Asking is enabling: a frequency above 1, a pattern with an S or a plan file switches sharing on, unless the same
    source (an error, until a later source settles it) or a later one (everything is off) says
    use_index_cache=false. A pattern, a plan file and a frequency replace each other across sources; within one
    source a pattern overrides the frequency, as in ATOM. A value of None is not set.

    Raises ConfigError for an unknown knob, a wrong type or range, and knobs of one source that contradict each other.
    """
    merged: dict[str, Any] = {}
    enabled: bool | None = None
    conflict: str | None = None
    for source, knobs in layers:
        given = {key: value for key, value in knobs.items() if value is not None}
        for key, value in given.items():
            _check_knob(source, key, value)
        if "index_plan_file" in given and "index_topk_pattern" in given:
            raise ConfigError(f"{source} sets both index_plan_file and index_topk_pattern: keep one")
        schedule = given.keys() & _SCHEDULES
        asking = [f"{key}={given[key]!r}" for key in _SCHEDULES if key in given and _asks(key, given[key])]
        if "use_index_cache" in given or schedule:
            conflict = None
        if asking:
            enabled = True
        enabled = given.get("use_index_cache", enabled)
        if asking and not enabled:
            conflict = (
                f"{source} says use_index_cache=false and also {', '.join(asking)}: "
                "set use_index_cache=true to share selections, or remove the others"
            )
        if schedule:
            for key in _SCHEDULES:
                merged.pop(key, None)
        merged |= given
    if conflict is not None:
        raise ConfigError(conflict)
    if enabled is False:
        return IndexKnobs()
    pattern = merged.get("index_topk_pattern")
    plan_file = None
    if "index_plan_file" in merged:
        plan_file = read_plan_file(Path(merged["index_plan_file"]))
        pattern = plan_file.pattern
    # 0 means 1, as in ATOM.
    freq = merged.get("index_topk_freq", 1) or 1
    offset = merged.get("index_skip_topk_offset", 0)
    return IndexKnobs(freq=freq, offset=offset, pattern=pattern, plan_file=plan_file, is_default=not merged)


def _asks(key: str, value: Any) -> bool:
    """Whether this value of a schedule knob makes some layer reuse a selection."""
    if key == "index_topk_freq":
        return bool(value > 1)
    return key == "index_plan_file" or "S" in value


def _check_knob(source: str, key: str, value: Any) -> None:
    if key not in KNOBS:
        raise ConfigError(f"{source}: unknown index cache knob {key!r}; known: {', '.join(KNOBS)}")
    expected: type = {"use_index_cache": bool, "index_topk_freq": int, "index_skip_topk_offset": int}.get(key, str)
    if type(value) is not expected:
        raise ConfigError(f"{source}: {key} must be of type {expected.__name__}, got {value!r}")
    if isinstance(value, int) and value < 0:
        raise ConfigError(f"{source}: {key} must be >= {int(key == 'index_topk_freq')}, got {value}")
