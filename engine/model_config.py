"""The text decoder's configuration, read strictly from config.json.

Nothing that changes the maths has a default here: a missing, unknown or contradictory key is an error that
names it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, ConfigError
from engine.msa.plan import KNOBS
from engine.quant_config import QuantConfig
from engine.rope import PLACES, RopeScaling, lift, read_rotary_dim, read_scaling

PAGE_SIZE = 128  # tokens per page; equal to the key block, so that block_table maps one to the other

MAX_NUMBER = 1e18  # of config.json; more is a typing error

# Keys that must hold this value: the other values mean maths that M3 does not have and we do not compute.
_REQUIRED_VALUES: dict[str, Any] = {
    "hidden_act": "swigluoai",
    "use_gemma_norm": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_head",
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "n_shared_experts": 1,
    "tie_word_embeddings": False,
}
# The same, but absent from some released revisions, where absence means this value.
_ALLOWED_VALUES: dict[str, Any] = {
    "attention_output_gate": False,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "final_logit_softcapping": None,
}
_NUMBERS: dict[str, type] = {
    "vocab_size": int,
    "hidden_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "head_dim": int,
    "intermediate_size": int,
    "dense_intermediate_size": int,
    "shared_intermediate_size": int,
    "num_local_experts": int,
    "num_experts_per_tok": int,
    "max_position_embeddings": int,
    "routed_scaling_factor": float,
    "swiglu_alpha": float,
    "swiglu_limit": float,
    "rms_norm_eps": float,
    "rope_theta": float,
}
# Keys of config.json that do not change what the text decoder computes.
_IGNORED = frozenset(
    [
        "architectures",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "auto_map",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
        "use_cache",
        "attention_dropout",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "num_mtp_modules",
        "num_reward_heads",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "is_encoder_decoder",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
        "_name_or_path",
        "name_or_path",
    ]
)
_SPARSE_NUMBERS = {
    "sparse_index_dim": "index_dim",
    "sparse_num_index_heads": "num_index_heads",
    "sparse_topk_blocks": "topk_blocks",
    "sparse_init_block": "init_blocks",
    "sparse_local_block": "local_blocks",
}
_SPARSE_KEYS = frozenset(
    [
        *_SPARSE_NUMBERS,
        "use_sparse_attention",
        "sparse_block_size",
        "sparse_score_type",
        "sparse_attention_freq",
        "sparse_disable_index_value",
    ]
)
_TEXT_KEYS = frozenset(
    [
        *_REQUIRED_VALUES,
        *_ALLOWED_VALUES,
        *_NUMBERS,
        *_IGNORED,
        *KNOBS,
        *PLACES,
        "moe_layer_freq",
        "quantization_config",
        "swiglu_beta",
        "sparse_attention_config",
        "rotary_dim",
        "partial_rotary_factor",
    ]
)
_OUTER_KEYS = frozenset(KNOBS) | frozenset(
    [
        "text_config",
        "vision_config",
        "architectures",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "auto_map",
        "image_token_index",
        "video_token_index",
        "projector_hidden_size",
        "projector_hidden_act",
        "multimodal_projector_bias",
        "image_seq_length",
        "num_reward_heads",
        "img_token_compression_config",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "process_image_mode",
        "image_token_id",
        "video_token_id",
        "quantization_config",
        "_name_or_path",
        "name_or_path",
    ]
)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The text decoder of one checkpoint. Sizes in elements, layers counted from 0.

    is_sparse, is_moe: one bool per layer.  topk_blocks counts the forced init and local blocks.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int  # of one routed expert
    dense_intermediate_size: int
    shared_intermediate_size: int
    num_local_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    routed_scaling_factor: float
    swiglu_alpha: float
    swiglu_limit: float
    swiglu_beta: float
    rms_norm_eps: float
    rope_theta: float
    rotary_dim: int
    is_sparse: tuple[bool, ...]
    is_moe: tuple[bool, ...]
    index_dim: int
    num_index_heads: int
    topk_blocks: int
    init_blocks: int
    local_blocks: int
    torch_dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    rope_scaling: RopeScaling | None = None
    quantization: QuantConfig | None = None

    @property
    def max_positions(self) -> int:
        """The longest context that the model is made for, in tokens."""
        return self.max_position_embeddings if self.rope_scaling is None else self.rope_scaling.max_positions

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a released config.json: the vision-language wrapper with `text_config`, or the flat text config."""
        text = _text_config(config)
        _refuse_unknown(text, _TEXT_KEYS, "config.json")
        text = lift(text)
        for key, wanted in (_REQUIRED_VALUES | _ALLOWED_VALUES).items():
            value = text.get(key)
            if value is None and key in _REQUIRED_VALUES:
                raise CheckpointError(f"config.json misses {key}: M3 has {key}={wanted!r}")
            if value is not None and not _is_exactly(value, wanted):
                raise CheckpointError(f"config.json: {key}={value!r} is not supported, only {wanted!r}")
        values: dict[str, Any] = {key: _positive(text, key, kind) for key, kind in _NUMBERS.items()}
        values["rope_scaling"] = read_scaling(text, values["max_position_embeddings"])
        values["swiglu_beta"] = _positive(text, "swiglu_beta", float) if text.get("swiglu_beta") is not None else 1.0
        num_layers = values["num_hidden_layers"]
        values["rotary_dim"] = read_rotary_dim(text, values["head_dim"])
        values["is_moe"] = _layer_flags(text, "moe_layer_freq", num_layers)
        values |= _sparse_attention(text, num_layers)
        values["torch_dtype"] = _torch_dtype(text, config)
        values["eos_token_ids"] = _token_ids(text, "eos_token_id", values["vocab_size"])
        bos = _token_ids(text, "bos_token_id", values["vocab_size"])
        values["bos_token_id"] = bos[0] if bos else None
        values["quantization"] = QuantConfig.from_hf(text.get("quantization_config"))
        model = cls(**values)
        model._check_heads()
        return model

    def _check_heads(self) -> None:
        heads, kv, index = self.num_attention_heads, self.num_key_value_heads, self.num_index_heads
        for name, count in (("num_key_value_heads", kv), ("sparse_num_index_heads", index)):
            if heads % count:
                raise CheckpointError(f"config.json: num_attention_heads={heads} must be a multiple of {name}={count}")
        if max(kv, index) % min(kv, index):
            raise CheckpointError(
                f"config.json: one of num_key_value_heads={kv} and sparse_num_index_heads={index} must divide the other"
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise CheckpointError(
                f"config.json: num_experts_per_tok={self.num_experts_per_tok} > "
                f"num_local_experts={self.num_local_experts}"
            )
        if self.index_dim < self.rotary_dim:
            raise CheckpointError(
                f"config.json: sparse_index_dim={self.index_dim} is smaller than rotary_dim={self.rotary_dim}"
            )
        if not self.init_blocks + self.local_blocks <= self.topk_blocks:
            raise CheckpointError(
                f"config.json: sparse_init_block={self.init_blocks} + sparse_local_block={self.local_blocks} "
                f"exceed sparse_topk_blocks={self.topk_blocks}"
            )


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    if "text_config" not in config:
        return config
    text = config["text_config"]
    if not isinstance(text, Mapping):
        raise CheckpointError(f"config.json: text_config must be an object, got {type(text).__name__}")
    _refuse_unknown(config, _OUTER_KEYS, "config.json, outside text_config")
    merged = dict(text)
    for key in ("tie_word_embeddings", "bos_token_id", "eos_token_id"):
        if key not in merged and key in config:
            merged[key] = config[key]
    inner, outer = text.get("quantization_config"), config.get("quantization_config")
    if None not in (inner, outer) and inner != outer:
        raise CheckpointError("config.json: quantization_config inside text_config differs from the one outside")
    merged["quantization_config"] = outer if inner is None else inner
    return merged


def _refuse_unknown(given: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    for key, value in given.items():
        # A null says that the key is not set; transformers writes many of those.
        if key in known or value is None:
            continue
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        for place, keys in (("sparse_attention_config", _SPARSE_KEYS), ("text_config", _TEXT_KEYS)):
            if key in keys:
                hint = f"; it belongs in {place}"
                break
        raise CheckpointError(f"{where}: unknown key {key!r}={value!r} might change what the model computes{hint}")


def _is_exactly(value: Any, wanted: Any) -> bool:
    return type(value) is type(wanted) and bool(value == wanted)


def _torch_dtype(*levels: Mapping[str, Any]) -> str:
    """The first that is set, in the text config or outside it; "" when none is."""
    for level in levels:
        for key in ("torch_dtype", "dtype"):
            value = level.get(key)
            if value is not None and not isinstance(value, str):
                raise CheckpointError(f"config.json: {key} must be a string, got {value!r}")
            if value:
                return value
    return ""


def _positive(config: Mapping[str, Any], key: str, kind: type) -> Any:
    if (value := config.get(key)) is None:
        raise CheckpointError(f"config.json misses {key}")
    allowed = (int, float) if kind is float else (int,)
    # JSON integers have no size limit; one that no float can hold is compared before it is converted.
    if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value < MAX_NUMBER:
        raise CheckpointError(f"config.json: {key} must be a positive {kind.__name__}, got {value!r}")
    return kind(value)


def _layer_flags(config: Mapping[str, Any], key: str, num_layers: int) -> tuple[bool, ...]:
    if (flags := config.get(key)) is None:
        raise CheckpointError(f"config.json misses {key}: one entry of 0 or 1 per layer")
    if (
        not isinstance(flags, list)
        or len(flags) != num_layers
        or not all(type(flag) is int and flag in (0, 1) for flag in flags)
    ):
        raise CheckpointError(f"config.json: {key} must hold {num_layers} entries of 0 or 1, got {flags!r}")
    return tuple(bool(flag) for flag in flags)


def _sparse_attention(text: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    sparse = text.get("sparse_attention_config")
    if sparse is None:
        raise CheckpointError("config.json misses sparse_attention_config")
    if not isinstance(sparse, Mapping):
        raise CheckpointError(f"config.json: sparse_attention_config must be an object, got {sparse!r}")
    for knob in KNOBS:
        if knob in sparse:
            raise ConfigError(
                f"{knob} is inside sparse_attention_config: put it at the top level of config.json or in text_config"
            )
    _refuse_unknown(sparse, _SPARSE_KEYS, "config.json, sparse_attention_config")
    for key, wanted in (
        ("use_sparse_attention", True),
        ("sparse_block_size", PAGE_SIZE),
        ("sparse_score_type", "max"),
    ):
        if not _is_exactly(sparse.get(key), wanted):
            raise CheckpointError(
                f"config.json: sparse_attention_config.{key}={sparse.get(key)!r} is not supported, only {wanted!r}"
            )
    values: dict[str, Any] = {}
    for key, name in _SPARSE_NUMBERS.items():
        value = sparse.get(key)
        least = 0 if name in ("init_blocks", "local_blocks") else 1
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < MAX_NUMBER:
            raise CheckpointError(
                f"config.json: sparse_attention_config.{key} must be an integer >= {least}, got {value!r}"
            )
        values[name] = value
    values["is_sparse"] = _layer_flags(sparse, "sparse_attention_freq", num_layers)
    score_only = _layer_flags(sparse, "sparse_disable_index_value", num_layers)
    if any(sparse_layer and not only for sparse_layer, only in zip(values["is_sparse"], score_only, strict=True)):
        raise CheckpointError(
            "config.json: sparse_attention_config.sparse_disable_index_value must be 1 on every sparse layer: "
            "an indexer with values of its own is not supported"
        )
    return values


def _token_ids(config: Mapping[str, Any], key: str, vocab_size: int) -> tuple[int, ...]:
    value = config.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise CheckpointError(f"config.json: {key}={token!r} is not a token id below vocab_size={vocab_size}")
    return tuple(ids)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint; CheckpointError names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
