"""python -m tests.kernels.aot: compile what the operations launch, check it, say what is wrong. See --help."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton

from tests.kernels.aot import checks
from tests.kernels.aot.cases import never_launched, record
from tests.kernels.aot.compile import Resources, compile_launch
from tests.kernels.aot.record import ARCHS, Launch


@dataclass
class Outcome:
    """failures, entries: by key.  seconds: of compiling, by key.  granted: exemptions that something needed."""

    failures: dict[str, list[str]] = field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    granted: set[checks.Exemption] = field(default_factory=set)

    def fail(self, key: str, message: str) -> None:
        self.failures.setdefault(key, []).append(message)


# Workers are forked with it, since kernels cannot be sent to them.
_launches: list[Launch] = []


def _compile(index: int) -> Resources | str:
    try:
        return compile_launch(_launches[index])
    except Exception as error:  # whatever the compiler raises, for one message per kernel
        return f"does not compile: {type(error).__name__}: {str(error).strip()[-1500:]}"


def compile_all(launches: Sequence[Launch], jobs: int) -> Outcome:
    outcome = Outcome()
    _launches[:] = launches
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        pending = {pool.submit(_compile, index): index for index in range(len(launches))}
        for future in as_completed(pending):
            launch = launches[pending[future]]
            try:
                found = future.result()
            except BrokenProcessPool:
                outcome.fail(launch.key, "not compiled: the compiler crashed, on this kernel or on another one")
                continue
            if isinstance(found, str):
                outcome.fail(launch.key, found)
                continue
            outcome.entries[launch.key] = checks.entry(launch, found)
            outcome.seconds[launch.key] = found.seconds
            for gate, message in checks.gates(launch, found).items():
                if granted := checks.exemption(gate, launch):
                    outcome.granted.add(granted)
                else:
                    outcome.fail(launch.key, f"{gate}: {message}")
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.aot", description=__doc__)
    parser.add_argument("--arch", choices=ARCHS, nargs="*", default=ARCHS)
    parser.add_argument("--all", action="store_true", help="also classes of shapes that `make test` leaves out")
    parser.add_argument("--only", default="", help="kernels whose name contains this; nothing is compared")
    parser.add_argument("--write", action="store_true", help="renew resources.json (it has what `make test` compiles)")
    parser.add_argument("--show", action="store_true", help="print the resources of every kernel")
    parser.add_argument("--results", type=Path, help="write the failures to this file as JSON")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.only and args.write:
        parser.error("--write needs all kernels")
    if triton.knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: interpreted kernels are not compiled")
    started = time.perf_counter()
    recordings = {arch: record(arch, args.all) for arch in args.arch}
    launches = [launch for found in recordings.values() for launch in found.launches if args.only in launch.name]
    recording = time.perf_counter() - started
    outcome = compile_all(launches, args.jobs)
    tested = {launch.key for found in recordings.values() for launch in found.launches[: found.num_tested]}
    entries = {key: entry for key, entry in outcome.entries.items() if key in tested}
    if args.write:
        checks.write_baseline(entries, args.arch)
    elif not args.only:
        for key, message in checks.compare(entries, set(outcome.failures), args.arch).items():
            outcome.fail(key, message)
    for arch, recorded in recordings.items():
        for shape_class, message in recorded.errors.items():
            outcome.fail(f"{arch} - {shape_class}", f"not recorded: {message}")
    for name in never_launched(recordings.values()):
        outcome.fail(f"never launched: {name}", "add a class of shapes that launches it to cases.py")
    if args.all and not args.only and len(args.arch) == len(ARCHS):
        for one in checks.EXEMPTIONS:
            if one not in outcome.granted:
                print(f"nothing needs the exemption of {one.kernel} from {one.gate} ({one.why})")
    _report(launches, outcome, args.show)
    print(
        f"triton {triton.__version__}: {len(launches)} compilations, {len(outcome.failures)} with failures; "
        f"{recording:.0f} s to record, {time.perf_counter() - started:.0f} s in all with {args.jobs} processes, "
        f"{sum(outcome.seconds.values()):.0f} s of CPU time to compile"
    )
    if args.results:
        args.results.write_text(json.dumps(outcome.failures))
    return 1 if outcome.failures else 0


def summary(failures: Mapping[str, Sequence[str]]) -> list[str]:
    """One line per message; keys with the same one share it."""
    keys: dict[str, list[str]] = {}
    for key, messages in sorted(failures.items()):
        for message in messages:
            keys.setdefault(message, []).append(key)
    return [f"{found[0]}{f' (and {len(found) - 1} more)' if found[1:] else ''}: {m}" for m, found in keys.items()]


def _report(launches: Sequence[Launch], outcome: Outcome, show: bool) -> None:
    if show:
        for key, entry in sorted(outcome.entries.items()):
            print(f"{key}: " + ", ".join(f"{name} {value}" for name, value in entry.items()))
    counts = Counter((launch.name, launch.arch) for launch in launches)
    spent: Counter[str] = Counter()
    for launch in launches:
        spent[launch.name] += outcome.seconds.get(launch.key, 0.0)
    for name in sorted(spent):
        numbers = ", ".join(f"{counts[name, arch]} on {arch}" for arch in ARCHS if counts[name, arch])
        print(f"{name}: {numbers}, {spent[name]:.1f} s of CPU time")
    slowest = sorted(outcome.seconds.items(), key=lambda item: -item[1])[:8]
    print("slowest: " + "; ".join(f"{key} {seconds:.1f} s" for key, seconds in slowest))
    for line in summary(outcome.failures):
        print(f"FAILED {line}")


if __name__ == "__main__":
    sys.exit(main())
