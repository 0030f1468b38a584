"""The answers of the page's two routes."""

from __future__ import annotations

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.responses import Response

from service.playground import page
from service.playground.layers import LayerView
from service.settings import ServiceSettings


class Playground:
    """The answers of its two routes: as if there were none, unless `enable_playground` is set."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._is_enabled = bool(settings.enable_playground)
        self._view = (
            LayerView(Path(settings.metrics_dir), settings.model_name) if settings.metrics_dir is not None else None
        )

    def page(self) -> Response:
        """The page itself: it holds no secret, so it needs no key."""
        self._check()
        return page.response()

    async def layers(self) -> Response:
        """Counts by layer as JSON; of no layer where metrics are off."""
        self._check()
        body = await self._view.json() if self._view is not None else b'{"engines":0,"guard_active":0,"layers":[]}'
        return Response(body, media_type="application/json", headers={"cache-control": "no-store"})

    def _check(self) -> None:
        if not self._is_enabled:
            raise HTTPException(404)
