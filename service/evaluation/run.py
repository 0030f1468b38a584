"""An evaluation from flags to files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.evaluation import offline as engine_side
from service.evaluation import report
from service.evaluation.arguments import Choice, data_for
from service.evaluation.data import Data
from service.evaluation.measure import Measured
from service.evaluation.plans import plan_specs, resolve
from service.evaluation.progress import say


def offline(
    model: Path, settings: dict[str, Any], chosen: Choice, *, compare: str | None = None, out: Path | None = None
) -> int:
    """Evaluate plans on engines in this process; prints tables, writes JSON, returns the exit status.

    settings: fields of EngineConfig beside the model.  compare: plans, separated by commas; default: the plan that the
    settings and the checkpoint give. Raises ConfigError or CheckpointError before any weight is read, if it can.
    """
    specs: list[str | None] = [None] if compare is None else [*plan_specs(compare)]
    config, _ = resolve(model, settings, specs)
    data = data_for(model, config, chosen, max_model_len=settings.get("max_model_len"))
    results, about = engine_side.evaluate(model, data, settings, specs)
    tell(data, results, {"source": "offline", **about}, out)
    return 0


def tell(data: Data, results: Sequence[Measured], about: dict[str, Any], out: Path | None) -> None:
    """Print the tables, write the JSON."""
    found = report.document(data, results, about)
    print(report.page(found))
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        say(f"wrote {out}")
