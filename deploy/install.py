"""Installs m3serve into the Python that runs this; both images are made with it, and a test runs the same steps.

    python deploy/install.py dependencies --provided torch,triton
    python deploy/install.py wheels --directory /wheels --provided torch,triton
    python deploy/install.py project
    python deploy/install.py check --provided torch,triton

Needs nothing but Python 3.11 and pip: it runs before anything is installed. `--provided` names what the
environment brings with it, a torch for its GPUs above all: pip is not asked about it, since it would take another
build of the same name from PyPI. `--without` names what this kind of image does not use.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1]
CONSTRAINTS = SOURCE / "deploy" / "constraints.txt"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-cache-dir")
# What must work in an image, from a directory that holds no sources.
COMMANDS = (
    ("-m", "service.cli", "--help"),
    ("-m", "service.exporter", "--help"),
    ("-m", "deploy.demo.copy_checkpoint", "--help"),
    ("-c", "import service.app, service.serve_config"),
)
EXTRAS = ("traces",)


class InstallError(Exception):
    """The environment is not fit for m3serve; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Install m3serve, in an image or an environment.")
    parser.add_argument("step", choices=("dependencies", "wheels", "project", "check"))
    parser.add_argument("--provided", default="", metavar="NAME,NAME", help="packages that are there already")
    parser.add_argument("--without", default="", metavar="NAME,NAME", help="dependencies: packages to leave out")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="wheels: where they lie")
    parser.add_argument("--constraints", type=Path, default=CONSTRAINTS, metavar="FILE", help="versions to install")
    args = parser.parse_args(argv)
    provided, without = ([name for name in names.split(",") if name] for names in (args.provided, args.without))
    try:
        if args.step == "dependencies":
            install_dependencies(provided, without, args.constraints)
        elif args.step == "wheels":
            if args.directory is None:
                parser.error("wheels needs --directory")
            install_wheels(sorted(args.directory.glob("*.whl")), provided)
        elif args.step == "project":
            install_project()
        else:
            check(provided)
    except (InstallError, subprocess.CalledProcessError) as error:
        print(f"install: error: {error}", file=sys.stderr)
        return 1
    return 0


def install_dependencies(provided: Sequence[str], without: Sequence[str], constraints: Path) -> None:
    """Install what pyproject.toml asks for, in the versions of `constraints`, and leave `provided` as it is."""
    wanted = [text for text in dependencies() if _name(text) not in (*provided, *without)]
    _pip(wanted, provided, "-c", str(constraints))


def install_wheels(wheels: Sequence[Path], provided: Sequence[str]) -> None:
    """Install wheels that were built before, with what they depend on, and leave `provided` as it is."""
    if wheels:
        _pip([str(wheel) for wheel in wheels], provided)


def install_project() -> None:
    """Install the project itself; what it depends on is there."""
    subprocess.run([*PIP, "--no-deps", "--force-reinstall", str(SOURCE)], check=True)


def check(provided: Sequence[str]) -> None:
    """Raise InstallError unless the commands start from an empty directory, and Triton could compile."""
    if "ROCR_VISIBLE_DEVICES" in os.environ:
        raise InstallError("ROCR_VISIBLE_DEVICES is set in the image: Ray refuses to start; unset it")
    if "triton" in provided:
        # It builds its launchers when a kernel is first called.
        header = Path(sysconfig.get_path("include")) / "Python.h"
        if not any(map(shutil.which, ("cc", "gcc", "clang"))) or not header.is_file():
            raise InstallError(f"Triton needs a C compiler (cc, gcc or clang on PATH) and {header}")
    with tempfile.TemporaryDirectory() as empty:
        for command in COMMANDS:
            done = subprocess.run([sys.executable, *command], cwd=empty, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise InstallError(f"python {' '.join(command)} failed: {done.stderr[-1000:]}")


def dependencies() -> list[str]:
    """The requirements of the project, and of the extras that an image cannot get later."""
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: list[str] = project["dependencies"]
    return found + [text for extra in EXTRAS for text in project["optional-dependencies"][extra]]


def _pip(wanted: Sequence[str], provided: Sequence[str], *options: str) -> None:
    """Install `wanted`; whatever asks for another version of a `provided` package makes pip fail."""
    with tempfile.TemporaryDirectory() as directory:
        kept = Path(directory) / "provided.txt"
        kept.write_text("".join(f"{name}=={found}\n" for name, found in map(_installed, provided)))
        subprocess.run([*PIP, *options, "-c", str(kept), *wanted], check=True)


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
    assert found is not None, requirement
    return found.group().lower()


def _installed(name: str) -> tuple[str, str]:
    """An installed package and its version; Triton's may have one of the names of ROCm's builds."""
    for alias in (name, f"{name}-rocm", f"pytorch-{name}-rocm"):
        try:
            return alias, version(alias)
        except PackageNotFoundError:
            continue
    raise InstallError(f"{name} should be provided, but it is not installed")


if __name__ == "__main__":
    sys.exit(main())
