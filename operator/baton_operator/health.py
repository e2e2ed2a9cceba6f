"""The operator's HTTP port: /livez, /readyz, /metrics.

kopf's own liveness answers as long as its web server runs. Here a process is alive while its resync loop turns, and
both answers say how old the last watch event, the last pass and the last whole list are.
"""

from __future__ import annotations

import time

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from baton_operator.handlers import TICK_S, Watcher
from baton_operator.metrics import Metrics

_STUCK_S = 180.0
"""A tick waits for lists of the API server: each is tried for seconds only, so minutes mean that the loop hangs."""


class Health:
    def __init__(self, watcher: Watcher, metrics: Metrics) -> None:
        self._watcher = watcher
        self._metrics = metrics
        self._runner: web.AppRunner | None = None

    async def serve(self, host: str, port: int) -> int:
        """Start to listen. Returns the port (0 asks for any)."""
        app = web.Application()
        app.add_routes([
            web.get("/livez", self._live), web.get("/readyz", self._ready), web.get("/metrics", self._show_metrics),
        ])  # fmt: skip
        self._runner = web.AppRunner(app, handle_signals=False, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _live(self, _: web.Request) -> web.Response:
        """Alive while starting, too: a start that hangs is not ready, and kopf tries again by itself."""
        is_alive = not self._watcher.is_synced or time.time() - self._watcher.ticked_at < TICK_S + _STUCK_S
        return web.json_response(self._ages(), status=200 if is_alive else 503)

    async def _ready(self, _: web.Request) -> web.Response:
        return web.json_response(self._ages(), status=200 if self._watcher.is_synced else 503)

    async def _show_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _ages(self) -> dict[str, float | None]:
        """Seconds since each happened; null: not yet."""
        gauges = {
            "last_watch_event_s": self._metrics.last_event,
            "last_reconcile_s": self._metrics.last_reconcile,
            "last_resync_s": self._metrics.last_resync,
        }
        values = {name: next(iter(gauge.collect())).samples[0].value for name, gauge in gauges.items()}
        return {name: round(time.time() - value, 1) if value else None for name, value in values.items()}
