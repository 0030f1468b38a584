"""Calibration of a checkpoint: runs the search of engine/msa/calibrate.py on a loaded engine and writes the plan file.

One engine serves all trials: it runs in audited mode, where every sparse layer owns its indexer, and changes its plan
between them. What was measured is in the file after every trial, so that an interrupted calibration goes on where it
stopped.
"""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from engine import scoring
from engine.checkpoint_hash import checkpoint_hash
from engine.config import PAGE_SIZE, EngineConfig, ModelConfig, resolve_model
from engine.errors import ConfigError
from engine.llm import LLM
from engine.msa.calibrate import Removal, SearchOptions, most_skipped, num_trials, search, skipped_at
from engine.msa.plan_file import read_document, write_document

# The schedules that the search is compared with.
UNIFORM_FREQS = (2, 3, 4, 8)
# Sequences whose prompts may be computed in one step.
_RUNNING = 4
# What must be the same for losses to be comparable.
_IDENTITY = ("checkpoint_hash", "topk_blocks", "data_sha256", "engine")


@dataclass(frozen=True, slots=True)
class CalibrationData:
    """What every trial runs on.

    token_ids: of each sequence.  weights: float64 [length] per sequence, what each token's loss counts; they sum to 1.
    sha256: of both.  about: said of it in the plan file.
    """

    token_ids: list[list[int]]
    weights: list[NDArray[np.float64]]
    sha256: str
    about: dict[str, Any]

    @classmethod
    def make(
        cls,
        documents: Sequence[list[int]],
        answers: Sequence[tuple[list[int], NDArray[np.bool_]]],
        *,
        skip_tokens: int,
        about: dict[str, Any],
    ) -> CalibrationData:
        """documents: their loss is the mean of all tokens.  answers: sequences, and which of their tokens count,
        bool [length]; where there are both, each side counts half.  skip_tokens: positions below it count nowhere,
        since every plan selects all blocks there.

        Raises ConfigError when no token counts.
        """
        past = [np.arange(len(ids)) >= max(1, skip_tokens) for ids in documents]
        asked = [(np.arange(len(ids)) >= max(1, skip_tokens)) & mask for ids, mask in answers]
        sides = [side for side in (past, asked) if any(mask.any() for mask in side)]
        if not sides:
            raise ConfigError(
                f"no calibration token lies past the first {skip_tokens}, up to which all plans are the same: the data "
                "needs longer documents"
            )
        weights = []
        for side in (past, asked):
            count = sum(int(mask.sum()) for mask in side)
            weights += [mask / (count * len(sides)) if count else mask.astype(np.float64) for mask in side]
        token_ids = [*documents, *(ids for ids, _ in answers)]
        digest = hashlib.sha256()
        for ids, weight in zip(token_ids, weights, strict=True):
            digest.update(np.array(ids, dtype="<i4").tobytes() + weight.astype("<f8").tobytes())
        counts = {
            "documents": len(documents),
            "sequences": len(answers),
            "tokens": sum(map(len, token_ids)),
            "counted_tokens": sum(int((weight > 0).sum()) for weight in weights),
            "skip_tokens": skip_tokens,
        }
        return cls(token_ids, weights, digest.hexdigest(), about | counts)

    @property
    def num_tokens(self) -> int:
        """Of all sequences."""
        return sum(map(len, self.token_ids))

    def loss(self, nats: Sequence[NDArray[np.float32]]) -> float:
        """The weighted sum of the losses of all tokens, in nats; nats: of each sequence, as `scoring.score` gives."""
        total = math.fsum(
            float((weight[weight > 0] * each[weight > 0]).sum())
            for each, weight in zip(nats, self.weights, strict=True)
        )
        if not math.isfinite(total):
            raise RuntimeError(f"the calibration loss is {total}: the model's logits are not finite")
        return total


class Watcher(Protocol):
    """Hears how far a calibration is."""

    def begin(self, measured: int, left: int) -> None:
        """measured: trials that an earlier run left.  left: trials that follow, at most."""

    def add(self, tokens: int) -> None:
        """So many more tokens of the trial are done."""

    def trial(self, pattern: str, loss: float) -> None:
        """A trial ended."""

    def removed(self, removal: Removal, rise: float) -> None:
        """The search took one layer's indexer away.  rise: of the loss, over that of F alone, in nats."""


