"""What the aiter backend takes from AITER, how it finds it, and a whole model on it, over the references."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine import LLM, SamplingParams, collectives
from engine.config import EngineConfig, resolve_model
from engine.errors import ConfigError
from engine.kernels import aiter, api
from engine.kernels.batch import StepBatch
from engine.model.minimax_m3 import MiniMaxM3
from engine.model.weights import DummyWeights
from engine.parallel import TensorParallel
from tests.checkpoints import make_checkpoint
from tests.kernels.aiter.__main__ import main
from tests.kernels.aiter.binding import HEAD, bound
from tests.kernels.aiter.signatures import Source, load, parse, read_source
from tests.kernels.devices import ON_GPU, TARGET
from tests.kernels.reference import PAGE, random_step

pytestmark = pytest.mark.skipif(ON_GPU, reason="the references of AITER's functions run on CPU")

BF16 = torch.bfloat16
TAKEN = ["qk_norm_rope_insert", "attend_sparse"]


def without(path: str, keyword: str | None = None) -> Source:
    """HEAD without a function, or without one of its parameters."""
    functions = dict(HEAD.functions)
    if keyword is None:
        del functions[path]
    else:
        kept = [each for each in functions[path].split(", ") if each.partition("=")[0] != keyword]
        assert len(kept) == len(functions[path].split(", ")) - 1
        functions[path] = ", ".join(kept)
    return Source("a part of AITER", functions)


# --- what is taken -------------------------------------------------------------------------------------------------


def test_what_each_state_of_aiter_gives() -> None:
    wheel, head = (bound(load()[name])[0].report for name in ("wheel", "e4048607"))
    assert {operation: head[operation] for operation in TAKEN} == dict.fromkeys(TAKEN, "aiter")
    assert wheel["qk_norm_rope_insert"] == "triton (AITER has no fused_qknorm_idxrqknorm)"
    assert wheel["attend_sparse"] == "triton (AITER has no pa_decode_gluon)"
    for report in (wheel, head):
        left = {operation: how for operation, how in report.items() if operation not in (*TAKEN, "all_reduce")}
        assert left.keys() == aiter.LEFT_TO_TRITON.keys()
        assert all(how.startswith("triton (") for how in left.values())


def test_the_custom_all_reduce_of_each_state() -> None:
    """In the wheel and in later sources it takes what it is given by name."""
    for name in ("wheel", "03644e50"):
        kernels, _ = bound(load()[name])
        assert kernels.report["all_reduce"] == "aiter" and kernels.custom_reduce is not None
    kernels, _ = bound(HEAD)
    assert kernels.report["all_reduce"] == "torch.distributed (AITER has no CustomAllreduce)"
    assert kernels.custom_reduce is None


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sums_by_it(group_of_one: None) -> None:
    """It takes what it can sum, leaves its input alone, and the norm behind it is the backend's."""
    kernels, library = bound(load()["wheel"])
    found, reason = collectives.custom_reduce(kernels, max_bytes=4 * 64)
    assert found is not None and reason == ""
    assert library.calls == [(f"{aiter.REDUCE.module}.{aiter.REDUCE.name}", frozenset(aiter.REDUCE.keywords))]
    x, residual, gain = torch.randn(2, 32), torch.randn(2, 32), torch.rand(32)
    assert found.takes(x) and found.sample is None
    assert not found.takes(torch.zeros(3, 32)) and not found.takes(torch.zeros(2, 3)) and not found.takes(x.T)
    assert torch.equal(found.all_reduce(x), x) and found.all_reduce(x) is not x
    normed, total = found.add_rms_norm(x, residual, gain, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, kernels.rms_norm(total, gain, 1e-6))


