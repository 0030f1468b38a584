"""Dashboard "Platform": Ray Serve, the nodes, the GPUs. Ray's own series, scraped from the agent of each node."""

from __future__ import annotations

from deploy.grafana.ray_series import AMD_PREFIX
from deploy.grafana.spec import NAMESPACE, WINDOW, Dashboard, Kind, Panel, Query, Row, Variable
from deploy.promql import aggregate, quantile, rate, selector

_DEPLOYMENT = "application, deployment"
_NAME = "{{application}} {{deployment}}"
_PERCENT = "percent"
_BAD, _BUSY, _GOOD = "red", "orange", "green"

# Ray Serve's numbers for states.
_APPLICATION_STATES = (
    (0, "unknown", _BAD),
    (1, "deploy failed", _BAD),
    (2, "unhealthy", _BAD),
    (3, "not started", _BUSY),
    (4, "deleting", _BUSY),
    (5, "deploying", _BUSY),
    (6, "running", _GOOD),
)
_DEPLOYMENT_STATES = (
    (0, "unknown", _BAD),
    (1, "deploy failed", _BAD),
    (2, "unhealthy", _BAD),
    (3, "updating", _BUSY),
    (4, "upscaling", _BUSY),
    (5, "downscaling", _BUSY),
    (6, "healthy", _GOOD),
)
_PROXY_STATES = (
    (1, "starting", _BUSY),
    (2, "healthy", _GOOD),
    (3, "unhealthy", _BAD),
    (4, "draining", _BUSY),
    (5, "drained", _BUSY),
)


def _ray(operation: str, by: str, name: str, *matchers: str) -> str:
    return aggregate(operation, by, selector(name, *NAMESPACE, *matchers))


def _serve() -> tuple[Panel, ...]:
    return (
        Panel(
            Kind.STATES,
            "Applications",
            "What Serve's controller thinks of each application.",
            "none",
            (Query(_ray("max", "application", "ray_serve_application_status"), "{{application}}"),),
            height=6,
            states=_APPLICATION_STATES,
        ),
        Panel(
            Kind.STATES,
            "Deployments",
            "Unhealthy: a replica failed its health checks or died, and is being replaced.",
            "none",
            (Query(_ray("max", _DEPLOYMENT, "ray_serve_deployment_status"), _NAME),),
            height=6,
            states=_DEPLOYMENT_STATES,
        ),
        Panel(
            Kind.STATES,
            "HTTP proxies",
            "The proxy of each node; one that drains takes no new requests. HAProxy mode has none of these.",
            "none",
            (Query(_ray("max", "node_ip_address", "ray_serve_proxy_status"), "{{node_ip_address}}"),),
            height=6,
            states=_PROXY_STATES,
        ),
        Panel(
            Kind.TIME_SERIES,
            "Replicas",
            "Healthy replicas of each deployment, and how many Serve wants.",
            "none",
            (
                Query(_ray("sum", _DEPLOYMENT, "ray_serve_deployment_replica_healthy"), f"{_NAME}, healthy"),
                Query(_ray("max", _DEPLOYMENT, "ray_serve_autoscaling_target_replicas"), f"{_NAME}, wanted"),
            ),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Replica starts",
            "Replicas that became ready since the controller started: a step up is a new replica.",
            "none",
            (Query(_ray("sum", _DEPLOYMENT, "ray_serve_replica_startup_latency_ms_count"), _NAME),),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Mean start time",
            "From a replica's creation until it is ready, over all since the controller started; for an engine this is "
            "mostly loading weights.",
            "ms",
            (
                Query(
                    f"{_ray('sum', _DEPLOYMENT, 'ray_serve_replica_startup_latency_ms_sum')} / "
                    f"{_ray('sum', _DEPLOYMENT, 'ray_serve_replica_startup_latency_ms_count')}",
                    _NAME,
                ),
            ),
        ),
    )


