"""The memory budget: the chart's templates, its README and the formula, written here once more, agree."""

from __future__ import annotations

from typing import Any

import pytest

from deploy import tools
from deploy.tools import ToolMissing
from tests.deploy import chart
from tests.deploy.chart import CHART

try:
    tools.find("helm")
except ToolMissing as error:
    pytest.skip(str(error), allow_module_level=True)

GIB = {"mi300x": 192, "mi325x": 256, "mi355x": 288, "h100": 79, "h200": 140}
WEIGHTS_GIB = {"bf16": 793.8, "mxfp8": 384.9, "mxfp4": 227.3}


def kv_tokens(gib: float, ranks: int, weights_gib: float, vector: int, index_layers: int = 57) -> int:
    """The budget of README.md, written again; 0 when the weights do not fit."""
    free_gib = gib - weights_gib / ranks - 4
    token_bytes = 60 * 2 * max(1, 4 // ranks) * vector + index_layers * vector
    return max(0, int(free_gib * 0.85 * 2**30 / token_bytes / 128) * 128)


@pytest.mark.parametrize(
    ("values", "gib", "ranks", "weights", "vector", "index_layers"),
    [
        ({}, 192, 8, "bf16", 256, 57),
        ({"engine.kvCacheDtype": "fp8", "engine.indexCacheDtype": "fp8"}, 192, 8, "bf16", 132, 57),
        ({"accelerator": "mi325x", "engine.tensorParallelSize": 4}, 256, 4, "bf16", 256, 57),
        ({"engine.tensorParallelSize": 2, "model.format": "mxfp4"}, 192, 2, "mxfp4", 256, 57),
        ({"engine.indexCache.topkFreq": 4}, 192, 8, "bf16", 256, 15),
        ({"engine.indexCache.topkFreq": 4, "engine.indexCache.skipTopkOffset": 2}, 192, 8, "bf16", 256, 16),
        ({"engine.indexCache.topkPattern": "FSS" * 19}, 192, 8, "bf16", 256, 19),
        ({"engine.indexCache.topkFreq": 4, "engine.indexCache.reuse": "audited"}, 192, 8, "bf16", 256, 57),
    ],
    ids=str,
)
def test_estimate_of_kv_tokens(
    values: dict[str, Any], gib: float, ranks: int, weights: str, vector: int, index_layers: int
) -> None:
    found = chart.ray_service(*chart.set_json(values))["metadata"]["annotations"]["m3serve/kv-tokens-estimate"]
    assert int(found) == kv_tokens(gib, ranks, WEIGHTS_GIB[weights], vector, index_layers)


def test_capacity_table_of_the_readme() -> None:
    rows = 0
    for line in (CHART / "README.md").read_text().splitlines():
        name, _, rest = line.removeprefix("| ").partition(", ")
        if name not in GIB or not line.startswith("| "):
            continue
        ranks, *cells = (cell.strip() for cell in rest.rstrip(" |").split("|"))
        expected = []
        for weights in WEIGHTS_GIB.values():
            for vector in (256, 132):
                tokens = kv_tokens(GIB[name], int(ranks), weights, vector)
                expected.append(f"{tokens / 1e6:.2f}" if tokens else "-")
        assert cells == expected, line
        rows += 1
    assert rows == 2 * len(GIB)
