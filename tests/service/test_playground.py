"""The page at /: what it says over HTTP, and what a person can do with it in a real browser."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.playground import page as page_module
from service.serve_command import _has_playground
from service.settings import ServiceSettings
from tests import browser
from tests.cluster import Cluster, wait_until

# No other test's: their series are in the same directory.
MODEL = "playground"
KEY = "sk-playground-0123456789"
HEADERS = {"Authorization": f"Bearer {KEY}"}
PROMPT = [5] * 600


@pytest.fixture(scope="module")
def url(cluster: Cluster, checkpoint: Path) -> Iterator[str]:
    settings = cluster.settings(
        checkpoint,
        served_model_name=MODEL,
        enable_playground=True,
        api_keys=KEY,
        index_topk_freq=2,
        index_reuse="audited",
        audit_interval=1,
        probe_interval=1,
    )
    with cluster.service(settings) as base:
        wait_until(lambda: httpx.get(f"{base}/ready").status_code == 200, timeout_s=60, what="readiness")
        yield base


def complete(url: str) -> None:
    body = {"prompt": PROMPT, "max_tokens": 4, "ignore_eos": True, "seed": 0}
    assert httpx.post(f"{url}/v1/completions", json=body, headers=HEADERS, timeout=60).status_code == 200


def layers(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/playground/layers", headers=HEADERS).raise_for_status().json()
    return found


def test_the_page_is_open_and_its_policy_lets_nothing_else_run(url: str) -> None:
    answer = httpx.get(f"{url}/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for tag in ("script", "style"):
        [content] = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    # Nothing from elsewhere; the only other address is the name of SVG in the icon.
    assert set(re.findall(r"https?://[^\s'\"]+", answer.text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\son\w+=|\sstyle=|\ssrc=", answer.text)


def test_nothing_else_is_open(url: str) -> None:
    for path in ("//", "/playground", "/page.html"):
        assert httpx.get(f"{url}{path}").status_code == 401
    assert httpx.post(f"{url}/", json={}).status_code == 405


def test_layers_need_the_key_and_are_what_the_series_say(cluster: Cluster, url: str) -> None:
    assert httpx.get(f"{url}/playground/layers").status_code == 401
    complete(url)
    series = re.compile(rf'm3_index_selections_total\{{engine="0",layer="3",model_name="{MODEL}",role="reuse"\}} (\S+)')

    def counted() -> tuple[float, float]:
        [scraped] = series.findall(httpx.get(cluster.metrics_url).text)
        return float(scraped), layers(url)["layers"][3]["reused"]

    # What is shown may be a second old.
    wait_until(lambda: len(set(counted())) == 1 and counted()[0] > 0, timeout_s=30, what="the same count in both")
    found = layers(url)
    assert (found["engines"], found["guard_active"]) == (1, 0)
    roles = [(layer["layer"], layer["role"], layer["source"]) for layer in found["layers"]]
    assert roles == [(0, "dense", None), (1, "dense", None), (2, "compute", 2), (3, "reuse", 2), (4, "compute", 4)]
    by_layer = {layer["layer"]: layer for layer in found["layers"]}
    assert by_layer[2]["computed"] == by_layer[3]["reused"] > 0 == by_layer[2]["reused"]
    assert by_layer[3]["overlap_count"] > 0 and 0 <= by_layer[3]["overlap_sum"] <= by_layer[3]["overlap_count"]
    assert by_layer[2]["indexer_s"]["prefill"] > 0 and by_layer[2]["indexer_samples"]["decode"] > 0


def test_where_it_is_on_by_default(checkpoint: Path) -> None:
    def settings(**given: Any) -> ServiceSettings:
        return ServiceSettings(model=str(checkpoint), **given)

    assert settings().enable_playground is None, "a cluster has none unless it is asked for"
    assert _has_playground(settings()) and not _has_playground(settings(host="0.0.0.0"))
    assert _has_playground(settings(host="0.0.0.0", enable_playground=True))
    assert not _has_playground(settings(enable_playground=False))


def test_the_document_is_one_file() -> None:
    html, _ = page_module.document()
    assert "/*STYLE*/" not in html and "/*SCRIPT*/" not in html and len(html) < 64 * 1024


def test_in_a_browser(url: str, tmp_path: Path) -> None:
    """With the keyboard alone: the key, a completion, a chat, refusals, stop; at the end in a narrow, dark window."""
    binary = browser.find()
    if binary is None:
        pytest.skip("no chromium or chrome in PATH")
    complete(url)

    async def visit() -> None:
        async with browser.page(binary) as page:
            await page.open(f"{url}/")
            await page.until("document.getElementById('status-text').textContent === 'an API key is needed'")
            # The browser's console tells of each 401, and rightly.
            assert all("401" in problem for problem in page.problems), page.problems
            await page.fill("#key", KEY)
            await page.press("Tab")
            await page.until(f"document.getElementById('model').value === '{MODEL}'")
            await page.until("document.querySelectorAll('#layers tr').length === 5")
            page.problems.clear()
            assert await page.run("document.getElementById('plan').textContent") == "DDFSF"
            overlap = "document.querySelectorAll('#layers tr')[3].lastChild.textContent"
            await page.until(f"/^[0-9.]+ %$/.test({overlap})")
            await _complete(page)
            # What came since the page was opened: its prompt was too short to leave a block out.
            await page.run("document.querySelector('input[name=span][value=\"30\"]').click()")
            await page.until(f"{overlap} === '–'")
            assert "of selections reused" in await page.run("document.getElementById('summary').textContent")
            await _chat(page)
            await _refused(page)
            await _stopped(page)
            await page.resize(400, 800)
            scheme = {"name": "prefers-color-scheme", "value": "dark"}
            await page.call("Emulation.setEmulatedMedia", features=[scheme])
            assert await page.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
            await page.screenshot(tmp_path / "page.png")
            assert all(requested.startswith((url, "data:", "about:")) for requested in page.requested)
            assert await page.run("localStorage.length + sessionStorage.length + document.cookie.length") == 0

    asyncio.run(visit())
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


IDLE = "!document.getElementById('run').disabled"


async def _complete(page: browser.Page) -> None:
    await page.fill("#prompt", "def add")
    await page.fill("#max-tokens", "5")
    await page.press("Enter", ctrl=True)
    await page.until("document.getElementById('n-reason').textContent !== '–'")
    await page.until(IDLE)
    assert await page.run("document.getElementById('error').hidden")
    assert int(await page.run("document.getElementById('n-output').textContent")) <= 5
    assert (await page.run("document.getElementById('output').textContent")).startswith("def add")
    assert not page.problems


async def _chat(page: browser.Page) -> None:
    await page.run("document.getElementById('tab-completion').focus()")
    await page.press("ArrowRight")
    assert await page.run("document.activeElement.id") == "tab-chat"
    await page.fill("#message", "hello")
    await page.press("Enter", ctrl=True)
    await page.until(f"document.querySelectorAll('#messages li').length === 2 || {IDLE}")
    await page.until(IDLE)
    error = await page.run("document.getElementById('error').textContent")
    # A checkpoint without a template is refused with words; the message then is back in its field.
    if error:
        assert "template" in error and await page.run("document.getElementById('message').value") == "hello"
        page.problems.clear()
    assert not page.problems
    await page.run("document.getElementById('tab-completion').click()")


async def _refused(page: browser.Page) -> None:
    """By the service, in its words; the page stays usable."""
    await page.fill("#max-tokens", "100000000")
    await page.press("Enter", ctrl=True)
    await page.until("!document.getElementById('error').hidden")
    await page.until(IDLE)
    assert "max_tokens" in await page.run("document.getElementById('error').textContent")
    await page.fill("#temperature", "-1")
    await page.press("Enter", ctrl=True)
    await page.until("document.getElementById('error').textContent.startsWith('temperature: ')")
    await page.fill("#temperature", "1")
    page.problems.clear()


async def _stopped(page: browser.Page) -> None:
    await page.fill("#max-tokens", "400")
    await page.press("Enter", ctrl=True)
    await page.until("Number(document.getElementById('n-output').textContent) >= 1")
    await page.press("Escape")
    await page.until(IDLE)
    assert await page.run("document.getElementById('n-reason').textContent") in ("you", "stop", "length")
    assert not page.problems
