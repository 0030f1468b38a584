"""A calibration from flags to files."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import numpy as np

from engine.calibration import CalibrationData, calibrate
from engine.config import EngineConfig, resolve_model
from engine.errors import ConfigError
from engine.msa.calibrate import Removal
from service.bench.report import Row, table
from service.calibration.flags import search_options
from service.evaluation.arguments import choice, data_for
from service.evaluation.data import Data
from service.evaluation.documents import shipped_documents
from service.evaluation.progress import Progress, say

_COMMAND = "calibrate"


def run(model: Path, settings: dict[str, Any], args: argparse.Namespace) -> int:
    """Calibrate, print the levels, write plan and plot; the exit status.

    settings: fields of EngineConfig beside the model.  args: of `flags.add_flags`. Raises ConfigError or
    CheckpointError before any weight is read, if it can.
    """
    options = search_options(args)
    if args.documents is None:
        args.documents = shipped_documents("calibration")
    config = EngineConfig.from_kwargs(model, **settings | {"use_index_cache": False})
    model_config, _ = resolve_model(config)
    # A file that cannot be written should not be found out after hours.
    if not args.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {args.out}: there is no such directory")
    data = data_for(model, model_config, choice(args), max_model_len=config.max_model_len, command=_COMMAND)
    calibration = _calibration_data(data, args.documents)
    teller = _Teller(calibration.num_tokens)
    try:
        found = calibrate(model, calibration, options, settings, args.out, teller)
    except KeyboardInterrupt:
        teller.close()
        if args.out.exists():
            say(f"stopped; {args.out} has what was measured: the same command goes on from there", _COMMAND)
        return 130
    finally:
        teller.close()
    print(page(found))
    say(f"wrote {args.out}: --index-plan-file {args.out} serves by it, or its place beside config.json", _COMMAND)
    _plot(found, args.plot or args.out.with_suffix(".png"))
    return 0


def page(found: dict[str, Any]) -> str:
    """Tables of a plan file's content, for people."""
    num_sparse = len(found["sparse_layers"])

    def line(what: str, row: dict[str, Any]) -> Row:
        kept = num_sparse - row["skipped"]
        loss, rise = f"{row['loss']:.5f}", f"{row['delta']:+.5f}"
        return {"layer": what, "select": f"{kept} of {num_sparse}", "loss": loss, "rise": rise, "plan": row["pattern"]}

    rows = [line("all", found["levels"][0])]
    for removal, level in zip(found["removals"], found["levels"][1:], strict=True):
        rows.append(line(f"-{removal['layer']}", level))
    rows += [line(f"freq {row['freq']}", row) for row in found["uniform"]]
    chosen = found["chosen"]
    return f"{table(rows)}\n\nplan, by {chosen['by']}: {chosen['pattern']} (loss {chosen['delta']:+.5f} nats)"


def _calibration_data(data: Data, source: Path) -> CalibrationData:
    masks = [np.zeros(data.sizes.length, dtype=bool) for _ in data.sequences]
    spans = zip(data.answers.sequence.tolist(), data.answers.start.tolist(), data.answers.end.tolist(), strict=True)
    for sequence, start, end in spans:
        masks[sequence][start:end] = True
    return CalibrationData.make(
        data.documents,
        list(zip(data.sequences, masks, strict=True)),
        skip_tokens=data.sizes.skip_tokens,
        about={"source": source.name, "names": data.names, "tasks": list(data.sizes.tasks), "seed": data.sizes.seed},
    )


class _Teller:
    """Tells the person at the terminal how far it is."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._number = self._total = 0
        self._progress: Progress | None = None

    def begin(self, measured: int, left: int) -> None:
        known = f"{measured} trials are in the file, " if measured else ""
        say(f"{known}at most {left} trials of {self._tokens} tokens follow", _COMMAND)
        self._total = measured + left
        self._number = measured
        self._progress = Progress(self._what(), left * self._tokens, _COMMAND)

    def add(self, tokens: int) -> None:
        assert self._progress is not None
        self._progress.add(tokens)

    def trial(self, pattern: str, loss: float) -> None:
        assert self._progress is not None
        self._number += 1
        self._progress.what = self._what()

    def removed(self, removal: Removal, rise: float) -> None:
        self.close()
        say(f"{removal.pattern}: loss {removal.loss:.5f}, {rise:+.5f}", _COMMAND)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()

    def _what(self) -> str:
        return f"trial {self._number + 1} of {self._total}"


def _plot(found: dict[str, Any], path: Path) -> None:
    try:
        plot = importlib.import_module("service.calibration.plot")
    except ImportError as error:
        say(f"no plot, since {error}: pip install 'm3serve[plots]'", _COMMAND)
        return
    plot.draw(found, path)
    say(f"wrote {path}", _COMMAND)