def calibrate(
    model: Path,
    data: CalibrationData,
    options: SearchOptions,
    settings: dict[str, Any],
    out: Path,
    watcher: Watcher,
) -> dict[str, Any]:
    """Search and write the plan file `out`, which also goes on with what it holds. Returns its content.

    settings: fields of EngineConfig beside the model. KeyboardInterrupt leaves a file that holds all measured trials.
    Raises ConfigError when `out` holds another calibration, CheckpointError for a bad checkpoint.
    """
    engine_settings = _settings(data) | settings | _FIXED
    config = EngineConfig.from_kwargs(model, **engine_settings)
    if config.load_format == "dummy":
        raise ConfigError("load_format=dummy has random weights: there is nothing to calibrate")
    model_config, _ = resolve_model(config)
    if sum(model_config.is_sparse) < 2:
        raise ConfigError("the model has fewer than two sparse layers: none can reuse a selection")
    book = Notebook(out, data, options, config, model_config)
    with LLM(model, **engine_settings) as llm:
        info = llm.info
        book.resume({"backend": info.backend, "dtype": info.dtype})
        _run(llm, data, options, book, watcher)
    return book.document()


_FIXED = {
    "index_reuse": "audited",
    "use_index_cache": False,
    "index_topk_freq": None,
    "index_topk_pattern": None,
    "index_plan_file": None,
    "index_skip_topk_offset": None,
    "audit_overlap_floor": None,
}


