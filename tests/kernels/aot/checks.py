"""The limits that every compiled kernel keeps, the named exceptions, and the comparison with resources.json."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import triton

from engine.kernels.launch import GFX950, SHARED_BYTES, SM90
from tests.kernels.aot.compile import Resources
from tests.kernels.aot.record import Launch

BASELINE = Path(__file__).with_name("resources.json")
REGENERATE = "if that is intended: python -m tests.kernels.aot --write"
MAX_SGPR_SPILLS = 8  # they go to lanes of a vector register
MAX_CODE_BYTES = 32 * 1024  # two compute units share 64 KiB of instruction cache
MIN_WAVES_COMPUTE, MIN_WAVES_BANDWIDTH = 2, 4
# What a rise of vector registers is worth a failure, if it costs a wave.
REGISTER_STEP = 8


@dataclass(frozen=True)
class Exemption:
    """A limit that some kernels may break, and why. Patterns are those of fnmatch."""

    gate: str
    kernel: str
    why: str
    arch: str = "*"
    shape_class: str = "*"

    def covers(self, gate: str, launch: Launch) -> bool:
        pairs = [
            (gate, self.gate),
            (launch.name, self.kernel),
            (launch.arch, self.arch),
            (launch.shape_class, self.shape_class),
        ]
        return all(fnmatchcase(text, pattern) for text, pattern in pairs)


_PARITY = "small models are for tests of parity, not for speed"
_LATENCY = "a few integers or floats per row: bound by latency, not by bandwidth"
_UNROLLED = "every wave has a whole row's loads in flight: fewer waves cover the latency"
_MX_SCALES = "the scales of a tile are one or two bytes per thread"
_MX_WIDE = "72 to 88 bytes: 8192 tokens take 4.8 ms on H100, 6.3 with tiles that have no spills"
_MX_SHARED = "in the tile of all tokens, which the shared expert alone takes: faster on H100 than what has no spills"
_TP1 = "M3 in bf16 fits no single GPU: these shapes only have to run"
EXEMPTIONS: tuple[Exemption, ...] = (
    Exemption("matrix", "*", _PARITY, shape_class="small*"),
    Exemption("loads", "*", _PARITY, shape_class="small*"),
    Exemption("waves", "*", _TP1, shape_class="tp1-*"),
    Exemption("loads", "*", _MX_SCALES, arch="gfx*", shape_class="*-mxfp[48]/*"),
    Exemption("loads", "topk.select_decode", _LATENCY),
    Exemption("loads", "unions._build_kernel", _LATENCY),
    Exemption("loads", "moe_many._sort_pairs_kernel", _LATENCY),
    Exemption("loads", "route._select_kernel", _LATENCY),
    Exemption("loads", "prepare._prepare_kernel", _LATENCY),
    Exemption("loads", "pages._tables_kernel", _LATENCY),
    Exemption("loads", "topk.select_prefill", "reads whole sectors of several tokens: one score of each per thread"),
    Exemption("loads", "decode._merge_kernel", "two splits of 128 floats are 8 bytes per thread", arch="gfx*"),
    Exemption("loads", "sample._chunk_kernel", "a chunk of bf16 logits is 8 bytes per thread", arch="gfx*"),
    Exemption("loads", "sample._merge_kernel", _LATENCY, shape_class="*/sample_share/*"),
    Exemption("spills", "dense._dense_kernel", "held to 128 registers: two programs fit", arch="sm_90"),
    Exemption("spills", "moe_few._few_*_kernel", _MX_SHARED, arch="sm_90", shape_class="*-mxfp[48]/experts/decode*"),
    Exemption("spills", "mx_many._*_kernel", _MX_WIDE, arch="sm_90", shape_class="*-mxfp4/experts/prefill*"),
    Exemption("spills", "linear._many_tokens_kernel", "8 bytes", arch="sm_90", shape_class="*-mxfp4/*"),
    Exemption("spills", "topk.select_*", "8 bytes: two of a row's scalars", arch="sm_90"),
    Exemption("waves", "moe_few._one_down_kernel", _UNROLLED, arch="gfx*"),
)


def gates(launch: Launch, found: Resources) -> dict[str, str]:
    """The limits that do not hold, exemptions aside: name of the limit -> what is wrong."""
    wrong: dict[str, str] = {}
    if found.shared > SHARED_BYTES[found.arch]:
        wrong["shared"] = f"{found.shared} bytes of shared memory, of {SHARED_BYTES[found.arch]}"
    if found.warps * found.wave_size > 1024:
        wrong["warps"] = f"{found.warps} warps: more than 1024 threads"
    if found.wave_size != (32 if found.arch == SM90 else 64):
        wrong["wavefront"] = f"wavefront of {found.wave_size}"
    sgprs = found.spills.get("sgpr_spill_count", 0)
    spills = {name: count for name, count in found.spills.items() if name != "sgpr_spill_count"}
    if spills or sgprs > MAX_SGPR_SPILLS:
        wrong["spills"] = ", ".join(f"{name} {count}" for name, count in found.spills.items())
    if found.code_bytes > MAX_CODE_BYTES:
        wrong["code"] = f"{found.code_bytes} bytes of code"
    least = MIN_WAVES_COMPUTE if found.dot_rows else MIN_WAVES_BANDWIDTH
    # A multiprocessor hides latency by asynchronous copies and wgmma: one block of 4 warps can be enough.
    if found.waves < (1 if found.arch == SM90 else least):
        wrong["waves"] = (
            f"{found.waves:g} waves per SIMD, at least {least} wanted ({found.vgprs} registers, {found.shared} bytes "
            f"of shared memory, {found.warps} warps)"
        )
    if message := _matrix(found):
        wrong["matrix"] = message
    if found.narrow:
        wrong["loads"] = f"{found.narrow} loads of 2 bytes or less in a loop: misaligned, or a stride that hides it"
    elif found.loads and not found.wide:
        wrong["loads"] = f"{found.loads} loads and none of 16 bytes"
    if launch.options.get("launch_pdl") and found.arch == SM90 and not found.waits:
        wrong["order"] = "starts before the kernel ahead of it has ended, and never waits for it"
    if found.unordered:
        wrong["atomics"] = f"{found.unordered} atomics that other waves' stores may still be behind of"
    return wrong


def exemption(gate: str, launch: Launch) -> Exemption | None:
    return next((one for one in EXEMPTIONS if one.covers(gate, launch)), None)


def _matrix(found: Resources) -> str | None:
    if not found.dot_rows:
        return None
    if not found.matrix:
        return "tl.dot without matrix instructions"
    if found.arch == SM90:
        no_wgmma = found.dot_rows >= 64 and found.warps >= 4 and "wgmma" not in found.matrix
        return f"mma.sync for {found.dot_rows} rows: wgmma reaches twice its rate" if no_wgmma else None
    if upcast := [name for name in found.matrix if name.endswith("_f16")]:
        return f"computes in fp16 ({upcast[0]}): an fp8 that this architecture does not know"
    single = [name for name in found.matrix if name.endswith(("16x16x16_bf16", "32x32x8_bf16"))]
    if found.arch == GFX950 and single:
        return f"half rate: {single[0]} in place of 16x16x32 or 32x32x16"
    return None


def entry(launch: Launch, found: Resources) -> dict[str, Any]:
    """What resources.json keeps of a compilation; what is zero is left out."""
    matrix = " ".join(f"{count}x{name.removeprefix('v_mfma_f32_')}" for name, count in found.matrix.items())
    numbers = {
        "config": launch.config,
        "registers": found.vgprs,
        "shared": found.shared,
        "waves": found.waves,
        "spills": sum(found.spills.values()),
        "matrix": matrix,
        "wide": f"{found.wide}/{found.loads}",
        "barriers": found.barriers,
        "shuffles": found.shuffles,
    }
    return {name: value for name, value in numbers.items() if value}


def regressions(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What got worse since resources.json was written."""
    if old["config"] != new["config"]:
        return [f"launch config {old['config']!r} became {new['config']!r}"]

    def grew(name: str, by: float) -> bool:
        return bool(new.get(name, 0) >= old.get(name, 0) + by)

    worse = []
    if new["waves"] < old["waves"] and (grew("registers", REGISTER_STEP) or grew("shared", 1)):
        worse += [f"{old.get(name, 0)} {name} became {new.get(name, 0)}" for name in ("waves", "registers", "shared")]
    if grew("spills", 1):
        worse.append(f"{old.get('spills', 0)} spills became {new['spills']}")
    worse += [
        f"{old.get(name, 0)} {name} became {new[name]}"
        for name in ("barriers", "shuffles")
        if grew(name, max(3, 0.5 * old.get(name, 0)))
    ]
    return worse


