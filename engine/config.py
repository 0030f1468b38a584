"""The model's configuration, read strictly from config.json, and the engine's own settings.

Nothing that changes the maths has a default here: a missing, unknown or contradictory key is an error that names it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, ConfigError
from engine.msa.plan import KNOBS, IndexKnobs, resolve_knobs

PAGE_SIZE = 128  # tokens per page; equal to the key block, so that block_table maps one to the other

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
    "rope_scaling": None,
    "sliding_window": None,
    "final_logit_softcapping": None,
    "quantization_config": None,
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
    """architectures model_type torch_dtype dtype transformers_version auto_map bos_token_id eos_token_id pad_token_id
    initializer_range use_cache attention_dropout output_router_logits router_aux_loss_coef router_jitter_noise
    num_mtp_modules num_reward_heads return_dict output_attentions output_hidden_states is_encoder_decoder
    chunk_size_feed_forward id2label label2id problem_type _name_or_path name_or_path""".split()
)
_SPARSE_NUMBERS = {
    "sparse_index_dim": "index_dim",
    "sparse_num_index_heads": "num_index_heads",
    "sparse_topk_blocks": "topk_blocks",
    "sparse_init_block": "init_blocks",
    "sparse_local_block": "local_blocks",
}
_SPARSE_KEYS = frozenset(
    [*_SPARSE_NUMBERS, "use_sparse_attention", "sparse_block_size", "sparse_score_type", "sparse_attention_freq"]
    + ["sparse_disable_index_value"]
)
_OUTER_KEYS = frozenset(
    """text_config vision_config architectures model_type torch_dtype dtype transformers_version auto_map
    image_token_index video_token_index projector_hidden_size projector_hidden_act multimodal_projector_bias
    image_seq_length num_reward_heads img_token_compression_config tie_word_embeddings bos_token_id eos_token_id
    pad_token_id vision_feature_layer vision_feature_select_strategy process_image_mode image_token_id video_token_id
    quantization_config _name_or_path name_or_path""".split()
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

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a released config.json: the vision-language wrapper with `text_config`, or the flat text config."""
        text = _text_config(config)
        known = {*_REQUIRED_VALUES, *_ALLOWED_VALUES, *_NUMBERS, *_IGNORED, *KNOBS}
        known |= {"moe_layer_freq", "sparse_attention_config", "swiglu_beta", "rotary_dim", "partial_rotary_factor"}
        _refuse_unknown(text, known, "config.json")
        for key, wanted in (_REQUIRED_VALUES | _ALLOWED_VALUES).items():
            if key not in text and key in _REQUIRED_VALUES:
                raise CheckpointError(f"config.json misses {key}: M3 has {key}={wanted!r}")
            value = text.get(key, wanted)
            if value != wanted or isinstance(value, bool) is not isinstance(wanted, bool):
                raise CheckpointError(f"config.json: {key}={value!r} is not supported, only {wanted!r}")
        values: dict[str, Any] = {key: _positive(text, key, kind) for key, kind in _NUMBERS.items()}
        values["swiglu_beta"] = _positive(text, "swiglu_beta", float) if text.get("swiglu_beta") is not None else 1.0
        num_layers = values["num_hidden_layers"]
        values["rotary_dim"] = _rotary_dim(text, values["head_dim"])
        values["is_moe"] = _layer_flags(text, "moe_layer_freq", num_layers)
        values |= _sparse_attention(text, num_layers)
        values["torch_dtype"] = str(text.get("torch_dtype") or text.get("dtype") or config.get("torch_dtype") or "")
        values["eos_token_ids"] = _token_ids(text, "eos_token_id", values["vocab_size"])
        bos = _token_ids(text, "bos_token_id", values["vocab_size"])
        values["bos_token_id"] = bos[0] if bos else None
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
    _refuse_unknown(config, {*_OUTER_KEYS, *KNOBS, "tie_word_embeddings"}, "config.json, outside text_config")
    merged = dict(text)
    for key in ("tie_word_embeddings", "quantization_config", "bos_token_id", "eos_token_id"):
        if key not in merged and key in config:
            merged[key] = config[key]
    return merged


def _refuse_unknown(given: Mapping[str, Any], known: set[str], where: str) -> None:
    for key, value in given.items():
        # A null says that the key is not set; transformers writes many of those.
        if key in known or value is None:
            continue
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise CheckpointError(f"{where}: unknown key {key!r}={value!r} might change what the model computes{hint}")


def _positive(config: Mapping[str, Any], key: str, kind: type) -> Any:
    if (value := config.get(key)) is None:
        raise CheckpointError(f"config.json misses {key}")
    allowed = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value < float("inf"):
        raise CheckpointError(f"config.json: {key} must be a positive {kind.__name__}, got {value!r}")
    return kind(value)