@pytest.mark.parametrize("operation", TAKEN)
def test_a_missing_function_or_keyword_leaves_both_to_triton(operation: str) -> None:
    feature = aiter.FEATURES[operation]
    path = f"{feature.module}.{feature.name}"
    fallback = api.resolve("torch")
    for keyword in (None, *feature.keywords):
        kernels, library = bound(without(path, keyword))
        reason = f"AITER's {feature.name} has no {keyword}" if keyword else f"AITER has no {feature.name}"
        assert [kernels.report[name] for name in TAKEN] == [f"triton ({reason})"] * 2
        for name in ("qk_norm_rope_insert", "attend_sparse", "pack_gains", "shuffles"):
            assert getattr(kernels, name) is getattr(fallback, name)
        assert kernels.name == "aiter" and library.calls == []


def test_a_function_that_does_not_load_is_left_alone() -> None:
    def lookup(module: str, name: str) -> object:
        raise OSError("libamdhip64.so: cannot open shared object file")

    report = aiter.bind(lookup, api.resolve("torch"), TARGET).report
    expected = "triton (AITER's pa_decode_gluon does not load: libamdhip64.so: cannot open shared object file)"
    assert report["attend_sparse"] == expected


def test_signatures_are_read_from_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "aiter/ops/fused_qknorm_idxrqknorm.py"
    file.parent.mkdir(parents=True)
    path = "aiter.fused_qknorm_idxrqknorm"
    typed = HEAD.functions[path].replace("eps,", "eps: float,").replace("q_out=None", "q_out: Optional[Tensor] = None")
    file.write_text(f"import hip\n@compile_ops('x')\ndef fused_qknorm_idxrqknorm({typed}) -> None: ...\n")
    found = read_source(tmp_path)
    assert dict(found.functions) == {path: HEAD.functions[path]}
    assert found.signature(path) == HEAD.signature(path)
    assert main(["--source", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.split(f"{tmp_path}: ")[1]
    assert "qk_norm_rope_insert    triton (AITER has no pa_decode_gluon)" in printed
    with pytest.raises(SystemExit):
        main(["--source", str(tmp_path / "aiter")])


def test_parsed_parameters_bind_as_python_does() -> None:
    signature = parse("a, b=1, /, c='x', *rest, d, e=torch.bfloat16, **more")
    assert str(signature) == "(a, b=1, /, c='x', *rest, d, e='torch.bfloat16', **more)"
    with pytest.raises(TypeError, match="missing a required argument: 'd'"):
        signature.bind(1)


# --- finding it, and the whole engine ------------------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory whose packages can be imported during the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
        del sys.modules[name]


def write(directory: Path, name: str, text: str) -> None:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


LIKE_AITER = """
from tests.kernels.aiter.reference import Aiter
from tests.kernels.aiter.signatures import load
ActivationType = QuantType = dtypes = object()
reference = Aiter(load()["e4048607"])
"""


def write_reference_package(directory: Path) -> None:
    """A package `aiter` made of the references."""
    insert, attend = aiter.INSERT, aiter.ATTEND
    write(
        directory,
        "aiter/__init__.py",
        f"{LIKE_AITER}{insert.name} = reference.lookup('{insert.module}', '{insert.name}')",
    )
    for package in ("aiter/ops", "aiter/ops/triton", "aiter/ops/triton/gluon"):
        write(directory, f"{package}/__init__.py", "")
    write(
        directory,
        f"{attend.module.replace('.', '/')}.py",
        f"from aiter import reference\n{attend.name} = reference.lookup(__name__, '{attend.name}')",
    )


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (None, "needs AMD's AITER .*, which is not installed"),
        ("def aitercsv(): ...", "is not AMD's: it has no ActivationType, QuantType, dtypes. PyPI's aiter is another"),
        ("raise OSError('no libamdhip64.so')", "AITER does not import: OSError: no libamdhip64.so"),
        ("import a_module_that_is_not_there", "AITER does not import: ModuleNotFoundError: No module named"),
    ],
)
def test_packages_that_are_not_amds(
    packages: Path, package: str | None, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    if package is not None:
        write(packages, "aiter/__init__.py", package)
    with pytest.raises(ConfigError, match=f"backend=aiter.*{message}"):
        api.resolve("aiter")
    assert not aiter.is_usable()
    assert bool(caplog.records) == (package is not None), "backend=auto says why it leaves an installed package alone"


def test_amds_package_is_found(packages: Path) -> None:
    write_reference_package(packages)
    assert aiter.is_usable()
    kernels = api.resolve("aiter")
    assert kernels.name == "aiter" and [kernels.report[name] for name in TAKEN] == ["aiter"] * 2


def test_the_engine_reports_what_computes(packages: Path) -> None:
    write_reference_package(packages)
    model = make_checkpoint(
        packages / "model", seed=1, layers=4, hidden_size=32, heads=4, kv_heads=2, head_dim=16, rotary_dim=8,
        index_dim=16, topk_blocks=2, experts=4, expert_width=16, dense_width=32, shared_width=16, vocab_size=300,
    )  # fmt: skip
    fixed = {"dtype": "float32", "max_model_len": 256, "num_pages": 2, "max_num_seqs": 1}
    greedy = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    tokens = {}
    for backend in ("torch", "aiter"):
        with LLM(model, backend=backend, **fixed) as llm:
            tokens[backend] = llm.generate([[7, 8, 9]], greedy)[0].token_ids
            info = llm.info
    assert info.backend == "aiter" and tokens["aiter"] == tokens["torch"]
    assert info.kernels["attend_sparse"].endswith("these are float32, float32, float32)")
    assert sys.modules["aiter"].reference.calls == []


TABLE = torch.tensor([[5, 2, 7, 0], [1, 4, 0, 0]], dtype=torch.int32)  # two requests, on 8 pages


def step_of(rows: list[tuple[int, int, int]]) -> StepBatch:
    """rows: (request, tokens before, new tokens), decode rows first."""
    step = random_step([(before, new) for _, before, new in rows], heads=1, kv_heads=1, index_heads=1, dim=16, seed=0)
    table, batch = TABLE[[request for request, _, _ in rows]], step.batch
    pages = table[batch.row_ids, batch.positions // PAGE].long()
    return dataclasses.replace(batch, block_table=table, slot_mapping=pages * PAGE + batch.positions % PAGE)


def test_a_model_on_it(tmp_path: Path) -> None:
    """Dense, selecting and reusing layers; prefill in chunks, decode, and both in one step: as on the torch backend."""
    path = make_checkpoint(tmp_path, heads=4, kv_heads=2, head_dim=128, rotary_dim=64, index_dim=128, topk_blocks=2)
    config, knobs = resolve_model(EngineConfig(str(path), index_topk_pattern="FSF"))
    ours, library = bound()
    steps = [
        step_of([(0, 0, 200)]),
        step_of([(0, 200, 90), (1, 0, 40)]),
        step_of([(0, 290, 1), (1, 40, 100)]),
        step_of([(0, 291, 1), (1, 140, 1)]),
    ]
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(3, 500, (step.num_tokens,), generator=generator) for step in steps]
    hidden = {}
    for kernels in (api.resolve("torch"), ours):
        model = MiniMaxM3(
            config, knobs, DummyWeights(3, kernels.device), kernels, TensorParallel(), dtype=BF16, max_model_len=512,
            max_num_tokens=256, max_num_rows=2, audited=False,
        )  # fmt: skip
        model.cos_sin = model.cos_sin.to(BF16).float()
        model.allocate_pages(8)
        assert str(model.plan) == "DDFSF"
        assert [pages.shuffled for pages in model.pages] == [kernels is ours and role != "D" for role in "DDFSF"]
        with torch.inference_mode():
            hidden[kernels.name] = [model.forward(*each) for each in zip(tokens, steps, strict=True)]
    errors = []
    for found, expected in zip(hidden["aiter"], hidden["torch"], strict=True):
        errors.append((found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1))
        assert float(errors[-1].median()) < 0.02
    # All but tokens that a rounding sends to another expert; keys of another token or head would cost all of them more.
    assert float((torch.cat(errors) < 0.02).float().mean()) > 0.95
    inserts = sum(path.endswith("fused_qknorm_idxrqknorm") for path, _ in library.calls)
    decodes = sum(path.endswith("pa_decode_gluon") for path, _ in library.calls)
    assert (inserts, decodes) == (3 * 4, 3 * 2), "by sparse layers and steps"
