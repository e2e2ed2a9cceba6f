"""Health that means progress: /livez, /readyz, /startupz and /metrics, served before the weights load.

startupz   200 once started; before, 503 with {"state", "phase", "percent", "elapsed_seconds"}
readyz     200 while the process takes requests: started, not draining, not stalled
livez      200 unless the process has failed or its work stands still; never asks a peer
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

    from starlette.applications import Starlette

STALL_MIN_S = 10.0
STALL_STEPS = 10.0


class State(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


def is_stalled(idle_s: float, num_pending: int, predicted_step_s: float) -> bool:
    """Whether pending work without a step for `idle_s` means that the process is stuck."""
    return num_pending > 0 and idle_s > max(STALL_MIN_S, STALL_STEPS * predicted_step_s)


class ProgressWatch:
    """Remembers when the step counter last moved, or when work last began to wait."""

    def __init__(self, now: float) -> None:
        self._step_counter = -1
        self._moved_at = now

    def observe(self, now: float, step_counter: int, num_pending: int, predicted_step_s: float) -> bool:
        """Note the counters; True while the process is stalled."""
        if step_counter != self._step_counter or num_pending == 0:
            self._step_counter, self._moved_at = step_counter, now
        return is_stalled(now - self._moved_at, num_pending, predicted_step_s)


@dataclass(frozen=True, slots=True)
class Phase:
    """One part of the start, with the share of the whole that it usually takes."""

    name: str
    weight: float = 1.0


class HealthState:
    """Where the process stands. Assigned by the process's own flow, read by the probes (any thread)."""

    def __init__(self, phases: Sequence[Phase] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self._phases = tuple(phases)
        self._clock = clock
        self._started_at = clock()
        self._phase_at = self._started_at
        self._index = -1
        self._fraction = 0.0
        self.state = State.STARTING
        self.detail = ""
        self.stalled = False
        self.phase_seconds: dict[str, float] = {}
        self.facts: Callable[[], Mapping[str, object]] = dict  # what else a process tells of itself

    @property
    def phase(self) -> str:
        return self._phases[self._index].name if 0 <= self._index < len(self._phases) else ""

    def enter(self, phase: str) -> None:
        """Begin a phase; the one before is complete."""
        self._close_phase()
        self._index = next(i for i, known in enumerate(self._phases) if known.name == phase)
        self._fraction = 0.0

    def progress(self, fraction: float) -> None:
        """How much of the current phase is done, 0 to 1; never goes back."""
        self._fraction = max(self._fraction, min(1.0, fraction))

    def ready(self) -> None:
        self._close_phase()
        self._index = len(self._phases)
        self.state = State.READY

    def drain(self) -> None:
        if self.state is not State.FAILED:
            self.state = State.DRAINING

    def fail(self, detail: str) -> None:
        self.state, self.detail = State.FAILED, detail

    @property
    def percent(self) -> float:
        if self._index >= len(self._phases):
            return 100.0
        total = sum(phase.weight for phase in self._phases) or 1.0
        done = sum(phase.weight for phase in self._phases[: max(0, self._index)])
        current = self._phases[self._index].weight * self._fraction if self._index >= 0 else 0.0
        return round(100.0 * (done + current) / total, 1)

    @property
    def is_live(self) -> bool:
        return self.state is not State.FAILED and not self.stalled

    @property
    def is_ready(self) -> bool:
        return self.state is State.READY and not self.stalled

    @property
    def is_started(self) -> bool:
        return self.state in (State.READY, State.DRAINING)

    def report(self) -> dict[str, object]:
        body: dict[str, object] = {
            "state": self.state.value,
            "phase": self.phase,
            "percent": self.percent,
            "elapsed_seconds": round(self._clock() - self._started_at, 3),
        }
        body |= self.facts()
        if self.stalled:
            body["detail"] = "work is pending and no step has been made"
        if self.detail:
            body["detail"] = self.detail
        return body

    def _close_phase(self) -> None:
        now = self._clock()
        if self.phase:
            self.phase_seconds[self.phase] = round(now - self._phase_at, 3)
        self._phase_at = now


def health_routes(health: HealthState, render_metrics: Callable[[], bytes]) -> list[Any]:
    """Starlette routes; a gateway adds them to its own app, a worker serves them alone (`health_app`)."""
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def probe(is_good: Callable[[], bool]) -> Callable[[Request], Any]:
        async def answer(_: Request) -> Response:
            return JSONResponse(health.report(), status_code=200 if is_good() else 503)

        return answer

    async def metrics(_: Request) -> Response:
        return Response(render_metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return [
        Route("/livez", probe(lambda: health.is_live)),
        Route("/readyz", probe(lambda: health.is_ready)),
        Route("/startupz", probe(lambda: health.is_started)),
        Route("/metrics", metrics),
    ]


def health_app(health: HealthState, render_metrics: Callable[[], bytes]) -> Starlette:
    from starlette.applications import Starlette

    return Starlette(routes=health_routes(health, render_metrics))


@dataclass(slots=True)
class HttpServer:
    """A running uvicorn on this loop; `port` is the one really bound."""

    host: str
    port: int
    _server: Any
    _task: asyncio.Task[None]

    async def stop(self) -> None:
        self._server.should_exit = True
        await self._task


async def start_http(app: Any, host: str, port: int, **uvicorn_options: Any) -> HttpServer:
    """Serve `app` on this loop. Signals stay the process's own; port 0 picks a free one."""
    import asyncio

    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Generator[None]:
            yield  # lifecycle.py owns the signals: a drain must not close the listener first

    listener = _listen(host, port)
    options: dict[str, Any] = {"log_config": None, "access_log": False, "lifespan": "off", "ws": "none"}
    server = Server(uvicorn.Config(app, **(options | uvicorn_options)))
    task = asyncio.create_task(server.serve(sockets=[listener]), name="http")
    while not server.started:
        if task.done():
            task.result()
            raise RuntimeError("HTTP server ended while starting")
        await asyncio.sleep(0.005)
    return HttpServer(host, listener.getsockname()[1], server, task)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener
