"""The start-up self-test of one GPU: a tiny fixed model must give the logits that are stored beside this file.

A GPU that computes wrong numbers, or a kernel that was compiled wrongly for it, looks healthy and answers fluently.
The model has the heads that MiniMax-M3 has on one of four ranks, its number of selected blocks and its kinds of
layers, so that its kernels are those of serving. Weights and tokens follow from names, on every machine the same. The
stored logits are those of the torch backend in fp32: `python -m engine.self_test --write` makes them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import devices
from engine.batches import Resident, SlotTables
from engine.config import PAGE_SIZE, EngineConfig, ModelConfig
from engine.errors import EngineDead
from engine.kernels.api import KernelSet, resolve
from engine.kernels.torch_pages import FP8_DTYPES
from engine.model.minimax_m3 import MiniMaxM3
from engine.model.weights import DummyWeights
from engine.msa.plan import IndexKnobs
from engine.parallel import TensorParallel
from engine.quant_config import Format
from engine.types import SamplingParams, StepPlan, StepRow

log = logging.getLogger(__name__)

LOGITS = Path(__file__).with_suffix(".json")
# By what linear layers are stored in (None: bf16); chosen so that in no compared row two experts are close to a tie.
SEEDS: dict[Format | None, int] = {None: 2, "mxfp8": 25, "mxfp4": 2}
_LAYERS = [0, 1, 1]
_PATTERN = "FS"  # behind a dense layer
_CONFIG: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "num_hidden_layers": len(_LAYERS),
    "num_attention_heads": 16,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "intermediate_size": 128,
    "dense_intermediate_size": 256,
    "shared_intermediate_size": 128,
    "n_shared_experts": 1,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 32 * PAGE_SIZE,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "routed_scaling_factor": 2.0,
    "moe_layer_freq": _LAYERS,
    "hidden_act": "swigluoai",
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "rms_norm_eps": 1e-6,
    "use_gemma_norm": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_head",
    "tie_word_embeddings": False,
    "rope_theta": 5e6,
    "rotary_dim": 64,
    "sparse_attention_config": {
        "use_sparse_attention": True,
        "sparse_index_dim": 128,
        "sparse_num_index_heads": 1,
        "sparse_topk_blocks": 16,
        "sparse_block_size": PAGE_SIZE,
        "sparse_score_type": "max",
        "sparse_init_block": 0,
        "sparse_local_block": 1,
        "sparse_attention_freq": _LAYERS,
        "sparse_disable_index_value": _LAYERS,
    },
}
_MAX_LEN = 20 * PAGE_SIZE
# (slot, tokens before, tokens) of every row of every step; rows of one token decode. Slot 0 ends behind 18 blocks, of
# which 16 are selected; slot 1 never has more than it may take.
_STEPS: tuple[tuple[tuple[int, int, int], ...], ...] = (
    ((0, 0, 1100),),
    ((0, 1100, 1090), (1, 0, 100)),
    ((0, 2190, 1), (1, 100, 29)),
    ((0, 2191, 1), (1, 129, 1)),
    ((0, 2192, 1), (1, 130, 1)),
)
_MAX_STEP_TOKENS = 1200


class FixedWeights(DummyWeights):
    """Weights that follow from their names, bit for bit alike on every machine and in every release of torch.

    mx: the block-scaled format in which linear layers are stored: all but the router's and the output head, as in
    released MXFP8 checkpoints, or the experts alone, as in MXFP4 ones.
    """

    def __init__(self, device: torch.device, mx: Format | None = None) -> None:
        super().__init__(0, device)
        self._mx = mx

    def weight_format(self, name: str) -> Format | None:
        return self._mx if self._mx == "mxfp8" or "experts." in name else None

    def _draw(self, name: str, shape: tuple[int, ...], rows: slice | None, columns: slice | None) -> Tensor:
        values = fixed_numbers(f"{SEEDS[self._mx]} {name}", math.prod(shape)).reshape(shape)
        if len(shape) == 1:
            # Raised norms of queries make attention choose: of an even mean it would not show which keys it saw.
            mean = 1.0 if "self_attn.q_norm" in name else 0.2 if "index_" in name else 0.0
            values = values * (0.01 if "correction_bias" in name else 0.1) + mean
        elif "embed_tokens" not in name:
            gains = {"lm_head": 3.0, "o_proj": 2.0, ".gate.weight": 2.0}
            gain = next((gain for part, gain in gains.items() if part in name), 1.0)
            values = values * (gain / math.sqrt(shape[1]))
        cut = values[(rows or slice(None), columns or slice(None))[: len(shape)]]
        # Numbers of bf16, whatever dtype computes: one set of logits then serves both.
        return torch.from_numpy(cut.astype(np.float32)).to(torch.bfloat16).float().to(self._device)


def fixed_numbers(name: str, size: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """float64 [size] of variance 1, uniform: a generator's normal ones differ in the last bit between machines."""
    codes = np.frombuffer(hashlib.shake_128(name.encode()).digest(2 * size), dtype="<u2")
    return (codes.astype(np.float64) - 32767.5) * (math.sqrt(3) / 32768)


