"""RoPE as config.json describes it: the base, which part of a head turns, and how the context was extended.

Released files say it in three places: `rope_theta` and `partial_rotary_factor` beside the other sizes, `rope_scaling`
(older) or `rope_parameters` (newer, which may hold all of it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import Any

from engine.errors import CheckpointError

PLACES = ("rope_scaling", "rope_parameters")
# Kernels index positions with int32.
MAX_POSITIONS = 2**31 - 1
_MOVED = ("rope_theta", "partial_rotary_factor")
_PLAIN = ({"rope_type": "default"}, {"type": "default"})
_TYPES: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "yarn": frozenset(
        [
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ]
    ),
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Frequencies changed for a longer context than the model was first trained for.

    kind: "linear": all frequencies are divided by `factor`. "yarn" (arXiv 2309.00071): only the slow ones are, those
    that turn less than beta_slow times within original_max_positions; those that turn more than beta_fast times are
    kept, and the ones between are blended.
    attention_factor: cosines and sines are multiplied by it, so that scores are by its square.
    truncate: the ends of the blend are whole frequency numbers.
    """

    kind: str
    factor: float
    original_max_positions: int
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @property
    def max_positions(self) -> int:
        """How many positions the scaled frequencies are for."""
        return int(self.original_max_positions * self.factor)


def lift(text: Mapping[str, Any]) -> dict[str, Any]:
    """The text config with `rope_theta` and `partial_rotary_factor` beside the other sizes, wherever they stood."""
    lifted = dict(text)
    for place in PLACES:
        for key in _MOVED:
            value = _object(text, place).get(key)
            if value is None:
                continue
            if lifted.get(key) is not None and lifted[key] != value:
                raise CheckpointError(f"config.json: {key}={lifted[key]!r} contradicts {place}.{key}={value!r}")
            lifted[key] = value
    return lifted


def read_rotary_dim(text: Mapping[str, Any], head_dim: int) -> int:
    """How many dimensions of a head turn, from `rotary_dim`, `partial_rotary_factor`, or both. CheckpointError."""
    rotary_dim = text.get("rotary_dim")
    factor = text.get("partial_rotary_factor")
    if rotary_dim is None and factor is None:
        raise CheckpointError("config.json misses rotary_dim (or partial_rotary_factor)")
    if factor is not None and (isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1):
        raise CheckpointError(f"config.json: partial_rotary_factor must be in (0, 1], got {factor!r}")
    from_factor = None if factor is None else round(head_dim * factor)
    if rotary_dim is not None and from_factor is not None and rotary_dim != from_factor:
        raise CheckpointError(
            f"config.json: rotary_dim={rotary_dim} contradicts partial_rotary_factor={factor} of head_dim={head_dim}"
        )
    dim = rotary_dim if rotary_dim is not None else from_factor
    if isinstance(dim, bool) or not isinstance(dim, int) or not 0 < dim <= head_dim or dim % 2:
        raise CheckpointError(f"config.json: rotary_dim must be even and in (0, head_dim={head_dim}], got {dim!r}")
    return dim


def read_scaling(text: Mapping[str, Any], max_position_embeddings: int) -> RopeScaling | None:
    """What `rope_scaling` or `rope_parameters` asks for; None: the plain frequencies.

    Raises CheckpointError for a type that is not supported, a key that the type does not take, or a wrong value.
    """
    found = [(place, values) for place in PLACES if (values := _given(text, place)) and values not in _PLAIN]
    if not found:
        return None
    place, values = found[0]
    if len(found) > 1 and values != found[1][1]:
        raise CheckpointError(f"config.json: rope_scaling={values!r} contradicts rope_parameters={found[1][1]!r}")
    kind = _rope_type(place, values)
    rest = {key: value for key, value in values.items() if key not in ("type", "rope_type")}
    for key, value in rest.items():
        if key not in _TYPES[kind]:
            takes = ", ".join(sorted(_TYPES[kind])) or "no others"
            raise CheckpointError(
                f"config.json: {place}: unknown key {key!r}={value!r}; rope_type={kind!r} takes {takes}"
            )
    if kind == "default":
        return None
    factor = _number(place, rest, "factor", least=1.0)
    if factor is None:
        raise CheckpointError(f"config.json: {place} misses factor, which rope_type={kind!r} needs")
    scaling = RopeScaling(kind, factor, max_position_embeddings)
    if kind == "yarn":
        if text["rope_theta"] <= 1:
            raise CheckpointError(
                f"config.json: rope_theta={text['rope_theta']!r} must be above 1 for rope_type='yarn'"
            )
        scaling = _read_yarn(place, rest, factor, max_position_embeddings)
    if scaling.max_positions > MAX_POSITIONS:
        raise CheckpointError(
            f"config.json: {place}: factor={factor:g} times {scaling.original_max_positions} positions is more than "
            f"{MAX_POSITIONS}"
        )
    return scaling


