"""How much memory this process finds, and what of it KV pages may take."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from engine.capacity import CPU_MEMORY_FRACTION, GPU_MEMORY_FRACTION, Footprint, gib, page_budget
from engine.errors import ConfigError

log = logging.getLogger(__name__)


def free_bytes(device: torch.device) -> int:
    """Of the GPU; on CPU, of the machine: what can be taken without swapping, as the kernel estimates it."""
    if device.type != "cpu":
        # What was freed in this process is free too.
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo has no MemAvailable: set num_pages")


def pool_bytes(device: torch.device, footprint: Footprint, fraction: float | None) -> int:
    """What the pages of one rank may take, its weights being loaded. fraction: memory_fraction.

    The ranks of a group on CPU share the machine; on a GPU a step's tensors and graphs need room beside the pages.
    """
    free = free_bytes(device)
    if device.type == "cpu":
        return page_budget(free // footprint.ranks, fraction or CPU_MEMORY_FRACTION, 0)
    step = footprint.step_bytes()
    pool = page_budget(free, fraction or GPU_MEMORY_FRACTION, step)
    log.info("of %s free, KV pages get %s; a step needs an estimated %s", gib(free), gib(pool), gib(step))
    return pool
