"""A prefill worker, from its first probe to its exit."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from engine.config import DEFAULT_CHUNK_SIZE
from kvtransfer import rpc, ucx
from kvtransfer.negotiation import AUTO, SHM, NixlUse
from kvtransfer.nixl_transport import NixlMemory
from kvtransfer.prefill_server import PrefillServer
from kvtransfer.prefill_side import HeldTokens, PrefillLimits
from kvtransfer.shm_transport import ShmBlockServer, is_available
from prefill_service.backend import EngineBackend
from prefill_service.config import PrefillConfig
from prefill_service.memory import make_readable
from workerkit.engine_client import EngineClient
from workerkit.metrics import EngineMetrics, PrefillQueueMetrics, StagingMetrics
from workerkit.process import WorkerProcess

log = logging.getLogger(__name__)

DRAIN_POLL_S = 0.05


async def serve(config: PrefillConfig, process: WorkerProcess) -> int:
    """The whole flow of the process; returns its exit status."""
    # 1. Answer probes, then load.
    await process.begin()
    replica = await process.load(max_held_tokens=config.max_held_tokens, max_num_batched_tokens=step_tokens(config))
    if replica is None:
        await process.end()
        return 0
    # 2. The engine on its thread; its steps arrive here.
    identity = replica.identity
    engine_metrics = EngineMetrics(process.metrics, identity)
    metrics, staging = PrefillQueueMetrics(process.metrics), StagingMetrics(process.metrics)
    engine = EngineClient(replica.engine)
    backend = EngineBackend(engine, engine_metrics, process.failpoints)
    # 3. What hands KV out.
    memory = make_readable(replica, process.boot_id, process.failpoints, config.staging_memory)
    source = memory.source
    shared = None
    if memory.fd is not None and offers_shared_memory(config):
        shared = ShmBlockServer(source, memory.fd, process.secret)
    use = ucx.prepare(config.transports, config.require_rdma)
    nixl = NixlMemory(source, use, memory.device) if use is not NixlUse.NONE else None
    socket = await shared.start() if shared else ""
    info = process.describe(replica, socket, nixl.info if nixl else None, source.num_blocks)
    limits = PrefillLimits(max_prompt_tokens=identity.max_model_len, max_tickets=config.max_num_requests)
    server = PrefillServer(info, backend, source, limits, HeldTokens(config.max_held_tokens), memory.exposure)
    backend.connect(server.deliver)

    def on_crash() -> None:
        backend.on_crash()
        process.engine_failed()

    def refresh_metrics() -> None:
        engine_metrics.update(engine.load, engine.counters, replica.attention_calls)
        metrics.update(engine.load, server.num_tickets, server.num_event_failures, server.ignored)
        staging.update(memory.ring, memory.exposure.num_waiting)

    engine.start(backend.on_step, on_crash)
    process.refresh_metrics = refresh_metrics
    # 4. Serve until told to end.
    await process.serve(server.add_to, rpc.DATA_OPTIONS)
    process.announce()
    status = await process.until_end(engine)
    # 5. Let decode workers take what was promised to them, then leave.
    if status == 0:
        await _drain(server, config.drain_s)
    await server.aclose()
    backend.disconnect()
    if shared:
        await shared.aclose()
    if nixl:
        nixl.close()
    await process.end()
    await engine.stop()
    return status


def step_tokens(config: PrefillConfig) -> int:
    """The least that an engine accepts is room for a batch of decodes and a chunk, though none decodes here."""
    return max(config.max_num_batched_tokens, config.max_num_seqs + DEFAULT_CHUNK_SIZE)


def offers_shared_memory(config: PrefillConfig) -> bool:
    return bool({AUTO, SHM} & set(config.transports)) and is_available()


async def _drain(server: PrefillServer, patience_s: float) -> None:
    """Refuse new prompts and wait until every ticket is closed, `patience_s` at most."""
    server.drain()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(patience_s):
            await _until_idle(server)
    if server.num_tickets:
        log.warning("tickets left at the end of the drain", extra={"num_tickets": server.num_tickets})


async def _until_idle(server: PrefillServer) -> None:
    while server.num_tickets:  # noqa: ASYNC110  twenty looks a second, once in a process's life
        await asyncio.sleep(DRAIN_POLL_S)
