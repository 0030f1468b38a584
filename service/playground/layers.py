"""What the index cache did in each layer, from the series that the engine replicas of this node publish anyway.

The page asks every second; the engines notice nothing of it. On a cluster of several nodes it shows those of the node
that answers, and Prometheus shows all.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec
from prometheus_client.mmap_dict import MmapedDict

# However many pages are open, the files are read once in this time.
MAX_AGE_S = 0.9
_ATTEMPTS = 3
_LAYER_INFO, _GUARD = "m3_index_layer_info", "m3_index_guard_active"
_PHASED = {
    "m3_indexer_seconds_total": "indexer_s",
    "m3_indexer_samples_total": "indexer_samples",
    "m3_sparse_attention_seconds_total": "attention_s",
    "m3_sparse_attention_samples_total": "attention_samples",
}
_SELECTIONS = "m3_index_selections_total"
_PLAIN = {"m3_index_overlap_sum_total": "overlap_sum", "m3_index_overlap_count_total": "overlap_count"}


class LayerCounts(msgspec.Struct):
    """One layer, summed over the engine replicas since their start.

    role: dense, compute or reuse, by the configured plan.  source: the layer whose selection it attends with, None for
    a dense one.  indexer_s, attention_s: by phase, of the probed calls that *_samples count.  computed, reused:
    selections made and taken over.  overlap_sum / overlap_count: mean overlap of audited layers.
    """

    layer: int
    role: str = "dense"
    source: int | None = None
    indexer_s: dict[str, float] = {}
    indexer_samples: dict[str, float] = {}
    attention_s: dict[str, float] = {}
    attention_samples: dict[str, float] = {}
    computed: float = 0
    reused: float = 0
    overlap_sum: float = 0
    overlap_count: float = 0


class Layers(msgspec.Struct):
    """engines: replicas of this node that live.  guard_active: how many of them select in every layer for now."""

    engines: int
    guard_active: int
    layers: list[LayerCounts]
    object: str = "index_cache"


def read(directory: Path, model_name: str) -> Layers:
    """The counts of one model in the series files of `directory`."""
    for attempt in range(_ATTEMPTS):
        try:
            return _collect(directory, model_name)
        except FileNotFoundError:
            # The exporter has just put a dead process's file into the archive.
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError("not reached")


def _collect(directory: Path, model_name: str) -> Layers:
    layers: defaultdict[int, LayerCounts] = defaultdict(lambda: LayerCounts(-1))
    newest: dict[int, float] = {}
    engines: dict[str, tuple[float, float]] = {}
    for path in sorted(directory.glob("gauge_*.db")):
        for name, labels, value, stamp_s in _entries(path, (_LAYER_INFO, _GUARD), model_name):
            if name == _GUARD:
                engines[labels["engine"]] = max(engines.get(labels["engine"], (0.0, 0.0)), (stamp_s, value))
                continue
            layer_id = int(labels["layer"])
            # After an upgrade the dead process's plan may still be there.
            if stamp_s >= newest.get(layer_id, 0.0):
                newest[layer_id] = stamp_s
                layers[layer_id].role = labels["role"]
                layers[layer_id].source = int(labels["source"]) if labels["source"] else None
    wanted = (*_PHASED, _SELECTIONS, *_PLAIN)
    for path in sorted(directory.glob("counter_*.db")):
        for name, labels, value, _ in _entries(path, wanted, model_name):
            counts = layers[int(labels["layer"])]
            if name in _PHASED:
                by_phase: dict[str, float] = getattr(counts, _PHASED[name])
                by_phase[labels["phase"]] = by_phase.get(labels["phase"], 0.0) + value
            elif name == _SELECTIONS:
                field = "computed" if labels["role"] == "compute" else "reused"
                setattr(counts, field, getattr(counts, field) + value)
            else:
                setattr(counts, _PLAIN[name], getattr(counts, _PLAIN[name]) + value)
    for layer_id, counts in layers.items():
        counts.layer = layer_id
    return Layers(
        engines=len(engines),
        guard_active=sum(value > 0 for _, value in engines.values()),
        layers=[layers[layer_id] for layer_id in sorted(layers)],
    )


def _entries(path: Path, names: tuple[str, ...], model_name: str) -> Iterator[tuple[str, dict[str, str], float, float]]:
    """(name, labels, value, Unix time) of the wanted series of one model in one file."""
    for key, value, stamp_s, _ in MmapedDict.read_all_values_from_file(str(path)):
        # A key is a JSON list whose second entry is the name. Most are not wanted: looked for before they are parsed.
        if key.startswith(('["m3_index', '["m3_sparse_attention')):
            _, name, labels, _ = json.loads(key)
            if name in names and labels["model_name"] == model_name:
                yield name, labels, value, stamp_s


class LayerView:
    """The latest counts as JSON, for any number of pages."""

    def __init__(self, directory: Path, model_name: str) -> None:
        self._directory = directory
        self._model_name = model_name
        self._lock = asyncio.Lock()
        self._json = b""
        self._read_s = float("-inf")

    async def json(self) -> bytes:
        """At most MAX_AGE_S old. The files are read in a thread, by one caller at a time."""
        async with self._lock:
            if time.monotonic() - self._read_s > MAX_AGE_S:
                counts = await asyncio.to_thread(read, self._directory, self._model_name)
                self._json = msgspec.json.encode(counts)
                self._read_s = time.monotonic()
            return self._json
