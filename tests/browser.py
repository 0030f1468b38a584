"""A headless Chromium, driven over its DevTools protocol. Needs chromium or chrome in PATH, and nothing else."""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

TIMEOUT_S = 60.0
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowRight": 39}
_CTRL = 2


def find() -> str | None:
    """The path of a browser, None where there is none."""
    return next((path for name in _NAMES if (path := shutil.which(name)) is not None), None)


class Page:
    """One tab. `problems`: what went wrong in it: exceptions, errors in the console, violations of its policy."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.problems: list[str] = []
        self.requested: list[str] = []
        self._socket = socket
        self._session: dict[str, str] = {}
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reader = asyncio.create_task(self._read())

    async def open(self, url: str, *, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        """Load `url` in a window of this size."""
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def resize(self, width: int, height: int) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol; its result."""
        number = next(self._ids)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters, **self._session})
        async with asyncio.timeout(TIMEOUT_S):
            return await answer

    async def run(self, script: str) -> Any:
        """The value of an expression in the page. Raises AssertionError for what it throws."""
        answer = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait until an expression is true."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while not await self.run(condition):
                    await asyncio.sleep(0.02)
        except TimeoutError:
            shown = await self.run("document.body.innerText")
            raise AssertionError(f"{condition} did not come true; {self.problems}; the page says: {shown}") from None

    async def fill(self, selector: str, text: str) -> None:
        """Put the focus on a field, and type into it as a person would, over what was there."""
        await self.run(f"document.querySelector({selector!r}).focus()")
        await self.run(f"document.querySelector({selector!r}).select()")
        if text:
            await self.call("Input.insertText", text=text)
        else:
            await self.press("Delete", code=46)

    async def press(self, key: str, *, ctrl: bool = False, code: int | None = None) -> None:
        """A key that is no letter, down and up."""
        number = _KEYS[key] if code is None else code
        event = {"key": key, "code": key, "windowsVirtualKeyCode": number, "modifiers": _CTRL if ctrl else 0}
        for kind in ("rawKeyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, **event)

    async def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """What is seen, or the whole page, as PNG."""
        answer = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    async def close(self) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self) -> None:
        async for message in self._socket:
            event = message.json()
            if "id" in event:
                waiting = self._waiting.pop(event["id"])
                if waiting.done():
                    continue  # nobody waits any more
                if "error" in event:
                    waiting.set_exception(AssertionError(str(event["error"])))
                else:
                    waiting.set_result(event["result"])
                continue
            parameters = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                self.problems.append(details.get("exception", {}).get("description") or details["text"])
            elif event["method"] == "Log.entryAdded" and parameters["entry"]["level"] == "error":
                self.problems.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
            elif event["method"] == "Network.requestWillBeSent":
                self.requested.append(parameters["request"]["url"])


@asynccontextmanager
async def page(binary: str) -> AsyncIterator[Page]:
    """A browser of its own with one tab, which `Page.open` loads."""
    with tempfile.TemporaryDirectory(prefix="m3-browser-", ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions"]
        quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        command = [binary, *flags, *quiet, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
        errors = Path(profile) / "stderr"
        with errors.open("wb") as file:
            process = subprocess.Popen(command, stderr=file, stdout=file, env=os.environ | {"HOME": profile})
        try:
            address = await _address(errors, process)
            async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
                tab = Page(socket)
                try:
                    yield tab
                finally:
                    await tab.close()
        finally:
            process.terminate()
            process.wait(timeout=30)


async def _address(errors: Path, process: subprocess.Popen[bytes]) -> str:
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            said = errors.read_text(errors="replace")
            if found := re.search(r"DevTools listening on (ws://\S+)", said):
                return found[1]
            if process.poll() is not None:
                raise AssertionError(f"the browser did not start: {said[-500:]}")
            await asyncio.sleep(0.05)
