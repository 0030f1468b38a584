"""GuideLLM, a load generator: a few requests on both endpoints; every one must succeed, with the tokens asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from reporting import MODEL, URL, run, same

NUM_REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 6, 64, 16


def load(route: str) -> None:
    report = Path(os.environ["M3_SCRATCH"]) / "guidellm.json"
    command = [
        str(Path(sys.executable).with_name("guidellm")),
        "run",
        f"--backend=kind=openai_http,target={URL.removesuffix('/v1')},model={MODEL},request_format={route}",
        "--profile=kind=concurrent,streams=2",
        f"--constraint=kind=max_requests,count={NUM_REQUESTS}",
        f"--tokenizer=kind=hf_auto,model={os.environ['M3_CHECKPOINT']}",
        f"--data=kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}",
        f"--output=kind=json,path={report}",
        "--disable-console-interactive",
    ]
    subprocess.run(command, check=True, timeout=300)
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    same((totals["successful"], totals["errored"], totals["incomplete"]), (NUM_REQUESTS, 0, 0))
    same(benchmark["metrics"]["output_token_count"]["successful"]["total_sum"], float(NUM_REQUESTS * OUTPUT_TOKENS))


run(
    "guidellm",
    [
        ("run on /v1/completions", lambda: load("/v1/completions")),
        ("run on /v1/chat/completions", lambda: load("/v1/chat/completions")),
    ],
)
