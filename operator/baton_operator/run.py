"""The operator's process: its parts put together, and kopf around them."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
from pathlib import Path
from typing import Any

import kopf
import orjson
from kopf._core.reactor.inventory import ResourceMemories, ResourceMemory  # an argument of kopf.operator, not exported

from baton_operator.api import Api, client_configuration
from baton_operator.apply import Executor
from baton_operator.cache import Cache
from baton_operator.desired import Platform
from baton_operator.errors import Unreachable
from baton_operator.handlers import Watcher
from baton_operator.health import Health
from baton_operator.kinds import optional
from baton_operator.metrics import Metrics
from baton_operator.probe import Gateways
from baton_operator.reconcile import Reconciler, Settings

log = logging.getLogger(__name__)

_OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def run(options: argparse.Namespace) -> int:
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines())
    logging.basicConfig(level=options.log_level.upper(), handlers=[handler])
    logging.getLogger("kopf").setLevel(logging.WARNING)
    own = options.operator_namespace or (_OWN_NAMESPACE.read_text() if _OWN_NAMESPACE.exists() else "default")
    asyncio.run(_run(options, own))
    return 0


async def _run(options: argparse.Namespace, own: str) -> None:
    namespaces = () if options.cluster else tuple(name for name in (options.namespace or own).split(",") if name)
    metrics, cache, gateways = Metrics(), Cache(), Gateways()
    api = Api(await client_configuration(), metrics)
    apis = await _optional_apis(api)
    platform = Platform(
        gateway_image=options.gateway_image,
        worker_image=options.worker_image,
        gpu_worker_image=options.gpu_worker_image,
        redis_image=options.redis_image,
        operator_namespace=own,
        apis=apis,
    )
    executor = Executor(api, cache, gateways, metrics)
    reconciler = Reconciler(cache, api, executor, metrics, Settings(platform, float(options.secret_check_s)))
    watcher = Watcher(
        api, cache, reconciler, metrics, namespaces=namespaces, apis=apis, resync_s=float(options.resync_s)
    )
    registry, settings = kopf.OperatorRegistry(), kopf.OperatorSettings()
    watcher.register(registry)
    watcher.configure(settings)
    kopf.on.login(registry=registry)(_login)
    health = Health(watcher, metrics)
    host, _, port = options.http.rpartition(":")
    # kopf would ask for the user's name, and a uid of which /etc/passwd knows nothing has none. Its type is not public.
    identity: Any = f"{socket.gethostname()}-{os.getpid()}"
    log.info("health and metrics on port %d", await health.serve(host, int(port)))
    try:
        await kopf.operator(
            registry=registry, settings=settings, clusterwide=not namespaces, namespaces=namespaces, identity=identity,
            standalone=not options.peering, peering_name=options.peering or None,
            priority=os.getpid() if options.peering else None, memories=ForgetfulMemories(),
        )  # fmt: skip
    finally:
        await health.close()
        await gateways.close()
        await api.close()


async def _optional_apis(api: Api) -> frozenset[str]:
    """Of the kinds that are part of no Kubernetes, those that the cluster has now. Waits for the API server."""
    while True:
        try:
            return frozenset([kind.api for kind in optional() if await api.has(kind)])
        except Unreachable as error:
            log.warning("waiting for the API server: %s", error)
            await asyncio.sleep(1.0)


class ForgetfulMemories(ResourceMemories):
    """kopf's notes on every object, kept while it handles one event: only handlers that we do not have need them.

    A thousand services have 23,000 objects, and the notes took 14 MB (docs/log.md).
    """

    async def recall(
        self, raw_body: Any, *, memobase: Any = None, noticed_by_listing: bool = False, ephemeral: bool = False
    ) -> ResourceMemory:
        del ephemeral  # of each
        return await super().recall(raw_body, memobase=memobase, noticed_by_listing=noticed_by_listing, ephemeral=True)


class _JsonLines(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return orjson.dumps(line | {"logger": record.name}).decode()


def _login(settings: kopf.OperatorSettings, **_: object) -> kopf.ConnectionInfo | None:
    """As the client: the pod's service account, else KUBECONFIG."""
    return kopf.login_with_service_account(settings=settings) or kopf.login_with_kubeconfig(settings=settings)
