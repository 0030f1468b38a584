"""What the ranks of a group tell each other while they start."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing as mp

from engine.collectives import first_reason

RANKS = 2
CASES = [["", ""], ["", "no memory: ü"], ["one", "two"], ["x" * 1000, ""]]


def _rank(rank: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=RANKS)
    found = [first_reason(case[rank], torch.device("cpu")) for case in CASES]
    Path(directory, f"rank{rank}").write_text("\n".join(found), encoding="utf-8")
    dist.destroy_process_group()


def test_all_ranks_hear_the_first_reason(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=RANKS)
    for rank in range(RANKS):
        found = (tmp_path / f"rank{rank}").read_text(encoding="utf-8").split("\n")
        assert found == ["", "no memory: ü", "one", "x" * 256]
