"""Traces of real requests, as a collector receives them over OTLP from a real service."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan
from opentelemetry.trace import get_current_span
from ray import serve

from engine.errors import ConfigError
from engine.timeline import MAX_STEPS
from service.flags import make_settings
from service.settings import ServiceSettings
from service.tracing_ingress import IngressTracer
from service.tracing_otlp import parent_of
from tests.cluster import LOOPBACK, Cluster, wait_until
from tests.service.otlp_receiver import OtlpReceiver, Span, Trace

ROOT = Path(__file__).resolve().parents[2]
# Other prompts for other tests: none of them finds the pages of another.
PROMPT_TOKENS = 1200
BATCH_TOKENS = 512
NUM_TOKENS = 20
PIDS_TIMEOUT_S = 30.0


def prompt(start: int) -> list[int]:
    return [(start + 7 * index) % 400 + 10 for index in range(PROMPT_TOKENS)]


def body(start: int, **more: Any) -> dict[str, Any]:
    return {
        "model": "traced", "prompt": prompt(start), "max_tokens": NUM_TOKENS, "ignore_eos": True, "seed": 1,
    } | more  # fmt: skip


def parent(*, sampled: bool = True) -> tuple[str, str, dict[str, str]]:
    """Trace id, span id and headers of a caller that traces."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    return trace_id, span_id, {"traceparent": f"00-{trace_id}-{span_id}-{'01' if sampled else '00'}"}


def is_whole(trace: Trace, num_engines: int = 1) -> bool:
    return len(trace.named("POST /v1/completions")) == 1 and len(trace.named("engine")) == num_engines


def check_links(trace: Trace, caller: str) -> None:
    """One tree: every parent is in it, but that of the root."""
    ids = {span.span_id for span in trace.spans}
    assert len(ids) == len(trace.spans)
    [root] = [span for span in trace.spans if span.parent_id not in ids]
    assert (root.name, root.parent_id) == ("POST /v1/completions", caller)
    assert all(span.started_ns <= span.ended_ns for span in trace.spans)


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    receiver = OtlpReceiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def client(cluster: Cluster, checkpoint: Path, receiver: OtlpReceiver) -> Iterator[httpx.Client]:
    settings = cluster.settings(
        checkpoint,
        served_model_name="traced",
        max_model_len=2048,
        num_pages=64,
        max_num_batched_tokens=BATCH_TOKENS,
        otlp_traces_endpoint=receiver.endpoint,
        # A resubmission may meet a replica that is about to end.
        retry_limit=8,
    )
    with cluster.service(settings) as url, httpx.Client(base_url=url, timeout=60.0) as client:
        wait_until(lambda: client.get("/ready").status_code == 200, timeout_s=20, what="ready")
        yield client


def test_one_tree_from_http_to_steps(client: httpx.Client, receiver: OtlpReceiver) -> None:
    trace_id, span_id, headers = parent()
    headers |= {"tracestate": "vendor=opaque", "x-request-id": "seen-by-the-client"}
    with client.stream("POST", "/v1/completions", json=body(0, stream=True), headers=headers) as reply:
        text = reply.read().decode()
    answer_id = json.loads(text.splitlines()[0].removeprefix("data: "))["id"]
    trace = receiver.wait(trace_id, is_whole)
    check_links(trace, span_id)

    root = trace.one("POST /v1/completions")
    assert (root.kind, root.trace_state, root.failed) == (ProtoSpan.SPAN_KIND_SERVER, "vendor=opaque", False)
    assert root.attributes["http.request.method"] == "POST"
    assert root.attributes["http.route"] == "/v1/completions"
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["http.request.header.x-request-id"] == ("seen-by-the-client",)
    assert [span.name for span in trace.children(root)] == ["tokenize", "choice"]

    choice = trace.one("choice")
    assert choice.attributes["gen_ai.request.model"] == "traced"
    assert choice.attributes["gen_ai.response.id"] == answer_id
    assert choice.attributes["gen_ai.usage.input_tokens"] == PROMPT_TOKENS
    assert choice.attributes["gen_ai.usage.output_tokens"] == NUM_TOKENS
    assert choice.attributes["gen_ai.usage.cache_read.input_tokens"] == 0
    assert choice.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert choice.events == []
    attempt, engine = trace.one("attempt"), trace.one("engine")
    assert trace.children(choice) == [attempt] and trace.children(attempt) == [engine]
    assert attempt.attributes["m3.attempt.id"] == engine.attributes["m3.attempt.id"]
    assert attempt.attributes["m3.replica.id"] == engine.attributes["m3.replica.id"]
    assert engine.attributes["m3.engine"] == engine.resource["m3.engine"] == "0"
    assert engine.attributes["gen_ai.usage.output_tokens"] == NUM_TOKENS
    assert (root.resource["m3.process"], engine.resource["m3.process"]) == ("ingress", "engine")
    assert root.resource["service.name"] == engine.resource["service.name"] == "m3serve"
    assert root.resource["process.pid"] != engine.resource["process.pid"]

    phases = trace.children(engine)
    assert [span.name for span in phases] == ["queue", "prefill", "decode"]
    begins = [*(span.started_ns for span in phases), engine.ended_ns]
    ends = [engine.started_ns, *(span.ended_ns for span in phases)]
    assert begins == ends, "phases leave no time between them"
    prefill, decode = (trace.children(phase) for phase in phases[1:])
    assert trace.children(phases[0]) == []
    assert [span.attributes["m3.step.tokens"] for span in prefill] == [512, 512, 176]
    assert [span.attributes["m3.step.tokens"] for span in decode] == [1] * (NUM_TOKENS - 1)
    assert decode[-1].attributes["m3.step.first_position"] == PROMPT_TOKENS + NUM_TOKENS - 2
    steps = [*prefill, *decode]
    ids = [span.attributes["m3.step.id"] for span in steps]
    assert ids == list(range(ids[0], ids[0] + len(steps)))
    assert all(span.attributes["m3.step.batch_rows"] == 1 for span in steps)
    assert engine.attributes["m3.steps"] == len(steps) == 3 + NUM_TOKENS - 1
    assert engine.attributes["m3.steps_not_recorded"] == 0