def _settings(data: CalibrationData) -> dict[str, Any]:
    """Room for the sequences and one more token; what was computed under another plan is not found."""
    length = max(map(len, data.token_ids)) + 1
    return {
        "max_model_len": length,
        "max_num_seqs": _RUNNING,
        "num_pages": _RUNNING * -(-length // PAGE_SIZE),
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "probe_interval": 0,
    }


def _run(llm: LLM, data: CalibrationData, options: SearchOptions, book: Notebook, watcher: Watcher) -> None:
    num_sparse = book.num_sparse
    max_skipped = most_skipped(num_sparse, options.blocks)
    if options.stop is not None:
        max_skipped = min(max_skipped, skipped_at(num_sparse, options.stop))
    uniform = uniform_patterns(num_sparse)
    total = len(uniform) + num_trials(num_sparse, max_skipped=max_skipped, blocks=options.blocks)
    watcher.begin(len(book.trials), max(total - len(book.trials), 0))

    def loss(pattern: str) -> float:
        if pattern not in book.trials:
            started_s = time.monotonic()
            llm.set_plan(pattern)
            found = data.loss(scoring.score(llm, data.token_ids, watcher.add))
            book.add(pattern, found, time.monotonic() - started_s)
            watcher.trial(pattern, found)
        return book.trials[pattern]

    base = loss("F" * num_sparse)
    for pattern in uniform.values():
        loss(pattern)
    for removal in search(num_sparse, loss, max_skipped=max_skipped, blocks=options.blocks):
        book.removals.append(removal)
        book.write()
        watcher.removed(removal, removal.loss - base)
    book.complete = True
    book.write()


def uniform_patterns(num_sparse: int) -> dict[int, str]:
    """The frequencies of `UNIFORM_FREQS` that differ for so many layers, and their patterns."""
    made = {freq: "".join("S" if i % freq else "F" for i in range(num_sparse)) for freq in UNIFORM_FREQS}
    return {freq: made[freq] for freq in UNIFORM_FREQS if freq < num_sparse}


class Notebook:
    """All that was measured, and the plan file that holds it.

    trials: pattern -> loss.  removals: of the search, in their order.  complete: the search came to its end.
    """

    def __init__(
        self, path: Path, data: CalibrationData, options: SearchOptions, config: EngineConfig, model: ModelConfig
    ) -> None:
        self._path = path
        self._options = options
        self._layer_ids = [i for i, sparse in enumerate(model.is_sparse) if sparse]
        self.num_sparse = len(self._layer_ids)
        self._identity: dict[str, Any] = {
            "checkpoint": Path(config.model).resolve().name,
            "checkpoint_hash": checkpoint_hash(Path(config.model)),
            "topk_blocks": model.topk_blocks,
            "sparse_layers": self._layer_ids,
            "data_sha256": data.sha256,
            "data": data.about,
        }
        names = ("kv_cache_dtype", "index_cache_dtype", "tensor_parallel_size", "max_num_seqs")
        self._engine = {name: getattr(config, name) for name in (*names, "max_num_batched_tokens", "hf_overrides")}
        self.trials: dict[str, float] = {}
        self.removals: list[Removal] = []
        self.complete = False
        self._seconds = 0.0

    def resume(self, resolved: dict[str, Any]) -> None:
        """Take over the trials of the file, if there is one. resolved: more settings of the engine.

        ConfigError when it is of another checkpoint, engine or data, or no calibration at all.
        """
        self._identity["engine"] = resolved | self._engine
        if not self._path.exists():
            return
        found = read_document(self._path)
        remedy = "name another --out, or remove it"
        trials = found.get("trials")
        if not isinstance(trials, dict):
            raise ConfigError(f"{self._path} is a plan that no calibration wrote: {remedy}")
        for key in _IDENTITY:
            if found.get(key) != self._identity[key]:
                raise ConfigError(
                    f"{self._path} is of another calibration: {key} is {found.get(key)!r} there, "
                    f"{self._identity[key]!r} here: {remedy}"
                )
        self.trials = {str(pattern): float(loss) for pattern, loss in trials.items()}
        self._seconds = float(found.get("seconds", 0.0))

    def add(self, pattern: str, loss: float, seconds: float) -> None:
        """A trial ended: write it down."""
        self.trials[pattern] = loss
        self._seconds += seconds
        self.write()

    def write(self) -> None:
        """Write the plan file as of now."""
        write_document(self._path, self.document())

    def document(self) -> dict[str, Any]:
        """The content of the plan file."""
        base = self.trials.get("F" * self.num_sparse)
        levels = [] if base is None else self._levels(base)
        chosen = self._choose(levels)
        return {
            "pattern": chosen["pattern"],
            "chosen": chosen,
            **self._identity,
            "search": {"blocks": self._options.blocks, "complete": self.complete},
            "levels": levels,
            "removals": [
                {"layer": self._layer_ids[removal.ordinal], "ordinal": removal.ordinal, "loss": removal.loss}
                for removal in self.removals
            ],
            "uniform": [] if base is None else self._uniform(base),
            "trials": self.trials,
            "seconds": round(self._seconds, 3),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {
                "m3serve": _version("m3serve"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }

    def _levels(self, base: float) -> list[dict[str, Any]]:
        patterns = ["F" * self.num_sparse, *(removal.pattern for removal in self.removals)]
        return [self._row(pattern, base) for pattern in patterns]

    def _uniform(self, base: float) -> list[dict[str, Any]]:
        measured = {
            freq: pattern for freq, pattern in uniform_patterns(self.num_sparse).items() if pattern in self.trials
        }
        return [{"freq": freq, **self._row(pattern, base)} for freq, pattern in measured.items()]

    def _row(self, pattern: str, base: float) -> dict[str, Any]:
        loss = self.trials[pattern]
        return {"skipped": pattern.count("S"), "pattern": pattern, "loss": loss, "delta": loss - base}

    def _choose(self, levels: list[dict[str, Any]]) -> dict[str, Any]:
        """The level that the options ask for, or the one before it that was reached."""
        if not levels:
            return {"pattern": "F" * self.num_sparse, "by": "nothing was measured"}
        tolerance, level = self._options.tolerance, self._options.level
        if tolerance is not None:
            rows = [row for row in levels if row["delta"] <= tolerance]
            return {**max(rows, key=lambda row: row["skipped"]), "by": f"tolerance {tolerance:g}"}
        wanted = skipped_at(self.num_sparse, level)
        if wanted < len(levels):
            return {**levels[wanted], "by": f"level {level}"}
        return {**levels[-1], "by": f"level {level}, as far as the search went"}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
