"""The images, as far as that goes without Docker: their rules by text and hadolint, their install steps in an
environment of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy import install
from deploy.pins import LEFT_OUT, pins
from deploy.tools import ToolMissing, find

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "deploy").glob("Dockerfile.*"))
STEP_TIMEOUT_S = 300.0

each_dockerfile = pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)


def instructions(file: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined, comments gone."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in joined.splitlines() if line.strip()]


def test_there_are_two_images() -> None:
    assert [file.name for file in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.rocm"]


@each_dockerfile
def test_hadolint_finds_nothing(file: Path) -> None:
    try:
        hadolint = find("hadolint")
    except ToolMissing as error:
        pytest.skip(str(error))
    done = subprocess.run([hadolint, str(file)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@each_dockerfile
def test_the_rules_of_an_image(file: Path) -> None:
    found = instructions(file)
    names = [name for name, _ in found]
    last_stage = found[len(names) - 1 - names[::-1].index("FROM") :]
    text = " ".join(arguments for _, arguments in found)

    users = [arguments for name, arguments in last_stage if name == "USER"]
    assert users[-1] == "1000:1000", "numeric, for runAsNonRoot"
    after = [name for name, _ in last_stage[[n for n, _ in last_stage].index("USER") :]]
    assert "RUN" not in after and "COPY" not in after
    assert "ENTRYPOINT" not in names, "KubeRay's command would be its arguments"

    assert "ROCR_VISIBLE_DEVICES" not in text and "CUDA_VISIBLE_DEVICES" not in text
    assert "PROMETHEUS_MULTIPROC_DIR" not in text, "Ray's own processes would write there"
    assert re.search(r"apt-get install -y --no-install-recommends [^&]*\bwget\b", text)
    assert not re.search(r"(?i)(token|password|secret|api_key)\b *=", text)
    for label in ("title", "description", "version", "licenses"):
        assert f"org.opencontainers.image.{label}=" in text
    [base] = [arguments for name, arguments in found if name == "ARG" and arguments.startswith("BASE=")]
    tag = base.removeprefix("BASE=").partition("@")[0].partition(":")[2]
    assert re.search(r"\d+\.\d+", tag), "a version, not latest"
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert ("ARG", f"VERSION={version}") in found


def test_torch_of_the_images_is_one_that_the_project_takes_and_stays() -> None:
    [torch] = [Requirement(text) for text in install.dependencies() if text.startswith("torch")]
    cpu, rocm = (file.read_text() for file in DOCKERFILES)
    for found in (*re.findall(r"ARG TORCH=(\S+)", cpu), *re.findall(r"pytorch_release_([\d.]+)@", rocm)):
        assert found in torch.specifier
    for step in ("dependencies", "wheels --directory /wheels", "check"):
        assert f"install.py {step} --provided torch,triton" in rocm
    assert "install.py dependencies --provided torch --without triton" in cpu


def test_every_dependency_is_pinned_and_every_pin_is_allowed() -> None:
    """`python -m deploy.pins > deploy/constraints.txt` after a change of the dependencies."""
    lines = [line for line in install.CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    assert not pinned.keys() & LEFT_OUT
    for requirement in map(Requirement, install.dependencies()):
        name = canonicalize_name(requirement.name)
        if name not in LEFT_OUT:
            assert pinned[name] in requirement.specifier, name


def test_the_install_steps(tmp_path: Path) -> None:
    """What `docker build` runs, on what .dockerignore lets in, in an environment that sees this one's packages."""
    source = tmp_path / "src"
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line.startswith("!"):
            copy = shutil.copytree if (ROOT / line[1:]).is_dir() else shutil.copy
            source.mkdir(exist_ok=True)
            copy(ROOT / line[1:], source / line[1:])
    assert not (source / "tests").exists()

    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=STEP_TIMEOUT_S)
    python = venv / "bin" / "python"
    [site_packages] = venv.glob("lib/python*/site-packages")
    (site_packages / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # The versions that are there, so that nothing is downloaded.
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("".join(f"{name}=={found}\n" for name, found in pins().items()))
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "ROCR_VISIBLE_DEVICES")}

    def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=empty, env=environment | variables, capture_output=True, text=True,
            timeout=STEP_TIMEOUT_S, check=False,
        )  # fmt: skip

    def step(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return run(str(python), str(source / "deploy" / "install.py"), *arguments, **variables)

    for arguments in (
        ("dependencies", "--provided", "torch,triton", "--constraints", str(constraints)),
        ("wheels", "--directory", str(empty), "--provided", "torch,triton"),
        ("project",),
        ("check",),
    ):
        done = step(*arguments)
        assert done.returncode == 0, (arguments, done.stderr)
    shutil.rmtree(source / "engine")

    where = run(str(python), "-c", "import engine, service, deploy.demo; print(engine.__file__, service.__file__)")
    assert where.stdout.count(str(site_packages)) == 2, where.stderr
    assert run(str(venv / "bin" / "m3serve"), "--help").stdout.startswith("usage: m3serve")
    made = run(str(python), "-m", "deploy.demo.copy_checkpoint", "--out", str(tmp_path / "demo"))
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "demo" / "chat_template.jinja").is_file(), "the package holds its data"

    refused = step("check", ROCR_VISIBLE_DEVICES="0")
    assert refused.returncode == 1 and "ROCR_VISIBLE_DEVICES is set" in refused.stderr
    refused = step("dependencies", "--provided", "tensorflow")
    assert refused.returncode == 1 and "tensorflow should be provided" in refused.stderr
