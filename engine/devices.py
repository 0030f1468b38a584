"""The GPU of this process: which one it is, whether the environment shows the right one, and the CPUs near it.

On ROCm three variables hide GPUs, in two layers. ROCR_VISIBLE_DEVICES removes devices below HIP; HIP_VISIBLE_DEVICES,
or CUDA_VISIBLE_DEVICES where that is unset, picks from what is left by its *new* numbers. Ray knows nothing of the
first layer, gives each actor its device in the second, and counts in the numbers of the node.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.errors import ConfigError

log = logging.getLogger(__name__)

VISIBLE = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_SYS = Path("/sys")


@dataclass(frozen=True, slots=True)
class Device:
    """What start-up tells about a GPU. arch: gfx942:sramecc+:xnack- or sm_90.  pci: "" when torch does not say."""

    index: int
    name: str
    arch: str
    memory_bytes: int
    num_units: int
    runtime: str
    pci: str

    def __str__(self) -> str:
        memory = f"{self.memory_bytes / 2**30:.1f} GiB"
        pci = f"PCI {self.pci or 'unknown'}"
        return f"cuda:{self.index}, {self.name}, {self.arch}, {self.num_units} units, {memory}, {self.runtime}, {pci}"


def current() -> Device:
    """The GPU that this thread computes on; torch must see one."""
    index = torch.cuda.current_device()
    return describe(index, torch.cuda.get_device_properties(index), runtime())


def describe(index: int, properties: Any, runtime_version: str) -> Device:
    """properties: torch's, whose fields differ between ROCm, CUDA and the releases of torch."""
    is_hip = torch.version.hip is not None
    pci: list[int] = [getattr(properties, f"pci_{part}_id", -1) for part in ("domain", "bus", "device")]
    return Device(
        index=index,
        name=properties.name,
        arch=properties.gcnArchName if is_hip else f"sm_{properties.major}{properties.minor}",
        memory_bytes=properties.total_memory,
        num_units=properties.multi_processor_count,
        runtime=runtime_version,
        pci="" if -1 in pci else "{:04x}:{:02x}:{:02x}.0".format(*pci),
    )


def runtime(sys: Path = _SYS) -> str:
    """Versions of ROCm or CUDA, as torch was built for it, and of the kernel's driver."""
    hip = torch.version.hip
    module = sys / "module" / ("amdgpu" if hip else "nvidia") / "version"
    driver = module.read_text().strip() if module.is_file() else "of the kernel"
    return f"{'ROCm' if hip else 'CUDA'} {hip or torch.version.cuda}, driver {driver}"


def shown(environ: Mapping[str, str]) -> str:
    """The variables that hide GPUs, as this process has them."""
    return ", ".join(f"{name}={environ[name]}" if name in environ else f"{name} unset" for name in VISIBLE)


# --- which GPU --------------------------------------------------------------------------------------------------


def check_visibility(environ: Mapping[str, str], *, is_hip: bool) -> None:
    """ConfigError when variables hide GPUs from each other, which ends on a wrong GPU or on none.

    CUDA reads one of them only.
    """
    if not is_hip:
        return
    hip, cuda, rocr = (environ.get(name) for name in VISIBLE)
    for name, value in zip(VISIBLE[:2], (hip, cuda), strict=True):
        if rocr is not None and value is not None:
            raise ConfigError(
                f"ROCR_VISIBLE_DEVICES={rocr} and {name}={value} both hide GPUs: the second picks by number from what "
                "the first leaves; unset ROCR_VISIBLE_DEVICES"
            )
    if hip is not None and cuda is not None and hip != cuda:
        raise ConfigError(
            f"HIP_VISIBLE_DEVICES={hip} and CUDA_VISIBLE_DEVICES={cuda} name different GPUs, and HIP reads the first; "
            "unset CUDA_VISIBLE_DEVICES"
        )


def local_index(assigned: str, environ: Mapping[str, str], *, is_hip: bool) -> int:
    """torch's number of the GPU that Ray assigned to this process.

    assigned: Ray's id of it: a number of the node, or a UUID.  Ray shows a process its own GPU alone, and then this
    is 0, unless it was told not to (RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES and its CUDA sibling): then every rank
    sees all of them, and without this each would take the first. Raises ConfigError when it is not among them.
    """
    names = VISIBLE[:2] if is_hip else VISIBLE[1:2]
    name = next((name for name in names if name in environ), None)
    if name is None:
        if not assigned.isdecimal():
            raise ConfigError(f"Ray assigned GPU {assigned} to this process, and {names[0]} does not show which it is")
        return int(assigned)
    visible = [each.strip() for each in environ[name].split(",")]
    if assigned not in visible:
        raise ConfigError(
            f"Ray assigned GPU {assigned} to this process, and {name}={environ[name]} shows others: unset {name} where "
            "Ray is started, and let Ray set it"
        )
    return visible.index(assigned)


# --- the CPUs near it -------------------------------------------------------------------------------------------


def near_cpus(pci: str, sys: Path = _SYS) -> frozenset[int]:
    """CPUs of the NUMA node that the PCI device is attached to; none where the kernel does not tell the node.

    pci: domain:bus:device.function.  sys: where sysfs is mounted.
    """
    attached = sys / "bus/pci/devices" / pci / "numa_node"
    if not pci or not attached.is_file():
        return frozenset()
    # A kernel that knows no node says -1.
    cpus = sys / "devices/system/node" / f"node{attached.read_text().strip()}" / "cpulist"
    return parse_cpulist(cpus.read_text()) if cpus.is_file() else frozenset()


def parse_cpulist(text: str) -> frozenset[int]:
    """sysfs's way to write CPUs: "0-3,8" are 0, 1, 2, 3 and 8."""
    found: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def cpus_to_pin(numa_pinning: bool | None, pci: str, allowed: frozenset[int], sys: Path = _SYS) -> frozenset[int]:
    """Where the process should run: the allowed CPUs near its GPU; none: leave it where it is.

    numa_pinning: None: pin where the node is known; True: ConfigError where it is not.
    """
    if numa_pinning is False:
        return frozenset()
    near = near_cpus(pci, sys) & allowed
    if numa_pinning and not near:
        raise ConfigError(
            f"numa_pinning=true: {sys} tells no CPU near the GPU at PCI {pci or 'unknown'} that this process may use"
        )
    return near


def pin(cpus: frozenset[int]) -> None:
    """Let every thread of this process run on `cpus` alone; those that it starts later inherit it.

    Memory that a thread touches first is then the node's too.
    """
    for task in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), cpus)
        except ProcessLookupError:
            continue  # it ended meanwhile


# --- the CPU's operations ---------------------------------------------------------------------------------------


# oneDNN compiles an operation for each shape and keeps 1024 of them, and so does torch's layer above it. Steps have all
# sizes: for minutes a process would grow, by hundreds of MB. With 128 nothing is slower.
CPU_ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}


# --- collectives ------------------------------------------------------------------------------------------------


def collective_environment() -> dict[str, str]:
    """Variables that gloo, NCCL and RCCL (which has NCCL's names) read when a group is made, unless they are set.

    The ranks of a group share a node, and no other host has business with their sockets: gloo would listen on
    whatever address the host name resolves to, NCCL and RCCL on the first interface that is not the loopback. What
    tunes bandwidth (channels, protocols) is left to the libraries, which choose by the machine that they find.
    PyTorch's symmetric memory would refuse ranks that each see their own GPU alone, all as number 0; and it would set
    up multicast, which nothing here uses.
    """
    loopback = "lo0" if platform.system() == "Darwin" else "lo"
    return {
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    }
