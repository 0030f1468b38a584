"""config.json's quantization_config: which weights of a checkpoint are block-scaled, and how."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from engine.errors import CheckpointError

Format = Literal["mxfp8", "mxfp4"]
FORMATS: frozenset[str] = frozenset(get_args(Format))

_KEY = "quantization_config"
_SUPPORTED = "mxfp8, and quark with mxfp4 weights"
# What a module may be called besides its canonical name: with a wrapper's prefix, and as transformers names it in
# memory, which is what a quantiser that runs there writes down.
_PREFIXES = (
    ("model.", "language_model.model."),
    ("model.", "model.language_model."),
    ("lm_head", "language_model.lm_head"),
)
_IN_MEMORY = (
    ("block_sparse_moe.", "mlp."),
    ("self_attn.index_q_", "self_attn.indexer.q_"),
    ("self_attn.index_k_", "self_attn.indexer.k_"),
)
_PROJECTIONS = ((".w1", ".gate_proj"), (".w3", ".up_proj"), (".w2", ".down_proj"))
# The same the other way round, for names and parts of names.
_CANONICAL = (
    *((re.compile(rf"^{re.escape(theirs)}"), ours) for ours, theirs in _PREFIXES),
    (re.compile(r"\bmlp\.(?=(?:experts|shared_experts|gate)(?:\.|$))"), "block_sparse_moe."),
    (re.compile(r"\bindexer\.(?=[qk]_)"), "index_"),
    *((re.compile(rf"(\.experts\.\d+)\{theirs}(?=\.|$)"), rf"\1{ours}") for ours, theirs in _PROJECTIONS),
)
_MXFP8_KEYS = (
    "quant_method", "activation_scheme", "weight_block_size", "ignored_layers", "modules_to_not_convert", "fmt",
    "scale_fmt",
)  # fmt: skip
_QUARK_KEYS = (
    "quant_method", "global_quant_config", "layer_quant_config", "exclude", "export",
    # How the values were found, and by what: nothing about what is stored.
    "algo_config", "pre_quant_opt_config", "quant_mode", "version", "quark_version", "log_severity_level",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """Which linear layers are stored in which block-scaled format.

    default: of modules that no pattern names.  layers: (pattern, format) of those that one names; the first that
    matches counts.  exclude: patterns of modules that are not quantised, whatever the others say.

    A pattern is a run of the dotted parts of a module's name ("lm_head", "block_sparse_moe.gate"), a glob over the
    whole name ("*self_attn*"), or a regular expression that is matched from its start ("re:.*mlp"). A module that
    matches takes all that is inside it along.
    """

    default: Format | None
    layers: tuple[tuple[str, Format | None], ...] = ()
    exclude: tuple[str, ...] = ()
    _excluded: _Patterns = field(init=False, repr=False, compare=False)
    _layers: tuple[tuple[_Patterns, Format | None], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_excluded", _Patterns.of(self.exclude))
        object.__setattr__(self, "_layers", tuple((_Patterns.of([pattern]), kind) for pattern, kind in self.layers))

    @classmethod
    def from_hf(cls, raw: Any) -> QuantConfig | None:
        """Read config.json's object; None where there is none. Raises CheckpointError, naming key and value."""
        if raw is None:
            return None
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"config.json: {_KEY} must be an object, got {raw!r}")
        method = raw.get("quant_method")
        if method == "mxfp8":
            return _read_mxfp8(raw)
        if method == "quark":
            return _read_quark(raw)
        raise CheckpointError(f"config.json: {_KEY}.quant_method={method!r} is not supported, only {_SUPPORTED}")

    @property
    def formats(self) -> frozenset[str]:
        """All that occur."""
        return frozenset(kind for kind in (self.default, *(kind for _, kind in self.layers)) if kind is not None)

    def format_of(self, name: str) -> Format | None:
        """What the weight of a linear layer is stored in; None: a plain dtype. name: canonical, with or without
        ".weight"."""
        module = name.removesuffix(".weight")
        if self._excluded.match(module):
            return None
        for patterns, kind in self._layers:
            if patterns.match(module):
                return kind
        return self.default


@dataclass(frozen=True, slots=True)
class _Patterns:
    """plain: runs of parts of canonical names, by the first part.  regexes: all other patterns."""

    plain: dict[str, set[str]]
    regexes: tuple[re.Pattern[str], ...]

    @classmethod
    def of(cls, patterns: Iterable[str]) -> _Patterns:
        plain: dict[str, set[str]] = {}
        regexes = []
        for pattern in patterns:
            if pattern.startswith("re:"):
                regexes.append(_compile(pattern))
            elif any(letter in pattern for letter in "*?["):
                regexes += [re.compile(fnmatch.translate(glob)) for glob in (pattern, f"{pattern}.*")]
            else:
                for theirs, ours in _CANONICAL:
                    pattern = theirs.sub(ours, pattern)
                plain.setdefault(pattern.split(".")[0], set()).add(pattern)
        return cls(plain, tuple(regexes))

    def match(self, module: str) -> bool:
        """module: canonical."""
        parts = module.split(".")
        for start, first in enumerate(parts):
            if (candidates := self.plain.get(first)) is not None and any(
                ".".join(parts[start:stop]) in candidates for stop in range(start + 1, len(parts) + 1)
            ):
                return True
        return bool(self.regexes) and any(regex.match(name) for name in _spellings(module) for regex in self.regexes)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise CheckpointError(f"config.json: {_KEY}: {pattern!r} is not a regular expression: {error}") from error


