"""What `helm test` asks: every LLMService, by its own gateways, through both pools where there are two."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from baton_operator.api import Api
from baton_operator.handover import probe_of, prove
from baton_operator.kinds import Kind
from baton_operator.objects import Manifest, ProbeReport, Ref
from baton_operator.plan import Probe
from baton_operator.probe import Gateways


def service(namespace: str, name: str, **more: Any) -> Manifest:
    return {"metadata": {"namespace": namespace, "name": name}, "status": {"servingRevision": "0a1b2c3d"}} | more


def endpoints(namespace: str, name: str, address: str) -> Manifest:
    labels = {"kubernetes.io/service-name": f"{name}-gateway"}
    return {
        "metadata": {"namespace": namespace, "labels": labels},
        "ports": [{"name": "internal", "port": 8001}],
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
    }


@dataclass
class FakeApi:
    """Namespaces are watched together: what it lists for None is everything."""

    services: list[Manifest]
    slices: list[Manifest]

    async def list(self, kind: Kind, namespace: str | None) -> AsyncIterator[tuple[list[Manifest], int]]:
        found = self.services if kind.plural == "llmservices" else self.slices
        yield [each for each in found if namespace in (None, each["metadata"]["namespace"])], 1

    async def get(self, namespace: str, ref: Ref) -> Manifest | None:
        return {"data": {"secret": base64.b64encode(f"{namespace}/{ref.name}".encode()).decode()}}


@dataclass
class FakeGateways:
    asked: list[tuple[Sequence[str], str, Probe]] = field(default_factory=list[tuple[Sequence[str], str, Probe]])

    async def probe(self, addresses: Sequence[str], secret: str, probe: Probe) -> ProbeReport:
        self.asked.append((addresses, secret, probe))
        return ProbeReport(probe.revision, 0.0, bool(addresses), probe.is_remote, "moved")


async def prove_all(api: FakeApi, namespaces: Sequence[str | None]) -> tuple[dict[str, bool], FakeGateways]:
    gateways = FakeGateways()
    found = prove(cast("Api", api), cast("Gateways", gateways), namespaces)
    return {where: report.is_ok async for where, report in found}, gateways


async def test_each_service_is_asked_at_its_own_gateways_with_its_own_secret() -> None:
    """Two namespaces may have services of one name."""
    api = FakeApi(
        [service("a", "chat"), service("b", "chat"), service("b", "other")],
        [endpoints("a", "chat", "10.0.0.1"), endpoints("b", "chat", "10.0.0.2")],
    )
    found, gateways = await prove_all(api, [None])
    assert found == {"a/chat": True, "b/chat": True, "b/other": False}
    assert [(addresses, secret) for addresses, secret, _ in gateways.asked] == [
        (["10.0.0.1:8001"], "a/chat-internal"), (["10.0.0.2:8001"], "b/chat-internal"), ([], "b/other-internal"),
    ]  # fmt: skip


async def test_only_the_given_namespaces_are_looked_at() -> None:
    api = FakeApi([service("a", "chat"), service("b", "chat")], [endpoints("b", "chat", "10.0.0.2")])
    found, _ = await prove_all(api, ["b"])
    assert found == {"b/chat": True}


async def test_nothing_is_proven_where_there_is_no_service() -> None:
    found, gateways = await prove_all(FakeApi([], []), ["a"])
    assert (found, gateways.asked) == ({}, [])


def test_the_prompt_goes_through_both_pools_unless_there_is_no_prefill() -> None:
    no_prefill = {"servingRevision": "0a1b2c3d", "pools": {"prefill": {"replicas": 0}}}
    assert probe_of(service("a", "chat")).is_remote
    assert not probe_of(service("a", "chat", spec={"disaggregation": "Never"})).is_remote
    assert not probe_of(service("a", "chat", status=no_prefill)).is_remote
    assert probe_of(service("a", "chat")).revision == "0a1b2c3d"
