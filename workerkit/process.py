"""A worker process around its work: probes first, weights, server, registration, drain, exit.

    begin -> load -> serve gRPC -> announce -> until_end -> (the role's own drain) -> end

The role's `worker.py` calls these in this order; that function is the process's whole flow.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import grpc.aio

from engine.errors import EngineError
from engine.sizing import MemoryTooSmall
from engine.worker import LoadPhase, OnProgress, Replica, ReplicaSpec, load_replica
from kvtransfer import rpc
from kvtransfer.auth import SecretInterceptor
from kvtransfer.nixl_agent import NixlError
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.shm_transport import host_id
from modelfiles.errors import ModelFilesError
from registry.dns import join_address
from registry.entry import SIGNING_PURPOSE, Entry
from registry.keeper import WITHDRAW_TIMEOUT_S, Keeper
from registry.opening import open_memberships
from servicekit import failpoints, lifecycle, logs
from servicekit.health import HealthState, HttpServer, Phase, ProgressWatch, health_app, start_http
from servicekit.metrics import Metrics
from workerkit.config import WorkerConfig
from workerkit.engine_client import EngineClient
from workerkit.gpu_transfer import reads_device_memory
from workerkit.messages import worker_info
from workerkit.metrics import count_startup, show_registries

log = logging.getLogger(__name__)

# The engine's Python runs beside this loop's: 0.5 ms keeps heartbeats and tokens prompt (5 ms is the default).
SWITCH_INTERVAL_S = 0.0005
# grpc has no type hints of its own.
_aio: Any = grpc.aio

EXIT_CANNOT_START = 78  # EX_CONFIG: starting again will not help
EXPECTED_ERRORS = (ModelFilesError, EngineError, MemoryTooSmall, NixlError, OSError, ValueError)
"""A model, setting, port or file that cannot be used; the message says which and why, a traceback would hide it."""

EXIT_ENGINE_FAILED = 70  # EX_SOFTWARE

# Shares of the start measured with SmolLM2 on 2 cores; they only shape the percent.
PHASES = (
    Phase(LoadPhase.READ_MODEL.value, 1),
    Phase(LoadPhase.IMPORT_TORCH.value, 20),
    Phase(LoadPhase.LOAD_WEIGHTS.value, 2),
    Phase(LoadPhase.WARMUP.value, 2),
    Phase("register", 1),
)


Options = tuple[tuple[str, int], ...]
Loader = Callable[[ReplicaSpec, OnProgress], Replica]


class WorkerProcess:
    """One worker. Everything here runs on the asyncio loop of the main thread, except the loading itself."""

    def __init__(self, config: WorkerConfig, role: pb.Role, load: Loader = load_replica) -> None:
        """Raises: ValueError for a secret file or failpoints that cannot be used."""
        self.config = config
        self.role = role
        self.address = ""
        self._layout_fingerprint = ""
        self._load = load
        self.boot_id = lifecycle.new_boot_id()
        self.host_id = host_id()
        self.secret = config.load_secret()
        self.failpoints = failpoints.parse(config.failpoints, os.environ)
        self.health = HealthState(PHASES)
        self.metrics = Metrics(config.served_model_id, config.worker_id)
        self.drain_signal = lifecycle.DrainSignal()
        self.refresh_metrics: Callable[[], None] = lambda: None
        self._engine_failed = asyncio.Event()
        self._failure = ""
        self._http: HttpServer | None = None
        self._server: Any = None
        self._tasks: list[asyncio.Task[None]] = []
        self._memberships = open_memberships(config, self.secret.signing_key(SIGNING_PURPOSE))
        self._keepers: list[Keeper] = []
        self._keeping: list[asyncio.Task[None]] = []

    async def begin(self) -> None:
        """Answer probes before anything slow happens."""
        self._http = await start_http(health_app(self.health, self._render_metrics), *self.config.http)
        log.info("probes answer", extra={"http": f"{self._http.host}:{self._http.port}"})

    async def load(self, **role_settings: Any) -> Replica | None:
        """Build the replica on a thread of its own; None if a drain was asked for before it was ready.

        `role_settings` are fields of ReplicaSpec that only one role has.
        """
        spec = dataclasses.replace(self._replica_spec(), **role_settings)
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[Replica] = loop.create_future()

        def tell(callback: Callable[..., None], *args: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: a drain did not wait for us
                loop.call_soon_threadsafe(callback, *args)

        def on_progress(phase: LoadPhase, fraction: float) -> None:
            tell(self._note_progress, phase, fraction)

        def run() -> None:
            try:
                replica = self._load(spec, on_progress)
            except BaseException as error:
                tell(_settle, loaded.set_exception, error, loaded)
            else:
                tell(_settle, loaded.set_result, replica, loaded)

        # A daemon: a drain while weights load must not wait for them.
        threading.Thread(target=run, name="load", daemon=True).start()
        drained = asyncio.create_task(self.drain_signal.wait())
        await asyncio.wait((loaded, drained), return_when=asyncio.FIRST_COMPLETED)
        drained.cancel()
        if not loaded.done():
            loaded.cancel()  # nobody waits for it any more
            return None
        return await loaded

    def describe(
        self,
        replica: Replica,
        shared_memory_socket: str = "",
        nixl: pb.NixlMemory | None = None,
        num_readable_blocks: int = 0,
    ) -> pb.WorkerInfo:
        """`num_readable_blocks`: how many blocks others may read, by the ids that are published."""
        self._layout_fingerprint = replica.identity.layout_fingerprint
        return worker_info(
            replica.identity,
            worker_id=self.config.worker_id,
            role=self.role,
            boot_id=self.boot_id,
            model_id=self.config.served_model_id,
            host_id=self.host_id,
            shared_memory_socket=shared_memory_socket,
            nixl=nixl,
            num_readable_blocks=num_readable_blocks,
            version=_version(),
            revision=self.config.revision,
        )

    async def serve(self, add: Callable[[Any], None], options: Options = rpc.CONTROL_OPTIONS) -> None:
        """Open the gRPC port; `address` is what others reach it by."""
        server = _aio.server(
            interceptors=[SecretInterceptor(self.secret)],
            options=[*options, ("grpc.so_reuseport", 0)],  # two workers on one port must not pass unnoticed
        )
        add(server)
        host, port = self.config.listen
        bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        await server.start()
        self._server = server
        self.address = join_address(self.config.advertise or host, bound)

    def announce(self) -> None:
        """Ready: the health port says so, and from now on every registry, whenever it can be reached."""
        self.health.enter("register")
        self._keepers = [
            Keeper(membership, self._entry(), self.config.registry_lease_s) for membership in self._memberships
        ]
        self._keeping = [asyncio.create_task(keeper.run(), name="announce") for keeper in self._keepers]
        show_registries(self.metrics, self._keepers)
        self.health.ready()
        count_startup(self.metrics, self.health.phase_seconds)
        log.info("ready", extra={"address": self.address, "phase_seconds": self.health.phase_seconds})

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run beside the servers until the end. What lives as long as the process may not end, or fail, alone."""
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._on_task_done)
        self._tasks.append(task)

    def engine_failed(self) -> None:
        self._fail("the engine failed")

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            log.critical(
                "a task that the worker cannot do without ended: %s", task.get_name(), exc_info=task.exception()
            )
            self._fail(f"{task.get_name()} ended")

    def _fail(self, reason: str) -> None:
        self._failure = self._failure or reason
        self._engine_failed.set()

    async def until_end(self, engine: EngineClient) -> int:
        """Wait for a drain signal (0) or the engine's failure. Then nobody is sent here any more."""
        self.spawn(self._watch_progress(engine), "progress")
        waits = [asyncio.create_task(self.drain_signal.wait()), asyncio.create_task(self._engine_failed.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        await self._withdraw()
        if self._engine_failed.is_set():
            self.health.fail(self._failure)
            return EXIT_ENGINE_FAILED
        self.health.drain()
        return 0

    async def end(self) -> None:
        """Close the ports. What still runs is cut."""
        await self._withdraw()
        for task in self._tasks:
            task.cancel()
        if self._server is not None:
            await self._server.stop(grace=0.5)
        if self._http is not None:
            await self._http.stop()
        log.info("ended")

    # ------------------------------------------------------------ parts

    def _entry(self) -> Entry:
        assert self._http is not None
        return Entry(
            worker_id=self.config.worker_id,
            role="prefill" if self.role == pb.ROLE_PREFILL else "decode",
            address=self.address,
            http=join_address(self.config.advertise or self._http.host, self._http.port),
            revision=self.config.revision,
            fingerprint=self._layout_fingerprint,
            boot_id=self.boot_id.hex(),
            pid=os.getpid(),
        )

    async def _withdraw(self) -> None:
        """Be found no more by those who do not know this worker yet. Idempotent."""
        for task in self._keeping:
            task.cancel()
        if self._keeping:
            await asyncio.wait(self._keeping, timeout=WITHDRAW_TIMEOUT_S)  # a drain does not hang on the registry
        await asyncio.gather(*(keeper.withdraw() for keeper in self._keepers))

    def _replica_spec(self) -> ReplicaSpec:
        config = self.config
        return ReplicaSpec(
            model=config.model,
            dtype=config.dtype,
            kernels=config.kernels,
            device=config.device,
            deterministic=config.deterministic,
            max_model_len=config.max_model_len,
            num_threads=config.threads,
            kv_memory_bytes=config.kv_memory,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            prefix_caching=config.prefix_caching,
            workers_on_host=config.workers_on_host,
            gpu_memory_fraction=config.gpu_memory_fraction,
            digests_on_device=reads_device_memory(config),
        )

    def _note_progress(self, phase: LoadPhase, fraction: float) -> None:
        if self.health.phase != phase.value:
            self.health.enter(phase.value)
        self.health.progress(fraction)

    def _render_metrics(self) -> bytes:
        self.refresh_metrics()
        return self.metrics.render()

    async def _watch_progress(self, engine: EngineClient) -> None:
        """Liveness means steps: pending work without one makes /livez fail."""
        watch = ProgressWatch(time.monotonic())
        while True:
            await asyncio.sleep(1.0)
            load = engine.load
            num_pending = load.num_running + load.num_waiting
            self.health.stalled = watch.observe(time.monotonic(), load.step_counter, num_pending, load.predicted_step_s)


Serve = Callable[[WorkerProcess], Coroutine[Any, Any, int]]


def run_process(serve: Serve, config: WorkerConfig, role: pb.Role, load: Loader = load_replica) -> None:
    """Logs, the parent's pipe, signals, the loop; then exit at once, whatever threads still run."""
    logs.setup(config.log_level, config.log_format, config.worker_id)
    lifecycle.watch_parent(config.parent_fd)
    sys.setswitchinterval(SWITCH_INTERVAL_S)

    async def main() -> int:
        process = WorkerProcess(config, role, load)
        process.drain_signal.install()
        return await serve(process)

    try:
        status = asyncio.run(main())
    except EXPECTED_ERRORS as error:
        log.error("cannot start: %s", error, extra={"error": type(error).__name__})
        status = EXIT_CANNOT_START
    except Exception as error:
        log.error("worker failed", exc_info=error)
        status = 1
    logging.shutdown()
    os._exit(status)


def _settle(settle: Callable[[Any], None], value: object, future: asyncio.Future[Any]) -> None:
    if not future.done():
        settle(value)


def _version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("baton-serving")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"
