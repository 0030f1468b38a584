"""RoPE scaling: read strictly from config.json, and the frequencies of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLRotaryEmbedding

from engine.config import EngineConfig, ModelConfig, merge_overrides, resolve_model
from engine.errors import CheckpointError, ConfigError
from engine.model.rope import frequencies, rope_table
from engine.rope import RopeScaling
from tests.unit.test_config import checkpoint, flat, refused, without, wrapped

POSITIONS = 1048576
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 524288}
SCALINGS: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "yarn": YARN,
    "yarn, of this length": {"rope_type": "yarn", "factor": 1.5},
    "yarn, trained for little": YARN | {"original_max_position_embeddings": 4096, "factor": 256},
    "yarn, factor 1": YARN | {"factor": 1, "original_max_position_embeddings": POSITIONS},
    "yarn, other betas": YARN | {"beta_fast": 8, "beta_slow": 2.5},
    "yarn, not truncated": YARN | {"truncate": False, "beta_fast": 3},
    "yarn, attention": YARN | {"attention_factor": 0.75},
    "yarn, mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.4},
}


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("theta", [5e6, 1e4])
def test_frequencies_equal_those_of_transformers(place: str, scaling: dict[str, Any], theta: float) -> None:
    model = ModelConfig.from_hf(flat(rope_theta=theta, **{place: dict(scaling)}))
    config = MiniMaxM3VLTextConfig(
        rope_theta=theta,
        partial_rotary_factor=0.5,
        max_position_embeddings=POSITIONS,
        rope_scaling=dict(scaling),
        head_dim=128,
    )
    reference = MiniMaxM3VLRotaryEmbedding(config)
    ours = frequencies(model.rotary_dim, model.rope_theta, model.rope_scaling)
    assert ours.shape == (32,)
    assert torch.equal(ours, reference.inv_freq)
    where = torch.arange(300)
    cos, sin = reference(torch.zeros(1), where[None])
    table = rope_table(300, model.rotary_dim, model.rope_theta, model.rope_scaling)
    assert torch.equal(table, torch.cat((cos[0, :, :32], sin[0, :, :32]), -1))


def test_the_cases_differ() -> None:
    """The comparison above would see a scaling that is ignored."""
    tables = set()
    for scaling in SCALINGS.values():
        model = ModelConfig.from_hf(flat(rope_scaling=scaling))
        tables.add(tuple(rope_table(9, model.rotary_dim, model.rope_theta, model.rope_scaling).flatten().tolist()))
    assert len(tables) == len(SCALINGS) - 1, "a factor of 1 is the plain table"


def test_read_from_either_place_and_from_overrides() -> None:
    wanted = RopeScaling("yarn", 4.0, 524288, attention_factor=pytest.approx(1.13863, abs=1e-5))
    assert ModelConfig.from_hf(wrapped(flat(rope_scaling=YARN))).rope_scaling == wanted
    assert ModelConfig.from_hf(merge_overrides(wrapped(), {"rope_scaling": YARN})).rope_scaling == wanted
    older = {"type": "yarn", **without(YARN, "rope_type")}
    assert ModelConfig.from_hf(flat(rope_scaling=older, rope_parameters=older)).rope_scaling == wanted
    whole = {"rope_theta": 5000000, "partial_rotary_factor": 0.5, "mscale": None, **YARN}
    bare = without(without(without(flat(), "rope_theta"), "rotary_dim"), "partial_rotary_factor")
    # As transformers saves a plain model, with an override.
    plain = {"rope_theta": 5000000, "partial_rotary_factor": 0.5, "rope_type": "default"}
    assert ModelConfig.from_hf(flat(rope_parameters=plain, rope_scaling=YARN)).rope_scaling == wanted
    model = ModelConfig.from_hf(bare | {"rope_parameters": whole})
    assert (model.rope_scaling, model.rope_theta, model.rotary_dim) == (wanted, 5e6, 64)


def test_plain_rope_is_no_scaling() -> None:
    for plain in (None, {}, {"rope_type": "default"}, {"type": "default", "rope_theta": 5e6, "factor": None}):
        assert ModelConfig.from_hf(flat(rope_scaling=plain)) == ModelConfig.from_hf(flat())
        assert ModelConfig.from_hf(flat(rope_parameters=plain)) == ModelConfig.from_hf(flat())


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type='dynamic' is not supported, only 'default', 'linear'"),
        ({"rope_type": "longrope", "factor": 2.0}, "rope_type='longrope' is not supported"),
        ({"rope_type": ["yarn"]}, r"rope_type=\['yarn'\] is not supported"),
        ({"rope_type": 5}, "rope_type=5 is not supported"),
        ({"type": "linear", "rope_type": "yarn", "factor": 2.0}, "sets type='linear' and rope_type='yarn'"),
        ({"factor": 2.0}, "unknown key 'factor'=2.0; rope_type='default' takes no others"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "unknown key 'beta_fast'=32.*'linear' takes factor"),
        (YARN | {"mrope_section": [8, 12, 12]}, "unknown key 'mrope_section'"),
        ({"rope_type": "linear"}, "rope_scaling misses factor, which rope_type='linear' needs"),
        ({"rope_type": "yarn"}, "misses factor"),
        *(
            (YARN | {"factor": bad}, "factor must be a number from 1 on, got")
            for bad in (0.5, 0, -4.0, "4", True, [4], float("nan"), float("inf"), 10**400)
        ),
        *((YARN | {"beta_fast": bad}, "beta_fast must be a positive number") for bad in (0, -1, "32", True)),
        (YARN | {"beta_fast": 1, "beta_slow": 1}, "beta_fast=1 must be greater than beta_slow=1"),
        (YARN | {"attention_factor": 0}, "attention_factor must be a positive number, got 0"),
        (YARN | {"attention_factor": 1.0, "mscale": 1.0}, "sets attention_factor and mscale: keep one"),
        (YARN | {"mscale": 1.0}, "mscale and mscale_all_dim have an effect together only"),
        (YARN | {"truncate": 1}, "truncate must be true or false, got 1"),
        *(
            (YARN | {"original_max_position_embeddings": bad}, "original_max_position_embeddings must be an integer in")
            for bad in (0, -1, "8", 8.0, True, 2**31)
        ),
        (YARN | {"factor": 1.5}, "max_position_embeddings=1048576 is more than .*=524288 times factor=1.5"),
        (YARN | {"factor": 2**13}, "factor=8192 times 524288 positions is more than 2147483647"),
        ([], "rope_scaling must be an object, got"),
        ("yarn", "rope_scaling must be an object, got 'yarn'"),
        (YARN | {"rope_theta": 1e6}, "rope_theta=5000000 contradicts rope_scaling.rope_theta=1000000.0"),
        (YARN | {"partial_rotary_factor": 1.0}, "partial_rotary_factor=0.5 contradicts"),
    ],
)
def test_what_is_refused(scaling: Any, message: str) -> None:
    refused(flat(rope_scaling=scaling), message)


def test_contradictions_between_the_places() -> None:
    refused(flat(rope_scaling=YARN, rope_parameters=YARN | {"factor": 8.0}), "contradicts rope_parameters")
    refused(flat(rope_theta=1.0, rope_scaling=YARN), "rope_theta=1.0 must be above 1 for rope_type='yarn'")


def test_positions_beyond_the_scaled_limit_are_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, wrapped(flat(rope_scaling=YARN)))
    model, _ = resolve_model(EngineConfig(path, max_model_len=4 * 524288))
    assert model.max_positions == 4 * 524288
    with pytest.raises(
        ConfigError, match="max_model_len=2097153 exceeds the checkpoint's limit of 2097152 positions, 5"
    ):
        resolve_model(EngineConfig(path, max_model_len=4 * 524288 + 1))
    linear = {"rope_scaling": {"rope_type": "linear", "factor": 1.5, "original_max_position_embeddings": None}}
    plain = checkpoint(tmp_path, wrapped())
    resolve_model(EngineConfig(plain, hf_overrides=linear, max_model_len=3 * 524288))
    with pytest.raises(ConfigError, match=r"exceeds .* 1572864 positions, 1048576 times the factor 1\.5 of its linear"):
        resolve_model(EngineConfig(plain, hf_overrides=linear, max_model_len=3 * 524288 + 1))
    with pytest.raises(CheckpointError, match="rope_type='dynamic' is not supported"):
        resolve_model(EngineConfig(plain, hf_overrides={"rope_scaling": {"rope_type": "dynamic", "factor": 2}}))