def fixed_tokens(slot: int, mx: Format | None) -> list[int]:
    """The tokens of a slot: its prompt, and what decode steps are told that it goes on with."""
    codes = hashlib.shake_128(f"{SEEDS[mx]} tokens of slot {slot}".encode()).digest(_MAX_LEN)
    return [code % int(_CONFIG["vocab_size"]) for code in codes]


@torch.inference_mode()
def compute(
    kernels: KernelSet,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None,
    index_dtype: torch.dtype | None = None,
    mx: Format | None = None,
) -> Tensor:
    """float32 [rows of all steps, vocab_size] on the host: the logits behind the last token of every row."""
    model = MiniMaxM3(
        ModelConfig.from_hf(_CONFIG),
        IndexKnobs(pattern=_PATTERN),
        FixedWeights(kernels.device, mx),
        kernels,
        TensorParallel(),
        dtype=dtype,
        max_model_len=_MAX_LEN,
        max_num_tokens=_MAX_STEP_TOKENS,
        max_num_rows=2,
        audited=False,
        kv_dtype=kv_dtype,
        index_dtype=index_dtype,
    )
    # Pages of the two slots alternate, so that a kernel cannot take a page id for a block id.
    model.allocate_pages(2 * _MAX_LEN // PAGE_SIZE)
    tables = SlotTables(2, _MAX_LEN // PAGE_SIZE, kernels.device)
    tokens = [fixed_tokens(slot, mx) for slot in range(2)]
    residents: list[Resident | None] = [Resident(each, len(each), SamplingParams(), []) for each in tokens]
    pages = count()
    found = []
    for step_id, step in enumerate(_STEPS):
        rows = []
        for slot, computed, scheduled in step:
            resident = residents[slot]
            assert resident is not None
            missing = -(-(computed + scheduled) // PAGE_SIZE) - len(resident.page_ids)
            rows.append(StepRow(slot, computed, scheduled, [next(pages) for _ in range(missing)], True))
            tables.last_tokens[slot] = tokens[slot][computed + scheduled - 1]
        num_decode_rows = sum(scheduled == 1 for _, _, scheduled in step)
        plan = StepPlan(step_id, rows, num_decode_rows)
        tables.update(plan, residents)
        token_ids, batch, _ = tables.batch(plan, residents, None)
        hidden = model.forward(token_ids, batch)
        last = torch.tensor(batch.query_starts[1:], device=kernels.device) - 1
        found.append(model.logits(hidden.index_select(0, last)).float().cpu())
    return torch.cat(found)


# --- what it should be ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a row's logits may be from the stored ones, relative to their size.

    many: what rounding makes, with room.  one: of a single row. Where rounding decides a near-tie between experts or
    blocks, one row differs by as much as they do; every path through the kernels ends in two rows or more.
    """

    many: float
    one: float

    @classmethod
    def of(cls, *dtypes: torch.dtype | None) -> Limits:
        """dtypes: of the computation and of pages."""
        if any(dtype in FP8_DTYPES for dtype in dtypes):
            return cls(0.2, 0.6)
        return cls(2e-4, 2e-4) if dtypes[0] == torch.float32 else cls(0.06, 0.6)

    def passed(self, errors: Tensor) -> bool:
        """errors: from row_errors; what is no number never passes."""
        return bool((errors <= self.one).all()) and int((errors > self.many).sum()) <= 1


def row_errors(logits: Tensor, expected: Tensor) -> Tensor:
    """float32 [rows]: |logits - expected| / |expected| of each row."""
    errors: Tensor = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    return errors


def stored(mx: Format | None = None) -> Tensor:
    """float32 [rows of all steps, vocab_size]: the logits of the model whose linear layers are stored in `mx`."""
    return torch.tensor(json.loads(LOGITS.read_text())[mx or "plain"], dtype=torch.float32)


def check(
    kernels: KernelSet,
    dtype: torch.dtype,
    *,
    where: str,
    kv_dtype: torch.dtype | None = None,
    index_dtype: torch.dtype | None = None,
    formats: Collection[str] = (),
) -> list[str]:
    """Run the model as it will be served, and in fp32, which shows small faults too. Returns one line per run.

    where: the device.  formats: block-scaled formats of the checkpoint.  Raises EngineDead, with the device and the
    errors, when the logits are not the stored ones.
    """
    served = (dtype, kv_dtype, index_dtype)
    runs: list[tuple[tuple[torch.dtype, torch.dtype | None, torch.dtype | None], Format | None]] = []
    if kernels.name in ("torch", "triton"):  # another library's kernels need not know fp32
        runs.append(((torch.float32, None, None), None))
    runs += [(served, mx) for mx in SEEDS if (mx is None or mx in formats) and (served, mx) not in runs]
    lines = []
    for dtypes, mx in runs:
        started = time.perf_counter()
        errors = row_errors(compute(kernels, *dtypes, mx), stored(mx))
        names = [str(each).removeprefix("torch.") for each in dtypes if each is not None]
        run = f"backend {kernels.name}, {', '.join([*names, *([mx] if mx else [])])}"
        limits = Limits.of(*dtypes)
        worst = ", ".join(f"{each:.1e}" for each in errors.tolist())
        if not limits.passed(errors):
            raise EngineDead(
                f"self-test failed on {where}: {run}: relative errors of the logits {worst}, where rounding makes at "
                f"most {limits.many:.1g}. This GPU, its driver or its compiled kernels compute wrong answers: nothing "
                "is served on it"
            )
        lines.append(f"{run}: error {errors.max():.1e}, {time.perf_counter() - started:.1f} s")
    return lines


def examine(
    config: EngineConfig, kernels: KernelSet, dtype: torch.dtype, formats: Collection[str], *, rank: int
) -> None:
    """Tell which GPU a rank computes on, and test it. Raises EngineDead.

    dtype: that will serve.  formats: of the checkpoint's block-scaled weights.
    """
    device = devices.current()
    log.info("rank %d computes on %s; %s", rank, device, devices.shown(os.environ))
    if not config.self_test:
        return
    started = time.perf_counter()
    lines = check(
        kernels,
        dtype,
        where=f"{device.name} ({device.arch}, cuda:{device.index} of rank {rank})",
        kv_dtype=kernels.fp8_dtype if config.kv_cache_dtype == "fp8" else None,
        index_dtype=kernels.fp8_dtype if config.index_cache_dtype == "fp8" else None,
        formats=formats,
    )
    log.info("rank %d passed its self-test in %.1f s. %s", rank, time.perf_counter() - started, "; ".join(lines))


def main() -> int:
    """Exit status: 1 when the stored logits are not what the torch backend computes."""
    parser = argparse.ArgumentParser(prog="python -m engine.self_test", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"make {LOGITS.name} anew from the torch backend in fp32")
    args = parser.parse_args()
    kernels = resolve("torch")
    found = {mx or "plain": compute(kernels, torch.float32, mx=mx) for mx in SEEDS}
    if args.write:
        parts = []
        for name, logits in found.items():
            rows = [json.dumps([round(value, 5) for value in row]) for row in logits.tolist()]
            parts.append(f'"{name}": [\n' + ",\n".join(rows) + "\n]")
        LOGITS.write_text("{" + ",\n".join(parts) + "}\n")
    errors = {mx or "plain": float(row_errors(found[mx or "plain"], stored(mx)).max()) for mx in SEEDS}
    print("largest error of the torch backend in fp32:", ", ".join(f"{mx} {each:.1e}" for mx, each in errors.items()))
    return int(max(errors.values()) > Limits.of(torch.float32).many)


if __name__ == "__main__":
    sys.exit(main())
