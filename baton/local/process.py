"""One process of the service: started, watched, restarted, drained. Only this module assigns its state.

STARTING -> READY -> (ends) RESTARTING or CRASH_LOOP -> STARTING ...
any      -> DRAINING (stop asked for) -> ENDED
any      -> ENDED with `has_given_up` (a hopeless end while the service starts)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path

from baton.local.control import ProcessView
from baton.local.logfiles import open_log
from baton.local.plan import ProcessSpec
from baton.local.probe import Health, ask_health
from baton.local.restarts import RestartHistory, after_end, is_hopeless
from baton.local.rundir import RunDir

STARTUP_POLL_S = 0.1
LIVENESS_POLL_S = 2.0
PROBE_TIMEOUT_S = 2.0
MAX_REFUSED_PROBES = 3


class ProcessState(Enum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    CRASH_LOOP = "crash loop"
    DRAINING = "draining"
    ENDED = "ended"


class ManagedProcess:
    """Keeps one process of the service running until it is asked to stop."""

    def __init__(
        self,
        spec: ProcessSpec,
        run: RunDir,
        *,
        address: str | None,
        environment: Mapping[str, str],
        parent_fd: int,
        say: Callable[[str], None],
        is_service_starting: Callable[[], bool],
    ) -> None:
        self.spec = spec
        self.state = ProcessState.STARTING
        self.history = RestartHistory()
        self.last_exit: int | None = None
        self.has_given_up = False
        self._run = run
        self._fixed_address = address
        self.address = address or ""
        self._environment = dict(environment)
        self._parent_fd = parent_fd
        self._say = say
        self._is_service_starting = is_service_starting
        self._health = Health(is_good=False)
        self._child: asyncio.subprocess.Process | None = None
        self._started_at = time.monotonic()
        self._stop = asyncio.Event()

    # ------------------------------------------------------------ flow

    async def keep_running(self) -> None:
        """Start the process, and again whenever it ends, until a stop is asked for or there is no hope."""
        while not self._stop.is_set():
            child = await self._start()
            watch = asyncio.create_task(self._watch_health(child))
            self.last_exit = await child.wait()
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            self._registry_file.unlink(missing_ok=True)  # a process killed with -9 could not
            if self._stop.is_set():
                break
            if self._is_service_starting() and is_hopeless(self.history, self.last_exit):
                self.has_given_up = True
                break
            await self._wait_to_restart()
        self._child = None
        self.state = ProcessState.ENDED

    async def _start(self) -> asyncio.subprocess.Process:
        if self._fixed_address is None:
            self.address = f"127.0.0.1:{_free_port()}"
        log = open_log(self._run.log_of(self.spec.worker_id))
        try:
            self._child = await asyncio.create_subprocess_exec(
                # -P: a folder of the user's that happens to be named gateway/ must not be run instead of ours.
                sys.executable, "-P", "-m", self.spec.module, *self.spec.arguments, *self._run_arguments(),
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
                env=self._environment, pass_fds=(self._parent_fd,),
                start_new_session=True,  # Ctrl-C reaches the supervisor alone, which drains the processes in order
            )  # fmt: skip
        finally:
            os.close(log)
        self._started_at = time.monotonic()
        self._health = Health(is_good=False)
        self.state = ProcessState.DRAINING if self._stop.is_set() else ProcessState.STARTING
        return self._child

    async def _watch_health(self, child: asyncio.subprocess.Process) -> None:
        """Follow the start, then end a process that says itself that its work stands still."""
        while self.state is ProcessState.STARTING:
            health = await self._ask("/startupz")
            if health is not None:
                self._health = health
                if health.is_good and self.state is ProcessState.STARTING:
                    self.state = ProcessState.READY
            await asyncio.sleep(STARTUP_POLL_S)
        num_refused = 0
        while num_refused < MAX_REFUSED_PROBES:
            await asyncio.sleep(LIVENESS_POLL_S)
            health = await self._ask("/livez")
            self._health = health or self._health
            # No answer at all is no verdict: two busy cores can hold a probe up for seconds.
            num_refused = num_refused + 1 if health is not None and not health.is_good else 0
        self._say(f"{self.spec.worker_id} says that its work stands still ({MAX_REFUSED_PROBES} x /livez): killing it")
        with contextlib.suppress(ProcessLookupError):
            child.kill()

    async def _wait_to_restart(self) -> None:
        restart = after_end(self.history, uptime_s=time.monotonic() - self._started_at, chance=random.random())
        self.history = restart.history
        self.state = ProcessState.CRASH_LOOP if restart.is_crash_loop else ProcessState.RESTARTING
        self._say(
            f"{self.spec.worker_id} {_how_it_ended(self.last_exit)}; starting again in {restart.delay_s:.1f} s"
            + (f" (crash loop: {restart.history.num_quick_ends} quick ends)" if restart.is_crash_loop else "")
        )
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), restart.delay_s)

    # ------------------------------------------------------------ what the supervisor asks

    def ask_to_stop(self) -> None:
        """Drain: SIGTERM now, no restart after it. Idempotent."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self.state is not ProcessState.ENDED:
            self.state = ProcessState.DRAINING
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._stop.set()
        self._signal(signal.SIGKILL)

    def view(self) -> ProcessView:
        share = self.spec.share
        is_up = self._child is not None and self._child.returncode is None
        return ProcessView(
            worker_id=self.spec.worker_id,
            role=self.spec.role.value,
            state=self.state.value,
            pid=self._child.pid if is_up and self._child is not None else None,
            uptime_s=round(time.monotonic() - self._started_at, 1) if is_up else 0.0,
            num_restarts=self.history.num_restarts,
            phase=self._health.phase if self.state is ProcessState.STARTING else "",
            percent=100.0 if self.state is ProcessState.READY else self._health.percent,
            threads=share.threads if share else None,
            kv_bytes=share.kv_bytes if share else None,
            transports=self._health.transports if self.state is ProcessState.READY else (),
            http=self.address,
            log=str(self._run.log_of(self.spec.worker_id)),
        )

    # ------------------------------------------------------------ parts

    @property
    def _registry_file(self) -> Path:
        return self._run.registry / f"{self.spec.worker_id}.json"

    async def _ask(self, probe: str) -> Health | None:
        return await asyncio.to_thread(ask_health, self.address, probe, timeout_s=PROBE_TIMEOUT_S)

    def _run_arguments(self) -> tuple[str, ...]:
        """What only the running supervisor knows."""
        http = () if self._fixed_address is not None else ("--http", self.address)
        return (*http, "--parent-fd", str(self._parent_fd))

    def _signal(self, number: signal.Signals) -> None:
        if self._child is not None and self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(number)


def _free_port() -> int:
    """A port for a worker's health, chosen here so that its start can be shown: workers announce themselves when ready.

    Somebody may take the port in between; the worker then ends and is started again with another.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
