"""What the ranks of a group send each other, and by which way.

torch.distributed carries any tensor: gloo on CPU, NCCL and RCCL on GPUs. Few rows of a decode step take less time than
such a call needs to begin: kernels sum them through memory that all ranks of a node have mapped. On NVIDIA these are
the engine's own, over PyTorch's symmetric memory; on AMD AITER's custom all-reduce, where it is installed. Which way a
message takes follows from its size alone, on all ranks alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory

from engine.capacity import exchange_rows
from engine.kernels.api import ExchangeKernels, KernelSet
from engine.kernels.exchange import Exchange

_REASON_BYTES = 256


class FewRows(Protocol):
    """Sums of few rows, with the same bits on all ranks, that a captured step can hold.

    sample: for winners of the vocabulary's shares; None: torch.distributed gathers them.
    """

    @property
    def sample(self) -> Exchange | None: ...

    def takes(self, x: Tensor) -> bool:
        """Whether it sums x [rows, size]."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks; x may be overwritten with it."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """torch_norm.add_rms_norm of the sum."""


@dataclass(frozen=True, slots=True)
class OneShot:
    """Every rank writes to every other one, and sums what it gets: one kernel, with the norm.

    memory: keeps the buffers mapped.
    """

    kernels: ExchangeKernels
    reduce: Exchange
    sample: Exchange
    memory: object

    def takes(self, x: Tensor) -> bool:
        words = x.shape[1] * x.itemsize // 4
        return len(x) <= self.reduce.rows and words == self.reduce.width and x.is_contiguous()

    def all_reduce(self, x: Tensor) -> Tensor:
        self.kernels.all_reduce(x, self.reduce)
        return x

    def add_rms_norm(self, x: Tensor, residual: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self.kernels.all_reduce_add_rms_norm(x, residual, gain, eps, self.reduce)


@dataclass(frozen=True, slots=True)
class CustomReduce:
    """AITER's custom all-reduce. It copies its input into memory that all ranks have mapped, and so may be captured.

    reduce: its `all_reduce`.  norm: KernelSet.add_rms_norm.
    """

    reduce: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    max_bytes: int

    @property
    def sample(self) -> None:
        return None

    def takes(self, x: Tensor) -> bool:
        # What it sums, it moves 16 bytes at a time.
        return x.nbytes <= self.max_bytes and x.nbytes % 16 == 0 and x.is_contiguous()

    def all_reduce(self, x: Tensor) -> Tensor:
        return self.reduce(x)

    def add_rms_norm(self, x: Tensor, residual: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self.norm(self.reduce(x), residual, gain, eps)


def library(device: torch.device) -> str:
    """What torch.distributed sends tensors of `device` with."""
    if device.type == "cpu":
        return "gloo"
    return "RCCL" if torch.version.hip else "NCCL"


def all_reduce(x: Tensor) -> None:
    """Sum over the ranks, in place."""
    dist.all_reduce(x)


def all_gather(x: Tensor) -> Tensor:
    """[...] of each rank -> [size, ...]."""
    parts = x.new_empty(dist.get_world_size(), *x.shape)
    if x.device.type == "cpu":  # gloo gathers into a list only
        dist.all_gather(list(parts.unbind()), x.contiguous())
    else:
        dist.all_gather_into_tensor(parts, x.contiguous())
    return parts


def few_rows(
    kernels: KernelSet, *, hidden_size: int, element: int, max_rows: int, vocab: int
) -> tuple[FewRows | None, str]:
    """(what sums few rows in this group, what to say of all sums). Every rank has to call it.

    element: bytes of a number of hidden states.  max_rows: of a decode step.  vocab: tokens of a rank's share.
    """
    rest, row_bytes = library(kernels.device), hidden_size * element
    found: FewRows | None = None
    if kernels.device.type != "cuda":
        return None, rest
    if kernels.custom_reduce is not None:
        found, reason = custom_reduce(kernels, max_rows * row_bytes)
        by = f"AITER's custom all-reduce up to {max_rows} rows ({max_rows * row_bytes // 1024} KiB)"
    elif kernels.exchange is not None:
        rows = exchange_rows(dist.get_world_size(), hidden_size, element, max_rows)
        found, reason = _one_shot(kernels, kernels.exchange, (rows, row_bytes // 4), max_rows, vocab)
        by = f"one-shot kernels up to {rows} rows ({rows * row_bytes // 1024} KiB)"
    else:
        reason = f"no kernels of backend {kernels.name} reach other ranks"
    reason = first_reason(reason, kernels.device)
    if found is not None and not reason:
        reason = first_reason(_compare(found, hidden_size, element, kernels.device), kernels.device)
    return (None, f"{rest} ({reason})") if reason else (found, f"{by}, {rest} above")


def first_reason(reason: str, device: torch.device) -> str:
    """The first that is not empty of those of all ranks, cut to what one message holds: one rank without it means all
    without it. Every rank has to call it."""
    # Bytes in a tensor: torch.distributed would pickle an object.
    message = torch.zeros(_REASON_BYTES, dtype=torch.uint8)
    content = bytearray(reason.encode()[:_REASON_BYTES])
    if content:
        message[: len(content)] = torch.frombuffer(content, dtype=torch.uint8)
    for each in all_gather(message.to(device)).cpu():
        if text := bytes(each.tolist()).rstrip(b"\0").decode(errors="replace"):
            return text
    return ""


def _compare(found: FewRows, hidden_size: int, element: int, device: torch.device) -> str:
    """Whole numbers, whose sums are exact in any order, against torch.distributed: "" or what is wrong."""
    dtype = torch.bfloat16 if element == 2 else torch.float32
    for turn in range(4):
        numbers = (torch.arange(hidden_size, device=device) + turn) % 8 + dist.get_rank()
        expected = numbers.to(dtype).unsqueeze(0)
        summed = found.all_reduce(expected.clone())
        all_reduce(expected)
        if not torch.equal(summed, expected):
            return f"sums differ from those of {library(device)}"
    return ""


def _one_shot(
    kernels: KernelSet, exchange_kernels: ExchangeKernels, shape: tuple[int, int], max_rows: int, vocab: int
) -> tuple[OneShot | None, str]:
    """shape: rows and words of a row that are summed."""
    rank, size = dist.get_rank(), dist.get_world_size()
    sample_shape = max_rows, exchange_kernels.sample_width(vocab)
    num_words = [Exchange.num_words(size, *each) for each in (shape, sample_shape)]
    try:
        memory, addresses = _map_memory(sum(num_words), kernels.device)
    except RuntimeError as error:
        return None, f"no symmetric memory: {str(error).splitlines()[0]}"

    def exchange(offset: int, rows: int, width: int) -> Exchange:
        peers = torch.tensor([address + 8 * offset for address in addresses], device=kernels.device)
        counters = torch.zeros(rows, dtype=torch.int32, device=kernels.device)
        return Exchange(rank, size, rows, width, peers, counters)

    return OneShot(exchange_kernels, exchange(0, *shape), exchange(num_words[0], *sample_shape), memory), ""


def custom_reduce(kernels: KernelSet, max_bytes: int) -> tuple[CustomReduce | None, str]:
    """(sums of up to max_bytes by `kernels.custom_reduce`, "") or (None, why not). Every rank has to call it."""
    assert kernels.custom_reduce is not None
    # It exchanges handles of its buffers over a group that is not NCCL's.
    group = dist.new_group(backend="gloo")
    try:
        communicator = kernels.custom_reduce(group=group, device=kernels.device, max_size=max_bytes)
    except (RuntimeError, AssertionError) as error:
        return None, f"AITER's CustomAllreduce: {str(error).splitlines()[0]}"
    if communicator.disabled:
        return None, "AITER's CustomAllreduce disabled itself"
    return CustomReduce(communicator.all_reduce, kernels.add_rms_norm, max_bytes), ""


def _map_memory(num_words: int, device: torch.device) -> tuple[object, list[int]]:
    """Zeros, int64 [num_words], on every rank: (what keeps them mapped, where this process finds each rank's)."""
    group = dist.group.WORLD
    assert group is not None, "a rank joins its group first"
    indexed = torch.device(device.type, torch.cuda.current_device())
    buffer = symmetric_memory.empty(num_words, dtype=torch.int64, device=indexed)
    handle = symmetric_memory.rendezvous(buffer, group)
    buffer.zero_()
    torch.cuda.synchronize()
    dist.barrier()  # nobody writes into a buffer that its owner has yet to clear
    return (buffer, handle), [int(address) for address in handle.buffer_ptrs]
