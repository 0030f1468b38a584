"""The engine's settings, and what start-up makes of them together with config.json."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from engine.checkpoint_hash import checkpoint_hash
from engine.errors import ConfigError
from engine.model_config import PAGE_SIZE, ModelConfig, read_json
from engine.msa.plan import KNOBS, IndexKnobs, resolve_knobs
from engine.msa.plan_file import PLAN_FILE_NAME, PlanFile

__all__ = [
    "PAGE_SIZE",
    "EngineConfig",
    "ModelConfig",
    "index_knobs",
    "merge_overrides",
    "read_json",
    "resolve_model",
]

MAX_INTEGER = 2**31 - 1
_INTEGERS = {  # the least value of each
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


def merge_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with `hf_overrides` laid over its text config, without the index cache knobs of the overrides.

    Objects merge key by key. An override may stand at the top level or inside `text_config`, whatever the layout of
    config.json: it always means the text decoder, the only part that is served.
    """
    flat = {key: value for key, value in overrides.items() if key not in KNOBS and key != "text_config"}
    for key, value in _text_of(overrides, "hf_overrides").items():
        if key in flat and flat[key] != value:
            raise ConfigError(
                f"hf_overrides sets {key} twice: {flat[key]!r} at the top level and {value!r} in text_config"
            )
        if key not in KNOBS:
            flat[key] = value
    if isinstance(text := config.get("text_config"), Mapping):
        if (key := "quantization_config") in flat:
            # Released files have it outside; an override of a part of it means that one.
            given = text.get(key)
            text = {**text, key: config.get(key) if given is None else given}
            config = {name: value for name, value in config.items() if name != key}
        return {**config, "text_config": _merge(text, flat)}
    return _merge(config, flat)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = base.get(key)
        merged[key] = _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _text_of(config: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    text = config.get("text_config")
    if text is None:
        return {}
    if not isinstance(text, Mapping):
        raise ConfigError(f"{source}: text_config must be an object, got {text!r}")
    return text


def index_knobs(
    config: Mapping[str, Any],
    overrides: Mapping[str, Any],
    settings: Mapping[str, Any],
    plan_file: Path | None = None,
) -> IndexKnobs:
    """The index cache knobs of config.json, `hf_overrides` and the engine's settings, in rising precedence.

    plan_file: beside config.json; counts where none of them names a schedule, or switches sharing off.
    """
    beside = {} if plan_file is None else {"index_plan_file": str(plan_file)}
    return resolve_knobs(
        [
            (PLAN_FILE_NAME, beside),
            ("config.json", _knobs_of(config, "config.json")),
            ("hf_overrides", _knobs_of(overrides, "hf_overrides")),
            ("settings", settings),
        ]
    )


def _knobs_of(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    levels = [config, _text_of(config, source)]
    knobs: dict[str, Any] = {}
    for level in levels:
        for key in KNOBS:
            if level.get(key) is None:
                continue
            if key in knobs and (type(knobs[key]), knobs[key]) != (type(level[key]), level[key]):
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
    backend: str = field(default="auto", metadata={"help": "kernels: triton (GPU), aiter (ROCm), torch (CPU) or auto"})
    dtype: str = field(default="auto", metadata={"help": "compute dtype: bfloat16, float32, or auto"})
    tensor_parallel_size: int = field(default=1, metadata={"help": "ranks of one replica"})
    max_model_len: int | None = field(
        default=None, metadata={"help": "longest prompt plus output, in tokens; default: the checkpoint's limit"}
    )
    max_num_seqs: int = field(default=16, metadata={"help": "sequences that run at the same time"})
    max_num_batched_tokens: int = field(default=2048, metadata={"help": "token budget of one step"})
    max_num_prefill_tokens: int | None = field(
        default=None,
        metadata={
            "help": "prompt tokens of a step in which other requests decode, and so wait for them; default: 256, on a "
            "GPU max_num_batched_tokens"
        },
    )
    long_prefill_token_threshold: int | None = field(
        default=None,
        metadata={
            "help": "a prompt with more tokens to compute is long: shorter ones may pass it; 0: in order of arrival; "
            "default: max_num_batched_tokens"
        },
    )
    num_pages: int | None = field(
        default=None, metadata={"help": "KV pages of 128 tokens; default: what the memory allows"}
    )
    memory_fraction: float | None = field(
        default=None, metadata={"help": "share of free memory that KV pages may take; default: 0.85 on GPU, 0.5 on CPU"}
    )
    kv_cache_dtype: str = field(
        default="auto", metadata={"help": "of stored keys and values: auto: the compute dtype; fp8: half the bytes"}
    )
    index_cache_dtype: str = field(
        default="auto",
        metadata={"help": "of stored index keys: auto, or fp8, which can change the selection where scores are close"},
    )
    enable_prefix_caching: bool = field(default=True, metadata={"help": "reuse pages of equal prefixes"})
    load_format: str = field(default="auto", metadata={"help": "auto: read tensors; dummy: seeded random weights"})
    weight_cache_dir: str | None = field(
        default=None,
        metadata={"help": "where each rank keeps its share of the weights for faster later starts, e.g. a local disk"},
    )
    hf_overrides: dict[str, Any] = field(default_factory=dict, metadata={"help": "laid over config.json (JSON)"})
    use_index_cache: bool | None = field(default=None, metadata={"help": "share selections between layers"})
    index_topk_freq: int | None = field(default=None, metadata={"help": "one sparse layer in this many selects"})
    index_topk_pattern: str | None = field(
        default=None, metadata={"help": "F (select) or S (reuse) per sparse layer; overrides the frequency"}
    )
    index_skip_topk_offset: int | None = field(
        default=None, metadata={"help": "sparse layers after the first that still select each for itself"}
    )
    index_plan_file: str | None = field(
        default=None, metadata={"help": "JSON plan file with a pattern, such as m3serve calibrate writes"}
    )
    index_reuse: str = field(
        default="lean", metadata={"help": "lean: S layers own no index weights and pages; audited: they do"}
    )
    audit_interval: int = field(default=64, metadata={"help": "audited: steps between shadow selections"})
    audit_overlap_floor: float | None = field(
        default=None,
        metadata={
            "help": "audited: while the mean overlap of reused selections is below it, every sparse layer selects for "
            "itself; default: off"
        },
    )
    audit_overlap_margin: float = field(
        default=0.05,
        metadata={"help": "audited: how far above the floor the overlap must be before layers reuse again"},
    )
    audit_trip_after: int = field(
        default=3, metadata={"help": "audited: audits in a row below the floor that it takes"}
    )
    audit_recover_after: int = field(
        default=10, metadata={"help": "audited: audits in a row above floor and margin that it takes to reuse again"}
    )
    probe_interval: int | None = field(
        default=None,
        metadata={
            "help": "steps between per-layer timings; 0: never; default: 16, on a GPU 2048, where such a step runs "
            "without its graph"
        },
    )
    enforce_eager: bool = field(default=False, metadata={"help": "GPU: run decode steps without captured graphs"})
    async_scheduling: bool | None = field(
        default=None, metadata={"help": "plan a step before the last one's tokens are known; default: on a GPU"}
    )
    self_test: bool = field(
        default=True, metadata={"help": "GPU: serve only if a tiny fixed model gives the stored logits on it"}
    )
    numa_pinning: bool | None = field(
        default=None,
        metadata={"help": "GPU: run a rank on the CPUs near its device; default: where the system tells which"},
    )
    seed: int = field(default=0, metadata={"help": "of dummy weights"})
    num_threads: int | None = field(default=None, metadata={"help": "CPU threads per rank; default: cores / ranks"})

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"model must be the path of a checkpoint directory, got {self.model!r}")
        _choice("backend", self.backend, ("auto", "torch", "triton", "aiter"))
        _choice("kv_cache_dtype", self.kv_cache_dtype, ("auto", "fp8"))
        _choice("index_cache_dtype", self.index_cache_dtype, ("auto", "fp8"))
        _choice("dtype", self.dtype, ("auto", "bfloat16", "float32"))
        _choice("load_format", self.load_format, ("auto", "dummy"))
        _choice("index_reuse", self.index_reuse, ("lean", "audited"))
        defaults = {each.name: each.default for each in fields(self)}
        for name, low in _INTEGERS.items():
            value = getattr(self, name)
            if value is None and defaults[name] is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_INTEGER:
                raise ConfigError(f"{name} must be an integer in [{low}, {MAX_INTEGER}], got {value!r}")
        fraction = self.memory_fraction
        if fraction is not None and (
            isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1
        ):
            raise ConfigError(f"memory_fraction must be in (0, 1], got {fraction!r}")
        self._check_guard()
        for name in ("enable_prefix_caching", "enforce_eager", "self_test"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("async_scheduling", "numa_pinning"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true, false or unset, got {getattr(self, name)!r}")
        cache_dir = self.weight_cache_dir
        if cache_dir is not None and (not isinstance(cache_dir, str) or not cache_dir):
            raise ConfigError(f"weight_cache_dir must be the path of a directory or unset, got {cache_dir!r}")
        if not isinstance(self.hf_overrides, dict):
            raise ConfigError(f"hf_overrides must be an object, got {self.hf_overrides!r}")
        resolve_knobs([("settings", self.index_settings)])

    def _check_guard(self) -> None:
        floor, margin = self.audit_overlap_floor, self.audit_overlap_margin
        if not _is_number(margin) or not 0 <= margin < 1:
            raise ConfigError(f"audit_overlap_margin must be in [0, 1), got {margin!r}")
        if floor is None:
            return
        if not _is_number(floor) or not 0 < floor < 1:
            raise ConfigError(f"audit_overlap_floor must be in (0, 1) or unset, got {floor!r}")
        if floor + margin > 1:
            raise ConfigError(
                f"audit_overlap_floor + audit_overlap_margin must be at most 1, the overlap of equal selections, got "
                f"{floor!r} + {margin!r}"
            )
        if self.index_reuse != "audited":
            raise ConfigError(
                f"audit_overlap_floor={floor!r} needs index_reuse=audited, got {self.index_reuse}: layers without an "
                "indexer cannot select for themselves"
            )

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
        return {key: getattr(self, key) for key in KNOBS if getattr(self, key) is not None}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def resolve_model(config: EngineConfig, raw: Mapping[str, Any] | None = None) -> tuple[ModelConfig, IndexKnobs]:
    """Read and check config.json with the overrides on it. Imports no torch, and reads no tensors but the samples that
    tell whether a plan file was calibrated on them.

    raw: in place of the checkpoint's config.json; weights are then not looked at.

    Raises CheckpointError or ConfigError; an illegal index schedule is found here, before any weight is loaded.
    """
    directory = Path(config.model)
    has_weights = raw is None and config.load_format != "dummy"
    if raw is None:
        raw = read_json(directory / "config.json")
    beside = directory / PLAN_FILE_NAME
    # A plan for the weights says nothing about random ones.
    found = beside if config.load_format != "dummy" and beside.exists() else None
    # The knobs first: a misspelt one in the overrides should be blamed on them, not on config.json.
    knobs = index_knobs(raw, config.hf_overrides, config.index_settings, found)
    model = ModelConfig.from_hf(merge_overrides(raw, config.hf_overrides))
    if knobs.plan_file is not None:
        _check_plan_file(knobs.plan_file, config, model, has_weights)
    knobs.build_plan(model.is_sparse)
    forced = (model.init_blocks + model.local_blocks) / model.topk_blocks
    if config.audit_overlap_floor is not None and config.audit_overlap_floor <= forced:
        raise ConfigError(
            f"audit_overlap_floor={config.audit_overlap_floor!r} would never be reached: {model.init_blocks} + "
            f"{model.local_blocks} of {model.topk_blocks} selected blocks are the same in every layer, so the overlap "
            f"is at least {forced:g}"
        )
    if config.max_model_len is not None and config.max_model_len > model.max_positions:
        limit = f"max_position_embeddings={model.max_position_embeddings}"
        if (scaling := model.rope_scaling) is not None:
            limit = (
                f"limit of {model.max_positions} positions, {scaling.original_max_positions} times the factor "
                f"{scaling.factor:g} of its {scaling.kind} RoPE"
            )
        raise ConfigError(f"max_model_len={config.max_model_len} exceeds the checkpoint's {limit}")
    return model, knobs


def _check_plan_file(plan: PlanFile, config: EngineConfig, model: ModelConfig, has_weights: bool) -> None:
    """ConfigError when the plan was calibrated on another model than this one."""
    what, num_sparse = f"index_plan_file {plan.path}", sum(model.is_sparse)
    if len(plan.pattern) != num_sparse:
        raise ConfigError(f"{what} has {len(plan.pattern)} letters, the model has {num_sparse} sparse layers")
    if plan.topk_blocks is not None and plan.topk_blocks != model.topk_blocks:
        raise ConfigError(
            f"{what} was calibrated with topk_blocks={plan.topk_blocks}, the model now has {model.topk_blocks}"
        )
    if plan.checkpoint_hash is None:
        return
    remedy = "calibrate this one (m3serve calibrate), or give its pattern as index_topk_pattern to use it all the same"
    if config.load_format == "dummy":
        raise ConfigError(f"{what} was calibrated on a checkpoint, load_format=dummy has random weights: {remedy}")
    if has_weights and (found := checkpoint_hash(Path(config.model))) != plan.checkpoint_hash:
        raise ConfigError(
            f"{what} was calibrated on a checkpoint with checkpoint_hash {plan.checkpoint_hash}, that of "
            f"{config.model} is {found}: {remedy}"
        )
