"""The gateway's life: logs, listen, load the tokenizer, find workers, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import modelfiles
from gateway.admission import Admission, AdmissionLimits
from gateway.app import Gateway, build_app, build_starting_app
from gateway.config import Disaggregation, GatewayConfig
from gateway.dialect import ModelLimits
from gateway.http_protocol import BoundedHttpProtocol
from gateway.keys import ApiKeys
from gateway.metrics import GatewayMetrics
from gateway.routing_file import RoutingFile
from gateway.serve import Services
from gateway.text import TextService
from gateway.worker_pool import WorkerPool
from kvtransfer.auth import Secret
from kvtransfer.protocol import baton_pb2 as pb
from registry.entry import SIGNING_PURPOSE
from registry.opening import open_table
from servicekit import lifecycle, logs
from servicekit.config import parse_address
from servicekit.health import HealthState, HttpServer, Phase, start_http

log = logging.getLogger(__name__)

PHASES = (Phase("load_tokenizer", 1.0),)
_DISAGGREGATION = {
    Disaggregation.AUTO: pb.DISAGGREGATION_AUTO,
    Disaggregation.ALWAYS: pb.DISAGGREGATION_ALWAYS,
    Disaggregation.NEVER: pb.DISAGGREGATION_NEVER,
}


def run(config: GatewayConfig) -> None:
    """Run until drained. The loop is uvloop's: half the CPU per streamed token."""
    import uvloop

    logs.setup(config.log_level, config.log_format, config.gateway_id)
    lifecycle.watch_parent(config.parent_fd)
    uvloop.run(_main(config))


async def _main(config: GatewayConfig) -> None:
    drain = lifecycle.DrainSignal()
    drain.install()
    gateway, _, stop = await start(config)
    await drain.wait()
    await drain_requests(gateway, config.drain_timeout)
    await stop()


async def start(config: GatewayConfig) -> tuple[Gateway, HttpServer, Callable[[], Any]]:
    """Listen first (health answers while the tokenizer loads), then load, then find workers.

    Returns the gateway, its public server, and a function that stops everything.
    """
    health = HealthState(PHASES)
    metrics = GatewayMetrics(config.model_id or config.model.stem)
    front = _Front(build_starting_app(health, metrics.render))
    server = await _listen(front, config.http, config.max_connections)
    health.enter("load_tokenizer")
    try:
        gateway = await asyncio.to_thread(load_gateway, config, health, metrics)
    except BaseException:
        await server.stop()
        raise
    front.app = build_app(gateway)
    servers = [server]
    if config.internal_http is not None:
        servers.append(await _listen(build_app(gateway, is_internal=True), config.internal_http, 64))
    await gateway.services.pool.start()
    keeper = asyncio.create_task(_keep_house(gateway), name="housekeeping")
    health.ready()
    log.info("gateway ready", extra={"http": f"{server.host}:{server.port}", "model_id": gateway.model_id})

    async def stop() -> None:
        keeper.cancel()
        await gateway.services.pool.stop()
        for each in servers:
            await each.stop()
        gateway.text.close()

    return gateway, server, stop