def _rotary_dim(text: Mapping[str, Any], head_dim: int) -> int:
    rotary_dim = text.get("rotary_dim")
    factor = text.get("partial_rotary_factor")
    if rotary_dim is None and factor is None:
        raise CheckpointError("config.json misses rotary_dim (or partial_rotary_factor)")
    from_factor = None if factor is None else round(head_dim * float(factor))
    if rotary_dim is not None and from_factor is not None and rotary_dim != from_factor:
        raise CheckpointError(
            f"config.json: rotary_dim={rotary_dim} contradicts partial_rotary_factor={factor} of head_dim={head_dim}"
        )
    dim = rotary_dim if rotary_dim is not None else from_factor
    if not isinstance(dim, int) or not 0 < dim <= head_dim or dim % 2:
        raise CheckpointError(f"config.json: rotary_dim must be even and in (0, head_dim={head_dim}], got {dim!r}")
    return dim


def _layer_flags(config: Mapping[str, Any], key: str, num_layers: int) -> tuple[bool, ...]:
    flags = config.get(key)
    if not isinstance(flags, list) or len(flags) != num_layers or any(flag not in (0, 1) for flag in flags):
        raise CheckpointError(f"config.json: {key} must hold {num_layers} entries of 0 or 1, got {flags!r}")
    return tuple(bool(flag) for flag in flags)


