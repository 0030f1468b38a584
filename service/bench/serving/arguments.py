"""Flags of `m3serve bench serve`. Where vLLM's benchmark of the same name has a flag for it, it is called the same.

Loads no HTTP library: every `m3serve` command builds these flags.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from typing import Any

from service.bench.arguments import count
from service.bench.serving.workload import Component

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GOALS = ("ttft", "tpot", "e2el")
_DESCRIPTION = """\
Load on an OpenAI-compatible endpoint, as its clients see it.

With --request-rate requests leave at times of their own, whatever the endpoint does (open loop); with
--max-concurrency a request waits until another one has ended (closed loop); both together: whichever comes later.
A request's time begins when it leaves. "late" says how long after its time in the open loop it did: while that is
more than some ms without --max-concurrency, this client is what limits the load.

TTFT: to the first text.  TPOT: from the first text to the last, per token after the first.  ITL: between two pieces of
text.  E2E: to the last text. A piece may hold several tokens.
"""
_EPILOG = """\
workloads (--dataset-name):
  random    prompts of --input-len tokens that share nothing
  prefix    --num-prefixes groups, each with --prefix-len tokens of its own in common and --input-len after them
  mix       lengths by weight, as in --mix 1024:128:7,8192:128:2,32768:256:1  (input:output:weight)
  sharegpt  --dataset-path FILE, a JSON list of {"conversations": [{"from": "human", "value": ...}, ...]} or of
            {"messages": [{"role": "user", "content": ...}, ...]}: first questions, with the length of their answers

examples:
  m3serve bench serve --max-concurrency 16 --num-prompts 64 --metrics-url http://127.0.0.1:9400/metrics
  m3serve bench serve --request-rate 2 --num-prompts 120 --goodput ttft:500 tpot:50
  m3serve bench serve --dataset-name prefix --num-prefixes 4 --prefix-len 2048 --input-len 128 --max-concurrency 8
  m3serve bench serve --base-url https://api.example.com --endpoint /v1/chat/completions --no-ignore-eos \\
      --dataset-name sharegpt --dataset-path sharegpt.json --request-rate 1     (the key: OPENAI_API_KEY)

