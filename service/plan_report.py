"""What `m3serve plan` prints: one document, as JSON or as a page for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from engine.capacity import GIB, Fit, Footprint, checkpoint_bytes, useful_pages, weight_parts
from engine.model_config import PAGE_SIZE

Facts = dict[str, Any]
_ELEMENT_NAMES = {1: "fp8", 2: "bf16", 4: "fp32"}


def document(
    base: Footprint,
    format_name: str,
    weights: Sequence[Mapping[str, int]],
    fits: Mapping[str, Sequence[Fit]],
    *,
    fraction: float,
    gpus_per_node: int,
) -> Facts:
    """Everything that was computed. weights: by group, per number of ranks.  fits: by device, per number of ranks.
    Sizes are bytes of one rank."""
    footprints = [each.footprint for each in next(iter(fits.values()))]
    return {
        "model": _model(base, format_name),
        "settings": {
            "max_model_len": base.max_model_len,
            "max_num_seqs": base.max_num_seqs,
            "max_num_batched_tokens": base.max_num_batched_tokens,
            "memory_fraction": fraction,
            "index_reuse": "audited" if base.audited else "lean",
            "gpus_per_node": gpus_per_node,
        },
        "ranks": [_rank(footprint, parts) for footprint, parts in zip(footprints, weights, strict=True)],
        "devices": [_device(name, found, gpus_per_node) for name, found in fits.items()],
    }


def best(fits: Sequence[Fit]) -> Fit | None:
    """Of those that fit, the one with the fewest GPUs per replica, then the most tokens."""
    fitting = [each for each in fits if each.reason is None]
    return min(fitting, key=lambda each: (each.footprint.ranks, -each.tokens), default=None)


def _model(base: Footprint, format_name: str) -> Facts:
    parts = weight_parts(base.model, index_layers=base.model.is_sparse)
    return {
        "num_layers": base.model.num_hidden_layers,
        "plan": base.plan,
        "parameters": sum(part.copies * math.prod(part.shape) for part in parts),
        "format": format_name,
        "checkpoint_bytes": checkpoint_bytes(base.model, base.format_of, element=base.element),
        "dtype": _ELEMENT_NAMES[base.element],
        "kv_cache_dtype": _ELEMENT_NAMES[base.kv_element],
        "index_cache_dtype": _ELEMENT_NAMES[base.index_element],
    }


def _rank(footprint: Footprint, weights: Mapping[str, int]) -> Facts:
    return {
        "tensor_parallel_size": footprint.ranks,
        "weight_bytes": sum(weights.values()),
        "weights": dict(sorted(weights.items(), key=lambda item: -item[1])),
        "buffer_bytes": footprint.buffer_bytes(),
        "activation_bytes": footprint.activation_bytes(),
        "graph_bytes": footprint.graph_bytes(),
        "kv_token_bytes": footprint.kv_token_bytes(),
        "index_token_bytes": footprint.index_token_bytes(),
        "page_bytes": footprint.page_bytes(),
        "request_bytes": footprint.request_bytes(),
    }


def _device(name: str, fits: Sequence[Fit], gpus_per_node: int) -> Facts:
    chosen = best(fits)
    return {
        "device": name,
        "memory_bytes": fits[0].memory_bytes,
        "layouts": [_layout(each, gpus_per_node) for each in fits],
        "best": None if chosen is None else chosen.footprint.ranks,
    }


def _layout(fit: Fit, gpus_per_node: int) -> Facts:
    footprint, fits = fit.footprint, fit.reason is None
    replicas = gpus_per_node // footprint.ranks
    useful = useful_pages(footprint.max_num_seqs, footprint.max_model_len)
    return {
        "tensor_parallel_size": footprint.ranks,
        "reason": fit.reason,
        "free_bytes": fit.free_bytes,
        "pool_bytes": fit.pool_bytes,
        "kv_tokens": fit.tokens if fits else 0,
        "num_pages": min(fit.num_pages, useful) if fits else 0,
        "full_requests": fit.full_requests if fits else 0,
        "concurrent_requests": min(fit.full_requests, footprint.max_num_seqs) if fits else 0,
        "replicas_per_node": replicas if fits else 0,
        "kv_tokens_per_node": replicas * fit.tokens if fits else 0,
    }


def page(found: Facts) -> str:
    """The document for people."""
    model, settings = found["model"], found["settings"]
    length, rows = settings["max_model_len"], settings["max_num_seqs"]
    lines = [
        f"{model['parameters'] / 1e9:,.1f} billion parameters in {model['num_layers']} layers, {model['plan']}",
        f"{model['format']} weights, {model['checkpoint_bytes'] / 1e9:,.1f} GB on disk without vision; "
        f"{model['dtype']} compute, {model['kv_cache_dtype']} keys and values, "
        f"{model['index_cache_dtype']} index keys",
        "",
        *_aligned(_rank_table(found["ranks"], length)),
        *_aligned(_device_table(found["devices"], length, settings["gpus_per_node"])),
        *(_verdict(device, found, detailed=len(found["devices"]) <= 2) for device in found["devices"]),
    ]
    widest = max((layout["kv_tokens"] for device in found["devices"] for layout in device["layouts"]), default=0)
    most = 2 * rows * -(-length // PAGE_SIZE) * PAGE_SIZE
    if widest > most:
        lines.append(
            f"The engine makes pages for {most:,} tokens at most, twice what max_num_seqs={rows} requests can fill."
        )
    return "\n".join(lines)


def _rank_table(ranks: Sequence[Facts], length: int) -> list[list[str]]:
    def row(title: str, values: Sequence[float | int]) -> list[str]:
        return [title, *(f"{value / GIB:,.2f}" for value in values)]

    groups = ranks[0]["weights"]
    return [
        ["one rank of", *(_gpus(each["tensor_parallel_size"]) for each in ranks)],
        row("weights, GiB", [each["weight_bytes"] for each in ranks]),
        *(row(f"  {group}", [each["weights"][group] for each in ranks]) for group in groups),
        row("buffers, GiB", [each["buffer_bytes"] for each in ranks]),
        row("activations, GiB (estimate)", [each["activation_bytes"] for each in ranks]),
        row("captured graphs, GiB (estimate)", [each["graph_bytes"] for each in ranks]),
        ["keys and values, bytes per token", *(f"{each['kv_token_bytes']:,}" for each in ranks)],
        ["index keys, bytes per token", *(f"{each['index_token_bytes']:,}" for each in ranks)],
        row(f"a request of {length:,} tokens, GiB", [each["request_bytes"] for each in ranks]),
    ]


def _device_table(devices: Sequence[Facts], length: int, gpus: int) -> list[list[str]]:
    rows = [
        [
            "device", "GiB", "replica of", "free, GiB", "KV tokens", f"requests of {length:,}",
            f"replicas on {gpus} GPUs", "their KV tokens", "",
        ]
    ]  # fmt: skip
    counts = ("kv_tokens", "full_requests", "replicas_per_node", "kv_tokens_per_node")
    for device in devices:
        for layout in device["layouts"]:
            if layout["reason"] is None:
                ranks = layout["tensor_parallel_size"]
                cells = [device["device"], f"{device['memory_bytes'] / GIB:,.1f}", _gpus(ranks)]
                cells += [f"{layout['free_bytes'] / GIB:,.1f}", *(f"{layout[key]:,}" for key in counts)]
                rows.append([*cells, "best" if ranks == device["best"] else ""])
    return rows if len(rows) > 1 else []


def _verdict(device: Facts, found: Facts, *, detailed: bool) -> str:
    """The best layout of a device, and why others do not fit: all of them if `detailed`, else where none does."""
    name, rows, length = device["device"], found["settings"]["max_num_seqs"], found["settings"]["max_model_len"]
    failed = [layout for layout in device["layouts"] if layout["reason"] is not None]
    lines = []
    for layout in device["layouts"]:
        if layout["tensor_parallel_size"] == device["best"]:
            now, each = layout["concurrent_requests"], layout["kv_tokens"] // rows
            room = f"{now} of max_num_seqs={rows} requests have {length:,} tokens at the same time"
            if now < rows:
                room += f", or all {rows} have {each:,}"
            lines.append(f"{name}: {_gpus(device['best'])} per replica; {room}")
    if not lines:
        lines.append(f"{name}: does not fit")
        failed = failed if detailed else failed[-1:]
    elif not detailed:
        failed = []
    lines += [f"  {_gpus(layout['tensor_parallel_size'])}: {layout['reason']}" for layout in failed]
    return "\n".join(lines)


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right, and an empty line."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return [*lines, ""]