def test_each_choice_has_its_span_and_a_trace_may_begin_here(client: httpx.Client, receiver: OtlpReceiver) -> None:
    answer = client.post("/v1/completions", json=body(1, n=2, stop=None)).json()
    wait_until(
        lambda: len(receiver.find("choice", gen_ai_response_id=answer["id"])) == 2, timeout_s=15, what="both choices"
    )
    choices = receiver.find("choice", gen_ai_response_id=answer["id"])
    trace = receiver.wait(choices[0].trace_id, lambda trace: is_whole(trace, 2))
    check_links(trace, "")
    assert {choice.attributes["m3.choice.index"] for choice in choices} == {0, 1}
    for choice in choices:
        [attempt] = trace.children(choice)
        [engine] = trace.children(attempt)
        assert [span.name for span in trace.children(engine)] == ["queue", "prefill", "decode"]
    # Both are rows of the same steps, each of which says so in both.
    rows = {span.attributes["m3.step.batch_rows"] for span in trace.named("step")}
    assert rows >= {2}


def test_a_choice_names_its_operation(client: httpx.Client, receiver: OtlpReceiver) -> None:
    for route, asked, operation in (
        ("/v1/completions", {"prompt": "a"}, "text_completion"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "chat"),
    ):
        response_id = client.post(route, json={**asked, "max_tokens": 1}).json()["id"]
        wait_until(
            lambda made=response_id: bool(receiver.find("choice", gen_ai_response_id=made)),
            timeout_s=15,
            what="a choice",
        )
        [choice] = receiver.find("choice", gen_ai_response_id=response_id)
        assert choice.attributes["gen_ai.operation.name"] == operation


def test_a_long_answer_is_recorded_up_to_a_bound(client: httpx.Client, receiver: OtlpReceiver) -> None:
    trace_id, span_id, headers = parent()
    num_tokens = MAX_STEPS + 30
    reply = client.post("/v1/completions", json=body(2, max_tokens=num_tokens), headers=headers)
    assert reply.json()["usage"]["completion_tokens"] == num_tokens
    trace = receiver.wait(trace_id, is_whole)
    check_links(trace, span_id)
    attributes = trace.one("engine").attributes
    assert attributes["m3.steps"] == 3 + num_tokens - 1
    assert len(trace.named("step")) == MAX_STEPS
    assert attributes["m3.steps_not_recorded"] == attributes["m3.tokens_not_recorded"] == 3 + num_tokens - 1 - MAX_STEPS


def test_the_caller_decides_what_is_sampled(client: httpx.Client, receiver: OtlpReceiver) -> None:
    unsampled, _, headers = parent(sampled=False)
    assert client.post("/v1/completions", json=body(3), headers=headers).status_code == 200
    # Each process sends its spans in order: those of a later request come last.
    sampled, _, headers = parent()
    assert client.post("/v1/completions", json=body(4), headers=headers).status_code == 200
    receiver.wait(sampled, is_whole)
    assert receiver.trace(unsampled).spans == []


