"""All kernels compile for all architectures, within the limits of each, and do not get worse unnoticed.

That makes the AMD side of the one source something a machine without any GPU can check.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import engine.kernels
from engine.kernels.launch import SM90
from engine.kernels.triton_moe_shared import _sum_ranks_kernel
from tests.kernels.aot.checks import gates, regressions
from tests.kernels.aot.compile import Resources, loop_lines, unordered_atomics
from tests.kernels.aot.contract import violations
from tests.kernels.aot.record import Launch

ROOT = Path(__file__).parents[2]
KERNELS = Path(engine.kernels.__file__).parent
DEADLINE_SECONDS = 400


@dataclass(frozen=True)
class Report:
    failures: dict[str, list[str]]
    output: str


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """One run of the gate over all architectures, in a process where Triton compiles rather than interprets."""
    results = tmp_path_factory.mktemp("aot") / "failures.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.aot", "--results", str(results)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    assert results.exists(), f"{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}"
    print(ran.stdout)
    return Report(json.loads(results.read_text()), ran.stdout)


@pytest.mark.parametrize("arch", ["sm_90", "gfx942", "gfx950"])
def test_kernels_compile_within_the_limits(report: Report, arch: str) -> None:
    failed = [f"{key}: {' | '.join(texts)}" for key, texts in report.failures.items() if key.split()[0] == arch]
    assert not failed, "\n".join(failed)


def test_every_kernel_is_compiled(report: Report) -> None:
    """A kernel that no class of shapes launches would not be checked at all."""
    missing = [key for key in report.failures if key.startswith("never launched")]
    assert not missing


def test_start_up_compiles_all_that_steps_launch() -> None:
    """No request waits for a compiler: the graphs and chunks of start-up launch whatever a later step does."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.aot.start_up"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    assert ran.returncode == 0, f"{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}"


def test_sources_use_nothing_that_only_nvidia_has() -> None:
    found = [message for path in sorted(KERNELS.glob("triton_*.py")) for message in violations(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("gdc_wait()", "gdc_wait exists on NVIDIA only"),
        ("if PDL:\n        gdc_wait()", None),
        ("x = wait()", "wait exists on NVIDIA only"),
        ("if n > 0:\n        tl.extra.cuda.smid()", "tl.extra.cuda.smid exists on NVIDIA only"),
        ("tl.make_tensor_descriptor(p, [n], [1], [16])", "tl.make_tensor_descriptor exists on NVIDIA only"),
        ("for _ in tl.range(0, n, warp_specialize=True):\n        pass", "warp_specialize= means something"),
        ("tl.dot(p, p, input_precision='tf32')", "input_precision='tf32' does not compile on AMD"),
        ("tl.dot(p, p, input_precision='ieee')", None),
    ],
)
def test_contract_of_sources(tmp_path: Path, body: str, complaint: str | None) -> None:
    source = tmp_path / "triton_x.py"
    source.write_text(
        "from triton.language.extra.cuda import gdc_wait, gdc_launch_dependents as wait\n"
        f"@triton.jit(do_not_specialize=['n'])\ndef kernel(p, n, PDL: tl.constexpr):\n    {body}\n"
    )
    found = violations(source)
    assert [complaint in message for message in found if complaint] == ([True] if complaint else []), found
    assert bool(found) == bool(complaint), found


def test_regressions() -> None:
    old = {"config": "w4 s1", "registers": 126, "shared": 16384, "waves": 4.0, "barriers": 6}
    assert regressions(old, old) == []
    assert regressions(old, old | {"registers": 130, "waves": 3.0}) == []  # noise
    assert "4.0 waves became 3.0" in regressions(old, old | {"registers": 134, "waves": 3.0})
    assert regressions(old, old | {"spills": 1}) == ["0 spills became 1"]
    assert regressions(old, old | {"barriers": 10}) == ["6 barriers became 10"]
    assert regressions(old, old | {"config": "w8 s1"}) == ["launch config 'w4 s1' became 'w8 s1'"]


@pytest.mark.parametrize(
    ("code", "warps", "unordered"),
    [
        ("global_store_dword\ns_barrier\ns_waitcnt vmcnt(0)\nglobal_atomic_add", 4, 1),
        ("global_store_dword\ns_waitcnt vmcnt(0)\ns_barrier\nglobal_atomic_add", 4, 0),
        ("s_barrier\nglobal_store_dword\ns_waitcnt vmcnt(0)\nglobal_atomic_add", 4, 1),
        ("global_store_dword\ns_waitcnt vmcnt(0)\nglobal_atomic_add", 1, 0),
        ("s_barrier\nglobal_atomic_add", 4, 0),
    ],
)
def test_ticket_order(code: str, warps: int, unordered: int) -> None:
    """The asm of Triton 3.9 for store; atomic_add(acq_rel) is the first one: only the wave of the atomic waits."""
    assert unordered_atomics(code.split("\n"), warps) == unordered


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_early_start_needs_a_wait(early: bool, waits: bool) -> None:
    launch = Launch(SM90, _sum_ranks_kernel, "class", 1, None, {"launch_pdl": early}, "w4 s1")
    found = Resources(SM90, vgprs=32, shared=0, warps=4, waves=8.0, dot_rows=0, wave_size=32, waits=waits)
    assert ("order" in gates(launch, found)) == (early and not waits)


def test_loop_lines() -> None:
    lines = ["a", ".LBB0_1:", "b", ".LBB0_2:", "c", "s_cbranch_scc1 .LBB0_2", "d", "s_branch .LBB0_3", ".LBB0_3:", "e"]
    assert sorted(set(loop_lines(lines))) == [3, 4]
