"""A context extended by RoPE scaling, against transformers reading the same config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import RequestError
from tests.checkpoints import make_checkpoint
from tests.golden.compare import Observed, Reference, greedy, observe, open_llm
from tests.golden.configs import make_prompt
from tests.golden.oracle import Oracle

LENGTH = 700
ORIGINAL = 160
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL, "beta_fast": 4}
SCALINGS: list[dict[str, Any]] = [
    YARN,
    YARN | {"mscale": 1.0, "mscale_all_dim": 0.2, "truncate": False},
    {"rope_type": "linear", "factor": 4.0},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rope")
    return make_checkpoint(path, seed=51, layers=4, heads=4, max_positions=ORIGINAL, rope_theta=1e4)


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Observed:
    """The model without scaling, far beyond what it is made for."""
    with open_llm(checkpoint, hf_overrides={"max_position_embeddings": 1024}) as llm:
        return observe(llm, make_prompt(LENGTH, vocab_size=500), 3)


@pytest.mark.parametrize("scaling", SCALINGS, ids=["yarn", "yarn-mscale", "linear"])
def test_scaled_positions_equal_the_oracle(
    checkpoint: Path, plain: Observed, tmp_path: Path, scaling: dict[str, Any]
) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((checkpoint / "config.json").read_text())
    if scaling["rope_type"] == "linear":
        config["text_config"]["max_position_embeddings"] = 256
    config["text_config"]["rope_scaling"] = scaling
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    limit = int(scaling["factor"] * (256 if scaling["rope_type"] == "linear" else ORIGINAL))
    prompt = make_prompt(LENGTH, vocab_size=500)
    with open_llm(tmp_path, chunk=300) as llm:
        assert llm.info.max_model_len == limit
        observed = observe(llm, prompt, 3)
        llm.generate([make_prompt(limit - 1, vocab_size=500)], greedy(1))
        with pytest.raises(RequestError) as caught:
            llm.generate([make_prompt(limit, vocab_size=500)], greedy(1))
    assert caught.value.code == "context_length_exceeded" and str(limit) in str(caught.value)
    Reference(Oracle(tmp_path)).check(observed)
    # The comparison would see a scaling that is ignored.
    ours, others = observed.output.prompt_logprobs, plain.output.prompt_logprobs
    assert ours is not None and others is not None
    pairs = zip(ours[1:], others[1:], prompt[1:], strict=True)
    assert max(abs(a[token] - b[token]) for a, b, token in pairs if a and b) > 0.1
