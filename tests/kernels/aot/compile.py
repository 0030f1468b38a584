"""Compile one recorded launch and read what it takes from the machine code."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import triton

from engine.kernels.launch import GFX942, GFX950, SM90
from tests.kernels.aot.record import GPUS, Launch

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# Shared memory of one streaming multiprocessor or compute unit, bytes; Hopper keeps 1 KiB of each block for itself.
_SHARED_PER_UNIT = {SM90: 233472, GFX942: 65536, GFX950: 163840}
_SPILLS = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
_BULK_LOAD = re.compile(r"\b(?:global|buffer)_load_(?:lds_)?(\w+)")
_NARROW = re.compile(r"ushort|ubyte|short|sbyte|_d16")


@dataclass
class Resources:
    """What one compiled kernel takes, and what its code looks like.

    vgprs: registers of a thread (on AMD, both kinds together).  spills: bytes or registers that live in memory, by
    kind, the non-zero ones.  dot_rows: most rows of a tl.dot, 0: it has none.  waves: that one SIMD of a compute unit
    (a quarter of a multiprocessor) holds at once.  matrix: matrix instructions by name.  wide, narrow: loads of 16
    bytes and of at most 2, narrow only inside loops.  barriers, shuffles: inside loops (all of them on NVIDIA).
    unordered: ticket atomics that some wave's stores may still be behind of.  waits: for the kernel before it has ended
    (NVIDIA).  seconds: of CPU time to compile it.
    """

    arch: str
    vgprs: int
    shared: int
    warps: int
    waves: float
    dot_rows: int
    spills: dict[str, int] = field(default_factory=dict)
    matrix: dict[str, int] = field(default_factory=dict)
    loads: int = 0
    wide: int = 0
    narrow: int = 0
    barriers: int = 0
    shuffles: int = 0
    code_bytes: int = 0
    wave_size: int = 0
    unordered: int = 0
    waits: bool = False
    seconds: float = 0.0


def compile_launch(launch: Launch) -> Resources:
    started = _cpu_seconds()
    compiled = triton.compile(launch.source, target=GPUS[launch.arch], options=dict(launch.options))
    # The result's shape ends the line: ... -> tensor<64x128xf32>, with a location behind it.
    dots = re.findall(r"\btt\.dot(?:_scaled)?\b.*tensor<(\d+)x", compiled.asm["ttir"])
    dot_rows = max(map(int, dots), default=0)
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    if launch.arch == SM90:
        resources = _read_nvidia(compiled.asm["ptx"], compiled.asm["cubin"], shared, warps, dot_rows)
    else:
        resources = _read_amd(launch.arch, compiled.asm["amdgcn"], shared, warps, dot_rows)
    resources.seconds = _cpu_seconds() - started
    return resources


def _cpu_seconds() -> float:
    """Of this process and of the assemblers it has started: other processes on the machine do not count."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _read_amd(arch: str, text: str, shared: int, warps: int, dot_rows: int) -> Resources:
    def meta(name: str) -> int:
        # The first key of a list entry starts with a dash.
        found = re.search(rf"^\s*(?:- )?\.{name}:\s*(\d+)", text, re.MULTILINE)
        assert found, f"no .{name} in the assembly"
        return int(found.group(1))

    lines = [line.split(";")[0].strip() for line in text.splitlines()]
    hot = [lines[i] for i in sorted(set(loop_lines(lines)))]
    loads = Counter(found.group(1) for line in lines if (found := _BULK_LOAD.search(line)))
    vgprs = meta("vgpr_count")
    code = re.search(r"; codeLenInByte = (\d+)", text)
    return Resources(
        arch=arch,
        vgprs=vgprs,
        shared=shared,
        warps=warps,
        waves=_waves_amd(arch, vgprs, shared, warps),
        dot_rows=dot_rows,
        spills={name: count for name in _SPILLS if (count := meta(name))},
        matrix=dict(sorted(Counter(re.findall(r"\bv_mfma_\w+", text)).items())),
        loads=loads.total(),
        wide=sum(count for name, count in loads.items() if "dwordx4" in name),
        narrow=sum(bool((found := _BULK_LOAD.search(line)) and _NARROW.search(found.group(1))) for line in hot),
        barriers=sum("s_barrier" in line for line in hot),
        shuffles=sum("ds_bpermute" in line for line in hot),
        code_bytes=int(code.group(1)) if code else 0,
        wave_size=meta("wavefront_size"),
        unordered=unordered_atomics(lines, warps),
    )


