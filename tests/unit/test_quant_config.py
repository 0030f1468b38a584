"""quantization_config of config.json: which weights it says are block-scaled, and what of it is refused."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from engine.config import ModelConfig, merge_overrides
from engine.errors import CheckpointError
from engine.quant_config import Format, QuantConfig
from tests.unit.test_config import flat, wrapped

LAYER = "model.layers.3."
MOE = LAYER + "block_sparse_moe."
SPEC = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1, "scale_format": "e8m0"}
# As MiniMaxAI/MiniMax-M3-MXFP8 has it, on four layers.
MXFP8: dict[str, Any] = {
    "quant_method": "mxfp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [1, 32],
    "ignored_layers": ["lm_head", "model.embed_tokens", "vision_tower", "multi_modal_projector", "patch_merge_mlp"]
    + [f"language_model.model.layers.{i}.block_sparse_moe.gate" for i in (1, 2, 3)],
}
# As AMD Quark writes it for experts alone.
QUARK: dict[str, Any] = {
    "quant_method": "quark",
    "global_quant_config": {
        "weight": {**SPEC, "is_dynamic": False, "observer_cls": "PerBlockMXObserver", "symmetric": None},
        "input_tensors": {**SPEC, "is_dynamic": True},
        "output_tensors": None,
        "bias": None,
    },
    "exclude": ["*lm_head", "re:.*vision_tower.*", "*self_attn*", "block_sparse_moe.gate", "shared_experts"]
    + [f"model.language_model.layers.{i}.mlp.{name}_proj" for i in range(4) for name in ("gate", "up", "down")],
    "export": {"weight_format": "real_quantized", "pack_method": "reorder", "kv_cache_group": []},
    "layer_quant_config": {},
    "layer_type_quant_config": {},
    "kv_cache_quant_config": {},
    "softmax_quant_spec": None,
    "algo_config": None,
    "quant_mode": "eager_mode",
    "version": "0.11",
}


def read(raw: dict[str, Any], **changes: Any) -> QuantConfig:
    config = QuantConfig.from_hf({**raw, **changes})
    assert config is not None
    return config


@pytest.mark.parametrize(
    ("name", "mxfp8", "quark"),
    [
        ("lm_head.weight", None, None),
        ("model.embed_tokens.weight", None, "mxfp4"),
        ("vision_tower.layers.0.fc1.weight", None, None),
        (LAYER + "self_attn.q_proj.weight", "mxfp8", None),
        (LAYER + "self_attn.index_k_proj.weight", "mxfp8", None),
        ("model.layers.0.mlp.gate_proj.weight", "mxfp8", None),
        (MOE + "gate.weight", None, None),
        (MOE + "experts.0.w1.weight", "mxfp8", "mxfp4"),
        (MOE + "experts.127.w2", "mxfp8", "mxfp4"),
        (MOE + "shared_experts.gate_proj.weight", "mxfp8", None),
    ],
)
def test_the_released_lists(name: str, mxfp8: Format | None, quark: Format | None) -> None:
    assert read(MXFP8).format_of(name) == mxfp8
    assert read(QUARK).format_of(name) == quark
    assert pickle.loads(pickle.dumps(read(QUARK))).format_of(name) == quark  # noqa: S301


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("q_proj", LAYER + "self_attn.q_proj", True),
        ("q_proj", LAYER + "self_attn.index_q_proj", False),
        ("self_attn", LAYER + "self_attn.o_proj", True),
        ("model.layers.3", LAYER + "self_attn.o_proj", True),
        ("model.layers.3", "model.layers.30.self_attn.o_proj", False),
        ("layers.3.self_attn", LAYER + "self_attn.o_proj", True),
        ("model.language_model.layers.3.self_attn.o_proj", LAYER + "self_attn.o_proj", True),
        ("language_model.lm_head", "lm_head", True),
        ("gate", MOE + "gate", True),
        ("gate", MOE + "shared_experts.gate_proj", False),
        # As transformers calls them in memory.
        ("model.language_model.layers.3.mlp.gate", MOE + "gate", True),
        ("model.layers.3.mlp.experts.7.gate_proj", MOE + "experts.7.w1", True),
        ("model.layers.3.mlp.experts.7.down_proj", MOE + "experts.7.w2", True),
        ("model.layers.3.mlp.experts.7.down_proj", MOE + "experts.7.w3", False),
        ("self_attn.indexer.k_proj", LAYER + "self_attn.index_k_proj", True),
        ("self_attn.indexer.k_proj", LAYER + "self_attn.k_proj", False),
        ("*self_attn", LAYER + "self_attn.k_proj", True),
        ("*.k_proj", LAYER + "self_attn.k_proj", True),
        ("k_proj*", LAYER + "self_attn.k_proj", False),
        ("*layers.[0-2].*", LAYER + "self_attn.k_proj", False),
        ("*layers.[1-3].*", LAYER + "self_attn.k_proj", True),
        ("re:.*k_proj", LAYER + "self_attn.k_proj", True),
        ("re:k_proj", LAYER + "self_attn.k_proj", False),
        (r"re:language_model\.model\.layers\.3\.", LAYER + "self_attn.k_proj", True),
    ],
)
def test_patterns(pattern: str, name: str, matches: bool) -> None:
    assert QuantConfig("mxfp8", exclude=(pattern,)).format_of(name) == (None if matches else "mxfp8")
    assert QuantConfig(None, layers=((pattern, "mxfp4"),)).format_of(name) == ("mxfp4" if matches else None)


def test_quark_by_layer() -> None:
    spec = {"weight": {"dtype": "mx", "mx_element_dtype": "fp4", "block_size": 32}}
    config = read(
        QUARK,
        global_quant_config=None,
        layer_quant_config={"*.experts.0.*": {"weight": None}, "*block_sparse_moe.experts": spec},
        exclude=["w2"],
    )
    found = [config.format_of(f"{MOE}experts.{name}") for name in ("0.w1", "1.w1", "1.w2")]
    assert found == [None, "mxfp4", None]
    assert config.format_of(LAYER + "self_attn.q_proj") is None


def test_what_means_the_same_is_read_the_same() -> None:
    plain = {"quant_method": "mxfp8", "ignored_layers": MXFP8["ignored_layers"]}
    assert read(MXFP8) == read(plain) == read(MXFP8, fmt="e4m3", scale_fmt="ue8m0", moe_quant_algo=None)
    names = plain.pop("ignored_layers")
    assert read(MXFP8) == read(plain, modules_to_not_convert=names)
    weight = QUARK["global_quant_config"]["weight"]
    assert read(QUARK) == read(QUARK, global_quant_config={"weight": [weight], "input_tensors": None})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("mxfp8", "must be an object"),
        ({}, "quant_method=None is not supported, only mxfp8, and quark"),
        ({"quant_method": "fp8"}, "quant_method='fp8' is not supported, only mxfp8, and quark with mxfp4 weights"),
        ({**MXFP8, "activation_scheme": "static"}, "activation_scheme='static' is not supported, only 'dynamic'"),
        ({**MXFP8, "weight_block_size": [128, 128]}, r"weight_block_size=\[128, 128\] is not supported"),
        ({**MXFP8, "scale_fmt": "float"}, "scale_fmt='float'"),
        ({**MXFP8, "moe_quant_algo": "NVFP4"}, "unknown key 'moe_quant_algo'='NVFP4'"),
        ({**MXFP8, "ignored_layers": "lm_head"}, "ignored_layers must be a list of module names"),
        ({**MXFP8, "ignored_layers": ["re:("]}, r"'re:\(' is not a regular expression"),
        ({**QUARK, "global_quant_config": None}, "names no weights"),
        ({**QUARK, "exclude": [1]}, "exclude must be a list"),
        ({**QUARK, "layer_quant_config": []}, "layer_quant_config must be an object"),
        ({**QUARK, "kv_cache_quant_config": {"*k_proj": SPEC}}, "unknown key 'kv_cache_quant_config'"),
        ({**QUARK, "export": {"weight_format": "fake_quantized"}}, "weight_format='fake_quantized'"),
    ],
)
def test_other_schemes_are_refused(raw: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^config\.json: quantization_config.*{message}"):
        QuantConfig.from_hf(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int4"}, "dtype='int4' is not supported, only 'fp4' or 'fp4_e2m1'"),
        ({"dtype": None}, "misses dtype"),
        ({"dtype": "mx"}, "misses mx_element_dtype"),
        ({"group_size": 16}, "group_size=16 is not supported, only 32"),
        ({"qscheme": "per_channel"}, "qscheme='per_channel'"),
        ({"scale_format": "e4m3"}, "scale_format='e4m3'"),
        ({"ch_axis": 0}, "ch_axis=0"),
        ({"is_dynamic": True}, "is_dynamic=True"),
    ],
)
@pytest.mark.parametrize("place", ["global_quant_config", "layer_quant_config.experts"])
def test_other_quark_weights_are_refused(change: dict[str, Any], message: str, place: str) -> None:
    config = {"weight": {**SPEC, **change}}
    key, _, layer = place.partition(".")
    with pytest.raises(CheckpointError, match=rf"{place}\.weight.*{message}"):
        read(QUARK, **{key: {layer: config} if layer else config})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"weight": [SPEC, SPEC]}, "weight must be one object"),
        ({"weight": SPEC, "input_tensors": {"is_dynamic": False}}, "input_tensors.is_dynamic=False"),
        ({"weight": SPEC, "output_tensors": SPEC}, "unknown key 'output_tensors'"),
        ({"weight": SPEC, "bias": SPEC}, "unknown key 'bias'"),
    ],
)
def test_other_quark_layers_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(QUARK, global_quant_config=config)


def test_it_stands_outside_or_inside_the_text_config() -> None:
    expected = read(MXFP8)
    inside = wrapped(flat(quantization_config=MXFP8))
    for config in (wrapped(quantization_config=MXFP8), inside, flat(quantization_config=MXFP8)):
        assert ModelConfig.from_hf(config).quantization == expected
    assert (
        ModelConfig.from_hf(wrapped(flat(quantization_config=None), quantization_config=MXFP8)).quantization == expected
    )
    assert ModelConfig.from_hf({**inside, "quantization_config": MXFP8}).quantization == expected
    assert ModelConfig.from_hf(wrapped()).quantization is None
    with pytest.raises(CheckpointError, match="quantization_config inside text_config differs"):
        ModelConfig.from_hf({**inside, "quantization_config": QUARK})


def test_overrides_mean_the_one_that_is_there() -> None:
    for config in (wrapped(quantization_config=MXFP8), flat(quantization_config=MXFP8)):
        changed = merge_overrides(config, {"quantization_config": {"ignored_layers": ["q_proj"]}})
        assert ModelConfig.from_hf(changed).quantization == QuantConfig("mxfp8", exclude=("q_proj",))
        assert ModelConfig.from_hf(merge_overrides(config, {"quantization_config": None})).quantization is None
        assert ModelConfig.from_hf(merge_overrides(config, {})).quantization == read(MXFP8)
