"""config.json read strictly, overrides, and the engine's settings: each wrong value is refused by name."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig, ModelConfig, index_knobs, merge_overrides, read_json, resolve_model
from engine.errors import CheckpointError, ConfigError
from engine.msa.plan import KNOBS, IndexKnobs

HUGE = 10**400  # no float holds it

# The text config of MiniMax-M3 as released, on four layers.
TEXT: dict[str, Any] = {
    "architectures": ["MiniMaxM3SparseForCausalLM"],
    "model_type": "",
    "hidden_size": 6144,
    "num_hidden_layers": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 200064,
    "intermediate_size": 3072,
    "dense_intermediate_size": 12288,
    "shared_intermediate_size": 3072,
    "n_shared_experts": 1,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "routed_scaling_factor": 2.0,
    "moe_layer_freq": [0, 1, 1, 1],
    "hidden_act": "swigluoai",
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "rms_norm_eps": 1e-6,
    "use_gemma_norm": True,
    "attention_output_gate": False,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "partial_rotary_factor": 0.5,
    "use_qk_norm": True,
    "qk_norm_type": "per_head",
    "tie_word_embeddings": False,
    "max_position_embeddings": 1048576,
    "num_mtp_modules": 1,
    "bos_token_id": 200034,
    "eos_token_id": 200020,
    "torch_dtype": "bfloat16",
    "sparse_attention_config": {
        "use_sparse_attention": True,
        "sparse_index_dim": 128,
        "sparse_num_index_heads": 4,
        "sparse_topk_blocks": 16,
        "sparse_block_size": 128,
        "sparse_score_type": "max",
        "sparse_init_block": 0,
        "sparse_local_block": 1,
        "sparse_attention_freq": [0, 1, 1, 1],
        "sparse_disable_index_value": [0, 1, 1, 1],
    },
}
FLOATS = ("routed_scaling_factor", "swiglu_alpha", "swiglu_limit", "rms_norm_eps", "rope_theta")
SIZES = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "dense_intermediate_size",
    "shared_intermediate_size",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
]
FIXED = {
    "hidden_act": "silu",
    "use_gemma_norm": False,
    "use_qk_norm": False,
    "qk_norm_type": "per_layer",
    "scoring_func": "softmax",
    "use_routing_bias": False,
    "n_shared_experts": 2,
    "tie_word_embeddings": True,
}
# The released file may lack these.
OPTIONAL = {
    "architectures", "model_type", "attention_output_gate", "num_mtp_modules", "bos_token_id", "eos_token_id",
    "torch_dtype",
}  # fmt: skip


def flat(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(TEXT) | changes


def sparse(**changes: Any) -> dict[str, Any]:
    return flat(sparse_attention_config=TEXT["sparse_attention_config"] | changes)


def wrapped(text: dict[str, Any] | None = None, **outer: Any) -> dict[str, Any]:
    """The vision-language layout."""
    return {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        "torch_dtype": "bfloat16",
        "image_token_index": 200025,
        "vision_config": {"hidden_size": 1280, "rope_theta": 10000.0},
        "text_config": flat() if text is None else text,
    } | outer


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != key}


def refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_hf(config)


# --- the released layouts ---


def test_flat_and_wrapped_configs_read_the_same() -> None:
    model = ModelConfig.from_hf(flat())
    assert model == ModelConfig.from_hf(wrapped())
    assert model.is_sparse == model.is_moe == (False, True, True, True)
    assert (model.rotary_dim, model.swiglu_beta, model.rope_theta) == (64, 1.0, 5e6)
    assert (model.topk_blocks, model.init_blocks, model.local_blocks, model.index_dim) == (16, 0, 1, 128)
    assert (model.eos_token_ids, model.bos_token_id, model.torch_dtype) == ((200020,), 200034, "bfloat16")


def test_text_keys_win_over_the_wrapper() -> None:
    outer = {"eos_token_id": 7, "bos_token_id": 8, "torch_dtype": "float32", "tie_word_embeddings": False}
    assert ModelConfig.from_hf(wrapped(**outer)) == ModelConfig.from_hf(flat())
    bare = without(without(without(flat(), "eos_token_id"), "bos_token_id"), "torch_dtype")
    model = ModelConfig.from_hf(wrapped(without(bare, "tie_word_embeddings"), **outer, dtype=None))
    assert (model.eos_token_ids, model.bos_token_id, model.torch_dtype) == ((7,), 8, "float32")
    assert ModelConfig.from_hf(wrapped(bare, torch_dtype=None, dtype="float32")).torch_dtype == "float32"


def test_several_end_tokens() -> None:
    assert ModelConfig.from_hf(flat(eos_token_id=[5, 6])).eos_token_ids == (5, 6)
    assert ModelConfig.from_hf(flat(eos_token_id=None, bos_token_id=None)).eos_token_ids == ()


def test_rotary_dim_from_the_factor_alone() -> None:
    assert ModelConfig.from_hf(without(flat(partial_rotary_factor=0.25), "rotary_dim")).rotary_dim == 32


def test_swiglu_beta_may_be_given() -> None:
    assert ModelConfig.from_hf(flat(swiglu_beta=0.5)).swiglu_beta == 0.5
    refused(flat(swiglu_beta="1"), "swiglu_beta must be a positive float, got '1'")


def test_nulls_are_not_set() -> None:
    assert ModelConfig.from_hf(flat(anything=None, attention_bias=None, rope_scaling=None)) == ModelConfig.from_hf(
        flat()
    )


# --- wrong keys ---


@pytest.mark.parametrize("key", sorted(TEXT.keys() - OPTIONAL - {"rotary_dim", "partial_rotary_factor"}))
def test_every_key_is_needed(key: str) -> None:
    refused(without(flat(), key), f"config.json misses {key}")
    refused(flat(**{key: None}), f"config.json misses {key}")
    refused(wrapped(without(flat(), key)), f"config.json misses {key}")


@pytest.mark.parametrize("key", sorted(OPTIONAL))
def test_these_keys_may_be_absent(key: str) -> None:
    assert ModelConfig.from_hf(without(flat(), key)).hidden_size == 6144


def test_one_of_the_rotary_keys_is_needed() -> None:
    refused(without(without(flat(), "rotary_dim"), "partial_rotary_factor"), "misses rotary_dim")


@pytest.mark.parametrize("key", sorted(TEXT["sparse_attention_config"]))
def test_every_sparse_key_is_needed(key: str) -> None:
    config = flat(sparse_attention_config=without(TEXT["sparse_attention_config"], key))
    refused(config, key)


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", ["8", 8.0, True, 0, -8, math.nan, math.inf, [8], {}, HUGE], ids=lambda v: str(v)[:9])
def test_sizes(key: str, value: Any) -> None:
    refused(flat(**{key: value}), f"{key} must be a positive int")


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize(
    "value", ["8", True, 0, 0.0, -1.5, math.nan, math.inf, [8], {}, HUGE], ids=lambda v: str(v)[:9]
)
def test_scalars(key: str, value: Any) -> None:
    refused(flat(**{key: value}), f"{key} must be a positive float")


@pytest.mark.parametrize("key", FIXED)
def test_other_maths_is_refused(key: str) -> None:
    for value in (FIXED[key], "?", 5, [], {}, math.nan):
        refused(flat(**{key: value}), f"{key}=.* is not supported, only {TEXT[key]!r}")
    wanted = TEXT[key]
    equal = int(wanted) if isinstance(wanted, bool) else float(wanted) if isinstance(wanted, int) else [wanted]
    refused(flat(**{key: equal}), f"{key}=.* is not supported")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_output_gate", True),
        ("attention_bias", True),
        ("mlp_bias", 0),
        ("sliding_window", 4096),
        ("final_logit_softcapping", 30.0),
    ],
)
def test_maths_that_m3_lacks_is_refused(key: str, value: Any) -> None:
    refused(flat(**{key: value}), f"{key}=.* is not supported")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("use_sparse_attention", [False, 1, "true"]),
        ("sparse_block_size", [64, 128.0, "128", True]),
        ("sparse_score_type", ["lse", "MAX", 1]),
        ("sparse_index_dim", [0, -1, 1.5, "8", True, math.nan, HUGE]),
        ("sparse_num_index_heads", [0, -1, 1.5, "8", True]),
        ("sparse_topk_blocks", [0, -1, 1.5, "8", True, HUGE]),
        ("sparse_init_block", [-1, 0.0, "0", False]),
        ("sparse_local_block", [-1, 1.0, "1", True]),
        (
            "sparse_attention_freq",
            [1, "0111", [0, 1, 1], [0, 1, 1, 2], [0, 1, 1, True], [0, 1, 1, 1.0], [0, 1, 1, "1"]],
        ),
        ("sparse_disable_index_value", [1, [0, 1, 1], [0, 1, 1, -1], [0, 1, 1, 0]]),
    ],
)
def test_sparse_values(key: str, values: list[Any]) -> None:
    for value in values:
        refused(sparse(**{key: value}), key)


@pytest.mark.parametrize("value", ["x", [], 5])
def test_sparse_config_of_a_wrong_type(value: Any) -> None:
    refused(flat(sparse_attention_config=value), "sparse_attention_config must be an object")


@pytest.mark.parametrize("value", [1, "0111", [0, 1, 1], [0, 1, 1, 2], [0, 1, 1, 1.0], [0, 1, 1, None], {}])
def test_moe_layers(value: Any) -> None:
    refused(flat(moe_layer_freq=value), "moe_layer_freq must hold 4 entries of 0 or 1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_dim": 32}, "rotary_dim=32 contradicts partial_rotary_factor=0.5"),
        ({"rotary_dim": 64.0}, "rotary_dim must be even"),
        ({"rotary_dim": True, "partial_rotary_factor": None}, "rotary_dim must be even"),
        ({"rotary_dim": 63, "partial_rotary_factor": None}, "rotary_dim must be even"),
        ({"rotary_dim": 130, "partial_rotary_factor": None}, "rotary_dim must be even"),
        ({"rotary_dim": -2, "partial_rotary_factor": None}, "rotary_dim must be even"),
        *(
            ({"partial_rotary_factor": bad}, "partial_rotary_factor must be in")
            for bad in ("x", math.nan, 0, 1.5, True)
        ),
        ({"num_key_value_heads": 3}, "num_attention_heads=64 must be a multiple of num_key_value_heads=3"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok=129 > num_local_experts=128"),
        ({"rotary_dim": 128, "partial_rotary_factor": 1.0, "head_dim": 128}, None),
        ({"rotary_dim": 256, "partial_rotary_factor": 1.0, "head_dim": 256}, "sparse_index_dim=128 is smaller"),
        ({"eos_token_id": 200064}, "eos_token_id=200064 is not a token id below vocab_size=200064"),
        ({"eos_token_id": [5, -1]}, "eos_token_id=-1 is not a token id"),
        ({"eos_token_id": "5"}, "eos_token_id='5' is not a token id"),
        ({"bos_token_id": True}, "bos_token_id=True is not a token id"),
        ({"torch_dtype": 16}, "torch_dtype must be a string, got 16"),
    ],
)
def test_values_that_do_not_fit_together(changes: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert ModelConfig.from_hf(flat(**changes)).rotary_dim == 128
    else:
        refused(flat(**changes), message)


def test_sparse_heads_and_blocks_must_fit() -> None:
    refused(sparse(sparse_num_index_heads=3), "must be a multiple of sparse_num_index_heads=3")
    refused(
        flat(
            num_attention_heads=12,
            num_key_value_heads=4,
            sparse_attention_config=TEXT["sparse_attention_config"] | {"sparse_num_index_heads": 6},
        ),
        "num_key_value_heads=4 and sparse_num_index_heads=6 must divide the other",
    )
    refused(sparse(sparse_init_block=16), "sparse_init_block=16 .* exceed sparse_topk_blocks=16")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (flat(rope_tetha=1e6), "unknown key 'rope_tetha'=1000000.0 .*did you mean 'rope_theta'"),
        (flat(zzz=1), "unknown key 'zzz'=1 might change what the model computes$"),
        (flat(sparse_topk_blocks=8), "unknown key 'sparse_topk_blocks'=8 .*belongs in sparse_attention_config"),
        (wrapped(rope_theta=1e6), "outside text_config: unknown key 'rope_theta'.*belongs in text_config"),
        (wrapped(sparse_score_type="lse"), "outside text_config.*belongs in sparse_attention_config"),
        (sparse(sparse_topk_block=8), "sparse_attention_config: unknown key .*did you mean 'sparse_topk_blocks'"),
        (sparse(rope_theta=1e6), "sparse_attention_config: unknown key 'rope_theta'.*belongs in text_config"),
        ({"text_config": []}, "text_config must be an object, got list"),
        ({"text_config": None}, "text_config must be an object, got NoneType"),
        ({}, "config.json misses hidden_act"),
    ],
)
def test_unknown_and_misplaced_keys(config: dict[str, Any], message: str) -> None:
    refused(config, message)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "\ud800", "[" * 10**5, '{"a": ' * 10**5])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"config\.json (cannot be read|must hold a JSON object)"):
        read_json(file)
    with pytest.raises(CheckpointError, match=r"none\.json cannot be read"):
        read_json(tmp_path / "none.json")


# --- overrides ---


@pytest.mark.parametrize("layout", [flat, wrapped])
@pytest.mark.parametrize("nested", [False, True])
def test_overrides_reach_the_text_config_from_either_level(layout: Any, nested: bool) -> None:
    changes = {
        "swiglu_beta": 0.5,
        "eos_token_id": 9,
        "torch_dtype": "float32",
        "sparse_attention_config": {"sparse_topk_blocks": 8},
        "index_topk_freq": 2,
    }
    config = layout()
    before = copy.deepcopy(config)
    model = ModelConfig.from_hf(merge_overrides(config, {"text_config": changes} if nested else changes))
    assert (model.swiglu_beta, model.eos_token_ids, model.torch_dtype) == (0.5, (9,), "float32")
    assert (model.topk_blocks, model.local_blocks) == (8, 1)
    assert config == before


def test_overrides_win_over_both_levels_of_config_json() -> None:
    config = wrapped(flat(), eos_token_id=3, torch_dtype="float16")
    model = ModelConfig.from_hf(merge_overrides(config, {"eos_token_id": 9, "torch_dtype": "float32"}))
    assert (model.eos_token_ids, model.torch_dtype) == ((9,), "float32")


def test_an_override_of_null_unsets_a_key() -> None:
    assert merge_overrides(flat(), {"rope_theta": None})["rope_theta"] is None
    refused(merge_overrides(wrapped(), {"rope_theta": None}), "misses rope_theta")


def test_an_override_may_be_given_at_both_levels_if_it_is_the_same() -> None:
    same = {"swiglu_beta": 2.0, "text_config": {"swiglu_beta": 2.0}}
    assert ModelConfig.from_hf(merge_overrides(wrapped(), same)).swiglu_beta == 2.0
    with pytest.raises(ConfigError, match=r"hf_overrides sets swiglu_beta twice: 2\.0 at the top level and 3\.0"):
        merge_overrides(wrapped(), {"swiglu_beta": 2.0, "text_config": {"swiglu_beta": 3.0}})


@pytest.mark.parametrize("layout", [flat, wrapped])
def test_unknown_overrides_are_refused(layout: Any) -> None:
    refused(merge_overrides(layout(), {"rope_tetha": 1.0}), "unknown key 'rope_tetha'")
    refused(merge_overrides(layout(), {"vision_config": {"hidden_size": 2}}), "unknown key 'vision_config'")
    with pytest.raises(ConfigError, match="hf_overrides: text_config must be an object, got 5"):
        merge_overrides(layout(), {"text_config": 5})


# --- index cache knobs ---


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("source", ["config.json", "hf_overrides", "settings"])
def test_knobs_are_read_from_every_place(nested: bool, source: str) -> None:
    knobs = {"index_topk_freq": 4, "index_skip_topk_offset": 1}
    config, overrides, settings = wrapped(), {}, {}
    if source == "config.json":
        (config["text_config"] if nested else config).update(knobs)
    elif source == "hf_overrides":
        overrides = {"text_config": knobs} if nested else knobs
    else:
        settings = knobs
    assert index_knobs(config, overrides, settings) == IndexKnobs(4, 1)
    assert ModelConfig.from_hf(merge_overrides(config, overrides)) == ModelConfig.from_hf(flat())


def test_a_knob_at_both_levels_must_agree() -> None:
    config = wrapped(flat(index_topk_freq=4), index_topk_freq=4)
    assert index_knobs(config, {}, {}) == IndexKnobs(4)
    with pytest.raises(ConfigError, match=r"config.json sets index_topk_freq twice: 2 at the top level and 4 in text"):
        index_knobs(wrapped(flat(index_topk_freq=4), index_topk_freq=2), {}, {})
    with pytest.raises(ConfigError, match=r"hf_overrides sets use_index_cache twice: True .* and 1 in"):
        index_knobs(flat(), {"use_index_cache": True, "text_config": {"use_index_cache": 1}}, {})


@pytest.mark.parametrize("knob", KNOBS)
def test_misplaced_knobs(knob: str) -> None:
    with pytest.raises(ConfigError, match=f"config.json: {knob} is inside sparse_attention_config: put it at the top"):
        index_knobs(sparse(**{knob: 1}), {}, {})
    with pytest.raises(ConfigError, match=f"hf_overrides: {knob} is inside sparse_attention_config"):
        index_knobs(flat(), {"sparse_attention_config": {knob: 1}}, {})
    with pytest.raises(ConfigError, match=f"{knob} is inside sparse_attention_config"):
        ModelConfig.from_hf(sparse(**{knob: 1}))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("index_topk_frequency", "index_topk_freq"),
        ("index_topk_patern", "index_topk_pattern"),
        ("use_indexcache", "use_index_cache"),
        ("index_skip_offset", "index_skip_topk_offset"),
    ],
)
def test_misspelt_knobs(wrong: str, right: str) -> None:
    for config in (flat(**{wrong: 4}), wrapped(flat(**{wrong: 4})), wrapped(**{wrong: 4})):
        with pytest.raises(ConfigError, match=f"config.json: unknown key '{wrong}'; did you mean '{right}'"):
            index_knobs(config, {}, {})
    with pytest.raises(ConfigError, match=f"hf_overrides: unknown key '{wrong}'; did you mean '{right}'"):
        index_knobs(flat(), {wrong: 4}, {})


# --- settings ---

INTEGERS = {
    "tensor_parallel_size": 1,
    "max_model_len": 1,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "max_num_prefill_tokens": 1,
    "long_prefill_token_threshold": 0,
    "num_pages": 1,
    "audit_interval": 1,
    "audit_trip_after": 1,
    "audit_recover_after": 1,
    "probe_interval": 0,
    "seed": 0,
    "num_threads": 1,
}
UNSET = {
    "max_model_len", "max_num_prefill_tokens", "long_prefill_token_threshold", "num_pages", "probe_interval",
    "num_threads",
}  # fmt: skip
CHOICES = ("backend", "dtype", "load_format", "index_reuse", "kv_cache_dtype", "index_cache_dtype")


def test_the_tables_cover_every_setting() -> None:
    others = {
        "model", "memory_fraction", "enable_prefix_caching", "enforce_eager", "async_scheduling", "hf_overrides",
        "self_test", "numa_pinning", "weight_cache_dir", "audit_overlap_floor", "audit_overlap_margin",
    }  # fmt: skip
    assert {*INTEGERS, *CHOICES, *KNOBS, *others} == {field.name for field in fields(EngineConfig)}


def test_every_setting_has_a_help_text() -> None:
    assert [field.name for field in fields(EngineConfig) if not field.metadata.get("help")] == []


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_settings(name: str) -> None:
    low = INTEGERS[name]
    assert getattr(EngineConfig("m", **{name: low}), name) == low
    for value in ("8", 8.0, True, low - 1, -(10**9), math.nan, math.inf, [8], HUGE):
        with pytest.raises(ConfigError, match=f"{name} must be an integer in \\[{low}, 2147483647\\]"):
            EngineConfig("m", **{name: value})
    if name in UNSET:
        assert getattr(EngineConfig("m", **{name: None}), name) is None
    else:
        with pytest.raises(ConfigError, match=name):
            EngineConfig("m", **{name: None})


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name: str) -> None:
    for value in ("cuda", "", None, 5, [], "AUTO", math.nan):
        with pytest.raises(ConfigError, match=f"{name} must be one of .*, got "):
            EngineConfig("m", **{name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("model", ["", None, 5, b"m"]),
        ("memory_fraction", [0, 1.01, -0.5, math.nan, math.inf, True, "0.5", HUGE]),
        ("enable_prefix_caching", [None, 0, 1, "true"]),
        ("enforce_eager", [None, 0, 1, "true"]),
        ("self_test", [None, 0, 1, "true"]),
        ("async_scheduling", [0, 1, "true"]),
        ("numa_pinning", [0, 1, "true"]),
        ("hf_overrides", [None, [], "{}", 5]),
        ("use_index_cache", [0, "true", []]),
        ("index_topk_freq", [True, "4", 4.0, -1, math.nan]),
        ("index_skip_topk_offset", [True, "4", 4.0, -1]),
        ("index_topk_pattern", [5, ["F"], True]),
        ("index_plan_file", [5, ["F"], True]),
        ("weight_cache_dir", ["", 5, ["F"], True]),
        ("audit_overlap_floor", [0, 1, 1.0, -0.5, math.nan, math.inf, True, "0.5", HUGE]),
        ("audit_overlap_margin", [None, 1, -0.1, math.nan, math.inf, True, "0.5", HUGE]),
    ],
)
def test_other_settings(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=name):
            EngineConfig(**({"model": "m"} | {name: value}))


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="settings says use_index_cache=false and also index_topk_freq=4"):
        EngineConfig("m", use_index_cache=False, index_topk_freq=4)


def test_a_guard_must_be_able_to_work() -> None:
    with pytest.raises(ConfigError, match=r"audit_overlap_floor=0\.5 needs index_reuse=audited, got lean"):
        EngineConfig("m", audit_overlap_floor=0.5)
    with pytest.raises(ConfigError, match=r"must be at most 1, .* got 0\.7 \+ 0\.4"):
        EngineConfig("m", index_reuse="audited", audit_overlap_floor=0.7, audit_overlap_margin=0.4)
    assert EngineConfig("m", index_reuse="audited", audit_overlap_floor=0.7, audit_overlap_margin=0.3)


def test_unknown_settings_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown settings \['backends', 'tp'\]; known: .*'backend'"):
        EngineConfig.from_kwargs("m", tp=2, backends="torch")
    assert EngineConfig.from_kwargs(Path("m"), backend="torch") == EngineConfig("m", backend="torch")


# --- both together ---


def checkpoint(directory: Path, config: dict[str, Any]) -> str:
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def test_resolve_model(tmp_path: Path) -> None:
    model, knobs = resolve_model(EngineConfig(checkpoint(tmp_path, wrapped(index_topk_freq=2)), index_topk_freq=3))
    assert model == ModelConfig.from_hf(flat())
    assert str(knobs.build_plan(model.is_sparse)) == "DFSS"


def test_resolve_model_refuses_before_any_weight_is_read(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, wrapped())
    for settings, message in (
        ({"index_topk_pattern": "FS"}, "index_topk_pattern needs 3 letters"),
        ({"index_topk_pattern": "SFF"}, "first sparse layer"),
        ({"hf_overrides": {"index_topk_frq": 4}}, "hf_overrides: unknown key 'index_topk_frq'; did you mean"),
        (
            {"index_reuse": "audited", "audit_overlap_floor": 0.0625},
            r"audit_overlap_floor=0.0625 would never be reached: 0 \+ 1 of 16 selected blocks .* at least 0.0625",
        ),
        ({"max_model_len": 1048577}, "max_model_len=1048577 exceeds .* max_position_embeddings=1048576"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve_model(EngineConfig(path, **settings))
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        resolve_model(EngineConfig(str(tmp_path / "none")))