def loop_lines(lines: list[str]) -> list[int]:
    """Numbers of the lines between a label and a later branch back to it."""
    labels: dict[str, int] = {}
    inside: list[int] = []
    for number, line in enumerate(lines):
        if found := re.match(r"(\.LBB\w+):", line):
            labels[found.group(1)] = number
        elif (found := re.match(r"s_(?:c)?branch\w*\s+(\.LBB\w+)", line)) and found.group(1) in labels:
            inside.extend(range(labels[found.group(1)], number))
    return inside


def unordered_atomics(lines: list[str], warps: int) -> int:
    """Ticket atomics that are issued although a wave of the workgroup may still have stores on their way.

    Triton lets only the wave that issues the atomic wait for its own stores. The others must have waited (vmcnt(0))
    before the last barrier ahead of the atomic, and must not have stored since.
    """
    pending = pending_at_barrier = stored_since = False
    count = 0
    for line in lines:
        if re.match(r"(?:global|buffer|flat)_atomic", line):
            count += pending if warps == 1 else pending_at_barrier or stored_since
        elif re.match(r"(?:global|buffer|flat)_store", line):
            pending = stored_since = True
        elif line.startswith("s_waitcnt") and "vmcnt(0)" in line:
            pending = False
        elif line.startswith("s_barrier"):
            pending_at_barrier, stored_since = pending, False
    return count


def _waves_amd(arch: str, vgprs: int, shared: int, warps: int) -> float:
    """Of 512 registers per lane in granules of 8; a workgroup's waves are spread over 4 SIMDs and live together."""
    by_registers = min(8, 512 // max(8, -(-vgprs // 8) * 8))
    groups = by_registers * 4 // warps if warps > 1 else by_registers * 4
    if shared:
        groups = min(groups, _SHARED_PER_UNIT[arch] // shared)
    return min(8.0, groups * warps / 4)


def _read_nvidia(ptx: str, cubin: bytes, shared: int, warps: int, dot_rows: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    assert "REG" in numbers, f"cuobjdump says nothing of registers: {usage!r}"
    matrix = {"wgmma": ptx.count("wgmma.mma_async"), "mma": len(re.findall(r"\bmma\.sync", ptx))}
    loads = re.findall(r"\bld\.global\S*|cp\.async\.c[ag]\.shared\.global\S* \[[^\]]*\], \[[^\]]*\], (?:0x)?\w+", ptx)
    return Resources(
        arch=SM90,
        vgprs=numbers["REG"],
        shared=shared,
        warps=warps,
        waves=_waves_nvidia(numbers["REG"], shared, warps),
        dot_rows=dot_rows,
        spills={name.lower(): numbers[name] for name in ("STACK", "LOCAL") if numbers.get(name)},
        matrix={name: count for name, count in matrix.items() if count},
        loads=len(loads),
        wide=sum(".v4.b32" in load or ".v2.b64" in load or load.endswith(("0x10", " 16")) for load in loads),
        barriers=len(re.findall(r"\bbar\.sync", ptx)),
        shuffles=len(re.findall(r"\bshfl\.sync", ptx)),
        wave_size=32,
        waits="griddepcontrol.wait" in ptx,
    )


def _waves_nvidia(registers: int, shared: int, warps: int) -> float:
    """Of 64 K registers, 64 warps and 32 blocks in a multiprocessor of four parts."""
    blocks = min(32, 64 // warps, 65536 // (max(8, -(-registers // 8) * 8) * 32 * warps))
    blocks = min(blocks, _SHARED_PER_UNIT[SM90] // (shared + 1024))
    return blocks * warps / 4
