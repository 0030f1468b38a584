"""MXFP8 and MXFP4 checkpoints: the same model as the plain checkpoint of what their codes stand for, or an error."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import LLM, SamplingParams
from engine.config import EngineConfig, resolve_model
from engine.errors import CheckpointError, ConfigError
from engine.kernels.api import KernelSet, resolve
from engine.kernels.params import MXWeight, Weight
from engine.kernels.torch_mx import dequantise, quantise
from engine.model.minimax_m3 import MiniMaxM3
from engine.model.quant import view
from engine.model.shards import Shards
from engine.model.weights import CheckpointWeights, DummyWeights, WeightSource
from engine.parallel import TensorParallel
from engine.quant_config import FORMATS, Format
from tests.mx_checkpoints import (
    Naming,
    change_config,
    is_quantised,
    make_dequantised,
    make_mx_checkpoint,
    rewrite,
    tensors_of,
)

KINDS: list[Format] = ["mxfp8", "mxfp4"]
PROMPT = list(range(40))
LAYER = "language_model.model.layers.2."
MOE = LAYER + "block_sparse_moe."
EXPERT = MOE + "experts.3.w2"
CPU = torch.device("cpu")
Change = Callable[[dict[str, Tensor]], object]


def load(path: Path, **settings: Any) -> LLM:
    fixed = {"dtype": "float32", "backend": "torch", "max_model_len": 1024, "num_pages": 8}
    return LLM(str(path), **{**fixed, "max_num_batched_tokens": 256, **settings})


def logprobs(path: Path, **settings: Any) -> list[Any]:
    llm = load(path, **settings)
    try:
        [output] = llm.generate([PROMPT], SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=0))
    finally:
        llm.close()
    return [output.token_ids, output.prompt_logprobs]


def build(path: Path, weights: WeightSource, kernels: KernelSet, rank: int = 0, size: int = 1) -> MiniMaxM3:
    config, knobs = resolve_model(EngineConfig(model=str(path)))
    return MiniMaxM3(
        config, knobs, weights, kernels, TensorParallel(rank, size), dtype=torch.bfloat16, max_model_len=256,
        max_num_tokens=128, max_num_rows=4, audited=False,
    )  # fmt: skip


def bare_kernels(*, mx: bool) -> KernelSet:
    """Packing leaves weights as they are. mx: block-scaled ones too, as for a backend that multiplies them."""

    def keep(*weights: Weight) -> Any:
        return weights if len(weights) > 1 else weights[0]

    return replace(resolve("torch"), pack_linear=keep, pack_experts=keep, mx_formats=FORMATS if mx else frozenset())


def load_rank(path: Path, rank: int, size: int, *, mx: bool) -> MiniMaxM3:
    quant = resolve_model(EngineConfig(model=str(path)))[0].quantization
    shards = Shards(path)
    try:
        return build(path, CheckpointWeights(shards, quant, CPU, shards), bare_kernels(mx=mx), rank, size)
    finally:
        shards.close()


def packed_weights(model: MiniMaxM3) -> Iterator[tuple[str, Weight]]:
    """Every packed weight of the model, by where it is; the shared expert apart, wherever it runs."""
    yield "lm_head", model.lm_head
    for i, layer in enumerate(model.layers):
        yield f"{i}.qkv", layer.attention.qkv
        yield f"{i}.o_proj", layer.attention.o_proj
        block: Any = layer.feed_forward
        if hasattr(block, "experts"):
            w13, w2 = block.experts
            experts = slice(block.gate.shape[0])
            yield f"{i}.w13", view(w13, experts)
            yield f"{i}.w2", view(w2, experts)
            if block.shared is None:
                yield f"{i}.shared.gate_up", view(w13, experts.stop)
                yield f"{i}.shared.down", view(w2, experts.stop)
                continue
        name, block = (f"{i}.shared", block.shared) if hasattr(block, "experts") else (f"{i}.dense", block)
        yield f"{name}.gate_up", block.gate_up
        yield f"{name}.down", block.down


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Format, Path, Path]:
    """A format, a checkpoint of it, and the plain one of the same weights."""
    directory = tmp_path_factory.mktemp(request.param)
    path = make_mx_checkpoint(directory / "mx", request.param)
    return request.param, path, make_dequantised(path, directory / "plain")


# --- the same model ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_computes_what_its_codes_stand_for(pair: tuple[Format, Path, Path], dtype: str, tmp_path: Path) -> None:
    kind, path, plain = pair
    if (kind, dtype) == ("mxfp4", "bfloat16"):
        # A plain shared expert runs among plain experts, but not among MXFP4 ones, where its result is rounded on its
        # own. One of another width never does.
        path = make_mx_checkpoint(tmp_path / "mx", kind, shared_width=96)
        plain = make_dequantised(path, tmp_path / "plain")
    assert logprobs(path, dtype=dtype) == logprobs(plain, dtype=dtype)


def test_only_what_is_released_quantised_is(pair: tuple[Format, Path, Path]) -> None:
    kind, path, _ = pair
    found = {name for name, weight in packed_weights(load_rank(path, 0, 1, mx=True)) if isinstance(weight, MXWeight)}
    experts = {f"{i}.{name}" for i in (2, 3) for name in ("w13", "w2")}
    linears = {f"{i}.{name}" for i in range(4) for name in ("qkv", "o_proj")}
    mlps = {f"{name}.{part}" for name in ("0.dense", "1.dense", "2.shared", "3.shared") for part in ("gate_up", "down")}
    assert found == (experts if kind == "mxfp4" else experts | linears | mlps)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_rank_holds_its_part(pair: tuple[Format, Path, Path], size: int) -> None:
    """What a rank holds as stored stands for the part of the plain weight that it would hold."""
    kind, path, plain = pair
    for rank in range(size):
        expected = dict(packed_weights(load_rank(plain, rank, size, mx=True)))
        kept = dict(packed_weights(load_rank(path, rank, size, mx=True)))
        converted = dict(packed_weights(load_rank(path, rank, size, mx=False)))
        assert expected.keys() == kept.keys() == converted.keys()
        for name, weight in expected.items():
            held = kept[name]
            held = dequantise(held, torch.bfloat16) if isinstance(held, MXWeight) else held
            assert torch.equal(held, weight), (rank, name)
            assert torch.equal(converted[name], weight), (rank, name)
    assert any(isinstance(weight, MXWeight) and weight.format == kind for weight in kept.values())


def test_a_layout_without_the_wrapper(tmp_path: Path) -> None:
    for kind in KINDS:
        path = make_mx_checkpoint(tmp_path / kind, kind, layout="flat")
        assert logprobs(path) == logprobs(make_dequantised(path, tmp_path / f"{kind}-plain"))


def test_names_that_other_quantisers_write(pair: tuple[Format, Path, Path], tmp_path: Path) -> None:
    kind, _, plain = pair
    expected = logprobs(plain)
    spellings = [
        Naming(scales=".weight_scale"),
        Naming(scales=".scale", scale_dtype=torch.float8_e8m0fnu),
        Naming(values=".weight_packed", scales=".weight_scale_inv", expert_projections=True),
    ]
    for i, naming in enumerate(spellings):
        path = make_mx_checkpoint(tmp_path / str(i), kind, naming=naming)
        assert logprobs(path) == expected, naming
        resaved = {"language_model.model.": "model.language_model.", "language_model.lm_": "lm_"}

        def resave(tensors: dict[str, Tensor], names: dict[str, str] = resaved) -> None:
            for name in list(tensors):
                for ours, theirs in names.items():
                    if name.startswith(ours):
                        tensors[theirs + name.removeprefix(ours)] = tensors.pop(name)

        rewrite(path, resave)
        assert logprobs(path) == expected, f"{naming}, names of a checkpoint that transformers saved again"


def test_a_shared_expert_of_its_own_format(pair: tuple[Format, Path, Path], tmp_path: Path) -> None:
    """A plain one runs beside block-scaled experts (MXFP4 as released), an MXFP4 one among them."""
    kind, path, plain = pair
    names = [name for name in tensors_of(plain) if ".shared_experts." in name]

    def swap(tensors: dict[str, Tensor]) -> None:
        for name in names:
            base = name.removesuffix(".weight")
            if kind == "mxfp8":
                tensors.pop(f"{base}.weight_scale_inv")
                tensors[name] = tensors_of(plain)[name]
            else:
                weight = quantise(tensors[name], kind)
                tensors[name], tensors[f"{base}.weight_scale"] = weight.values, weight.scales

    def list_them(config: dict[str, Any]) -> None:
        if kind == "mxfp8":
            config["ignored_layers"].append("shared_experts")
        else:
            config["exclude"] = [name for name in config["exclude"] if "shared_experts" not in name]

    other = tmp_path / "other"
    make_mx_checkpoint(other, kind)
    rewrite(other, swap)
    change_config(other, list_them)
    assert logprobs(other) == logprobs(make_dequantised(other, tmp_path / "plain"))
    fused = {name: layer.shared is None for name, layer in (("as released", moe(path)), ("swapped", moe(other)))}
    assert fused == {"as released": kind == "mxfp8", "swapped": kind == "mxfp4"}


def moe(path: Path) -> Any:
    return load_rank(path, 0, 1, mx=True).layers[2].feed_forward


# --- the ledger ---


def test_every_tensor_is_accounted_for(pair: tuple[Format, Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    kind, path, _ = pair
    tensors = tensors_of(path)
    text = {name: tensor for name, tensor in tensors.items() if name.startswith("language_model.")}
    scales = [name for name in text if "_scale" in name]
    with caplog.at_level(logging.INFO, "engine.runner"):
        llm = load(path)
    ledger, weight_bytes = llm.info.ledger, llm.info.weight_bytes
    llm.close()
    assert f"backend torch multiplies no {kind} weights: they become torch.float32" in caplog.text
    assert ledger["used"] == len(text) and ledger[f"of these {kind}"] == 2 * len(scales) > 0
    assert sum(count for what, count in ledger.items() if "dropped" in what) == len(tensors) - len(text)
    packed = sum(text[name].nbytes for name in text if "_scale" in name or is_quantised(kind, name))
    plain = sum(text[name].numel() for name in text if "_scale" not in name and not is_quantised(kind, name))
    assert weight_bytes == packed + 4 * plain, "codes and scales as stored, the others in float32"


def test_reuse_layers_drop_scales_too(pair: tuple[Format, Path, Path]) -> None:
    kind, path, _ = pair
    llm = load(path, index_topk_freq=2)
    ledger, plan = llm.info.ledger, str(llm.plan)
    llm.close()
    assert plan == "DDFS"
    assert ledger["dropped: index weights of a reuse layer"] == (6 if kind == "mxfp8" else 4)


# --- what is refused ---


def scale(kind: Format, name: str) -> str:
    return name + (".weight_scale_inv" if kind == "mxfp8" else ".weight_scale")


def nan_scale(name: str) -> Change:
    return lambda tensors: tensors[name].view(-1)[5:6].fill_(255)


def as_dtype(name: str, dtype: torch.dtype) -> Change:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


@pytest.mark.parametrize("kind", KINDS)
def test_broken_tensors_are_named(tmp_path: Path, kind: Format) -> None:
    scales, values = scale(kind, EXPERT), EXPERT + ".weight"
    plain = LAYER + "input_layernorm.weight"
    rows, columns = 64, 128
    changes: list[tuple[Change, str, str]] = [
        (lambda tensors: tensors.pop(scales), values, "misses its scales"),
        (lambda tensors: tensors.pop(values), values, "misses"),
        (
            lambda tensors: tensors.update({scales: tensors[scales][:, :-1]}),
            scales,
            f"expected .{rows}, {columns // 32}",
        ),
        (lambda tensors: tensors.update({scales: tensors[scales][:-1]}), scales, "has shape"),
        (lambda tensors: tensors.update({values: tensors[values][:, :-2]}), values, "has shape"),
        (as_dtype(scales, torch.float32), scales, "dtype F32, expected one of F8_E8M0, U8"),
        (as_dtype(values, torch.bfloat16), values, f"dtype BF16, which is not quantised, but .* it is {kind}"),
        (as_dtype(values, torch.int8), values, "has dtype I8"),
        (nan_scale(scales), scales, "e8m0 code 255, which is NaN"),
        (lambda tensors: tensors.update({scale(kind, MOE + "gate"): torch.ones(4, 2)}), MOE + "gate", "has the scales"),
        (lambda tensors: tensors.update({scale(kind, LAYER + "ghost"): torch.ones(4, 2)}), LAYER + "ghost", "no place"),
        (lambda tensors: tensors.update({EXPERT + ".scale": tensors[scales].clone()}), EXPERT, "is there twice"),
        (lambda tensors: tensors.update({plain: torch.ones(64, dtype=torch.uint8)}), plain, "has dtype U8"),
        (
            lambda tensors: tensors.update({MOE + "gate.weight": torch.ones(4, 64, dtype=torch.float8_e4m3fn)}),
            MOE + "gate.weight",
            "dtype F8_E4M3, expected one of BF16",
        ),
    ]
    path = make_mx_checkpoint(tmp_path / "model", kind, shards=1)
    whole = tensors_of(path)
    for change, name, message in changes:
        rewrite(path, lambda tensors: (tensors.clear(), tensors.update({n: t.clone() for n, t in whole.items()})))
        rewrite(path, change)
        with pytest.raises(CheckpointError, match=message) as raised:
            load_rank(path, 0, 1, mx=True)
        assert name.removeprefix("language_model.") in str(raised.value)


def make_plain(tensors: dict[str, Tensor], *modules: str) -> None:
    for module in modules:
        values = tensors.pop(module + ".weight")
        tensors.pop(module + ".weight_scale_inv")
        tensors[module + ".weight"] = torch.zeros(values.shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("plain", "ours", "theirs"),
    [
        (["self_attn.q_proj", "self_attn.k_proj"], "v_proj.weight", "q_proj.weight"),
        (["self_attn.index_k_proj"], "index_k_proj.weight", "self_attn.q_proj.weight"),
        (["block_sparse_moe.shared_experts.up_proj"], "up_proj.weight", "gate_proj.weight"),
        (["block_sparse_moe.experts.1.w3"], "experts.1.w3", "experts.0.w1"),
        ([f"block_sparse_moe.experts.{i}.w2" for i in range(4)], "experts.0.w2", "experts.0.w1"),
    ],
)
def test_parts_that_are_packed_must_agree(tmp_path: Path, plain: list[str], ours: str, theirs: str) -> None:
    """Two of three ignored parts are as wrong as one."""
    path = make_mx_checkpoint(tmp_path / "model", "mxfp8")
    modules = [LAYER + name for name in plain]
    rewrite(path, lambda tensors: make_plain(tensors, *modules))
    change_config(path, lambda config: config["ignored_layers"].extend(modules))
    with pytest.raises(CheckpointError, match="stored in one format") as raised:
        load_rank(path, 0, 1, mx=True)
    assert ours in str(raised.value) and theirs in str(raised.value)


def test_config_and_tensors_must_agree(pair: tuple[Format, Path, Path], tmp_path: Path) -> None:
    kind, source, plain = pair
    path = make_mx_checkpoint(tmp_path / "model", kind)
    list_name = "ignored_layers" if kind == "mxfp8" else "exclude"
    name = f"{MOE}experts.0.w1.weight"
    change_config(path, lambda config: config[list_name].append("*.experts.0.w1"))
    with pytest.raises(CheckpointError, match=f"{name} .* is {kind}, but by quantization_config .* not quantised"):
        load(path)
    overrides = {"quantization_config": json.loads((source / "config.json").read_text())["quantization_config"]}
    expected = logprobs(plain)
    assert logprobs(path, hf_overrides=overrides) == expected, "an override corrects it"
    patterns = overrides["quantization_config"][list_name]
    part = {"quantization_config": {list_name: patterns}}
    assert logprobs(path, hf_overrides=part) == expected, "a part of it merges with what config.json has"
    with pytest.raises(CheckpointError, match=r"config\.json has no quantization_config"):
        load(path, hf_overrides={"quantization_config": None})


def test_groups_are_not_split_over_ranks(tmp_path: Path) -> None:
    path = make_mx_checkpoint(tmp_path / "model", "mxfp4", expert_width=64, shared_width=64)
    load_rank(path, 1, 2, mx=True)
    with pytest.raises(ConfigError, match="choose a smaller tensor_parallel_size"):
        load_rank(path, 1, 4, mx=True)
    path = make_mx_checkpoint(tmp_path / "odd", "mxfp8", layers=3)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight has 48 columns"):
        build_dummy(path, {"hidden_size": 48})


# --- random weights ---


def build_dummy(path: Path, overrides: dict[str, Any], rank: int = 0, size: int = 1, *, mx: bool = True) -> MiniMaxM3:
    config, knobs = resolve_model(EngineConfig(model=str(path), hf_overrides=overrides))
    return MiniMaxM3(
        config, knobs, DummyWeights(7, CPU, config.quantization), bare_kernels(mx=mx), TensorParallel(rank, size),
        dtype=torch.bfloat16, max_model_len=256, max_num_tokens=128, max_num_rows=4, audited=False,
    )  # fmt: skip


def test_random_weights_are_the_plain_ones_rounded(pair: tuple[Format, Path, Path]) -> None:
    kind, path, _ = pair
    plain = dict(packed_weights(build_dummy(path, {"quantization_config": None})))
    whole = build_dummy(path, {})
    weights = dict(packed_weights(whole))
    assert weights.keys() == plain.keys()
    for name, weight in weights.items():
        if isinstance(weight, MXWeight):
            error = (dequantise(weight, torch.float32) - plain[name].float()).abs().max() / plain[name].abs().max()
            assert 0 < error < (0.13 if kind == "mxfp8" else 0.26), name
        else:
            assert torch.equal(weight, plain[name]), name
    half = [dict(packed_weights(build_dummy(path, {}, rank, 2))) for rank in range(2)]
    for name in ("2.w2", "3.w2"):
        parts = [dequantise(part[name], torch.float32) for part in half]
        assert torch.equal(torch.cat(parts, -1), dequantise(weights[name], torch.float32))
    used = sum(weight.nbytes for weight in weights.values())
    assert whole.weight_bytes > used and whole.ledger["random"] > 0


def test_random_weights_run(pair: tuple[Format, Path, Path]) -> None:
    """A plain checkpoint's config serves with random weights of any format."""
    _, path, plain = pair
    quantization = json.loads((path / "config.json").read_text())["quantization_config"]
    overrides = {"quantization_config": quantization}
    ours = logprobs(plain, load_format="dummy", hf_overrides=overrides)
    assert ours == logprobs(path, load_format="dummy") != logprobs(plain, load_format="dummy")
