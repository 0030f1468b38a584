"""Makes the demo checkpoint: small, M3's architecture and on-disk layout, random weights.

    python -m deploy.demo.make_checkpoint [--out DIR]

Built once into a cache directory, since weights do not belong into git.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from deploy.demo.vocabulary import DEMO_MODULES, train_tokenizer
from deploy.demo.writer import Sizes, write_checkpoint

DEMO_NAME = "demo-untrained-v1"
DEMO_SEED = 20
DEMO_SIZES = Sizes(
    hidden_size=256,
    layers=9,
    heads=8,
    kv_heads=2,
    head_dim=64,
    rotary_dim=32,
    index_dim=64,
    topk_blocks=4,
    experts=8,
    experts_per_token=2,
    expert_width=256,
    dense_width=512,
    shared_width=256,
    vocab_size=4096,
    max_positions=16384,
    sparse=[0] * 3 + [1] * 6,
    moe=[0] * 3 + [1] * 6,
)
_MODEL_CARD = """# m3serve demo checkpoint: UNTRAINED

Random weights (seed {seed}) in the architecture and the on-disk layout of MiniMax-M3: the text that it
generates is meaningless. It exists so that m3serve can be tried, tested and measured without a GPU or a
download.

- {layers} layers: the first 3 with full attention and a dense feed-forward network, the others with
  block-sparse attention ({topk_blocks} key blocks of 128 tokens), a shared expert and {experts} routed ones,
  {experts_per_token} per token.
- Hidden size {hidden_size}; {heads} query heads and {kv_heads} key/value heads of {head_dim}.
- Vocabulary {vocab_size}; at most {max_positions} positions.
- Byte-level BPE tokenizer, trained on the sources of the Python standard library ({python}); another Python
  version gives other merges.
- The vision tower is a stub of random weights; m3serve does not load it.

Made by `python -m deploy.demo.make_checkpoint`.
"""


def default_path() -> Path:
    """Where the demo checkpoint is cached: $XDG_CACHE_HOME/m3serve, else ~/.cache/m3serve."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "m3serve" / DEMO_NAME


def ensure_demo_checkpoint(path: Path | None = None) -> Path:
    """The directory of the demo checkpoint, built first when it is missing.

    A directory that exists is complete: it is built under another name, then renamed. Raises FileExistsError
    when `path` is something else.
    """
    target = default_path() if path is None else path
    if _is_complete(target):
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is not a demo checkpoint: remove it or name another directory")
    started = time.monotonic()
    _say(f"making the demo checkpoint (random weights) in {target} ...")
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        # mkdtemp keeps others out; the finished checkpoint is no secret.
        building.chmod(0o755)
        _build(building)
        try:
            building.rename(target)
        except OSError:
            # Another process finished first: renaming onto a directory with files in it fails.
            if not _is_complete(target):
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    _say(f"demo checkpoint ready after {time.monotonic() - started:.1f} s")
    return target


def _say(text: str) -> None:
    print(f"m3serve: {text}", file=sys.stderr, flush=True)


def _is_complete(path: Path) -> bool:
    card = path / "MODEL_CARD.md"
    return card.is_file() and card.read_text(encoding="utf-8").startswith("# m3serve demo checkpoint")


def _build(path: Path) -> None:
    tokenizer = train_tokenizer(DEMO_SIZES.vocab_size, DEMO_MODULES)
    write_checkpoint(path, DEMO_SIZES, tokenizer, seed=DEMO_SEED)
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    sizes = {name: getattr(DEMO_SIZES, name) for name in Sizes.__dataclass_fields__}
    card = _MODEL_CARD.format(seed=DEMO_SEED, python=python, **sizes)
    (path / "MODEL_CARD.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.demo.make_checkpoint",
        description="Make the demo checkpoint of random weights, unless it is there already; prints its directory.",
    )
    parser.add_argument("--out", type=Path, help=f"directory to make (default: {default_path()})")
    print(ensure_demo_checkpoint(parser.parse_args().out))


if __name__ == "__main__":
    main()
