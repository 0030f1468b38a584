"""One run of `m3serve bench serve`: check the endpoint, send the load, say what its clients saw."""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import ssl
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from engine.errors import ConfigError, M3Error
from engine.tokenizer import Tokenizer
from service.bench.report import machine, progress, table, write
from service.bench.serving import workload
from service.bench.serving.client import Client, Target, service_cpu_seconds
from service.bench.serving.load import Load, arrival_times
from service.bench.serving.statistics import details, latency_rows, summarise
from service.bench.serving.workload import Prompt, TokenSource

DEFAULT_OUTPUT_TOKENS = 128
# Of one core: above it, what was measured may be this client.
HIGH_CPU_SHARE = 0.7
_LINE_PERIOD_S, _BAR_PERIOD_S = 10.0, 0.2
_BAR_CHARS = 30


class Unreachable(M3Error):
    """The endpoint cannot be measured."""


def from_args(args: argparse.Namespace) -> int:
    """Run as the flags say; returns the exit status."""
    try:
        document = asyncio.run(_run(args))
    except (Unreachable, aiohttp.ClientError, TimeoutError) as error:
        progress(f"error: {args.base_url} cannot be measured: {error or type(error).__name__}")
        return 1
    progress(_summary(document))
    write(document, args.out)
    if document["interrupted"]:
        return 130
    return 1 if document["failed"] else 0


def make_prompts(args: argparse.Namespace, count: int, seed: int) -> list[Prompt]:
    """The workload that the flags ask for. Raises ConfigError for a file that is none."""
    rng = random.Random(seed)
    tokenizer = None if args.tokenizer is None else Tokenizer.from_dir(args.tokenizer)
    output_tokens: int = args.output_len or DEFAULT_OUTPUT_TOKENS
    source = TokenSource(
        rng,
        max_token_id=args.max_token_id,
        as_text=args.endpoint.endswith("/chat/completions"),
        tokenizer=tokenizer,
    )
    if args.dataset_name == "sharegpt":
        if args.dataset_path is None:
            raise ConfigError("--dataset-name sharegpt needs --dataset-path FILE")
        return workload.sharegpt_prompts(
            Path(args.dataset_path),
            count,
            rng,
            tokenizer=tokenizer,
            output_tokens=args.output_len,
            max_input_tokens=args.max_input_len,
        )
    if args.dataset_name == "mix":
        return workload.mixed_prompts(count, source, rng, components=args.mix, ratio=args.range_ratio)
    lengths = {"input_tokens": args.input_len, "output_tokens": output_tokens, "ratio": args.range_ratio}
    if args.dataset_name == "prefix":
        return workload.shared_prefix_prompts(
            count, source, rng, num_prefixes=args.num_prefixes, prefix_tokens=args.prefix_len, **lengths
        )
    return workload.random_prompts(count, source, rng, **lengths)


async def _run(args: argparse.Namespace) -> dict[str, Any]:
    base_url = args.base_url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    tls = _trusted(args.ca_cert)
    prompts = make_prompts(args, args.num_prompts, args.seed)
    target = Target(
        base_url, args.endpoint, args.model or "", headers, args.extra_body, args.ignore_eos, args.timeout_s
    )
    client = Client(target, tls=tls)
    try:
        names = await client.model_names()
        if args.model is not None and args.model not in names:
            raise ConfigError(f"--model {args.model}: {base_url} does not serve it, only {', '.join(names)}")
        client.target = target = replace(target, model=args.model or names[0])
        await _warm_up(client, args)
        return await _measure(client, target, prompts, args)
    finally:
        await client.close()


def _trusted(ca_cert: str | None) -> ssl.SSLContext | None:
    if ca_cert is None:
        return None
    try:
        return ssl.create_default_context(cafile=ca_cert)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"--ca-cert {ca_cert} cannot be read: {error}") from None


async def _warm_up(client: Client, args: argparse.Namespace) -> None:
    # Another seed: what these leave in the prefix cache must not help the run.
    for prompt in make_prompts(args, args.num_warmups, args.seed + 1) if args.num_warmups else ():
        outcome = await client.send(prompt, None)
        if outcome.failure is not None:
            raise Unreachable(f"a first request failed: {outcome.failure}: {outcome.message}")


