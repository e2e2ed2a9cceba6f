"""A decode worker, from its first probe to its exit."""

from __future__ import annotations

from collections.abc import Callable

from decode_service.app import DecodeServicer
from decode_service.attempts import Attempts
from decode_service.config import DecodeConfig, DisaggregationMode
from decode_service.faults import FaultyPrefillClient
from decode_service.memory import WritableMemory, make_writable
from decode_service.placement import Policy
from decode_service.remote import PrefillPool
from engine.worker import Replica
from kvtransfer import rpc, ucx
from kvtransfer.negotiation import NixlUse
from kvtransfer.nixl_transport import NixlReader
from kvtransfer.prefill_client import DecodeIdentity, PrefillClient
from kvtransfer.protocol import baton_pb2 as pb
from workerkit.engine_client import EngineClient
from workerkit.messages import worker_load
from workerkit.metrics import DecodeQueueMetrics, EngineMetrics, StagingMetrics
from workerkit.process import WorkerProcess

POLICIES = {
    DisaggregationMode.AUTO: Policy.AUTO,
    DisaggregationMode.ALWAYS: Policy.ALWAYS,
    DisaggregationMode.NEVER: Policy.NEVER,
}


async def serve(config: DecodeConfig, process: WorkerProcess) -> int:
    """The whole flow of the process; returns its exit status."""
    # 1. Answer probes, then load.
    await process.begin()
    replica = await process.load(swap_memory_bytes=config.swap_memory)
    if replica is None:
        await process.end()
        return 0
    # 2. The engine on its thread; its steps arrive here.
    identity = replica.identity
    engine_metrics = EngineMetrics(process.metrics, identity)
    metrics, staging = DecodeQueueMetrics(process.metrics), StagingMetrics(process.metrics)
    engine = EngineClient(replica.engine)
    # 3. What fetches KV from prefill workers, and what owns the attempts.
    memory = make_writable(replica, config.staging_memory)
    nixl = _reader(process, replica, memory, ucx.prepare(config.transports, config.require_rdma))
    pool = PrefillPool(_client_maker(config, process, replica, memory, nixl, lambda: worker_load(engine.load)))
    attempts = Attempts(
        engine,
        pool,
        memory.destination,
        identity,
        default_policy=POLICIES[config.disaggregation],
        max_num_requests=config.max_num_requests,
        engine_metrics=engine_metrics,
        metrics=metrics,
        failpoints=process.failpoints,
    )

    def on_crash() -> None:
        attempts.on_crash()
        process.engine_failed()

    def refresh_metrics() -> None:
        engine_metrics.update(engine.load, engine.counters, replica.attention_calls)
        metrics.update(engine.load, pool.ignored(), pool.fallbacks(), pool.transports())
        staging.update(memory.ring, memory.landing.num_waiting)

    engine.start(attempts.on_step, on_crash)
    process.refresh_metrics = refresh_metrics
    process.health.facts = lambda: {"transports": pool.transports()}
    # 4. Serve until told to end.
    servicer = DecodeServicer(attempts, engine, process.describe(replica))
    await process.serve(servicer.add_to, rpc.GENERATE_OPTIONS)
    process.spawn(servicer.beat(), "heartbeats")
    process.announce()
    status = await process.until_end(engine)
    # 5. Finish or hand over what runs, then leave.
    if status == 0:
        await attempts.drain(config.drain_s)
    await servicer.aclose()
    await pool.aclose()
    if nixl:
        nixl.close()
    await process.end()
    await engine.stop()
    return status


def _reader(process: WorkerProcess, replica: Replica, memory: WritableMemory, use: NixlUse) -> NixlReader | None:
    """Registers the memory that KV arrives in, once."""
    if use is NixlUse.NONE:
        return None
    name = f"baton-{process.boot_id.hex()}"
    return NixlReader(name, memory.region, replica.identity.block_bytes, use=use)


def _client_maker(
    config: DecodeConfig,
    process: WorkerProcess,
    replica: Replica,
    memory: WritableMemory,
    nixl: NixlReader | None,
    load: Callable[[], pb.WorkerLoad],
) -> Callable[[str], PrefillClient]:
    identity = DecodeIdentity(
        worker_id=config.worker_id,
        boot_id=process.boot_id,
        layout_fingerprint=replica.identity.layout_fingerprint,
        block_size=replica.identity.block_size,
        block_bytes=replica.identity.block_bytes,
        transports=config.transports,
        needs_rdma=config.require_rdma,
    )
    failpoints = process.failpoints
    if failpoints.active:
        return lambda address: FaultyPrefillClient(
            address, identity, process.secret, load, failpoints, nixl, memory.landing
        )
    return lambda address: PrefillClient(address, identity, process.secret, load, nixl=nixl, landing=memory.landing)