def _requests() -> tuple[Panel, ...]:
    def p95(name: str, by: str) -> str:
        return quantile(0.95, name, by, WINDOW, *NAMESPACE)

    return (
        Panel(
            Kind.TIME_SERIES,
            "Queued calls",
            "Calls that wait in a handle for a replica; more than 0 for long means that replicas are too few or slow.",
            "none",
            (Query(_ray("sum", _DEPLOYMENT, "ray_serve_deployment_queued_queries"), _NAME),),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Ongoing calls",
            "Calls that replicas work on. One call to the Engine deployment carries all requests of one submit.",
            "none",
            (Query(_ray("sum", _DEPLOYMENT, "ray_serve_num_ongoing_requests_at_replicas"), _NAME),),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Calls",
            "Calls per second that replicas took.",
            "reqps",
            (Query(rate("ray_serve_deployment_request_counter_total", _DEPLOYMENT, WINDOW, *NAMESPACE), _NAME),),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Routing p95",
            "Time that a call waits before a replica is found for it; it is part of the time to first token. "
            "Empty without calls.",
            "ms",
            (Query(p95("ray_serve_request_router_fulfillment_time_ms", _DEPLOYMENT), _NAME),),
        ),
        Panel(
            Kind.TIME_SERIES,
            "HTTP proxy",
            "Requests per second through Serve's proxy, by status; HAProxy mode bypasses it.",
            "reqps",
            (Query(rate("ray_serve_num_http_requests_total", "status_code", WINDOW, *NAMESPACE), "{{status_code}}"),),
        ),
        Panel(
            Kind.TIME_SERIES,
            "HTTP proxy latency p95",
            "Whole requests as the proxy sees them; a stream lasts until its last byte. Empty without requests.",
            "ms",
            (Query(p95("ray_serve_http_request_latency_ms", "route"), "{{route}}"),),
        ),
    )


def _controller() -> tuple[Panel, ...]:
    return (
        Panel(
            Kind.TIME_SERIES,
            "Health check p95",
            "How long replicas take to answer a health check; one that nears health_check_timeout_s is replaced. "
            "Empty while none was made.",
            "ms",
            (Query(quantile(0.95, "ray_serve_health_check_latency_ms", _DEPLOYMENT, WINDOW, *NAMESPACE), _NAME),),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Event loop delay p95",
            "How late the event loops of Serve's processes run what is due: a high value is a process that is out of "
            "CPU or blocked.",
            "ms",
            (
                Query(
                    quantile(
                        0.95,
                        "ray_serve_event_loop_scheduling_latency_ms",
                        "deployment, component, loop_type",
                        WINDOW,
                        *NAMESPACE,
                    ),
                    "{{component}} {{deployment}} {{loop_type}}",
                ),
            ),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Controller loop",
            "Duration of the last loop of Serve's controller; seconds here mean slow reactions to dead replicas.",
            "s",
            (Query(_ray("max", "", "ray_serve_controller_control_loop_duration_s"), "controller"),),
        ),
        Panel(
            Kind.STACKED,
            "Actors",
            "Actors that Ray knows, by state; pending ones wait for resources.",
            "none",
            (Query(_ray("sum", "State", "ray_gcs_actors_count"), "{{State}}"),),
        ),
        Panel(
            Kind.STACKED,
            "Placement groups",
            "A pending or infeasible group is an engine replica that finds no node with enough free GPUs.",
            "none",
            (Query(_ray("sum", "State", "ray_gcs_placement_group_count"), "{{State}}"),),
        ),
        Panel(
            Kind.TIME_SERIES,
            "CPUs and GPUs by Ray's books",
            "Logical resources that actors reserved, and those that are free: they place processes and limit nothing.",
            "none",
            (Query(_ray("sum", "Name, State", "ray_resources", 'Name=~"CPU|GPU"'), "{{Name}} {{State}}"),),
        ),
    )