exit status: 0 all requests succeeded, 1 some failed or the endpoint cannot be reached, 2 a flag is wrong, 130 Ctrl-C
(what has ended by then is reported)
"""


def positive(text: str) -> float:
    """A number above 0; inf is one."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def ratio(text: str) -> float:
    """A number in [0, 1)."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text!r}")
    return value


def shares(text: str) -> list[float]:
    """Percentiles, each in (0, 100)."""
    try:
        values = [float(part) for part in text.split(",") if part]
    except ValueError:
        values = []
    if not values or not all(0 < value < 100 for value in values):
        raise argparse.ArgumentTypeError(f"must be percentiles in (0, 100) with commas between them, got {text!r}")
    return values


def goal(text: str) -> tuple[str, float]:
    """ttft:500, in ms."""
    name, _, limit = text.partition(":")
    if name not in GOALS:
        raise argparse.ArgumentTypeError(f"must be NAME:MS with a name of {', '.join(GOALS)}, got {text!r}")
    return name, positive(limit)


def components(text: str) -> list[Component]:
    """1024:128:7,8192:128:2: input tokens, output tokens, weight."""
    found = []
    for part in text.split(","):
        fields = part.split(":")
        if len(fields) != 3:
            raise argparse.ArgumentTypeError(f"must be INPUT:OUTPUT:WEIGHT with commas between them, got {part!r}")
        found.append(Component(count(fields[0]), count(fields[1]), positive(fields[2])))
    return found


def endpoint(text: str) -> str:
    """The path of a route whose bodies are known."""
    if not text.endswith(("/completions", "/chat/completions")) or not text.startswith("/"):
        raise argparse.ArgumentTypeError(f"must end in {COMPLETIONS[3:]} or {CHAT[3:]}, got {text!r}")
    return text


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Register the flags."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    to = parser.add_argument_group("where")
    to.add_argument(
        "--base-url", default="http://127.0.0.1:8000", metavar="URL",
        help="of the server; a /v1 at its end may be there (http://127.0.0.1:8000)",
    )  # fmt: skip
    to.add_argument(
        "--endpoint",
        type=endpoint,
        default=COMPLETIONS,
        metavar="PATH",
        help=f"{COMPLETIONS}, or {CHAT} ({COMPLETIONS})",
    )
    to.add_argument("--model", metavar="NAME", help="model name; default: the first that is served")
    to.add_argument(
        "--api-key", default=os.environ.get("OPENAI_API_KEY"), metavar="KEY",
        help="sent to --base-url alone, as a bearer token; better in OPENAI_API_KEY, where nobody else sees it",
    )  # fmt: skip
    to.add_argument("--ca-cert", metavar="FILE", help="certificate (PEM) to trust; default: those of the system")
    to.add_argument("--timeout-s", type=positive, default=600.0, metavar="X", help="limit for one request (600)")
    to.add_argument(
        "--metrics-url", metavar="URL", help="m3serve's exporter, for the service's CPU seconds per 1000 output tokens"
    )
    load = parser.add_argument_group("load")
    load.add_argument("--num-prompts", type=count, default=64, metavar="N", help="requests in all (64)")
    load.add_argument(
        "--request-rate", type=positive, default=math.inf, metavar="X", help="requests per second (inf: no waiting)"
    )
    load.add_argument(
        "--burstiness", type=positive, default=1.0, metavar="X",
        help="shape of the gamma-distributed gaps: 1 Poisson, less comes in bursts, inf constant gaps (1)",
    )  # fmt: skip
    load.add_argument("--max-concurrency", type=count, metavar="N", help="requests at the same time; default: no limit")
    load.add_argument(
        "--num-warmups", type=int, default=1, metavar="N", help="requests beforehand, one at a time, not counted (1)"
    )
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts and times (0)")
    what = parser.add_argument_group("workload")
    what.add_argument("--dataset-name", choices=("random", "prefix", "mix", "sharegpt"), default="random")
    what.add_argument("--dataset-path", metavar="FILE", help="of sharegpt")
    what.add_argument("--input-len", type=count, default=1024, metavar="N", help="prompt tokens (1024)")
    what.add_argument(
        "--output-len", type=count, metavar="N", help="tokens to generate (128; sharegpt: as many as the answer has)"
    )
    what.add_argument(
        "--range-ratio", type=ratio, default=0.0, metavar="X",
        help="lengths are uniform in [1 - X, 1 + X] times the given ones (0)",
    )  # fmt: skip
    what.add_argument("--num-prefixes", type=count, default=8, metavar="N", help="groups of prefix (8)")
    what.add_argument("--prefix-len", type=count, default=1024, metavar="N", help="tokens that a group shares (1024)")
    what.add_argument(
        "--mix", type=components, metavar="I:O:W,...", default=components("1024:128:7,8192:128:2,32768:256:1"),
        help="lengths of mix (1024:128:7,8192:128:2,32768:256:1)",
    )  # fmt: skip
    what.add_argument(
        "--max-input-len",
        type=count,
        default=1024,
        metavar="N",
        help="longer questions of sharegpt are left out (1024)",
    )
    what.add_argument(
        "--tokenizer", metavar="DIR",
        help="tokenizer.json, to make and to count text: without it a word is taken for a token in random text, and "
        "4 characters in sharegpt",
    )  # fmt: skip
    what.add_argument(
        "--max-token-id", type=count, default=4000, metavar="N", help="random token ids are below this (4000)"
    )
    what.add_argument(
        "--ignore-eos", action=argparse.BooleanOptionalAction, default=True,
        help="ask for outputs of full length; not every server knows ignore_eos (on)",
    )  # fmt: skip
    what.add_argument(
        "--extra-body", type=json_object, default={}, metavar="JSON", help="more fields of the body; null takes one out"
    )
    out = parser.add_argument_group("result")
    out.add_argument(
        "--goodput", type=goal, nargs="+", default=[], metavar="NAME:MS",
        help="count the requests that were as fast as this: ttft:500 tpot:50 e2el:5000",
    )  # fmt: skip
    out.add_argument(
        "--metric-percentiles", type=shares, default=[50, 90, 99], metavar="P,P", help="to report (50,90,99)"
    )
    out.add_argument("--save-detailed", action="store_true", help="the JSON has every request by itself too")
    out.add_argument("--out", metavar="FILE", help="write the JSON here instead of stdout")
