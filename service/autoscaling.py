"""How many engine replicas Serve runs: as many as the load that they report fills.

Serve's own measure, open calls, says little here: one call may carry one short request or hundreds of long ones.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from service.messages import Load
from service.settings import ServiceSettings

# A replica's Load.share: 1 when it is full.
LOAD_METRIC = "m3_load"
# Loads are averaged over this time at most, and sent to Serve's controller this often at least.
MAX_WINDOW_S = 30.0
MAX_PUSH_PERIOD_S = 10.0
MIN_PUSH_PERIOD_S = 0.5
# Unless the settings say more: pages beyond this share are better kept for prefixes and growing contexts.
FULL_SHARE_OF_PAGES = 0.7


# Serve pickles this module into its controller: the function may only use what any Ray process can import.
def replicas_for_load(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """The sum of all loads, rounded up. Serve applies the limits and delays of its AutoscalingConfig."""
    loads = (context.aggregated_metrics or {}).get(LOAD_METRIC, {})
    return max(math.ceil(sum(loads.values())), 1), {}


def autoscaling_config(settings: ServiceSettings) -> AutoscalingConfig | None:
    """None: the number of replicas is fixed."""
    if settings.max_replicas is None:
        return None
    push_period_s = max(min(settings.upscale_delay_s / 3, MAX_PUSH_PERIOD_S), MIN_PUSH_PERIOD_S)
    with warnings.catch_warnings():
        # Its replacement, a variable, would hold for every application of the cluster.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=settings.fewest_replicas,
            max_replicas=settings.max_replicas,
            upscale_delay_s=settings.upscale_delay_s,
            downscale_delay_s=settings.downscale_delay_s,
            metrics_interval_s=push_period_s,
            look_back_period_s=min(3 * push_period_s, MAX_WINDOW_S),
            policy=AutoscalingPolicy(policy_function=replicas_for_load),
        )


def idle_load(settings: ServiceSettings, replica_id: str, kv_tokens: int) -> Load:
    """Of a replica without requests, whose KV pages hold `kv_tokens` tokens."""
    full_tokens = settings.target_tokens_per_replica or max(int(FULL_SHARE_OF_PAGES * kv_tokens), 1)
    return Load(replica_id, 0, 0, full_tokens, settings.max_num_seqs, settings.max_live_requests)