def load_gateway(config: GatewayConfig, health: HealthState, metrics: GatewayMetrics) -> Gateway:
    """Read the model's files and put the parts together. No worker is asked anything here."""
    model = modelfiles.load_config(config.model)
    model_id = config.model_id or config.model.stem
    text = TextService.load(config.model)
    own_limit = model.max_position_embeddings
    limits = ModelLimits(
        max_model_len=min(config.max_model_len or own_limit, own_limit),
        vocab_size=model.vocab_size,
        eos_token_ids=frozenset(model.eos_token_ids),
        defaults=model.generation,
    )
    keys = ApiKeys.read(config.api_key_file)
    share = config.max_key_share if len(keys) > 1 else 1.0
    admission = Admission(AdmissionLimits(config.max_queue_requests, config.max_queue_tokens, share), time.monotonic)
    secret = lifecycle.read_secret(config.secret_file) if config.secret_file is not None else ""
    pool = WorkerPool(
        open_table(
            config,
            Secret(secret).signing_key(SIGNING_PURPOSE),
            dns=[parse_address(service) for service in config.registry_dns],
            seeds=config.workers_seed,
        ),
        metrics,
        caller_id=config.gateway_id,
        boot_id=lifecycle.new_boot_id(),
        model_id=model_id,
        secret=secret,
        deterministic=config.deterministic,
        needs_prefill=config.disaggregation is not Disaggregation.NEVER,
        routing_file=RoutingFile(config.routing_file),
    )
    add_gauges(metrics, admission, pool)
    return Gateway(
        services=Services(admission, pool, metrics),
        text=text,
        limits=limits,
        model_id=model_id,
        health=health,
        keys=keys,
        secret=secret,
        fingerprint=_fingerprint(config.model, model_id),
        version=_version(),
        disaggregation=_DISAGGREGATION[config.disaggregation],
        ttft_objective_s=config.ttft_objective,
        request_timeout_s=config.request_timeout,
    )


async def drain_requests(gateway: Gateway, timeout_s: float) -> None:
    """Take no more, let what runs finish."""
    gateway.health.drain()
    deadline = time.monotonic() + timeout_s
    pool, admission = gateway.services.pool, gateway.services.admission
    while time.monotonic() < deadline:
        if not admission.num_requests and not any(c.attempts for c in pool.connections.values()):
            return
        await pool.wait_for_change(0.5)


class _Front:
    """What the listener serves: probes first, the whole application once it is loaded."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


async def _listen(app: Any, address: tuple[str, int], max_connections: int) -> HttpServer:
    return await start_http(
        app,
        *address,
        http=BoundedHttpProtocol,
        backlog=1024,
        limit_concurrency=max_connections,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=5,
        server_header=False,
        date_header=False,
    )


async def _keep_house(gateway: Gateway) -> None:
    while True:
        await asyncio.sleep(1.0)
        keep_house_once(gateway, time.monotonic())


def keep_house_once(gateway: Gateway, now: float) -> None:
    """The second's upkeep. A bug in one part ends neither the others nor the task, whose end nobody would see."""
    for part in (lambda: gateway.cut_stalled_clients(now), gateway.services.pool.routing_file.refresh):
        try:
            part()
        except Exception:  # the task's boundary: a bug here is logged and counted, and the gateway goes on
            log.exception("a part of the housekeeping failed")
            gateway.metrics.housekeeping_failures.inc()


def add_gauges(metrics: GatewayMetrics, admission: Admission, pool: WorkerPool) -> None:
    """What is read from admission and the pool at scrape time."""

    def running() -> float:
        return sum(len(connection.attempts) for connection in pool.connections.values())

    metrics.gauge("num_requests_running", "Requests at a worker", running, is_vllm=True)
    metrics.gauge(
        "num_requests_waiting", "Requests without a first token", lambda: admission.num_requests, is_vllm=True
    )
    metrics.gauge("queued_tokens", "Prompt tokens of requests without a first token", lambda: admission.num_tokens)
    metrics.gauge("decode_workers", "Live Generate streams", lambda: len(pool.connections))
    metrics.gauge(
        "registry_connected",
        "1 while every registry and DNS name answers; requests do not depend on it",
        lambda: float(all(status.is_connected for status in pool.table.statuses())),
    )
    metrics.gauge("prefill_workers", "Prefill workers that answer Hello", lambda: len(pool.prefill))


def _fingerprint(model: Path, model_id: str) -> str:
    """OpenAI's system_fingerprint: changes with the software or the model's files."""
    size = model.stat().st_size if model.is_file() else sum(f.stat().st_size for f in model.iterdir() if f.is_file())
    return "fp_" + hashlib.sha256(f"{_version()} {model_id} {size}".encode()).hexdigest()[:12]


def _version() -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("baton-serving")
    return "0.1.0"
