"""The Serve application: ingress replicas in front of engine replicas. `import_path: service.app:build`.

`service.ingress.Ingress` is the FastAPI class (decorated with `@serve.ingress`, not with `@serve.deployment`);
its constructor is `Ingress(settings: ServiceSettings, engine: DeploymentHandle)`.
"""

# Without `from __future__ import annotations`: Serve reads the annotation of `build` to turn the YAML's `args`
# into settings, and passes a plain dict when it finds a string there.

from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from service.autoscaling import autoscaling_config
from service.ingress import Ingress
from service.replica import EngineReplica
from service.settings import ServiceSettings
from service.target_router import TargetRouter

# Calls beyond what the engine runs and queues: refusals take a moment, probes and health checks come on top.
SPARE_ONGOING_CALLS = 256
# A checkpoint that cannot be loaded stays so; Serve would try 20 times.
MAX_LOAD_ATTEMPTS = 3
INGRESS_MAX_ONGOING_REQUESTS = 4096
# An update starts new fronts before old ones stop taking requests: they need a CPU each, and no GPU.
INGRESS_SURGE_PERCENT = 50


def build(settings: ServiceSettings) -> serve.Application:
    """The application of these settings. In Serve YAML they are the `args`."""
    ingress = serve.deployment(Ingress).options(
        name="Ingress",
        num_replicas=settings.ingress_replicas,
        max_ongoing_requests=INGRESS_MAX_ONGOING_REQUESTS,
        max_surge_percent=INGRESS_SURGE_PERCENT,
        **_common_options(settings),
    )
    application: serve.Application = ingress.bind(settings, build_engine(settings))
    return application


def build_engine(settings: ServiceSettings) -> serve.Application:
    """The engine replicas alone, for callers that talk to them through an EngineClient."""
    settings.engine_config()
    scaling = autoscaling_config(settings)
    number = {"num_replicas": settings.replicas} if scaling is None else {"autoscaling_config": scaling}
    engine = serve.deployment(EngineReplica).options(
        name="Engine",
        **number,
        request_router_config=RequestRouterConfig(request_router_class=TargetRouter),
        max_ongoing_requests=settings.max_live_requests + SPARE_ONGOING_CALLS,
        max_constructor_retry_count=MAX_LOAD_ATTEMPTS,
        **_common_options(settings),
    )
    application: serve.Application = engine.bind(settings)
    return application


def _common_options(settings: ServiceSettings) -> dict[str, Any]:
    # For these processes alone: Ray's own also import prometheus_client, and would write there.
    variables = {"PROMETHEUS_MULTIPROC_DIR": settings.metrics_dir} if settings.metrics_dir else {}
    return {
        "ray_actor_options": {"num_cpus": 1, "num_gpus": 0, "runtime_env": {"env_vars": variables}},
        "health_check_period_s": settings.health_check_period_s,
        "health_check_timeout_s": settings.health_check_timeout_s,
        "graceful_shutdown_timeout_s": settings.graceful_shutdown_timeout_s,
    }
