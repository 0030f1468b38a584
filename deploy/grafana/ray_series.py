"""The series of others that the dashboards use: names and labels, as they were seen or are documented.

A dashboard over a name that nobody exports is empty for ever; tests hold every expression against these lists.
"""

from __future__ import annotations

# The version of Ray whose agent exported RAY_SERIES.
RAY_VERSION = "2.60.0"

_DEPLOYMENT = ("application", "deployment")
_NODE = ("ip", "RayNodeType", "IsHeadNode")
_COMPONENT = ("Component", "ip", "pid")

# Without the labels that all of them have. Histograms stand without _bucket, _sum and _count.
RAY_SERIES: dict[str, tuple[str, ...]] = {
    "ray_serve_application_status": ("application",),
    "ray_serve_deployment_status": _DEPLOYMENT,
    "ray_serve_proxy_status": ("node_id", "node_ip_address"),
    "ray_serve_deployment_replica_healthy": (*_DEPLOYMENT, "replica"),
    "ray_serve_autoscaling_target_replicas": _DEPLOYMENT,
    "ray_serve_replica_startup_latency_ms": _DEPLOYMENT,
    "ray_serve_health_check_latency_ms": _DEPLOYMENT,
    "ray_serve_deployment_queued_queries": (*_DEPLOYMENT, "handle", "actor_id"),
    "ray_serve_num_ongoing_requests_at_replicas": (*_DEPLOYMENT, "handle", "actor_id"),
    "ray_serve_request_router_fulfillment_time_ms": (*_DEPLOYMENT, "handle_source", "actor_id"),
    "ray_serve_deployment_request_counter_total": (*_DEPLOYMENT, "replica", "route"),
    "ray_serve_http_request_latency_ms": ("application", "method", "route", "status_code"),
    "ray_serve_num_http_requests_total": ("application", "method", "route", "status_code"),
    "ray_serve_event_loop_scheduling_latency_ms": (*_DEPLOYMENT, "component", "loop_type", "actor_id"),
    "ray_serve_controller_control_loop_duration_s": (),
    "ray_node_cpu_utilization": _NODE,
    "ray_node_cpu_count": _NODE,
    "ray_node_mem_used": _NODE,
    "ray_node_mem_total": _NODE,
    "ray_node_disk_utilization_percentage": _NODE,
    "ray_node_network_receive_speed": _NODE,
    "ray_node_network_send_speed": _NODE,
    "ray_object_store_used_memory": (),
    "ray_object_store_available_memory": (),
    "ray_component_rss_bytes": _COMPONENT,
    "ray_component_cpu_percentage": _COMPONENT,
    "ray_gcs_actors_count": ("State",),
    "ray_gcs_placement_group_count": ("State",),
    "ray_resources": ("Name", "State"),
}

# AMD's Device Metrics Exporter (names of its documentation, MI300 and later); memory is in MB. Its setting
# MetricsFieldPrefix puts a prefix before the names: none by default, amd_ in its example.
AMD_PREFIX = "(amd_)?"
AMD_LABELS = ("hostname", "gpu_id")
AMD_SERIES = (
    "gpu_gfx_activity",
    "gpu_umc_activity",
    "gpu_used_vram",
    "gpu_total_vram",
    "gpu_package_power",
    "gpu_junction_temperature",
    "gpu_memory_temperature",
    "gpu_ecc_uncorrect_total",
    "gpu_ecc_correct_total",
)
