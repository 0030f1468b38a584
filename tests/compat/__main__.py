"""`python -m tests.compat`: other people's clients against the real service, on CPU, and a table of what they said.

Makes .venv-compat from requirements.txt (several GB, once), starts the service on the demo checkpoint, and runs every
program of clients/. What they must be given comes from the offline engine; for chat, from a plain request of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from deploy.demo import CHECKPOINT
from service.bench.report import table
from tests.cluster import wait_until
from tests.compat import expected

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = ROOT / ".venv-compat"
PYTHON = ENVIRONMENT / "bin" / "python"
CLIENTS = ("openai", "litellm", "langchain", "lm_eval", "guidellm")
START_TIMEOUT_S, CLIENT_TIMEOUT_S = 300.0, 900.0
READY = re.compile(r"m3serve ready: (http://\S+/v1) model=(\S+)")


def install() -> None:
    """The environment of the clients; made anew when the requirements have changed."""
    wanted = (HERE / "requirements.txt").read_text()
    stamp = ENVIRONMENT / "requirements.txt"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"installing {HERE / 'requirements.txt'} into {ENVIRONMENT}", file=sys.stderr, flush=True)
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    arguments = shlex.split(os.environ.get("PIP_ARGS", ""))
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run([*pip, "-r", str(HERE / "requirements.txt")], check=True)
    stamp.write_text(wanted)


@contextmanager
def service() -> Iterator[tuple[str, str]]:
    """The service on the demo checkpoint: its base URL and the model's name."""
    ports = ["--port", "0", "--metrics-port", "0", "--ray-metrics-port", "0"]
    engine = ["--dtype", expected.DTYPE, "--num-threads", "1", "--max-num-seqs", "8"]
    command = [sys.executable, "-m", "service.cli", "serve", "--model", str(CHECKPOINT), *ports, *engine]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    lines: list[str] = []
    threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True).start()
    try:
        wait_until(lambda: bool(lines) or process.poll() is not None, timeout_s=START_TIMEOUT_S, what="the ready line")
        found = READY.match(lines[0]) if lines else None
        if found is None:
            raise SystemExit(f"the service did not start, exit status {process.poll()}")
        yield found[1], found[2]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


def chat_text(url: str, model: str) -> str:
    """What a plain chat request is answered; clients must say the same."""
    body = {"model": model, "messages": expected.MESSAGES, "max_tokens": 16, "temperature": 0}
    answer = httpx.post(f"{url}/chat/completions", json=body, timeout=120, trust_env=False)
    if answer.status_code != 200:
        raise SystemExit(f"chat: HTTP {answer.status_code}: {answer.text[:300]}")
    content: str | None = answer.json()["choices"][0]["message"]["content"]
    return content or ""


def run_client(name: str, variables: dict[str, str], log: Path) -> list[dict[str, Any]]:
    """The lines that one client program reported; what else it printed goes into the log."""
    command = [str(PYTHON), str(HERE / "clients" / f"{name}_client.py")]
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OPENAI_API_KEY": "none",
        "TOKENIZERS_PARALLELISM": "0",
    }
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command,
                env=os.environ | offline | variables,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                timeout=CLIENT_TIMEOUT_S,
                check=False,
            )
            output, status = done.stdout, f"exit status {done.returncode}"
        except subprocess.TimeoutExpired as error:
            output, status = (error.stdout or b"").decode(), f"not done within {CLIENT_TIMEOUT_S:g} s"
        file.write(output)
    lines = [line.removeprefix("RESULT ") for line in output.splitlines() if line.startswith("RESULT ")]
    results: list[dict[str, Any]] = [json.loads(line) for line in lines]
    if not results or (status != "exit status 0" and all(result["result"] == "ok" for result in results)):
        results.append({"client": name, "version": "-", "ran": "the program", "result": f"{status}, see {log}"})
    return results


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compat", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CLIENTS, default=CLIENTS, help="some of the clients")
    parser.add_argument("--logs", type=Path, help="directory for what the clients print; default: a temporary one")
    arguments = parser.parse_args()
    install()
    logs = arguments.logs or Path(tempfile.mkdtemp(prefix="m3-compat-"))
    logs.mkdir(parents=True, exist_ok=True)
    wanted = expected.make(str(CHECKPOINT))
    results: list[dict[str, Any]] = []
    with service() as (url, model), tempfile.TemporaryDirectory() as scratch:
        wanted["chat"] = chat_text(url, model)
        (logs / "expected.json").write_text(json.dumps(wanted))
        variables = {
            "M3_URL": url,
            "M3_MODEL": model,
            "M3_CHECKPOINT": str(CHECKPOINT),
            "M3_EXPECTED": str(logs / "expected.json"),
            "M3_SCRATCH": scratch,
            "HF_HOME": scratch,
        }
        for name in arguments.only:
            print(f"running {name}", file=sys.stderr, flush=True)
            results += run_client(name, variables, logs / f"{name}.log")
    print(table(results))
    failed = sum(result["result"] != "ok" for result in results)
    print(f"{len(results) - failed} of {len(results)} ok; what they printed: {logs}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
