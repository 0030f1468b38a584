"""Fuzz for as long as one likes: `python -m tests.fuzz --seconds 600`. Exit status 1 when a promise was broken.

First hypothesis with many more examples than a test run has, the service itself included; then each target under
atheris, guided by coverage, where it is installed (`pip install atheris`). What broke a promise is left in .fuzz/, with
a command that repeats it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

# Of the time, for each of hypothesis over the targets and the service.
EXAMPLES_PER_SECOND = 2
DIRECTORY = Path(".fuzz")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="time for all targets together (default: 600)")
    parser.add_argument("--target", action="append", help="only this one; may stand several times")
    parser.add_argument("--guided", metavar="TARGET", help=argparse.SUPPRESS)
    parser.add_argument("--repeat", nargs=2, metavar=("TARGET", "FILE"), help="run one input and show what it breaks")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    if args.repeat is not None:
        from tests.fuzz.targets import TARGETS

        TARGETS[args.repeat[0]](Path(args.repeat[1]).read_bytes())
        return 0
    if args.guided is not None:
        return guided(args.guided, args.seconds)
    from tests.fuzz.targets import TARGETS

    chosen = args.target or list(TARGETS)
    failed = [] if args.target else examples(args.seconds / 2)
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: no run that is guided by coverage", flush=True)
    else:
        share_s = args.seconds / (1 if args.target else 2) / len(chosen)
        failed += [target for target in chosen if not in_a_process(target, share_s)]
    print(f"broken: {', '.join(failed)}" if failed else "nothing broken", flush=True)
    return 1 if failed else 0


def examples(seconds: float) -> list[str]:
    """The tests of this directory with more examples, about so long."""
    count = max(200, int(seconds * EXAMPLES_PER_SECOND))
    variables = os.environ | {"M3_FUZZ_EXAMPLES": str(count), "M3_FUZZ_REQUESTS": str(max(50, count // 4))}
    started_s = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "pytest", "tests/fuzz"], env=variables, check=False)
    print(f"{count} examples per target: {time.monotonic() - started_s:.0f} s", flush=True)
    return [] if done.returncode == 0 else ["pytest tests/fuzz"]


def in_a_process(target: str, seconds: float) -> bool:
    """One target under atheris, which ends its process. True when nothing broke."""
    command = [sys.executable, "-m", "tests.fuzz", "--guided", target, "--seconds", f"{seconds:.0f}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    last = next((line for line in reversed(done.stdout.splitlines()) if line.startswith(("Done", "#"))), "")
    print(f"{target}: {'ok' if done.returncode == 0 else 'BROKEN'} {last}", flush=True)
    if done.returncode != 0:
        print(done.stdout[-4000:], flush=True)
        found = [path for path in DIRECTORY.glob(f"{target}-*") if path.is_file()]
        for path in found:
            print(f"again: python -m tests.fuzz --repeat {target} {path}", flush=True)
    return done.returncode == 0


def guided(target: str, seconds: float) -> int:
    """Runs in a process of its own: libFuzzer ends it."""
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["engine", "service"]):
        targets = importlib.import_module("tests.fuzz.targets")
    seeds = importlib.import_module("tests.fuzz.seeds").seeds(target)
    corpus = DIRECTORY / "corpus" / target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = DIRECTORY / f"{target}.dict"
    words.write_text("".join(f'"{word}"\n' for word in dictionary(seeds)))
    flags = [f"-max_total_time={seconds:.0f}", "-timeout=20", "-rss_limit_mb=3000", f"-dict={words}", "-max_len=20000"]
    prefix = f"-artifact_prefix={DIRECTORY}/{target}-"
    atheris.Setup([sys.argv[0], *flags, prefix, str(corpus)], targets.TARGETS[target])
    atheris.Fuzz()
    return 0


def dictionary(seeds: list[bytes]) -> list[str]:
    """The strings of JSON seeds, as words to insert."""
    words: set[str] = {"null", "true", "1e400", "-1", "18446744073709551616"}

    def collect(value: object) -> None:
        if isinstance(value, dict):
            words.update(value)
            for below in value.values():
                collect(below)
        elif isinstance(value, list):
            for below in value:
                collect(below)
        elif isinstance(value, str):
            words.add(value)

    for seed in seeds:
        try:
            collect(json.loads(seed))
        except ValueError:
            continue
    return sorted(word for word in words if word.isascii() and word.replace("_", "").replace("-", "").isalnum())


if __name__ == "__main__":
    sys.exit(main())
