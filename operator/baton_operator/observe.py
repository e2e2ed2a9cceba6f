"""What is there, for one LLMService: from the cache and from what its last passes found. No call to the API server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from baton_operator.cache import Cache, Key
from baton_operator.objects import (
    API_VERSION,
    SERVICE_KIND,
    GatewayReport,
    Manifest,
    Observed,
    ProbeReport,
    Ref,
    StepFailure,
    Trouble,
    Where,
)

_SLICES = "EndpointSlice"


@dataclass(frozen=True, slots=True)
class Memory:
    """What the process keeps of one service between passes. Losing it costs a probe and a look at each Secret."""

    uid: str
    probes: Mapping[str, ProbeReport] = field(default_factory=dict[str, ProbeReport])
    gateways: tuple[GatewayReport, ...] = ()
    gateways_at: float = float("-inf")
    failures: tuple[StepFailure, ...] = ()
    troubles: Mapping[Where, Trouble] = field(default_factory=dict[Where, Trouble])
    pods_at: float = float("-inf")
    secrets: Mapping[Ref, Manifest] = field(default_factory=dict[Ref, Manifest])
    secrets_at: float = float("-inf")
    secret: str | None = None  # what the gateways know us by, once it was read
    num_retries: int = 0


@dataclass(frozen=True, slots=True)
class View:
    """One service as the cache has it."""

    service: Manifest
    objects: Mapping[Ref, Manifest]
    slices: tuple[Manifest, ...]

    @property
    def uid(self) -> str:
        return self.service["metadata"]["uid"]

    @property
    def is_deleted(self) -> bool:
        """It goes, and garbage collection takes what it owns."""
        return "deletionTimestamp" in self.service["metadata"]


def look(cache: Cache, key: Key) -> View | None:
    """The service and its objects; None if there is no such service."""
    found = cache.of(key)
    service = found.pop(Ref(API_VERSION, SERVICE_KIND, key[1]), None)
    if service is None:
        return None
    slices = tuple(manifest for ref, manifest in found.items() if ref.kind == _SLICES)
    return View(service, {ref: manifest for ref, manifest in found.items() if ref.kind != _SLICES}, slices)


def observe(view: View, memory: Memory) -> Observed:
    return Observed(
        service=view.service,
        objects={**view.objects, **memory.secrets},
        probes=memory.probes,
        gateways=memory.gateways,
        gateways_at=memory.gateways_at,
        failures=memory.failures,
        troubles=memory.troubles,
        pods_at=memory.pods_at,
    )
