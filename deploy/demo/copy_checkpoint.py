"""Copies m3-nano out of the package, for whoever needs it at a path of its own.

python -m deploy.demo.copy_checkpoint --out DIR
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from deploy.demo import CHECKPOINT


def copy_checkpoint(out: Path) -> None:
    """Copy the checkpoint to `out`, complete or not at all; what is there already is left alone.

    Raises FileExistsError when `out` is there and is something else.
    """
    if out.exists():
        if not out.is_dir() or {file.name for file in CHECKPOINT.iterdir()} - {file.name for file in out.iterdir()}:
            raise FileExistsError(f"{out} is there and is not a copy of {CHECKPOINT.name}")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    # A copy that is cut short has another name.
    building = out.with_name(f".{out.name}.part")
    shutil.rmtree(building, ignore_errors=True)
    shutil.copytree(CHECKPOINT, building)
    building.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.demo.copy_checkpoint", description="Copy m3-nano to DIR.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    out = parser.parse_args().out
    try:
        copy_checkpoint(out)
    except OSError as error:
        sys.exit(f"copy_checkpoint: error: {error}")
    print(out)


if __name__ == "__main__":
    main()
