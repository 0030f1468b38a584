"""Strict loading: every tensor is used, or dropped for a stated reason; anything else is an error that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deploy.demo.writer import write_json, write_shards
from engine import LLM, SamplingParams
from engine.errors import CheckpointError, ConfigError
from tests.checkpoints import make_checkpoint

SHARDS = 2
INDEX = "model.safetensors.index.json"
LAYER = "language_model.model.layers.2."
MOE = LAYER + "block_sparse_moe."
SIZES: dict[str, Any] = {"layers": 5, "experts": 4, "vocab_size": 320}
PROMPT = list(range(40))


def load(path: Path, **settings: Any) -> LLM:
    fixed = {"dtype": "float32", "backend": "torch", "max_model_len": 1024, "num_pages": 8}
    return LLM(str(path), **{**fixed, "max_num_batched_tokens": 256, **settings})


def logprobs(path: Path, **settings: Any) -> list[Any]:
    llm = load(path, **settings)
    try:
        [output] = llm.generate([PROMPT], SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=0))
    finally:
        llm.close()
    assert output.prompt_logprobs is not None
    return [output.token_ids, output.prompt_logprobs]


def tensors_of(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def change_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    write_json(file, content)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", shards=SHARDS, **SIZES)


@pytest.fixture
def rewrite(checkpoint: Path) -> Callable[[Callable[[dict[str, Tensor]], object]], Path]:
    """Writes the checkpoint again after a change to its tensors."""

    def apply(change: Callable[[dict[str, Tensor]], object]) -> Path:
        tensors = tensors_of(checkpoint)
        change(tensors)
        write_shards(checkpoint, tensors, SHARDS)
        return checkpoint

    return apply


Rewrite = Callable[[Callable[[dict[str, Tensor]], object]], Path]


@pytest.mark.parametrize(
    "name",
    [
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.norm.weight",
        "language_model.model.layers.0.mlp.up_proj.weight",
        LAYER + "input_layernorm.weight",
        LAYER + "self_attn.v_proj.weight",
        LAYER + "self_attn.k_norm.weight",
        LAYER + "self_attn.index_q_proj.weight",
        LAYER + "self_attn.index_k_norm.weight",
        MOE + "gate.weight",
        MOE + "e_score_correction_bias",
        MOE + "experts.3.w2.weight",
        MOE + "shared_experts.down_proj.weight",
    ],
)
def test_a_missing_tensor_is_named(rewrite: Rewrite, name: str) -> None:
    path = rewrite(lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=name.removeprefix("language_model.")):
        load(path)


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.0.self_attn.index_q_proj.weight",  # of a dense layer
        "language_model.model.layers.5.input_layernorm.weight",  # beyond the last layer
        MOE + "experts.4.w1.weight",  # beyond the last expert
        LAYER + "self_attn.q_proj.bias",
        LAYER + "self_attn.index_v_proj.weight",
    ],
)
def test_an_extra_tensor_is_named(rewrite: Rewrite, name: str) -> None:
    path = rewrite(lambda tensors: tensors.update({name: torch.ones(4, 4)}))
    with pytest.raises(CheckpointError, match=name):
        load(path)


@pytest.mark.parametrize(
    "name",
    [
        "language_model.lm_head.weight",
        LAYER + "self_attn.q_norm.weight",
        LAYER + "self_attn.o_proj.weight",
        LAYER + "self_attn.index_k_proj.weight",
        MOE + "gate.weight",
        MOE + "experts.1.w3.weight",
    ],
)
def test_a_wrong_shape_is_named(rewrite: Rewrite, name: str) -> None:
    path = rewrite(lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(CheckpointError, match=name) as raised:
        load(path)
    assert "shape" in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_a_wrong_dtype_is_named(rewrite: Rewrite, dtype: torch.dtype) -> None:
    name = LAYER + "self_attn.k_proj.weight"
    path = rewrite(lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(CheckpointError, match=name) as raised:
        load(path)
    assert "dtype" in str(raised.value)


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_a_truncated_shard_is_named(checkpoint: Path, keep: int) -> None:
    shard = checkpoint / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=shard.name):
        load(checkpoint)


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    (checkpoint / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00001-of-00002"):
        load(checkpoint)


def test_an_index_that_places_a_tensor_elsewhere_is_refused(checkpoint: Path) -> None:
    name = "language_model.model.norm.weight"
    shards = {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}

    def move(index: dict[str, Any]) -> None:
        [index["weight_map"][name]] = shards - {index["weight_map"][name]}

    change_json(checkpoint / INDEX, move)
    with pytest.raises(CheckpointError, match=name):
        load(checkpoint)


def test_an_index_entry_without_a_tensor_is_refused(checkpoint: Path) -> None:
    file = "model-00001-of-00002.safetensors"
    change_json(checkpoint / INDEX, lambda index: index["weight_map"].update({"model.ghost.weight": file}))
    with pytest.raises(CheckpointError, match=r"model\.ghost\.weight"):
        load(checkpoint)


@pytest.mark.parametrize("file", ["../model-00001-of-00002.safetensors", "/etc/passwd"])
def test_an_index_cannot_point_outside_the_directory(checkpoint: Path, file: str) -> None:
    change_json(checkpoint / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": file}))
    with pytest.raises(CheckpointError, match=file):
        load(checkpoint)


@pytest.mark.parametrize("file", ["config.json", INDEX])
@pytest.mark.parametrize("content", ["", "{", "[]", '"x"'])
def test_broken_json_is_named(checkpoint: Path, file: str, content: str) -> None:
    (checkpoint / file).write_text(content)
    with pytest.raises(CheckpointError, match=file):
        load(checkpoint)


def test_a_directory_without_tensors_is_refused(checkpoint: Path) -> None:
    for file in [*checkpoint.glob("*.safetensors"), checkpoint / INDEX]:
        file.unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "silu"),
        ("scoring_func", "softmax"),
        ("qk_norm_type", "per_layer"),
        ("use_routing_bias", False),
        ("attention_output_gate", True),
        ("tie_word_embeddings", True),
    ],
)
def test_other_maths_is_refused(checkpoint: Path, key: str, value: object) -> None:
    change_json(checkpoint / "config.json", lambda config: config["text_config"].update({key: value}))
    with pytest.raises(CheckpointError, match=key):
        load(checkpoint)


@pytest.mark.parametrize(
    ("key", "value"),
    [("sparse_score_type", "lse"), ("sparse_block_size", 64), ("use_sparse_attention", False)],
)
def test_other_sparse_attention_is_refused(checkpoint: Path, key: str, value: object) -> None:
    def change(config: dict[str, Any]) -> None:
        config["text_config"]["sparse_attention_config"][key] = value

    change_json(checkpoint / "config.json", change)
    with pytest.raises(CheckpointError, match=key):
        load(checkpoint)


@pytest.mark.parametrize("key", ["rope_theta", "swiglu_alpha", "routed_scaling_factor", "rms_norm_eps"])
def test_a_missing_scalar_is_not_guessed(checkpoint: Path, key: str) -> None:
    change_json(checkpoint / "config.json", lambda config: config["text_config"].pop(key))
    with pytest.raises(CheckpointError, match=key):
        load(checkpoint)


def test_what_text_serving_drops_is_counted_by_reason(rewrite: Rewrite) -> None:
    mtp = "language_model.model.mtp.layers.0.eh_proj.weight"
    path = rewrite(lambda tensors: tensors.update({mtp: torch.ones(4, 4)}))
    names = tensors_of(path)
    llm = load(path)
    ledger = llm.info.ledger
    llm.close()
    text = sum(name.startswith("language_model.") for name in names)
    assert ledger["used"] == text - 1
    dropped = {reason: count for reason, count in ledger.items() if reason != "used"}
    assert sorted(dropped.values()) == [1, len(names) - text]
    assert any("vision" in reason for reason in dropped)
    assert any("multi-token prediction" in reason for reason in dropped)


@pytest.mark.parametrize(("reuse", "dropped"), [("lean", 4), ("audited", 0)])
def test_index_weights_of_reuse_layers(checkpoint: Path, reuse: str, dropped: int) -> None:
    """Layer 3 of DDFSF reuses: lean drops its four index tensors, audited keeps them."""
    llm = load(checkpoint, index_topk_freq=2, index_reuse=reuse)
    ledger, plan = llm.info.ledger, str(llm.plan)
    llm.close()
    assert plan == "DDFSF"
    assert sum(count for reason, count in ledger.items() if "reuse" in reason) == dropped


def test_a_lean_reuse_layer_needs_no_index_weights(rewrite: Rewrite) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "layers.3.self_attn.index_" in name]:
            del tensors[name]

    path = rewrite(drop)
    load(path, index_topk_freq=2).close()
    with pytest.raises(CheckpointError, match=r"layers\.3\.self_attn\.index_"):
        load(path, index_topk_freq=2, index_reuse="audited")


def test_an_illegal_plan_fails_before_tensors_are_read(checkpoint: Path) -> None:
    for shard in checkpoint.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(ConfigError, match="first sparse layer"):
        load(checkpoint, index_topk_pattern="SFF")


def test_all_layouts_hold_the_same_model(tmp_path: Path) -> None:
    wrapped = make_checkpoint(tmp_path / "vl", layout="vl", shards=3, **SIZES)
    flat = make_checkpoint(tmp_path / "flat", layout="flat", shards=1, **SIZES)
    expected = logprobs(wrapped)
    assert logprobs(flat) == expected

    (flat / INDEX).unlink()
    assert logprobs(flat) == expected, "one file without an index"

    resaved = {
        name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_", "lm_"): tensor
        for name, tensor in tensors_of(wrapped).items()
    }
    for shard in wrapped.glob("*.safetensors"):
        shard.unlink()
    write_shards(wrapped, resaved, 2)
    assert logprobs(wrapped) == expected, "names of a checkpoint that transformers saved again"


def test_the_router_keeps_full_precision(rewrite: Rewrite) -> None:
    """In bf16 compute too: rounding the router's weights to bf16 before loading changes what it computes."""
    exact = logprobs(rewrite(lambda tensors: None), dtype="bfloat16")

    def round_router(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("block_sparse_moe.gate.weight"):
                tensors[name] = tensors[name].bfloat16().float()

    assert logprobs(rewrite(round_router), dtype="bfloat16") != exact
