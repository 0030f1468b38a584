"""The page as one document, and the headers that forbid it everything it does not need."""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path

from starlette.responses import Response

_FILES = Path(__file__).parent
# In this order; together they are one script.
_SCRIPTS = ("api.js", "layers.js", "page.js")


def _read(name: str) -> str:
    return (_FILES / name).read_text(encoding="utf-8")


def _source(content: str) -> str:
    """What a Content-Security-Policy calls this very script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


@functools.cache
def document() -> tuple[str, str]:
    """The HTML, with its style and script in it, and the policy that lets these two run and nothing else."""
    style, script = _read("page.css"), "".join(map(_read, _SCRIPTS))
    html = _read("page.html").replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_source(script)}",
            f"style-src {_source(style)}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        )
    )
    return html, policy


def response() -> Response:
    """The page as an answer."""
    html, policy = document()
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
    }
    return Response(html, media_type="text/html", headers=headers)