def test_refusals_say_why(client: httpx.Client, receiver: OtlpReceiver) -> None:
    trace_id, _, headers = parent()
    assert client.post("/v1/completions", json=body(5, temperature=-1), headers=headers).status_code == 400
    trace = receiver.wait(trace_id, lambda trace: bool(trace.spans))
    [root] = trace.spans
    assert (root.name, root.kind, root.failed) == ("POST /v1/completions", ProtoSpan.SPAN_KIND_SERVER, False)
    assert root.attributes["http.response.status_code"] == 400
    assert root.attributes["m3.error.code"] == "invalid_value"

    trace_id, _, headers = parent()
    assert client.post("/v1/nothing", json={}, headers=headers).status_code == 404
    [root] = receiver.wait(trace_id, lambda trace: bool(trace.spans)).spans
    assert (root.name, root.attributes["http.response.status_code"]) == ("POST", 404)
    assert client.get("/health", headers=headers).status_code == 200

    # The engine refuses this one: the choice fails, and no engine ran it.
    trace_id, span_id, headers = parent()
    assert client.post("/v1/completions", json=body(5, max_tokens=4000), headers=headers).status_code == 400
    trace = receiver.wait(trace_id, lambda trace: is_whole(trace, 0))
    check_links(trace, span_id)
    for span in (trace.one("choice"), trace.one("attempt")):
        assert span.failed and span.attributes["error.type"] == "context_length_exceeded"


def test_a_client_that_leaves_is_an_abort(client: httpx.Client, receiver: OtlpReceiver) -> None:
    trace_id, span_id, headers = parent()
    request = body(6, prompt=prompt(6)[:50], max_tokens=1900, stream=True)
    with client.stream("POST", "/v1/completions", json=request, headers=headers) as reply:
        assert next(reply.iter_lines()).startswith("data: ")
    trace = receiver.wait(trace_id, is_whole)
    check_links(trace, span_id)
    for name in ("choice", "engine"):
        span = trace.one(name)
        assert span.attributes["gen_ai.response.finish_reasons"] == ("abort",) and not span.failed
        assert span.attributes["gen_ai.usage.output_tokens"] < 1900


def test_failovers_are_attempts_of_one_choice(client: httpx.Client, receiver: OtlpReceiver) -> None:
    """First a worker dies, whose replica still tells; then the whole replica, which cannot."""
    trace_id, span_id, headers = parent()
    request = body(7, max_tokens=300, stream=True, return_token_ids=True)
    handle = serve.get_deployment_handle("Engine", "service")
    kill_at = [(30, 1), (150, 0)]
    num_tokens = 0
    with client.stream("POST", "/v1/completions", json=request, headers=headers) as reply:
        for line in filter(None, reply.iter_lines()):
            if line.startswith("data: {"):
                [choice] = json.loads(line.removeprefix("data: "))["choices"]
                num_tokens += len(choice["token_ids"])
            if kill_at and num_tokens >= kill_at[0][0]:
                _, index = kill_at.pop(0)
                os.kill(handle.pids.remote().result(timeout_s=PIDS_TIMEOUT_S)[index], signal.SIGKILL)
    assert (num_tokens, kill_at) == (300, [])

    trace = receiver.wait(trace_id, lambda trace: is_whole(trace, 2))
    check_links(trace, span_id)
    choice = trace.one("choice")
    attempts = trace.children(choice)
    assert [span.attributes["m3.attempt.number"] for span in attempts] == list(range(1, len(attempts) + 1))
    assert not choice.failed and choice.attributes["m3.attempts"] == len(attempts)
    assert choice.attributes["gen_ai.usage.output_tokens"] == 300
    failovers = [attributes for name, attributes in choice.events if name == "failover"]
    kinds = [attributes["m3.failover.kind"] for attributes in failovers]
    assert len(kinds) == len(attempts) - 1
    # After the loss a submit may meet the replica that is about to end.
    assert kinds[0] == "replica_lost" and set(kinds[1:]) <= {"replica_lost", "not_accepted"}
    assert all(attributes["m3.failover.cause"] for attributes in failovers)

    assert [span.failed for span in attempts] == [True] * (len(attempts) - 1) + [False]
    # More than three where a resubmission met a replica that was about to end.
    taken = [span for span in attempts if "m3.replica.id" in span.attributes]
    assert len({span.attributes["m3.replica.id"] for span in taken}) == len(taken) == 3
    assert all(trace.children(span) == [] for span in attempts if span not in taken)
    resumed = [span.attributes["m3.resumed_tokens"] for span in taken]
    assert 0 == resumed[0] < 30 <= resumed[1] < 150 <= resumed[2]
    [lost], none, [last] = (trace.children(span) for span in taken)
    assert none == [], "a process that was killed says nothing"
    assert lost.failed and lost.attributes["error.type"] == "engine_lost" and lost.message
    assert not last.failed and last.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert last.attributes["m3.resumed_tokens"] == resumed[2]
    assert [span.name for span in trace.children(lost)] == ["queue", "prefill", "decode"]
    assert _num_steps(trace, lost) == lost.attributes["m3.steps"] - lost.attributes["m3.steps_not_recorded"] > 0