def read_baseline() -> tuple[str, dict[str, dict[str, Any]]]:
    """(version of Triton, entries), ("", {}) where there is no file yet."""
    if not BASELINE.exists():
        return "", {}
    data = json.loads(BASELINE.read_text())
    return data["triton"], data["entries"]


def write_baseline(entries: Mapping[str, Mapping[str, Any]], archs: Collection[str]) -> None:
    """One line per entry, sorted. Entries of other architectures than `archs` stay."""
    version, baseline = read_baseline()
    kept = {key: old for key, old in baseline.items() if key.split()[0] not in archs and version == triton.__version__}
    merged = {**kept, **entries}
    body = ",\n".join(f"{json.dumps(key)}: {json.dumps(merged[key])}" for key in sorted(merged))
    BASELINE.write_text(f'{{"triton": {json.dumps(triton.__version__)}, "entries": {{\n{body}\n}}}}\n')


def compare(
    entries: Mapping[str, Mapping[str, Any]], failed: Collection[str], archs: Collection[str]
) -> dict[str, str]:
    """How `entries`, all of `archs`, differ from resources.json: key -> message. Versions of Triton allocate
    differently: nothing is compared with another one.

    failed: keys of launches that did not compile.
    """
    version, baseline = read_baseline()
    if version != triton.__version__:
        return {}
    failures = {}
    for key, new in entries.items():
        if key not in baseline:
            failures[key] = f"not in {BASELINE.name}; {REGENERATE}"
        elif worse := regressions(baseline[key], new):
            failures[key] = f"{'; '.join(worse)}; {REGENERATE}"
    for key in set(baseline) - set(entries) - set(failed):
        if key.split()[0] in archs:
            failures[key] = f"in {BASELINE.name} and no longer launched; {REGENERATE}"
    return failures
