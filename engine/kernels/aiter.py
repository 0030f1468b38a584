"""AMD's AITER (amd-aiter) for the operations that it computes as this engine defines them, Triton for the others.

What is taken, where the installed AITER has the function with every keyword that is passed:

    qk_norm_rope_insert of sparse layers   fused_qknorm_idxrqknorm
    attend_sparse, decode                  pa_decode_gluon
    sums of decode rows over the ranks     CustomAllreduce

The first two go together: the attention kernel reads keys and values in the order in which the other one writes them
(see SmallPages in aiter_paged.py), so the pages of sparse layers are kept in that order. Prefill copies the pages of
its rows back into rows and attends with Triton, which loads a page once for neighbouring tokens that select it
together. Cosines, sines and norm weights are rounded to bf16 here, as transformers has them; nothing else differs but
rounding. Needs bf16 pages: with fp8 ones, AITER's kernel wants an indexer in every layer, and stores index keys without
scales.

What is left to Triton, and why:

    attend_dense    the recommended split of a context ends at 8 parts: a long one would run on 8 workgroups
    select_blocks   AITER's block selection is younger than the sources that this was written against
    route           topk_gating and biased_grouped_topk begin where the logits are complete; here the choice is made
                    while partial logits are summed, and the shared expert joins it: one launch less
    experts         fused_moe adds the experts' outputs with bf16 atomics, in any order; it quantises the activations of
                    MXFP8 weights always and those of MXFP4 weights by default from 256 tokens on; without quantisation
                    its SwiGLU is a plain SiLU without clamps; the published wheel has no swiglu_limit at all
    norms           fused_qk_rmsnorm_group_quant would be one launch too
    sums with norm  fused_allreduce_rmsnorm knows Gemma's norm only in the newest AITER, and goes through AITER's own
                    registry of groups; quick all-reduce rounds to few bits

AITER is imported here only. Its functions are looked up once, at load.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
import triton

from engine.errors import ConfigError
from engine.kernels import launch, triton_set
from engine.kernels.aiter_paged import OPERATIONS, PagedAttention
from engine.kernels.api import KernelSet

log = logging.getLogger(__name__)

# What AMD's package has at the top and PyPI's `aiter`, another project, has not.
_LANDMARKS = ("ActivationType", "QuantType", "dtypes")

Lookup = Callable[[str, str], Any]


@dataclass(frozen=True, slots=True)
class Feature:
    """A function of AITER, and every parameter that is passed to it by name."""

    module: str
    name: str
    keywords: tuple[str, ...]

    def find(self, lookup: Lookup) -> tuple[Callable[..., Any] | None, str]:
        """(the function, "") or (None, why not). lookup: (module, name) -> what it is; raises when absent."""
        try:
            function: Callable[..., Any] = lookup(self.module, self.name)
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            is_absent = isinstance(error, AttributeError) or getattr(error, "name", None) == self.module
            return None, f"AITER has no {self.name}" if is_absent else f"AITER's {self.name} does not load: {error}"
        known = inspect.signature(function).parameters
        if missing := [keyword for keyword in self.keywords if keyword not in known]:
            return None, f"AITER's {self.name} has no {', '.join(missing)}"
        return function, ""


INSERT = Feature(
    "aiter",
    "fused_qknorm_idxrqknorm",
    (
        "qkv", "q_norm_weight", "k_norm_weight", "cos_sin_cache", "positions", "num_heads", "num_kv_heads",
        "rotary_dim", "eps", "index_q_norm_weight", "index_k_norm_weight", "num_index_heads", "slot_mapping",
        "kv_cache_k", "kv_cache_v", "index_cache", "block_size", "q_out", "index_q_out", "index_slot_mapping",
        "kv_cache_dtype", "index_cache_dtype", "asm_layout",
    ),
)  # fmt: skip
ATTEND = Feature(
    "aiter.ops.triton.gluon.pa_decode_gluon",
    "pa_decode_gluon",
    (
        "output", "query", "key_cache", "value_cache", "context_lengths", "block_tables", "softmax_scale",
        "query_length", "max_context_partition_num", "context_partition_size", "compute_type", "exp_sums",
        "max_logits", "temporary_output", "ps",
    ),
)  # fmt: skip
# Its `all_reduce` copies the input into its own buffer unless told otherwise, in every release.
REDUCE = Feature(
    "aiter.dist.device_communicators.custom_all_reduce", "CustomAllreduce", ("group", "device", "max_size")
)
FEATURES = dict(zip(OPERATIONS, (INSERT, ATTEND), strict=True))
# In short; the reasons are above.
LEFT_TO_TRITON = {
    "attend_sparse prefill": "loads a page once for neighbouring tokens",
    "attend_dense": "AITER splits a context into 8 parts at most",
    "select_blocks": "not in the AITER that this was written against",
    "route": "AITER would take one launch more",
    "experts": "AITER's sums, activations or clamps are others",
    "norms": "AITER would take as many launches",
}


def resolve() -> KernelSet:
    """Kernels for the ROCm device of this process. Raises ConfigError where there is none, or no AITER of AMD's."""
    if not (torch.version.hip or triton.knobs.runtime.interpret):
        raise ConfigError("backend=aiter needs a ROCm device; backend=triton also runs on NVIDIA, backend=torch on CPU")
    target = launch.detect()
    find()
    return bind(_import, triton_set.resolve(), target)


