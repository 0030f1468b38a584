"""Where kernels run, and with which meta-parameters: one table for all architectures.

Kernels are written once for CUDA and ROCm; what differs (tile sizes, warps, pipeline stages, MFMA shape) is looked up
here by (operation, architecture). Nothing is tuned at run time: compiling a candidate takes seconds, on somebody's
request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

from engine.errors import ConfigError

SM90, GFX942, GFX950, INTERPRET = "sm_90", "gfx942", "gfx950", "interpret"
# Shared memory (LDS) of one workgroup, bytes. Triton checks it on CUDA only, at launch.
SHARED_BYTES = {SM90: 232448, GFX942: 65536, GFX950: 163840, INTERPRET: 2**31 - 1}
_UNITS = {SM90: 132, GFX942: 304, GFX950: 256, INTERPRET: 4}


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Meta-parameters of one operation on one architecture.

    tiles: constexpr arguments of the kernel.  hip: compile options that only ROCm knows (matrix_instr_nonkdim,
    waves_per_eu, kpack).  cuda: those that only CUDA knows (launch_pdl, maxnreg).
    """

    tiles: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    hip: Mapping[str, int] = field(default_factory=dict)
    cuda: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, tile: str) -> int:
        return self.tiles[tile]


Recorder = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Target:
    """One architecture, and how kernels are launched on it.

    num_units: streaming multiprocessors or compute units.  recorder: when set, sees every launch in place of the GPU;
    ahead-of-time compilation tests thus compile what the operations really launch.
    """

    arch: str
    num_units: int
    recorder: Recorder | None = None

    @property
    def is_hip(self) -> bool:
        return self.arch.startswith("gfx")

    @property
    def interpreted(self) -> bool:
        return self.arch == INTERPRET

    @property
    def warp(self) -> int:
        """Threads that run in step."""
        return 64 if self.is_hip else 32

    @property
    def overlaps(self) -> bool:
        """Whether a kernel may start while the one before it ends: the constexpr OVERLAP of kernels that begin with
        `triton_common.follow`."""
        return self.arch == SM90

    @property
    def shared_bytes(self) -> int:
        return SHARED_BYTES[self.arch]

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, config: LaunchConfig, **constexprs: Any) -> None:
        """Launch `kernel` over `grid`. Positional args are run-time arguments, keywords are constexprs (those of
        `config.tiles` are added)."""
        if 0 in grid:
            return
        options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        options |= config.hip if self.is_hip else {} if self.interpreted else config.cuda
        constants = {**config.tiles, **constexprs}
        if constants.get("OVERLAP"):
            options["launch_pdl"] = True
        if self.recorder is not None:
            self.recorder(kernel, grid, args, constants, options)
        else:
            kernel[grid](*args, **constants, **options)


def detect() -> Target:
    """The device of this process. Raises ConfigError where Triton kernels cannot run."""
    if triton.knobs.runtime.interpret:
        return Target(INTERPRET, _UNITS[INTERPRET])
    if not torch.cuda.is_available():
        raise ConfigError("backend=triton needs a CUDA or ROCm device, and torch sees none; backend=torch runs on CPU")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    else:
        # Later NVIDIA architectures run what Hopper runs.
        is_later = properties.major >= 9
        arch = SM90 if is_later else f"sm_{properties.major}{properties.minor}"
    if arch not in SHARED_BYTES:
        raise ConfigError(
            f"backend=triton runs on gfx942, gfx950 and NVIDIA from sm_90 on, and this device is {arch}; "
            "backend=torch runs on CPU"
        )
    return Target(arch, properties.multi_processor_count)


def offline_target(arch: str, recorder: Recorder) -> Target:
    """A target that is not there, for compiling ahead of time."""
    return Target(arch, _UNITS[arch], recorder)
