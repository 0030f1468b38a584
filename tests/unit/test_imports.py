"""Imports point one way, service -> engine -> model -> msa -> kernels, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("engine", "service")
    for path in sorted((ROOT / package).rglob("*.py"))
}
RAY_MODULES = {"engine.ray_executor", "engine.worker"}
TRANSPORT_MODULES = RAY_MODULES | {"engine.transport"}
NO_TORCH = (
    "engine",
    "engine.capacity",
    "engine.config",
    "engine.engine",
    "engine.errors",
    "engine.metrics",
    "engine.msa.plan",
    "engine.pages",
    "engine.scheduler",
    "engine.tokenizer",
    "engine.types",
    "engine.ray_executor",
    "service.app",
    "service.cli",
)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_of(tree: ast.AST) -> set[str]:
    """Modules that running this code imports, inside functions too; not what only a type checker sees."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative import: write the whole name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {node.module} | (names & MODULES.keys())
        elif is_type_checking(node):
            assert isinstance(node, ast.If)
            found |= imports_of(ast.Module(node.orelse, []))
        else:
            found |= imports_of(node)
    return found


@functools.cache
def imports(module: str) -> frozenset[str]:
    return frozenset(imports_of(ast.parse(MODULES[module].read_text(encoding="utf-8"))))


def closure(module: str) -> dict[str, str]:
    """Everything that importing a module of ours loads, as name -> who asks for it. Importing a.b.c loads a and a.b."""
    seen = {module: module}
    pending = [module]
    while pending:
        importer = pending.pop()
        for target in imports(importer) if importer in MODULES else ():
            parts = target.split(".")
            for name in (".".join(parts[: i + 1]) for i in range(len(parts))):
                if name not in seen:
                    seen[name] = importer
                    pending.append(name)
    return seen


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_walk_sees_the_code() -> None:
    """The rules below would hold for an empty graph."""
    assert len(MODULES) > 30
    assert "engine.msa.cache" in imports("engine.model.minimax_m3")
    assert {"torch", "engine.kernels.api"} <= closure("engine.runner").keys()
    assert closure("service.app").keys() >= {"service.ingress", "service.replica", "engine.ray_executor", "ray"}
    code = (
        "import a.b\nfrom engine.msa import plan\nif TYPE_CHECKING:\n import c\nelse:\n import d\ndef f():\n import e"
    )
    assert imports_of(ast.parse(code)) == {"a.b", "engine.msa", "engine.msa.plan", "d", "e"}


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("engine.kernels", ("engine.model", "engine.msa", "engine.runner", "engine.engine", "service")),
        ("engine.msa", ("engine.model", "engine.runner", "engine.engine", "engine.llm", "service")),
        ("engine.model", ("engine.runner", "engine.executor", "engine.engine", "engine.llm", "service")),
        ("engine", ("service",)),
    ],
)
def test_imports_point_down(package: str, forbidden: tuple[str, ...]) -> None:
    members = [module for module in MODULES if within(module, (package,))]
    assert members
    for module in members:
        wrong = {name: why for name, why in closure(module).items() if within(name, forbidden)}
        assert not wrong, f"{module} loads {wrong}"


def test_no_import_cycle() -> None:
    graph = {module: {name for name in imports(module) if name in MODULES} for module in MODULES}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the cycle
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("module", NO_TORCH)
def test_no_torch(module: str) -> None:
    loaded = closure(module)
    assert "torch" not in loaded, f"{loaded['torch']} imports torch"


@pytest.mark.parametrize(
    ("libraries", "allowed"),
    [
        (("ray",), RAY_MODULES),
        (("zmq", "msgspec"), TRANSPORT_MODULES),
        (("fastapi", "starlette", "pydantic", "prometheus_client", "transformers"), set()),
    ],
)
def test_engine_keeps_service_libraries_out(libraries: tuple[str, ...], allowed: set[str]) -> None:
    for module in MODULES:
        if within(module, ("engine",)) and module not in allowed:
            wrong = [name for name in imports(module) if within(name, libraries)]
            assert not wrong, f"{module} imports {wrong}"


def test_only_the_worker_group_and_the_offline_api_use_the_transport() -> None:
    """The offline API loads it when it needs more than one rank: see the process test below."""
    for module in sorted(TRANSPORT_MODULES):
        users = {user for user in MODULES if within(user, ("engine",)) and module in imports(user)}
        assert users <= TRANSPORT_MODULES | {"engine.llm"}


def test_the_index_cache_is_known_in_few_places() -> None:
    """The plan and the cache are made by the model and used by msa; others may hold them, not reason about them."""
    makers = {"engine.model.minimax_m3"}
    # The offline API shows both to its caller; the executor hands the cache up; `m3serve plan` prints the plan, and
    # the series tell it by layer.
    showers = {"engine", "engine.llm", "engine.executor", "service.serve_command", "service.series"}
    for module, path in MODULES.items():
        if within(module, ("engine.msa",)) or module in makers | showers:
            continue
        found = re.findall(r"\b(?:IndexPlan|IndexCache)\b", path.read_text(encoding="utf-8"))
        assert not found, f"{module} mentions {set(found)}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("service.ingress", ("torch", "transformers")),
        ("engine.engine", ("torch", "ray", "zmq", "msgspec", "fastapi", "prometheus_client")),
        ("engine.llm", ("ray", "zmq", "msgspec", "fastapi", "prometheus_client")),
        ("service.evaluation.__main__", ("torch", "ray", "zmq", "msgspec", "fastapi", "pydantic", "httpx")),
    ],
)
def test_process_loads_no_more_than_it_needs(module: str, absent: tuple[str, ...]) -> None:
    """The same seen from a real process, where libraries import each other too."""
    code = f"import sys, {module}; print(sorted(set({absent!r}) & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_nothing_runs_what_it_reads(module: str) -> None:
    """Neither a socket, nor a request, nor a checkpoint brings code along."""
    loads = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    assert not [name for name in imports(module) if within(name, tuple(loads))]
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            # An attribute of that name may be torch's `model.eval()`.
            assert called not in {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "torch.hub.load"}
            assert not [word.arg for word in node.keywords if word.arg in ("trust_remote_code", "shell")]