def find() -> ModuleType:
    """AMD's package. Raises ConfigError when it is not installed, does not import, or is another project."""
    if importlib.util.find_spec("aiter") is None:
        raise ConfigError(
            "backend=aiter needs AMD's AITER (https://github.com/ROCm/aiter, on PyPI amd-aiter), which is not installed"
        )
    try:
        module = importlib.import_module("aiter")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise ConfigError(f"backend=aiter: AITER does not import: {type(error).__name__}: {error}") from error
    if missing := [name for name in _LANDMARKS if not hasattr(module, name)]:
        raise ConfigError(
            f"backend=aiter: the installed package aiter ({module.__file__}) is not AMD's: it has no "
            f"{', '.join(missing)}. PyPI's aiter is another project; AMD's is amd-aiter"
        )
    return module


def is_usable() -> bool:
    """Whether backend=auto takes this backend on a ROCm device."""
    if importlib.util.find_spec("aiter") is None:
        return False
    try:
        find()
    except ConfigError as error:
        log.warning("not taken by backend=auto: %s", error)
        return False
    return True


def _import(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def bind(lookup: Lookup, fallback: KernelSet, target: launch.Target) -> KernelSet:
    """`fallback` with the operations that AITER has in their places. Logs one line per operation."""
    found = {operation: feature.find(lookup) for operation, feature in FEATURES.items()}
    reasons = {operation: reason for operation, (_, reason) in found.items() if reason}
    (insert, _), (attend, _) = found["qk_norm_rope_insert"], found["attend_sparse"]
    report = dict.fromkeys(FEATURES, "aiter")
    reduce, no_reduce = REDUCE.find(lookup)
    kernels = replace(fallback, name="aiter", report=report, custom_reduce=reduce)
    if insert is not None and attend is not None:
        paged = PagedAttention(target, fallback, insert, attend, report)
        kernels = replace(
            kernels,
            pack_gains=paged.pack_gains,
            shuffles=paged.shuffles,
            qk_norm_rope_insert=paged.qk_norm_rope_insert,
            attend_sparse=paged.attend_sparse,
        )
    else:
        together = next(iter(reasons.values()))
        report.update({operation: f"triton ({reasons.get(operation, together)})" for operation in FEATURES})
    report.update({operation: f"triton ({reason})" for operation, reason in LEFT_TO_TRITON.items()})
    report["all_reduce"] = "aiter" if reduce is not None else f"torch.distributed ({no_reduce})"
    for operation, how in report.items():
        log.info("%s: %s", operation, how)
    return kernels
