"""A fingerprint of a checkpoint's weights that is cheap for hundreds of gigabytes. Loads no torch.

It covers what config.json says of the text decoder (without index cache knobs), every tensor's name, dtype and shape,
and samples of the contents: tensors of up to 16 KiB whole, of larger ones 1 KiB at four places, of the routed experts
the first one of each layer only. For MiniMax-M3 that is some 5 MB in 3,000 reads. How the tensors are spread over
files does not count, nor what the files are called. Training that moves weights everywhere changes it; an edit of a few
chosen numbers may not.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from engine.model_config import read_json
from engine.msa.plan import KNOBS
from engine.tensor_files import ITEM_BYTES, TensorFiles

_VERSION = "m3-sample-1"
_WHOLE_BYTES = 16 * 1024
_SAMPLE_BYTES = 1024
_NUM_SAMPLES = 4
_LATER_EXPERT = re.compile(r"\.experts\.[1-9]\d*\.")
# About the software that wrote the file.
_IGNORED = frozenset({*KNOBS, "transformers_version", "_name_or_path"})


def checkpoint_hash(directory: Path) -> str:
    """64 hex digits. Raises CheckpointError when config.json or the weights cannot be read."""
    config = read_json(directory / "config.json")
    text = config.get("text_config")
    described = text if isinstance(text, dict) else config
    digest = hashlib.sha256()
    for key in sorted(described.keys() - _IGNORED):
        digest.update(f"{key}={json.dumps(described[key], sort_keys=True)}\n".encode())
    with closing(TensorFiles(directory)) as files:
        for name in sorted(files.names()):
            stored = files[name]
            digest.update(f"{name} {stored.dtype} {stored.shape}\n".encode())
            if _LATER_EXPERT.search(name):
                continue
            for offset, count in _places(math.prod(stored.shape) * ITEM_BYTES[stored.dtype]):
                sample = bytearray(count)
                files.fill(name, stored.offset + offset, memoryview(sample))
                digest.update(sample)
    digest.update(_VERSION.encode())
    return digest.hexdigest()


def _places(num_bytes: int) -> Iterator[tuple[int, int]]:
    """(offset, number of bytes) of the samples."""
    if num_bytes <= _WHOLE_BYTES:
        yield 0, num_bytes
        return
    last = num_bytes - _SAMPLE_BYTES
    for i in range(_NUM_SAMPLES):
        yield i * last // (_NUM_SAMPLES - 1), _SAMPLE_BYTES