def _spellings(name: str) -> tuple[str, ...]:
    """All that one module goes by, the canonical name first."""
    names = [name]
    if ".experts." in name:
        names += [name.removesuffix(ours) + theirs for ours, theirs in _PROJECTIONS if name.endswith(ours)]
    names += [known.replace(ours, theirs) for ours, theirs in _IN_MEMORY if ours in name for known in names]
    return (
        *names,
        *(theirs + known.removeprefix(ours) for ours, theirs in _PREFIXES if name.startswith(ours) for known in names),
    )


def _read_mxfp8(raw: Mapping[str, Any]) -> QuantConfig:
    _refuse_unknown(raw, _MXFP8_KEYS, _KEY)
    # Only weights are scaled here: activations stay in the compute dtype, and a dynamic scheme stores nothing of them.
    _only(raw, _KEY, "activation_scheme", ("dynamic",))
    _only(raw, _KEY, "weight_block_size", ([1, 32],))
    _only(raw, _KEY, "fmt", ("e4m3",))
    _only(raw, _KEY, "scale_fmt", ("ue8m0",))
    ignored = (*_patterns(raw, "ignored_layers"), *_patterns(raw, "modules_to_not_convert"))
    return QuantConfig("mxfp8", exclude=tuple(dict.fromkeys(ignored)))


def _read_quark(raw: Mapping[str, Any]) -> QuantConfig:
    _refuse_unknown(raw, _QUARK_KEYS, _KEY)
    _only(_object(raw, _KEY, "export"), f"{_KEY}.export", "weight_format", ("real_quantized",))
    layers, where = _object(raw, _KEY, "layer_quant_config"), f"{_KEY}.layer_quant_config"
    config = QuantConfig(
        _quark_format(_object(raw, _KEY, "global_quant_config"), f"{_KEY}.global_quant_config"),
        tuple((each, _quark_format(_object(layers, where, each), f"{where}.{each}")) for each in layers),
        tuple(dict.fromkeys(_patterns(raw, "exclude"))),
    )
    if config.default is None and not any(kind for _, kind in config.layers):
        raise CheckpointError(f"config.json: {_KEY} of quark names no weights, neither globally nor by layer")
    return config


def _quark_format(config: Mapping[str, Any], where: str) -> Format | None:
    """Of one of quark's layer configs, {"weight": {...}, "input_tensors": {...}, ...}."""
    _refuse_unknown(config, ("weight", "input_tensors", "target_device"), where)
    # As in mxfp8: a dynamic scheme of activations stores nothing. A static one stores scales that nobody would use.
    _only(_object(config, where, "input_tensors"), f"{where}.input_tensors", "is_dynamic", (True,))
    weight = config.get("weight")
    if isinstance(weight, list) and len(weight) == 1:
        [weight] = weight
    if weight is None:
        return None
    where = f"{where}.weight"
    if not isinstance(weight, Mapping):
        raise CheckpointError(f"config.json: {where} must be one object, got {weight!r}")
    element = "mx_element_dtype" if weight.get("dtype") == "mx" else "dtype"
    if weight.get(element) is None:
        raise CheckpointError(f"config.json: {where} misses {element}")
    _only(weight, where, element, ("fp4", "fp4_e2m1"))
    _only(weight, where, "qscheme", ("per_group",))
    _only(weight, where, "group_size", (32,))
    _only(weight, where, "block_size", (32,))
    _only(weight, where, "scale_format", ("e8m0",))
    _only(weight, where, "ch_axis", (-1, 1))
    _only(weight, where, "is_dynamic", (False,))
    return "mxfp4"


def _object(raw: Mapping[str, Any], where: str, key: str) -> Mapping[str, Any]:
    value = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config.json: {where}.{key} must be an object, got {value!r}")
    return value


def _patterns(raw: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = raw.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise CheckpointError(f"config.json: {_KEY}.{key} must be a list of module names, got {value!r}")
    return tuple(value)


def _only(raw: Mapping[str, Any], where: str, key: str, allowed: Collection[Any]) -> None:
    """Refuse any value that is set and not among `allowed`."""
    value = raw.get(key)
    if value is not None and not any(type(value) is type(each) and value == each for each in allowed):
        wanted = " or ".join(map(repr, allowed))
        raise CheckpointError(f"config.json: {where}.{key}={value!r} is not supported, only {wanted}")


def _refuse_unknown(raw: Mapping[str, Any], known: Collection[str], where: str) -> None:
    for key, value in raw.items():
        # Empty says that it is not used; quark writes down all that it could do.
        if key not in known and value not in (None, False, [], {}, ""):
            raise CheckpointError(
                f"config.json: {where}: unknown key {key!r}={value!r} might change what is stored; "
                f"known: {', '.join(sorted(known))}; hf_overrides can set it to null"
            )
