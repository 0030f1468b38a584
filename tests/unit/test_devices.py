"""Which GPU a rank takes, and the CPUs near it, from environments and sysfs trees made here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine import devices
from engine.errors import ConfigError

HIP, CUDA, ROCR = "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"
PCI = "0000:c3:00.0"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({ROCR: "4,5", HIP: "0"}, "ROCR_VISIBLE_DEVICES=4,5 and HIP_VISIBLE_DEVICES=0 both hide GPUs.*unset ROCR"),
        ({ROCR: "0", HIP: "0"}, "unset ROCR_VISIBLE_DEVICES"),
        ({ROCR: "4", CUDA: "4"}, "ROCR_VISIBLE_DEVICES=4 and CUDA_VISIBLE_DEVICES=4 both hide GPUs"),
        ({HIP: "4,5", CUDA: "0"}, "HIP_VISIBLE_DEVICES=4,5 and CUDA_VISIBLE_DEVICES=0 name different.*unset CUDA"),
        ({HIP: "0", CUDA: ""}, "unset CUDA_VISIBLE_DEVICES"),
    ],
)
def test_variables_that_hide_gpus_from_each_other_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        devices.check_visibility(environ, is_hip=True)
    devices.check_visibility(environ, is_hip=False)  # CUDA reads its own only


@pytest.mark.parametrize("environ", [{}, {HIP: "3"}, {CUDA: "3"}, {ROCR: "3"}, {HIP: "3", CUDA: "3"}, {"HIP": "1"}])
def test_one_layer_of_hiding_is_fine(environ: dict[str, str]) -> None:
    devices.check_visibility(environ, is_hip=True)


@pytest.mark.parametrize(
    ("assigned", "environ", "is_hip", "index"),
    [
        ("3", {HIP: "3"}, True, 0),  # Ray shows the process its own alone
        ("3", {CUDA: "3"}, True, 0),
        ("3", {CUDA: "3"}, False, 0),
        ("6", {HIP: "4,5, 6,7"}, True, 2),  # Ray was told to show all
        ("6", {HIP: "4,5,6,7", CUDA: "6"}, True, 2),
        ("3", {}, True, 3),
        ("3", {HIP: "0"}, False, 3),  # not a variable of CUDA
        ("GPU-4b2c", {HIP: "GPU-1a2b,GPU-4b2c"}, True, 1),
        ("MIG-11", {CUDA: "MIG-11"}, False, 0),
    ],
)
def test_the_assigned_gpu_by_its_local_number(assigned: str, environ: dict[str, str], is_hip: bool, index: int) -> None:
    assert devices.local_index(assigned, environ, is_hip=is_hip) == index


def test_an_assigned_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="Ray assigned GPU 3 to this process, and HIP_VISIBLE_DEVICES=0,1 shows others"
    ):
        devices.local_index("3", {HIP: "0,1", CUDA: "3"}, is_hip=True)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES= shows others"):
        devices.local_index("0", {CUDA: ""}, is_hip=False)
    with pytest.raises(ConfigError, match="GPU-4b2c to this process, and CUDA_VISIBLE_DEVICES does not show"):
        devices.local_index("GPU-4b2c", {}, is_hip=False)


# --- the CPUs near a GPU ---


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0-3,8,10-11\n", {0, 1, 2, 3, 8, 10, 11}), ("5\n", {5}), ("\n", set()), ("96-97", {96, 97})],
)
def test_cpulists(text: str, cpus: set[int]) -> None:
    assert devices.parse_cpulist(text) == cpus


def tree(root: Path, node: str, cpulist: str | None = "48-51,144-147\n") -> Path:
    device = root / "bus/pci/devices" / PCI
    device.mkdir(parents=True)
    (device / "numa_node").write_text(f"{node}\n")
    for name, cpus in (("node0", "0-47,96-143\n"), ("node1", cpulist)):
        (root / "devices/system/node" / name).mkdir(parents=True)
        if cpus is not None:
            (root / "devices/system/node" / name / "cpulist").write_text(cpus)
    return root


def test_pinned_to_the_allowed_cpus_of_the_gpus_node(tmp_path: Path) -> None:
    sys_root = tree(tmp_path, "1")
    assert devices.near_cpus(PCI, sys_root) == {48, 49, 50, 51, 144, 145, 146, 147}
    allowed = frozenset(range(40, 50))
    for setting in (None, True):
        assert devices.cpus_to_pin(setting, PCI, allowed, sys_root) == {48, 49}
    assert devices.cpus_to_pin(False, PCI, allowed, sys_root) == frozenset()


@pytest.mark.parametrize(
    ("node", "cpulist", "pci", "allowed"),
    [
        ("-1", "48-51", PCI, 48),  # the kernel knows no node
        ("7", "48-51", PCI, 48),  # a node that is not there
        ("1", None, PCI, 48),
        ("1", "\n", PCI, 48),  # memory without CPUs
        ("1", "48-51", "0000:c4:00.0", 48),
        ("1", "48-51", "", 48),  # torch does not tell where the GPU is
        ("1", "48-51", PCI, 3),  # the container may not use them
    ],
)
def test_an_unknown_node_pins_nothing_unless_it_must(
    tmp_path: Path, node: str, cpulist: str | None, pci: str, allowed: int
) -> None:
    sys_root = tree(tmp_path, node, cpulist)
    assert devices.cpus_to_pin(None, pci, frozenset({allowed}), sys_root) == frozenset()
    with pytest.raises(ConfigError, match=f"numa_pinning=true: .* at PCI {pci or 'unknown'} that this process may use"):
        devices.cpus_to_pin(True, pci, frozenset({allowed}), sys_root)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_pinning_moves_every_thread() -> None:
    code = """
