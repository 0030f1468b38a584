"""The directory in which the processes of a node share their series, and who in it still lives.

Every process that writes holds a file lock there for as long as it lives: the kernel gives it back whatever way the
process ends, and shows it across containers that share the directory, where process ids mean nothing. `fold` takes
what dead processes left: their counters and histograms go on in one archive, their gauges are gone.
"""

from __future__ import annotations

import fcntl
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_ARCHIVE = "archive"
_held: dict[Path, int] = {}  # directory -> descriptor; closed by the kernel when the process ends


def claim_from_environment() -> None:
    """Claim the directory that prometheus_client will write to, if there is one."""
    if directory := os.environ.get(VARIABLE):
        claim(Path(directory))


def claim(directory: Path) -> None:
    """Say that this process writes to `directory`, until it ends. To be called before its first series is made."""
    if directory in _held:
        return
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{os.getpid()}.lock"
    while True:
        # Not inherited by programs that this process starts: they would keep it alive.
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_same(descriptor, path):
            break
        os.close(descriptor)  # it was a dead process's with this id, and has been folded in the meantime
    for left in _files_of(directory, str(os.getpid())):
        if left.name.startswith("gauge_"):
            left.unlink()
    _held[directory] = descriptor


def fold(directory: Path) -> None:
    """Take the files of dead processes into the archive. One caller at a time: the exporter."""
    for owner in _owners(directory):
        with _grave(directory, owner) as is_dead:
            if is_dead:
                _bury(directory, owner)


def clear_if_dead(directory: Path) -> None:
    """Remove what an earlier life of the service left, unless a process of it still lives."""
    if not is_alive(directory):
        for path in (*directory.glob("*.db"), *directory.glob("*.lock")):
            path.unlink()


def is_alive(directory: Path) -> bool:
    """Whether some process that writes to the directory still lives."""
    for owner in _owners(directory):
        with _grave(directory, owner, remove=False) as is_dead:
            if not is_dead:
                return True
    return False


def _owners(directory: Path) -> list[str]:
    """Ids of the processes that wrote, or began to."""
    wrote = {path.stem.rpartition("_")[2] for path in directory.glob("*_*.db")}
    return sorted((wrote | {path.stem for path in directory.glob("*.lock")}) - {_ARCHIVE})


@contextmanager
def _grave(directory: Path, owner: str, *, remove: bool = True) -> Iterator[bool]:
    """Hold the lock of a process while its files are dealt with, and remove it then. Yields False if it lives."""
    path = directory / f"{owner}.lock"
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
        if remove:
            path.unlink()
    finally:
        os.close(descriptor)


def _bury(directory: Path, owner: str) -> None:
    for path in _files_of(directory, owner):
        kind = path.name.partition("_")[0]
        if kind != "gauge":
            _add_to_archive(path, directory / f"{kind}_{_ARCHIVE}.db")
        path.unlink()


def _add_to_archive(path: Path, archive: Path) -> None:
    """Make a new archive that holds the sums, and put it in the old one's place at once."""
    sums: defaultdict[str, float] = defaultdict(float)
    for source in (archive, path):
        if source.exists():
            for key, value, _, _ in MmapedDict.read_all_values_from_file(str(source)):
                sums[key] += value
    made = archive.with_suffix(".new")
    made.unlink(missing_ok=True)
    values = MmapedDict(str(made))
    for key, value in sums.items():
        values.write_value(key, value, 0.0)
    values.close()
    os.replace(made, archive)


def _files_of(directory: Path, owner: str) -> list[Path]:
    return sorted(directory.glob(f"*_{owner}.db"))


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
