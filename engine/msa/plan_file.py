"""Plan files: a calibrated or hand-made pattern as JSON. What a calibration writes beside it is its evidence."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

PLAN_FILE_FORMAT = "m3serve-index-plan"
PLAN_FILE_VERSION = 1
PLAN_FILE_MAX_BYTES = 16 * 2**20
# Beside config.json: the plan of a checkpoint where nothing else says which layers select.
PLAN_FILE_NAME = "index_plan.json"


@dataclass(frozen=True, slots=True)
class PlanFile:
    """What a plan file asks for.

    pattern: F or S per sparse layer.  checkpoint_hash: of the weights that it was calibrated on; None: made by hand.
    topk_blocks: how many blocks a selection had then.
    """

    path: Path
    pattern: str
    checkpoint_hash: str | None = None
    topk_blocks: int | None = None


def read_plan_file(path: Path) -> PlanFile:
    """The plan of JSON {"format": "m3serve-index-plan", "version": 1, "pattern": "FSSS..."}; ConfigError names the file
    and the key at fault."""
    content = read_document(path)
    if not isinstance(pattern := content.get("pattern"), str):
        raise ConfigError(f'index_plan_file {path} needs "pattern": a string of F and S, got {pattern!r}')
    digest, topk = content.get("checkpoint_hash"), content.get("topk_blocks")
    if digest is not None and (not isinstance(digest, str) or not digest):
        raise ConfigError(f'index_plan_file {path}: "checkpoint_hash" must be a string, got {digest!r}')
    if topk is not None and type(topk) is not int:
        raise ConfigError(f'index_plan_file {path}: "topk_blocks" must be an integer, got {topk!r}')
    return PlanFile(path, pattern, digest, topk)


def read_document(path: Path) -> dict[str, Any]:
    """All of a plan file. ConfigError for what is none."""
    try:
        if not path.is_file():
            raise ConfigError(f"index_plan_file {path} is not a file")
        if path.stat().st_size > PLAN_FILE_MAX_BYTES:
            raise ConfigError(f"index_plan_file {path} is larger than {PLAN_FILE_MAX_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"index_plan_file {path} cannot be read: {error}") from error
    known = isinstance(content, dict) and content.get("format") == PLAN_FILE_FORMAT
    if not known or content.get("version") != PLAN_FILE_VERSION:
        raise ConfigError(
            f'index_plan_file {path} must be JSON with "format": "{PLAN_FILE_FORMAT}", "version": {PLAN_FILE_VERSION}'
        )
    return dict(content)


def write_document(path: Path, content: Mapping[str, Any]) -> None:
    """Write a plan file, whole or not at all; format and version are added."""
    header = {"format": PLAN_FILE_FORMAT, "version": PLAN_FILE_VERSION}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(header | dict(content), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