import os, threading
from pathlib import Path
from engine import devices
ready, done = threading.Event(), threading.Event()
threading.Thread(target=lambda: (ready.set(), done.wait())).start()
ready.wait()
first = min(os.sched_getaffinity(0))
devices.pin(frozenset({first}))
tasks = [int(task.name) for task in Path("/proc/self/task").iterdir()]
assert len(tasks) >= 2 and all(os.sched_getaffinity(task) == {first} for task in tasks), tasks
done.set()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- what start-up tells ---


def test_the_line_about_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = {"name": "AMD Instinct MI300X", "total_memory": 192 * 2**30, "multi_processor_count": 304}
    properties = SimpleNamespace(
        **facts,
        gcnArchName="gfx942:sramecc+:xnack-",
        major=9,
        minor=4,
        pci_domain_id=0,
        pci_bus_id=0xC3,
        pci_device_id=0,
    )
    (tmp_path / "module/amdgpu").mkdir(parents=True)
    (tmp_path / "module/amdgpu/version").write_text("6.12.12\n")
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    line = str(devices.describe(2, properties, devices.runtime(tmp_path)))
    assert line == (
        "cuda:2, AMD Instinct MI300X, gfx942:sramecc+:xnack-, 304 units, 192.0 GiB, ROCm 6.4.43482, driver 6.12.12, "
        "PCI 0000:c3:00.0"
    )
    assert devices.shown({HIP: "3"}) == f"{HIP}=3, {CUDA} unset, {ROCR} unset"
    # An older torch does not tell the PCI address, and CUDA's has no gcnArchName.
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    older = SimpleNamespace(**facts, major=9, minor=0)
    line = str(devices.describe(0, older, devices.runtime(tmp_path)))
    assert ", sm_90, " in line and line.endswith("CUDA 12.8, driver of the kernel, PCI unknown")


def test_collectives_stay_on_the_loopback() -> None:
    found = devices.collective_environment()
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    assert {name: found[name] for name in found if "SOCKET" in name} == {
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
    }