def _read_yarn(place: str, values: Mapping[str, Any], factor: float, max_position_embeddings: int) -> RopeScaling:
    original = values.get("original_max_position_embeddings", max_position_embeddings)
    if isinstance(original, bool) or not isinstance(original, int) or not 0 < original <= MAX_POSITIONS:
        raise CheckpointError(
            f"config.json: {place}.original_max_position_embeddings must be an integer in [1, {MAX_POSITIONS}], "
            f"got {original!r}"
        )
    if max_position_embeddings > original * factor:
        raise CheckpointError(
            f"config.json: max_position_embeddings={max_position_embeddings} is more than "
            f"{place}.original_max_position_embeddings={original} times factor={factor:g}"
        )
    truncate = values.get("truncate", True)
    if not isinstance(truncate, bool):
        raise CheckpointError(f"config.json: {place}.truncate must be true or false, got {truncate!r}")
    beta_fast = _number(place, values, "beta_fast") or 32.0
    beta_slow = _number(place, values, "beta_slow") or 1.0
    if beta_fast <= beta_slow:
        raise CheckpointError(
            f"config.json: {place}.beta_fast={beta_fast:g} must be greater than beta_slow={beta_slow:g}"
        )
    return RopeScaling(
        "yarn", factor, original, _attention_factor(place, values, factor), beta_fast, beta_slow, truncate
    )


def _attention_factor(place: str, values: Mapping[str, Any], factor: float) -> float:
    """As given, or the paper's 0.1 ln(factor) + 1, or the quotient of two such with weights of their own."""
    given = _number(place, values, "attention_factor")
    mscales = [_number(place, values, key) for key in ("mscale", "mscale_all_dim")]
    if given is not None and any(mscales):
        raise CheckpointError(f"config.json: {place} sets attention_factor and mscale: keep one")
    if given is not None:
        return given
    if (mscales[0] is None) != (mscales[1] is None):
        raise CheckpointError(f"config.json: {place}: mscale and mscale_all_dim have an effect together only")
    over, under = (0.1 * (1.0 if each is None else each) * log(factor) + 1.0 for each in mscales)
    return over if mscales[0] is None else over / under


def _given(text: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What stands there and is set, but for what `lift` moves."""
    values = _object(text, place)
    return {key: value for key, value in values.items() if value is not None and key not in _MOVED}


def _object(text: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    values = text.get(place)
    if values is not None and not isinstance(values, Mapping):
        raise CheckpointError(f"config.json: {place} must be an object, got {values!r}")
    return values or {}


def _rope_type(place: str, values: Mapping[str, Any]) -> str:
    kind = values.get("rope_type", values.get("type", "default"))
    if values.get("type", kind) != kind:
        raise CheckpointError(f"config.json: {place} sets type={values['type']!r} and rope_type={kind!r}")
    if not isinstance(kind, str) or kind not in _TYPES:
        # With "dynamic" the frequencies grow with the sequence, and keys that are stored were turned by others.
        raise CheckpointError(
            f"config.json: {place}: rope_type={kind!r} is not supported, only {', '.join(map(repr, _TYPES))}"
        )
    return kind


def _number(place: str, values: Mapping[str, Any], key: str, least: float = 0.0) -> float | None:
    """A number from `least` on (above it, where that is 0); None when it is not set."""
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < 1e9 and value >= least):
        wanted = f"a number from {least:g} on" if least else "a positive number"
        raise CheckpointError(f"config.json: {place}.{key} must be {wanted}, got {value!r}")
    return float(value)
