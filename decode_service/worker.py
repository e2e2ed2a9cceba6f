"""A decode worker, from its first probe to its exit."""

from __future__ import annotations

from decode_service.app import DecodeServicer
from decode_service.attempts import Attempts
from decode_service.config import DecodeConfig, DisaggregationMode
from decode_service.placement import Policy
from decode_service.remote import PrefillPool
from engine.worker import KV_DTYPE
from kvtransfer.protocol import baton_pb2_grpc as rpc
from workerkit.engine_client import EngineClient
from workerkit.metrics import DecodeQueueMetrics, EngineMetrics
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
    replica = await process.load()
    if replica is None:
        return 0
    # 2. The engine on its thread; its steps arrive here.
    identity = replica.identity
    engine_metrics = EngineMetrics(
        process.metrics, block_size=identity.block_size, num_blocks=identity.num_blocks, cache_dtype=KV_DTYPE
    )
    metrics = DecodeQueueMetrics(process.metrics)
    engine = EngineClient(replica.engine)
    # 3. What fetches KV, and what owns the attempts.
    info = process.describe(replica)
    remote = PrefillPool(info, replica.kv, process.secret, config.transports, process.failpoints, metrics)
    attempts = Attempts(
        engine,
        remote,
        identity,
        default_policy=POLICIES[config.disaggregation],
        max_num_requests=config.max_num_requests,
        engine_metrics=engine_metrics,
        metrics=metrics,
        failpoints=process.failpoints,
    )
    engine.start(attempts.on_step, lambda: (attempts.on_crash(), process.engine_failed()))

    def refresh_metrics() -> None:
        engine_metrics.update(engine.load, engine.counters)
        metrics.update(engine.load)

    process.refresh_metrics = refresh_metrics
    # 4. Serve until told to end.
    servicer = DecodeServicer(attempts, engine, info)
    await process.serve(lambda server: rpc.add_DecodeWorkerServicer_to_server(servicer, server))
    process.spawn(servicer.beat(), "heartbeats")
    process.announce()
    status = await process.until_end(engine)
    # 5. Finish or hand over what runs, then leave.
    if status == 0:
        await attempts.drain(config.drain_s)
    await remote.aclose()
    await process.end()
    await engine.stop()
    return status
