"""The part of helm/values.schema.json that follows the service's settings; the rest of that file is written by hand.

The chart's value `settings` takes every setting that has no value of its own and is not the chart's to decide.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from service.settings import ServiceSettings

PATH = "helm/values.schema.json"
ROOT = Path(__file__).resolve().parent.parent

# Settings with a value of their own in the chart.
NAMED = frozenset(
    {
        "model",
        "served_model_name",
        "replicas",
        "min_replicas",
        "max_replicas",
        "tensor_parallel_size",
        "backend",
        "dtype",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "memory_fraction",
        "kv_cache_dtype",
        "index_cache_dtype",
        "enable_prefix_caching",
        "use_index_cache",
        "index_topk_freq",
        "index_skip_topk_offset",
        "index_topk_pattern",
        "index_reuse",
        "ingress_replicas",
        "graceful_shutdown_timeout_s",
        "metrics_dir",
        "api_key_file",
    }
)
# Addresses, which follow from the pods, what only the command line uses, and secrets, which stand in no value.
NOT_IN_A_CLUSTER = frozenset(
    {"host", "port", "data_host", "metrics_port", "ray_metrics_port", "tls_cert_file", "tls_key_file", "api_keys"}
)


def settings_schema() -> dict[str, Any]:
    """JSON schema of the chart's value `settings`; an unknown name in it is refused."""
    known = ServiceSettings.model_json_schema()["properties"]
    properties = {name: _plain(known[name]) for name in sorted(known) if name not in NAMED | NOT_IN_A_CLUSTER}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def generated() -> dict[str, str]:
    """The schema file with that part as it should be."""
    schema = json.loads((ROOT / PATH).read_text())
    schema["properties"]["settings"] = settings_schema()
    return {PATH: json.dumps(schema, indent=2) + "\n"}


def _plain(field: dict[str, Any]) -> dict[str, Any]:
    """Without pydantic's titles and defaults: the defaults are the service's, not the chart's."""
    return {key: value for key, value in field.items() if key not in ("title", "default")}