async def _measure(
    client: Client, target: Target, prompts: Sequence[Prompt], args: argparse.Namespace
) -> dict[str, Any]:
    times = arrival_times(len(prompts), rate=args.request_rate, burstiness=args.burstiness, seed=args.seed)
    load = Load(client.send, max_concurrency=args.max_concurrency)
    cpu_before = {} if args.metrics_url is None else await service_cpu_seconds(args.metrics_url)
    reporter = asyncio.create_task(_report(load, len(prompts)))
    interrupted = False
    cpu_s = time.process_time()
    try:
        await load.run(prompts, times)
    except asyncio.CancelledError:  # Ctrl-C: what has ended is worth a report
        interrupted = True
    finally:
        cpu_s = time.process_time() - cpu_s
        reporter.cancel()
        await asyncio.gather(reporter, return_exceptions=True)
    cpu_after = {} if args.metrics_url is None else await service_cpu_seconds(args.metrics_url)
    results = summarise(load.outcomes, load.wall_s, shares=args.metric_percentiles, goals_ms=dict(args.goodput))
    num_events = sum(outcome.num_events for outcome in load.outcomes)
    tokens = results["output_tokens"]
    document = {
        "benchmark": "serve",
        "machine": machine(),
        "base_url": target.base_url,
        "endpoint": target.endpoint,
        "model": target.model,
        "load": _Settings.of(args).as_json(),
        "workload": _describe(args),
        "interrupted": interrupted,
        "requests": len(prompts),
        "peak_concurrency": load.peak,
        **results,
        "client": {
            "cpu_s": cpu_s,
            "cpu_share": cpu_s / load.wall_s,
            "events": num_events,
            "cpu_us_per_event": cpu_s / num_events * 1e6 if num_events else None,
        },
        "cpu_s_per_1k_tokens": {
            kind: (cpu_after[kind] - cpu_before.get(kind, 0.0)) / tokens * 1e3 for kind in cpu_after if tokens
        },
    }
    if args.save_detailed:
        document["details"] = details(load.outcomes, load.started_s)
    return document


@dataclass(frozen=True, slots=True)
class _Settings:
    """The load as JSON can hold it: infinities are null."""

    request_rate: float
    burstiness: float
    max_concurrency: int | None
    seed: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> _Settings:
        return cls(args.request_rate, args.burstiness, args.max_concurrency, args.seed)

    def as_json(self) -> dict[str, Any]:
        is_open = not math.isinf(self.request_rate)
        gaps = "constant" if math.isinf(self.burstiness) else "gamma"
        return {
            "loop": "open" if is_open else "closed",
            "request_rate": self.request_rate if is_open else None,
            "gaps": gaps if is_open else None,
            "burstiness": self.burstiness if is_open and gaps == "gamma" else None,
            "max_concurrency": self.max_concurrency,
            "seed": self.seed,
        }


def _describe(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that shaped the prompts."""
    of_kind: dict[str, dict[str, Any]] = {
        "random": {"input_len": args.input_len},
        "prefix": {"input_len": args.input_len, "num_prefixes": args.num_prefixes, "prefix_len": args.prefix_len},
        "mix": {"mix": [[part.input_tokens, part.output_tokens, part.weight] for part in args.mix]},
        "sharegpt": {"dataset_path": args.dataset_path, "max_input_len": args.max_input_len},
    }
    described = {"dataset": args.dataset_name, **of_kind[args.dataset_name]}
    if args.dataset_name in ("random", "prefix"):
        described["output_len"] = args.output_len or DEFAULT_OUTPUT_TOKENS
    elif args.dataset_name == "sharegpt":
        described["output_len"] = args.output_len
    if args.dataset_name != "sharegpt":
        described["range_ratio"] = args.range_ratio
    return {**described, "ignore_eos": args.ignore_eos, "extra_body": args.extra_body}


async def _report(load: Load, count: int) -> None:
    """How far the run is: a bar on a terminal, else a line now and then."""
    is_terminal = sys.stderr.isatty()
    try:
        while True:
            await asyncio.sleep(_BAR_PERIOD_S if is_terminal else _LINE_PERIOD_S)
            done, failed = len(load.outcomes), sum(outcome.failure is not None for outcome in load.outcomes)
            passed_s = time.perf_counter() - load.started_s
            state = f"{done} of {count} requests done, {load.num_running} running, {failed} failed, {passed_s:.0f} s"
            if is_terminal:
                filled = _BAR_CHARS * done // count
                bar = "█" * filled + "░" * (_BAR_CHARS - filled)
                print(f"\r{bar} {state}\x1b[K", end="", file=sys.stderr, flush=True)
            else:
                progress(state)
    finally:
        if is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _summary(document: dict[str, Any]) -> str:
    totals = {
        "requests": document["completed"],
        "failed": document["failed"],
        "wall s": document["wall_s"],
        "requests/s": document["requests_per_s"],
        "output tok/s": document["output_tokens_per_s"],
        "total tok/s": document["total_tokens_per_s"],
        "peak running": document["peak_concurrency"],
    }
    if "goodput" in document:
        totals |= {"goodput req/s": document["goodput"]["requests_per_s"], "good": document["goodput"]["share"]}
    lines = [f"\n{table([totals])}\n\n{table(latency_rows(document))}"]
    for kind, entry in document["errors"].items():
        lines.append(f"{entry['count']} failed, {kind}: {entry['first']}")
    share = document["client"]["cpu_share"]
    if share > HIGH_CPU_SHARE:
        lines.append(f"this client used {share:.0%} of a core: it may be what limited the load")
    if document["output_tokens_are_pieces"]:
        lines.append("the server did not say how many tokens it generated: pieces were counted instead")
    if document["interrupted"]:
        lines.append(f"stopped after {document['completed'] + document['failed']} of {document['requests']} requests")
    return "\n".join(lines)
