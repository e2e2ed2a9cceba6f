"""Prove that prompts get through, prefill to decode: `python -m baton_operator.handover`, which `helm test` runs.

Finds the LLMServices, sends one short prompt through each by its gateways' internal port, and prints what was moved:

    default/chat: 24.0 KiB in 3.1 ms over grpc, chat-prefill-... to chat-decode-...

Changes nothing. Exits with 1 if a service did not answer, or if there is none.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

from baton_operator.api import Api, client_configuration
from baton_operator.errors import ApiError
from baton_operator.kinds import BY_KIND
from baton_operator.metrics import Metrics
from baton_operator.objects import API_VERSION, SERVICE_KIND, Manifest, ProbeReport, Ref
from baton_operator.plan import Probe
from baton_operator.probe import Gateways, addresses_of

_SERVICES = BY_KIND[API_VERSION, SERVICE_KIND]
_SLICES = BY_KIND["discovery.k8s.io/v1", "EndpointSlice"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Send a prompt through every LLMService and say what was moved.")
    scope = parser.add_mutually_exclusive_group(required=True)
    scope.add_argument("--namespace", metavar="NAMES", default="", help="where to look, separated by commas")
    scope.add_argument("--cluster", action="store_true", help="look everywhere")
    options = parser.parse_args()
    return asyncio.run(_main([None] if options.cluster else options.namespace.split(",")))


async def _main(namespaces: Sequence[str | None]) -> int:
    api, gateways = Api(await client_configuration(), Metrics()), Gateways()
    try:
        reports = [report async for report in prove(api, gateways, namespaces)]
    except ApiError as error:
        print(f"the API server: {error}", file=sys.stderr)
        return 1
    finally:
        await gateways.close()
        await api.close()
    for where, report in reports:
        print(f"{where}: {'' if report.is_ok else 'FAILED: '}{report.message}")
    if not reports:
        print("there is no LLMService to prove anything with; apply one (helm get notes says how) and test again")
    return 0 if reports and all(report.is_ok for _, report in reports) else 1


async def prove(
    api: Api, gateways: Gateways, namespaces: Sequence[str | None]
) -> AsyncIterator[tuple[str, ProbeReport]]:
    """Namespace/name of every LLMService and what came of its prompt. Raises: ApiError."""
    for namespace in namespaces:
        services = await _all(api, _SERVICES, namespace)
        slices = await _all(api, _SLICES, namespace) if services else []
        for service in services:
            metadata = service["metadata"]
            own = [each for each in slices if each["metadata"]["namespace"] == metadata["namespace"]]
            addresses = addresses_of(own, f"{metadata['name']}-gateway", only_ready=True)
            secret = await _secret(api, metadata["namespace"], metadata["name"])
            report = await gateways.probe(addresses, secret, probe_of(service))
            yield f"{metadata['namespace']}/{metadata['name']}", report


def probe_of(service: Manifest) -> Probe:
    """Through both pools, unless this service has no prefill or is told not to use it."""
    spec: dict[str, Any] = service.get("spec") or {}
    status: dict[str, Any] = service.get("status") or {}
    pools: dict[str, Any] = status.get("pools") or {}
    prefill: dict[str, Any] = pools.get("prefill") or {}
    is_remote = spec.get("disaggregation") != "Never" and prefill.get("replicas", 1) > 0
    return Probe(status.get("servingRevision", ""), is_remote, "asked for by hand")


async def _all(api: Api, kind: Any, namespace: str | None) -> list[Manifest]:
    return [each async for page, _ in api.list(kind, namespace) for each in page]


async def _secret(api: Api, namespace: str, name: str) -> str:
    found = await api.get(namespace, Ref("v1", "Secret", f"{name}-internal"))
    data: dict[str, str] = found.get("data") or {} if found is not None else {}
    return base64.b64decode(data.get("secret", "")).decode()


if __name__ == "__main__":
    sys.exit(main())
