"""Run one service: start its processes, wait until it answers, keep it up, take commands, stop it without a trace.

`Supervisor.run` is the whole flow. What to start is decided in `plan`, when to start again in `restarts`; how one
process lives is in `process`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine, Sequence
from pathlib import Path

import baton
from baton.local.control import Command, ControlError, Reply, Verb, serve_control
from baton.local.errors import AlreadyRunning, StartFailed
from baton.local.janitor import RUN_ID_VARIABLE
from baton.local.logfiles import rotate, tail
from baton.local.plan import (
    DRAIN_S,
    POOL_ROLES,
    Machine,
    ModelFacts,
    ProcessSpec,
    Role,
    plan_added_worker,
    plan_service,
)
from baton.local.probe import FirstToken, ask_connected_workers, stream_first_token
from baton.local.process import ManagedProcess, ProcessState
from baton.local.reporter import Ready, Reporter
from baton.local.rundir import RunDir
from baton_operator.resources import Disaggregation, LLMService

START_TIMEOUT_S = 600.0
FIRST_TOKEN_TIMEOUT_S = 120.0
KILL_AFTER_S = DRAIN_S + 5.0  # a process that drains in time is never killed
MAX_REPLICAS = 64
JANITOR_TIMEOUT_S = 15.0


class Supervisor:
    """One run of one service. The caller holds the run's lock (`lock_fd`) and has prepared its folder."""

    def __init__(
        self,
        service: LLMService,
        machine: Machine,
        model: ModelFacts,
        run: RunDir,
        reporter: Reporter,
        *,
        lock_fd: int,
        started_at: float,
    ) -> None:
        self._service = service
        self._machine = machine
        self._model = model
        self._run = run
        self._reporter = reporter
        self._lock_fd = lock_fd
        self._started_at = started_at
        self._run_id = secrets.token_hex(8)
        self._processes: dict[str, ManagedProcess] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stop = asyncio.Event()
        self._kill = asyncio.Event()
        self._state = "starting"
        self._parent_fd = -1

    # ------------------------------------------------------------ flow

    async def run(self) -> None:
        """The life of the service. Raises: PlanError, StartFailed, AlreadyRunning; nothing is left behind then."""
        plan = plan_service(self._service, self._machine, self._model, self._run.paths)
        for line in plan.arithmetic:
            self._reporter.say(line)
        self._check_port()
        async with self._death_pipe(), self._commands(), self._signals():
            try:
                for spec in plan.processes:
                    self._add(spec)
                await self._until_stopped(self._become_ready())
                await self._until_stopped(self._keep_house())
            finally:
                await self._stop_processes()

    async def _become_ready(self) -> None:
        """Wait for every process, then for the first token of a real request."""
        async with asyncio.timeout(START_TIMEOUT_S):
            while any(process.state is not ProcessState.READY for process in self._processes.values()):
                self._fail_if_hopeless()
                self._reporter.update([process.view() for process in self._processes.values()])
                await asyncio.sleep(0.05)
            self._reporter.update([process.view() for process in self._processes.values()])
            while not await self._gateway_has_workers():
                self._fail_if_hopeless()
                await asyncio.sleep(0.05)
        seconds_to_ready = time.monotonic() - self._started_at
        token = await asyncio.to_thread(self._first_token)
        self._fail_if_hopeless()  # nobody would start again what gave up meanwhile
        self._state = "ready"
        self._reporter.ready(
            Ready(
                url=self.url,
                model_id=self._model.model_id,
                seconds_to_ready=seconds_to_ready,
                seconds_to_first_token=time.monotonic() - self._started_at,
                first_token=token,
                needs_api_key=self._service.spec.gateway.api_keys_file is not None,
            )
        )

    async def _keep_house(self) -> None:
        while True:
            rotate(self._run.logs)
            await asyncio.sleep(5.0)

    async def _until_stopped(self, work: Coroutine[None, None, None]) -> None:
        """Do `work` until it ends or a stop is asked for; its error is the service's."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not task.done():
            task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return
        except TimeoutError as error:
            raise StartFailed(f"not ready after {START_TIMEOUT_S:g} s; see {self._run.logs}") from error

    async def _stop_processes(self) -> None:
        """Gateway first, so that no new request meets a draining worker; then the workers; then whoever is left."""
        self._state = "stopping"
        gateway = [p for p in self._processes.values() if p.spec.role is Role.GATEWAY]
        workers = [p for p in self._processes.values() if p.spec.role is not Role.GATEWAY]
        for group in (gateway, workers):
            await self._drain(group)

    async def _drain(self, processes: Sequence[ManagedProcess]) -> None:
        for process in processes:
            process.ask_to_stop()
        tasks = [self._tasks[process.spec.worker_id] for process in processes]
        if not tasks:
            return
        kill = asyncio.ensure_future(self._kill.wait())
        everyone = asyncio.ensure_future(asyncio.wait(tasks))
        await asyncio.wait([everyone, kill], timeout=KILL_AFTER_S, return_when=asyncio.FIRST_COMPLETED)
        kill.cancel()
        for process in processes:
            if process.state is not ProcessState.ENDED:
                self._reporter.say(f"{process.spec.worker_id} has not drained: killing it")
                process.kill()
        await everyone

    # ------------------------------------------------------------ commands

    async def _handle(self, command: Command) -> Reply:
        match command.verb:
            case Verb.PS:
                return self._reply("")
            case Verb.DOWN:
                self._stop.set()
                return self._reply("stopping")
            case Verb.SCALE:
                return self._reply(self._scale(command.pool, command.replicas))

    def _scale(self, pool: str, replicas: int) -> str:
        """Begin to scale a pool; new workers start, surplus ones drain, in the background."""
        if self._state == "stopping":
            raise ControlError(f"service {self._run.name!r} is stopping; start it again with `baton up`")
        role = self._pool_role(pool, replicas)
        running = [p for p in self._processes.values() if p.spec.role is role and p.state is not ProcessState.DRAINING]
        surplus = sorted(running, key=lambda process: _index_of(process.spec), reverse=True)[: -replicas or None]
        for process in surplus if len(running) > replicas else ():
            process.ask_to_stop()
            self._tasks[process.spec.worker_id].add_done_callback(
                lambda _, name=process.spec.worker_id: self._forget(name)
            )
        for _ in range(replicas - len(running)):
            specs = tuple(process.spec for process in self._processes.values())
            taken = {_index_of(spec) for spec in specs if spec.role is role}
            index = next(i for i in range(MAX_REPLICAS * 2) if i not in taken)
            self._add(plan_added_worker(
                self._service, self._machine, self._model, self._run.paths, role, index, specs
            ))  # fmt: skip
        message = f"{pool}: {len(running)} -> {replicas}"
        self._reporter.say(message)
        return message

    def _pool_role(self, pool: str, replicas: int) -> Role:
        known = {role.value: role for role in POOL_ROLES}
        if pool not in known:
            raise ControlError(f"pool = {pool!r}; known: {', '.join(known)}")
        needs_prefill = self._service.spec.disaggregation is Disaggregation.ALWAYS
        least = 1 if pool == Role.DECODE.value or needs_prefill else 0
        if not least <= replicas <= MAX_REPLICAS:
            raise ControlError(f"replicas = {replicas}; {pool} takes {least} to {MAX_REPLICAS}")
        return known[pool]

    def _reply(self, message: str) -> Reply:
        views = tuple(process.view() for process in self._processes.values())
        return Reply(
            message=message,
            service=self._run.name,
            state=self._state,
            url=self.url,
            pid=os.getpid(),
            processes=views,
        )

    # ------------------------------------------------------------ edges of a run

    @contextlib.asynccontextmanager
    async def _death_pipe(self) -> AsyncGenerator[None]:
        """Hold the pipe whose closing ends every process of the run, however this one ends, and wakes the janitor."""
        read_end, write_end = os.pipe()
        self._parent_fd = read_end
        janitor = self._start_janitor(read_end)
        try:
            yield
        finally:
            os.close(write_end)
            os.close(read_end)
            await asyncio.to_thread(janitor.wait, JANITOR_TIMEOUT_S)

    @contextlib.asynccontextmanager
    async def _commands(self) -> AsyncGenerator[None]:
        server = await serve_control(self._run, self._handle)
        try:
            yield
        finally:
            server.close()

    @contextlib.asynccontextmanager
    async def _signals(self) -> AsyncGenerator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._kill.set()
            return
        self._reporter.say("stopping; once more to stop at once")
        self._stop.set()

    # ------------------------------------------------------------ parts

    def _start_janitor(self, read_end: int) -> subprocess.Popen[bytes]:
        """It inherits the lock: a new run of this name waits until the cleaning is done."""
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "baton.local.janitor", "--parent-fd", str(read_end),
             "--run-dir", str(self._run.path), "--run-id", self._run_id],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=(read_end, self._lock_fd), env=self._environment(is_of_run=False), start_new_session=True,
        )  # fmt: skip

    def _add(self, spec: ProcessSpec) -> None:
        process = ManagedProcess(
            spec,
            self._run,
            address=self._gateway_address if spec.role is Role.GATEWAY else None,
            environment=self._environment(is_of_run=True),
            parent_fd=self._parent_fd,
            say=self._reporter.say,
            is_service_starting=lambda: self._state == "starting",
        )
        self._processes[spec.worker_id] = process
        self._tasks[spec.worker_id] = asyncio.create_task(process.keep_running(), name=spec.worker_id)

    def _forget(self, worker_id: str) -> None:
        self._processes.pop(worker_id, None)
        self._tasks.pop(worker_id, None)

    def _fail_if_hopeless(self) -> None:
        """The start fails with the first process that has given up."""
        for process in self._processes.values():
            if process.has_given_up:
                log = self._run.log_of(process.spec.worker_id)
                raise StartFailed(
                    f"{process.spec.worker_id} ended with exit code {process.last_exit} before it was ready. "
                    f"The end of {log}:\n{tail(log, 12)}"
                )

    async def _gateway_has_workers(self) -> bool:
        """All of them: a prompt that came before its prefill workers would be prefilled where it is decoded."""
        started = Counter(process.spec.role for process in self._processes.values())
        met = await asyncio.to_thread(ask_connected_workers, self._gateway_address, timeout_s=2.0)
        return all(met.get(role.value, 0) >= started[role] for role in POOL_ROLES)

    def _check_port(self) -> None:
        """Say so now, instead of in a log, when the gateway's port is taken."""
        gateway = self._service.spec.gateway
        family = socket.AF_INET6 if ":" in gateway.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((gateway.host, gateway.port))
            except OSError as error:
                raise AlreadyRunning(
                    f"cannot listen on {gateway.host}:{gateway.port} ({error.strerror}); choose another with --port "
                    f"or spec.gateway.port"
                ) from error

    def _first_token(self) -> FirstToken | None:
        """A real request's first token; None where the keys file holds only digests of keys, so that we have none."""
        path = self._service.spec.gateway.api_keys_file
        key = _first_plain_key(Path(path).read_text()) if path else None
        if path and key is None:
            return None
        return stream_first_token(self._gateway_address, self._model.model_id, key, timeout_s=FIRST_TOKEN_TIMEOUT_S)

    @property
    def _gateway_address(self) -> str:
        """Where this machine reaches the gateway: loopback if it listens everywhere."""
        gateway = self._service.spec.gateway
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(gateway.host, gateway.host)
        return f"{host}:{gateway.port}"

    @property
    def url(self) -> str:
        return f"http://{self._gateway_address}"

    def _environment(self, *, is_of_run: bool) -> dict[str, str]:
        """The user's own, where our packages lie (a checkout that is not installed works too) and the run's mark."""
        root = Path(baton.__file__).resolve().parents[1]
        paths = [os.environ.get("PYTHONPATH", ""), str(root), str(root / "operator")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        environment.pop(RUN_ID_VARIABLE, None)
        return environment | ({RUN_ID_VARIABLE: self._run_id} if is_of_run else {})


def _first_plain_key(text: str) -> str | None:
    lines = (line.strip() for line in text.splitlines())
    return next((line for line in lines if line and not line.startswith(("#", "sha256:"))), None)


def _index_of(spec: ProcessSpec) -> int:
    return int(spec.worker_id.rpartition("-")[2])