def _num_steps(trace: Trace, engine: Span) -> int:
    return sum(len(trace.children(phase)) for phase in trace.children(engine))


@pytest.mark.parametrize(
    "values",
    [
        [],
        [""],
        ["00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"],
        ["00-00000000000000000000000000000000-b7ad6b7169203331-01"],
        ["00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01"],
        ["ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"],
        ["00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01"],
        ["00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more"],
        ["00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"] * 2,
        ["\xff\xfe"],
    ],
)
def test_a_malformed_parent_is_none(values: list[str]) -> None:
    headers = [(b"traceparent", value.encode("latin-1")) for value in values]
    assert not get_current_span(parent_of(headers)).get_span_context().is_valid


def test_a_well_formed_parent_is_taken_even_with_a_bad_state() -> None:
    headers = [
        (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        (b"tracestate", b"one=1"),
        (b"tracestate", b"two=2,\xff"),
    ]
    context = get_current_span(parent_of(headers)).get_span_context()
    assert (context.trace_id, context.span_id) == (0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331)
    assert context.is_remote and context.trace_flags.sampled
    assert parent_of(headers[:2]) != parent_of(headers[:1])


def test_the_ratio_is_for_requests_without_a_parent() -> None:
    scope = {"path": "/v1/completions", "method": "POST", "headers": []}
    endpoint = f"http://{LOOPBACK}:9/v1/traces"
    for ratio, begins in ((0.0, False), (1.0, True)):
        settings = ServiceSettings(model="/m", otlp_traces_endpoint=endpoint, trace_sample_ratio=ratio)
        tracer = IngressTracer(settings, "replica")
        try:
            assert (tracer.start(scope) is not None) is begins
            for sampled in (True, False):
                _, _, headers = parent(sampled=sampled)
                pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
                assert (tracer.start(scope | {"headers": pairs}) is not None) is sampled
            assert tracer.start(scope | {"path": "/ready"}) is None
        finally:
            tracer.close()


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_off_by_default_and_then_nothing_is_loaded() -> None:
    """Ray itself loads the API and the SDK; the exporter and our own spans come in by nobody else."""
    done = run_python(
        "import sys, service.ingress, service.replica, service.serve_command\n"
        "from service import tracing\n"
        "from service.settings import ServiceSettings\n"
        "settings = ServiceSettings(model='/m')\n"
        "tracing.check(settings)\n"
        "print(tracing.open_ingress(settings, 'r'), tracing.open_engine(settings, 'r', '0'))\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.exporter', 'service.tracing_'))])\n"
    )
    assert (done.returncode, done.stdout) == (0, "None None\n[]\n"), done.stderr


def test_only_these_modules_know_opentelemetry() -> None:
    importers = {
        path.relative_to(ROOT).as_posix()
        for package in ("engine", "service", "deploy")
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"^\s*(from|import) opentelemetry", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert importers == {"service/tracing_otlp.py", "service/tracing_ingress.py", "service/tracing_engine.py"}


def test_missing_packages_are_told_before_anything_starts(checkpoint: Path) -> None:
    done = run_python(
        "import sys\n"
        "sys.modules['opentelemetry.exporter'] = None\n"
        "from service.cli import main\n"
        f"sys.exit(main(['serve', '--model', {str(checkpoint)!r}, "
        "'--otlp-traces-endpoint', 'http://127.0.0.1:4318/v1/traces']))\n"
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "pip install 'm3serve[traces]'" in done.stderr and "starting Ray" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ["--otlp-traces-endpoint", "collector:4318"],
        ["--otlp-traces-endpoint", "http://collector:4318"],
        ["--trace-sample-ratio", "1.5"],
        ["--trace-sample-ratio", "-0.1"],
    ],
)
def test_wrong_settings_name_the_flag_and_the_value(flags: list[str]) -> None:
    name = flags[0].removeprefix("--").replace("-", "_")
    with pytest.raises(ConfigError, match=rf"{flags[0]} .*got '{flags[1]}'"):
        make_settings(model="/m", **{name: flags[1]})