def _nodes() -> tuple[Panel, ...]:
    used, total = "ray_node_mem_used", "ray_node_mem_total"
    store_used = _ray("sum", "", "ray_object_store_used_memory")
    store_free = _ray("sum", "", "ray_object_store_available_memory")
    return (
        Panel(
            Kind.TIME_SERIES,
            "CPU",
            "Share of each node's processors in use; ingress processes starve above 90 %.",
            _PERCENT,
            (Query(_ray("max", "ip", "ray_node_cpu_utilization"), "{{ip}}"),),
            maximum=100,
            thresholds=((90, _BAD),),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Memory",
            "Share of each node's memory in use; Ray kills workers from 95 % on.",
            "percentunit",
            (Query(f"{_ray('max', 'ip', used)} / {_ray('max', 'ip', total)}", "{{ip}}"),),
            maximum=1,
            thresholds=((0.9, _BAD),),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Disk",
            "Share of each node's disk in use, as Ray sees it; above 95 % Ray refuses to spill objects.",
            _PERCENT,
            (Query(_ray("max", "ip", "ray_node_disk_utilization_percentage"), "{{ip}}"),),
            maximum=100,
            thresholds=((90, _BAD),),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Network",
            "Bytes per second that the network cards of each node receive and send.",
            "Bps",
            (
                Query(_ray("max", "ip", "ray_node_network_receive_speed"), "{{ip}} in"),
                Query(_ray("max", "ip", "ray_node_network_send_speed"), "{{ip}} out"),
            ),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Object store",
            "Share of Ray's object store in use; m3serve sends no tokens or weights through it, so it stays near 0.",
            "percentunit",
            (Query(f"{store_used} / ({store_used} + {store_free})", "in use"),),
            maximum=1,
        ),
        Panel(
            Kind.TIME_SERIES,
            "Largest processes",
            "Resident memory by component, the ten largest: a rank on CPU holds the weights here.",
            "bytes",
            (Query(f"topk(10, {_ray('sum', 'Component', 'ray_component_rss_bytes')})", "{{Component}}"),),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Busiest processes",
            "Processors in use by component, the ten busiest.",
            "none",
            (Query(f"topk(10, {_ray('sum', 'Component', 'ray_component_cpu_percentage')}) / 100", "{{Component}}"),),
        ),
    )


def _gpu(title: str, series: str, unit: str, meaning: str, factor: str = "", maximum: float | None = None) -> Panel:
    """A panel over AMD's Device Metrics Exporter."""
    return Panel(
        Kind.TIME_SERIES,
        title,
        f"{meaning} From AMD's Device Metrics Exporter, if it runs on the nodes; not evaluated on AMD hardware by us.",
        unit,
        (Query(f"{_amd(series)}{factor}", "{{hostname}} GPU {{gpu_id}}"),),
        maximum=maximum,
        optional=True,
    )


def _amd(series: str) -> str:
    return aggregate("max", "hostname, gpu_id", f'{{__name__=~"{AMD_PREFIX}{series}"}}')


def _gpus() -> tuple[Panel, ...]:
    return (
        _gpu("GPU activity", "gpu_gfx_activity", _PERCENT, "Share of time that a kernel ran.", maximum=100),
        _gpu("Memory activity", "gpu_umc_activity", _PERCENT, "Share of time that HBM was in use.", maximum=100),
        _gpu("VRAM in use", "gpu_used_vram", "bytes", "Weights and KV pages are taken at start.", " * 1048576"),
        _gpu(
            "VRAM share in use",
            "gpu_used_vram",
            "percentunit",
            "Should stay flat after the start.",
            f" / {_amd('gpu_total_vram')}",
            maximum=1,
        ),
        _gpu("Power", "gpu_package_power", "watt", "Socket power."),
        _gpu(
            "Junction temperature",
            "gpu_junction_temperature",
            "celsius",
            "The hottest point of the chip.",
        ),
        _gpu("HBM temperature", "gpu_memory_temperature", "celsius", "Memory temperature."),
        _gpu("Uncorrectable ECC errors", "gpu_ecc_uncorrect_total", "none", "Anything above 0: drain the node."),
        _gpu("Correctable ECC errors", "gpu_ecc_correct_total", "none", "A rising count is a card that ages."),
    )


DASHBOARD = Dashboard(
    uid="m3-platform",
    title="M3 / Platform",
    description="What m3serve stands on: Ray Serve's replicas and proxies, nodes, and GPUs.",
    variables=(Variable("namespace", "Namespace", "label_values(ray_node_cpu_count, namespace)"),),
    rows=(
        Row("Ray Serve", _serve()),
        Row("Calls", _requests()),
        Row("Controller and scheduling", _controller()),
        Row("Nodes", _nodes()),
        Row("AMD GPUs (optional)", _gpus(), collapsed=True),
    ),
)