def _sparse_attention(text: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    sparse = text.get("sparse_attention_config")
    if not isinstance(sparse, Mapping):
        raise CheckpointError("config.json misses sparse_attention_config")
    for knob in KNOBS:
        if knob in sparse:
            raise ConfigError(
                f"{knob} is inside sparse_attention_config: put it at the top level of config.json or in text_config"
            )
    _refuse_unknown(sparse, set(_SPARSE_KEYS), "config.json, sparse_attention_config")
    for key, wanted in (
        ("use_sparse_attention", True),
        ("sparse_block_size", PAGE_SIZE),
        ("sparse_score_type", "max"),
    ):
        if sparse.get(key) != wanted:
            raise CheckpointError(
                f"config.json: sparse_attention_config.{key}={sparse.get(key)!r} is not supported, only {wanted!r}"
            )
    values: dict[str, Any] = {}
    for key, name in _SPARSE_NUMBERS.items():
        value = sparse.get(key)
        least = 0 if name in ("init_blocks", "local_blocks") else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
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
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def merge_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with `hf_overrides` laid over it; objects merge key by key, index cache knobs stay apart.

    With a `text_config` wrapper, an override of a text key may stand at either level.
    """
    text_keys = config["text_config"].keys() if isinstance(config.get("text_config"), dict) else ()
    merged = dict(config)
    for key, value in overrides.items():
        if key in KNOBS:
            continue
        if key in text_keys and key not in config:
            merged["text_config"] = {
                **merged["text_config"],
                **merge_overrides({key: merged["text_config"][key]}, {key: value}),
            }
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge_overrides(merged[key], {k: v for k, v in value.items() if k not in KNOBS})
        else:
            merged[key] = value
    return merged


def index_knobs(config: Mapping[str, Any], overrides: Mapping[str, Any], settings: Mapping[str, Any]) -> IndexKnobs:
    """The index cache knobs of config.json, `hf_overrides` and the engine's settings, in rising precedence."""
    return resolve_knobs(
        [
            ("config.json", _knobs_of(config, "config.json")),
            ("hf_overrides", _knobs_of(overrides, "hf_overrides")),
            ("settings", settings),
        ]
    )


def _knobs_of(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    text = config.get("text_config")
    levels = [config] + ([text] if isinstance(text, Mapping) else [])
    knobs: dict[str, Any] = {}
    for level in levels:
        for key in KNOBS:
            if level.get(key) is None:
                continue
            if key in knobs and knobs[key] != level[key]:
                raise ConfigError(
                    f"{source} sets {key} twice: {knobs[key]!r} at the top level and {level[key]!r} in text_config"
                )
            knobs[key] = level[key]
        sparse = level.get("sparse_attention_config")
        for key in KNOBS:
            if isinstance(sparse, Mapping) and key in sparse:
                raise ConfigError(
                    f"{source}: {key} is inside sparse_attention_config: put it at the top level or in text_config"
                )
        for key in level:
            close = difflib.get_close_matches(key, KNOBS, n=1, cutoff=0.85)
            if key not in KNOBS and close:
                raise ConfigError(f"{source}: unknown key {key!r}; did you mean {close[0]!r}?")
    return knobs


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine replica; `None` means: resolved at start-up, see EngineInfo. Raises ConfigError."""

    model: str = field(metadata={"help": "checkpoint directory: config.json, *.safetensors, tokenizer.json"})
    backend: str = field(default="auto", metadata={"help": "kernels: torch, triton, aiter, or auto"})
    dtype: str = field(default="auto", metadata={"help": "compute dtype: bfloat16, float32, or auto"})
    tensor_parallel_size: int = field(default=1, metadata={"help": "ranks of one replica"})
    max_model_len: int | None = field(
        default=None, metadata={"help": "longest prompt plus output, in tokens; default: the checkpoint's limit"}
    )
    max_num_seqs: int = field(default=16, metadata={"help": "sequences that run at the same time"})
    max_num_batched_tokens: int = field(default=2048, metadata={"help": "token budget of one step"})
    num_pages: int | None = field(
        default=None, metadata={"help": "KV pages of 128 tokens; default: what the memory allows"}
    )
    memory_fraction: float = field(default=0.5, metadata={"help": "share of free memory that KV pages may take"})
    enable_prefix_caching: bool = field(default=True, metadata={"help": "reuse pages of equal prefixes"})
    load_format: str = field(default="auto", metadata={"help": "auto: read tensors; dummy: seeded random weights"})
    hf_overrides: dict[str, Any] = field(default_factory=dict, metadata={"help": "laid over config.json (JSON)"})
    use_index_cache: bool | None = field(default=None, metadata={"help": "share selections between layers"})
    index_topk_freq: int | None = field(default=None, metadata={"help": "one sparse layer in this many selects"})
    index_topk_pattern: str | None = field(
        default=None, metadata={"help": "F (select) or S (reuse) per sparse layer; overrides the frequency"}
    )
    index_skip_topk_offset: int | None = field(
        default=None, metadata={"help": "sparse layers after the first that still select each for itself"}
    )
    index_plan_file: str | None = field(default=None, metadata={"help": "JSON plan file with a pattern"})
    index_reuse: str = field(
        default="lean", metadata={"help": "lean: S layers own no index weights and pages; audited: they do"}
    )
    audit_interval: int = field(default=64, metadata={"help": "audited: steps between shadow selections"})
    probe_interval: int = field(default=16, metadata={"help": "steps between per-layer timings; 0: never"})
    seed: int = field(default=0, metadata={"help": "of dummy weights"})
    num_threads: int | None = field(default=None, metadata={"help": "CPU threads per rank; default: cores / ranks"})

    def __post_init__(self) -> None:
        _choice("backend", self.backend, ("auto", "torch", "triton", "aiter"))
        _choice("dtype", self.dtype, ("auto", "bfloat16", "float32"))
        _choice("load_format", self.load_format, ("auto", "dummy"))
        _choice("index_reuse", self.index_reuse, ("lean", "audited"))
        for name, low in (
            ("tensor_parallel_size", 1),
            ("max_model_len", 1),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("num_pages", 1),
            ("audit_interval", 1),
            ("probe_interval", 0),
            ("num_threads", 1),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{name} must be an integer >= {low}, got {value!r}")
        if not isinstance(self.memory_fraction, int | float) or not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"memory_fraction must be in (0, 1], got {self.memory_fraction!r}")
        if not isinstance(self.hf_overrides, dict):
            raise ConfigError(f"hf_overrides must be an object, got {self.hf_overrides!r}")

    @classmethod
    def from_kwargs(cls, model: str | Path, **kwargs: Any) -> EngineConfig:
        """As the constructor, but an unknown name is a ConfigError with the known ones."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(kwargs.keys() - known):
            raise ConfigError(f"unknown settings {unknown}; known: {sorted(known)}")
        return cls(model=str(model), **kwargs)

    @property
    def index_settings(self) -> dict[str, Any]:
        """The index cache knobs that were set here, for `index_knobs`."""
        knobs = {key: getattr(self, key) for key in KNOBS if getattr(self, key) is not None}
        # Asking for a pattern or frequency here is asking for the index cache.
        return knobs


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def resolve_model(config: EngineConfig) -> tuple[ModelConfig, IndexKnobs]:
    """Read and check config.json with the overrides on it. Reads no tensor and imports no torch.

    Raises CheckpointError or ConfigError; an illegal index schedule is found here, before any weight is read.
    """
    raw = read_json(Path(config.model) / "config.json")
    model = ModelConfig.from_hf(merge_overrides(raw, config.hf_overrides))
    knobs = index_knobs(raw, config.hf_overrides, config.index_settings)
    knobs.build_plan(model.is_sparse)
    if config.max_model_len is not None and config.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len={config.max_model_len} exceeds the checkpoint's "
            f"max_position_embeddings={model.max_position_embeddings}"
        )
    return model, knobs
