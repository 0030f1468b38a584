"""What the operations launch: every launch once, signed the way Triton's JIT would sign it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from engine.kernels.launch import GFX942, GFX950, SM90, Target, offline_target

ARCHS = (SM90, GFX942, GFX950)
GPUS = {
    SM90: GPUTarget("cuda", 90, 32),
    GFX942: GPUTarget("hip", "gfx942", 64),
    GFX950: GPUTarget("hip", "gfx950", 64),
}


@dataclass(frozen=True)
class Launch:
    """One kernel as it must be compiled.

    shape_class: the first class of shapes that launched it, and `number` counts the kernel's compilations within that
    class.  options: as parsed by the backend.  config: the options that the launch asked for, in short.
    """

    arch: str
    kernel: JITFunction
    shape_class: str
    number: int
    source: ASTSource
    options: Mapping[str, Any]
    config: str

    @property
    def name(self) -> str:
        """decode._merge_kernel: of the module engine.kernels.triton_decode."""
        return f"{self.kernel.__module__.rpartition('triton_')[2]}.{self.kernel.__name__}"

    @property
    def key(self) -> str:
        suffix = f"#{self.number}" if self.number > 1 else ""
        return f"{self.arch} {self.name} {self.shape_class}{suffix}"


@dataclass
class Recorder:
    """Collects the launches of one architecture. Set `shape_class` before running an operation."""

    arch: str
    shape_class: str = ""
    launches: dict[str, Launch] = field(default_factory=dict)
    num_seen: int = 0
    _binders: dict[JITFunction, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._backend = make_backend(GPUS[self.arch])

    @property
    def target(self) -> Target:
        return offline_target(self.arch, self)

    def __call__(
        self,
        kernel: JITFunction,
        grid: tuple[int, ...],
        args: tuple[Any, ...],
        constants: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        assert isinstance(kernel, JITFunction), f"{kernel} is not a plain @triton.jit function"
        assert len(grid) <= 3 and all(0 < size < 2**31 for size in grid), f"{kernel.__name__}: grid {grid}"
        assert all(size < 2**16 for size in grid[1:]), f"{kernel.__name__}: CUDA has no grid {grid}"
        self.num_seen += 1
        # Triton's own binder, so that integers of 1, divisible ones, aligned pointers, small storages (buffer loads)
        # and do_not_specialize are treated exactly as at run time.
        if kernel not in self._binders:
            self._binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, self._backend)
        keywords = {**constants, **options}
        bound, specialization, _ = self._binders[kernel](*args, **keywords)
        parsed, signature, constexprs, attrs = kernel._pack_args(
            self._backend, keywords, bound, specialization, keywords
        )
        key = "|".join(
            [kernel.__module__, kernel.__name__, repr(signature), repr(constexprs), repr(attrs), parsed.hash()]
        )
        if key in self.launches:
            return
        same = [x for x in self.launches.values() if x.kernel is kernel and x.shape_class == self.shape_class]
        source = ASTSource(kernel, signature, constexprs, attrs)
        config = describe(options)
        self.launches[key] = Launch(self.arch, kernel, self.shape_class, len(same) + 1, source, parsed.__dict__, config)


def describe(options: Mapping[str, Any]) -> str:
    """Compile options in short: w4 s2 matrix_instr_nonkdim=16."""
    rest = [f"{name}={value}" for name, value in sorted(options.items()) if name not in ("num_warps", "num_stages")]
    return " ".join([f"w{options['num_warps']}", f"s{options['num_stages']}", *rest])
