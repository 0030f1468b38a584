"""The memory budget: the chart's templates and its README agree with what the engine computes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import tools
from deploy.tools import ToolMissing
from engine import capacity
from engine.capacity import GIB, RELEASED, Footprint
from engine.config import ModelConfig, read_json
from tests.deploy import chart
from tests.deploy.chart import CHART, EXAMPLES, ROOT

try:
    tools.find("helm")
except ToolMissing as error:
    pytest.skip(str(error), allow_module_level=True)

M3 = ModelConfig.from_hf(read_json(ROOT / "tests" / "unit" / "m3_config.json"))
MEMORY_GIB = {"mi300x": 192, "mi325x": 256, "mi355x": 288, "h100": 79, "h200": 140}


def footprint(ranks: int, weights: str, element: int, index_layers: int = 57, **changes: int) -> Footprint:
    sizes = {"max_model_len": 131072, "max_num_seqs": 16, "max_num_batched_tokens": 8192, **changes}
    plan = "DDD" + "F" * index_layers + "S" * (57 - index_layers)
    elements = {"kv_element": element, "index_element": element}
    return Footprint(M3, plan, ranks, **elements, **sizes, format_of=RELEASED[weights])


def kv_tokens(gib: float, found: Footprint) -> int:
    """README.md's estimate; 0 when the weights do not fit."""
    weights_gib = round(capacity.checkpoint_bytes(M3, found.format_of) / GIB, 1)
    free_gib = gib - weights_gib / found.ranks - 4
    return max(0, int(free_gib * 0.85 * GIB / found.page_bytes())) * 128


@pytest.mark.parametrize(
    ("values", "gib", "ranks", "weights", "element", "index_layers"),
    [
        ({}, 192, 8, "bf16", 2, 57),
        ({"engine.kvCacheDtype": "fp8", "engine.indexCacheDtype": "fp8"}, 192, 8, "bf16", 1, 57),
        ({"accelerator": "mi325x", "engine.tensorParallelSize": 4}, 256, 4, "bf16", 2, 57),
        ({"engine.tensorParallelSize": 2, "model.format": "mxfp4"}, 192, 2, "mxfp4", 2, 57),
        ({"engine.indexCache.topkFreq": 4}, 192, 8, "bf16", 2, 15),
        ({"engine.indexCache.topkFreq": 4, "engine.indexCache.skipTopkOffset": 2}, 192, 8, "bf16", 2, 16),
        ({"engine.indexCache.topkPattern": "FSS" * 19}, 192, 8, "bf16", 2, 19),
        ({"engine.indexCache.topkFreq": 4, "engine.indexCache.reuse": "audited"}, 192, 8, "bf16", 2, 57),
    ],
    ids=str,
)
def test_estimate_of_kv_tokens(
    values: dict[str, Any], gib: float, ranks: int, weights: str, element: int, index_layers: int
) -> None:
    assert estimate(*chart.set_json(values)) == kv_tokens(gib, footprint(ranks, weights, element, index_layers))


def estimate(*arguments: str) -> int:
    return int(chart.ray_service(*arguments)["metadata"]["annotations"]["m3serve/kv-tokens-estimate"])


def test_capacity_table_of_the_readme() -> None:
    rows = 0
    for line in (CHART / "README.md").read_text().splitlines():
        name, _, rest = line.removeprefix("| ").partition(", ")
        if name not in MEMORY_GIB or not line.startswith("| "):
            continue
        ranks, *cells = (cell.strip() for cell in rest.rstrip(" |").split("|"))
        expected = []
        for weights in RELEASED:
            for element in (2, 1):
                tokens = kv_tokens(MEMORY_GIB[name], footprint(int(ranks), weights, element))
                expected.append(f"{tokens / 1e6:.2f}" if tokens else "-")
        assert cells == expected, line
        rows += 1
    assert rows == 2 * len(MEMORY_GIB)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_agree_with_the_plan(example: Path) -> None:
    """The chart takes a flat overhead off each GPU's memory, 4 GiB, and the plan what it consists of: about half."""
    values = yaml.safe_load(example.read_text())
    if (name := values["accelerator"]) not in capacity.DEVICES:
        assert values["model"]["format"] == "none", "not MiniMax-M3"
        return
    engine = values["engine"]
    freq = engine.get("indexCache", {}).get("topkFreq", 1)
    found = footprint(
        engine["tensorParallelSize"],
        values["model"]["format"],
        1 if engine.get("kvCacheDtype") == "fp8" else 2,
        -(-57 // freq),
        max_model_len=engine["maxModelLen"],
        max_num_seqs=engine.get("maxNumSeqs", 16),
    )
    index_element = 1 if engine.get("indexCacheDtype") == "fp8" else 2
    found = dataclasses.replace(found, index_element=index_element)
    fit = capacity.fit(found, sum(found.weights().values()), capacity.DEVICES[name])
    assert fit.reason is None
    pages = (fit.tokens - estimate("-f", str(example))) // 128
    assert 0 <= pages * found.page_bytes() <= 2.5 * GIB
