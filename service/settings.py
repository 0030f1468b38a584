"""Every setting of the service, read once: arguments (Serve YAML `args`, the CLI), then M3SERVE_* variables.

Below this module nothing reads the environment: it takes ServiceSettings or the EngineConfig made from it.
"""

from __future__ import annotations

import os
import re
from dataclasses import MISSING, fields
from typing import Annotated, Any

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from engine.config import EngineConfig
from service.limits import MAX_PROMPTS, MAX_TIMEOUT_S, MIN_TIMEOUT_S

_ENGINE_FIELDS = {f.name: f for f in fields(EngineConfig)}
# A command line is seen by everybody on the machine, and a file of settings by many.
ENVIRONMENT_ONLY = frozenset({"api_keys"})
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+")


def _engine(name: str) -> Any:
    """The field `name` of EngineConfig: its default and help text exist once, there."""
    source = _ENGINE_FIELDS[name]
    description = source.metadata["help"]
    if source.default_factory is not MISSING:
        return Field(default_factory=source.default_factory, description=description)
    if source.default is MISSING:
        return Field(description=description)
    return Field(default=source.default, description=description)


class ServiceSettings(BaseSettings):
    """The engine's settings (flat, under their own names) and those of the service around it."""

    model_config = SettingsConfigDict(
        env_prefix="M3SERVE_", extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    model: str = _engine("model")
    backend: str = _engine("backend")
    dtype: str = _engine("dtype")
    tensor_parallel_size: int = _engine("tensor_parallel_size")
    max_model_len: int | None = _engine("max_model_len")
    max_num_seqs: int = _engine("max_num_seqs")
    max_num_batched_tokens: int = _engine("max_num_batched_tokens")
    max_num_prefill_tokens: int | None = _engine("max_num_prefill_tokens")
    long_prefill_token_threshold: int | None = _engine("long_prefill_token_threshold")
    num_pages: int | None = _engine("num_pages")
    memory_fraction: float | None = _engine("memory_fraction")
    kv_cache_dtype: str = _engine("kv_cache_dtype")
    index_cache_dtype: str = _engine("index_cache_dtype")
    enable_prefix_caching: bool = _engine("enable_prefix_caching")
    load_format: str = _engine("load_format")
    weight_cache_dir: str | None = _engine("weight_cache_dir")
    hf_overrides: dict[str, Any] = _engine("hf_overrides")
    use_index_cache: bool | None = _engine("use_index_cache")
    index_topk_freq: int | None = _engine("index_topk_freq")
    index_topk_pattern: str | None = _engine("index_topk_pattern")
    index_skip_topk_offset: int | None = _engine("index_skip_topk_offset")
    index_plan_file: str | None = _engine("index_plan_file")
    index_reuse: str = _engine("index_reuse")
    audit_interval: int = _engine("audit_interval")
    audit_overlap_floor: float | None = _engine("audit_overlap_floor")
    audit_overlap_margin: float = _engine("audit_overlap_margin")
    audit_trip_after: int = _engine("audit_trip_after")
    audit_recover_after: int = _engine("audit_recover_after")
    probe_interval: int | None = _engine("probe_interval")
    enforce_eager: bool = _engine("enforce_eager")
    async_scheduling: bool | None = _engine("async_scheduling")
    self_test: bool = _engine("self_test")
    numa_pinning: bool | None = _engine("numa_pinning")
    seed: int = _engine("seed")
    num_threads: int | None = _engine("num_threads")

    served_model_name: str | None = Field(
        default=None, description="model name in the API; default: the last part of the model directory"
    )
    data_host: str | None = Field(
        default=None,
        description="where the token sockets listen; default: the address of the node. 127.0.0.1 on a one-node cluster",
    )
    host: str = Field(default="127.0.0.1", description="address of the HTTP server (CLI; Serve YAML has its own)")
    port: int = Field(default=8000, ge=0, le=65535, description="port of the HTTP server; 0: any free one (CLI)")
    replicas: int = Field(
        default=1,
        ge=1,
        description="engine replicas, each with its own worker group; with max_replicas and no min_replicas: at least",
    )
    min_replicas: int | None = Field(
        default=None, ge=1, description="engine replicas at least, with max_replicas; default: replicas"
    )
    max_replicas: int | None = Field(
        default=None,
        ge=1,
        validate_default=True,
        description="engine replicas at most: Serve adds and removes some by their load; default: always replicas",
    )
    target_tokens_per_replica: int | None = Field(
        default=None,
        ge=1,
        description="tokens of running and waiting requests, prompt and output, at which a replica is full, as it is "
        "with max_num_seqs requests; default: 0.7 of its KV pages",
    )
    upscale_delay_s: float = Field(
        default=30.0, ge=0, description="how long the load must ask for more replicas before some are added"
    )
    downscale_delay_s: float = Field(
        default=600.0, ge=0, description="how long the load must ask for fewer replicas before some finish and go"
    )
    prefix_routing: bool = Field(
        default=True,
        description="a request goes to the replica that holds its prefix unless that one is overloaded; off: to the "
        "one with fewer open calls of two that chance picks",
    )
    prefix_routing_slack: float = Field(
        default=0.5,
        ge=0,
        description="the share of its target_tokens_per_replica or max_num_seqs by which a replica may be fuller than "
        "the least loaded one and still get requests whose whole prefix it holds; for a part of it, that part of this",
    )
    ingress_replicas: int = Field(default=1, ge=1, description="HTTP front processes")
    metrics_port: int = Field(
        default=9400, ge=0, le=65535, description="port of the Prometheus exporter; 0: any free one (CLI)"
    )
    ray_metrics_port: int = Field(
        default=9401,
        ge=0,
        le=65535,
        description="port of Ray's own metrics in a private cluster; 0: any free one (CLI)",
    )
    metrics_dir: str | None = Field(
        default=None, description="directory where the processes of a node share their series; default: no metrics"
    )
    otlp_traces_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^/\s]+/\S+$",
        description="OpenTelemetry collector for traces, a full URL as http://HOST:4318/v1/traces; default: no traces",
    )
    trace_sample_ratio: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="share of the requests to trace; for those with a traceparent header its sampled flag decides",
    )
    max_queued_requests: int = Field(
        default=256, ge=0, description="requests that one replica lets wait beyond max_num_seqs; more get a 429"
    )
    retry_limit: int = Field(default=3, ge=0, description="how often a request moves to another replica")
    failover_timeout_s: float = Field(
        default=600.0, gt=0, description="how long a request in flight waits for a replica to come back"
    )
    submit_timeout_s: float = Field(
        default=10.0, gt=0, description="how long a new request waits for a replica to accept it"
    )
    silence_timeout_s: float = Field(
        default=15.0, gt=0, description="an engine replica that says nothing for so long loses its requests to others"
    )
    max_undelivered_tokens: int = Field(
        default=65536, ge=1, description="tokens kept for a client that reads slowly; more end its request"
    )
    step_timeout_s: float = Field(
        default=120.0, gt=0, description="an engine step that takes longer means that its worker group is lost"
    )
    start_timeout_s: float = Field(default=1800.0, gt=0, description="limit for starting and loading a worker group")
    health_check_period_s: float = Field(default=2.0, gt=0, description="how often Serve asks for a replica's health")
    health_check_timeout_s: float = Field(default=60.0, gt=0, description="limit for the answer to that")
    graceful_shutdown_timeout_s: float = Field(
        default=600.0, gt=0, description="how long a replica that stops may finish its requests"
    )
    max_body_bytes: int = Field(default=16 * 2**20, ge=1024, description="largest HTTP request body")
    max_prompts: int = Field(default=256, ge=1, le=MAX_PROMPTS, description="prompts times n of one HTTP request")
    request_timeout_s: float | None = Field(
        default=None,
        ge=MIN_TIMEOUT_S,
        le=MAX_TIMEOUT_S,
        description="how long one HTTP request may take, to its last token; x-request-timeout-seconds asks for less. "
        "default: no limit",
    )
    api_key_file: str | None = Field(
        default=None,
        description="file of API keys, one a line, read again when it changes; default: no key is needed",
    )
    api_keys: SecretStr | None = Field(
        default=None, description="API keys, separated by commas, beside those of api_key_file (environment only)"
    )
    tls_cert_file: str | None = Field(
        default=None, description="certificate chain (PEM): the HTTP server speaks TLS (CLI; Serve YAML has its own)"
    )
    tls_key_file: str | None = Field(default=None, description="private key of tls_cert_file (PEM, no password; CLI)")
    cors_allow_origins: Annotated[list[str], NoDecode] = Field(
        default_factory=list,
        description="origins whose pages may use the API from a browser, as https://app.example.com; *: all",
    )
    enable_docs: bool = Field(default=False, description="serve the OpenAPI document at /openapi.json")
    enable_playground: bool | None = Field(
        default=None,
        description="serve a page at / to try the model, and what it shows of the index cache at /playground/layers. "
        "default: off; with m3serve serve, on where the HTTP server listens on loopback alone",
    )

    @field_validator("cors_allow_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """A variable has commas between them."""
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("cors_allow_origins")
    @classmethod
    def _origins(cls, value: list[str]) -> list[str]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"an origin is SCHEME://HOST, with a port if need be and nothing after it: {origin}")
        return value

    @field_validator("max_replicas")
    @classmethod
    def _not_below_the_fewest(cls, value: int | None, info: ValidationInfo) -> int | None:
        fewest = info.data.get("min_replicas")
        if value is None and fewest is not None:
            raise ValueError(f"must be set where min_replicas ({fewest}) is")
        name = "replicas" if fewest is None else "min_replicas"
        if value is not None and value < info.data.get(name, 1):
            raise ValueError(f"must be at least {name} ({info.data[name]})")
        return value

    def engine_config(self) -> EngineConfig:
        """The engine's share of the settings, checked. Raises ConfigError."""
        return EngineConfig(**{name: getattr(self, name) for name in _ENGINE_FIELDS})

    @property
    def model_name(self) -> str:
        """The name that clients use."""
        return self.served_model_name or os.path.basename(os.path.normpath(self.model))

    @property
    def most_replicas(self) -> int:
        """Engine replicas at most."""
        return self.replicas if self.max_replicas is None else self.max_replicas

    @property
    def fewest_replicas(self) -> int:
        """Engine replicas at least."""
        return self.replicas if self.min_replicas is None else self.min_replicas

    @property
    def max_live_requests(self) -> int:
        """Requests that one replica holds at the same time, running and waiting."""
        return self.max_num_seqs + self.max_queued_requests
