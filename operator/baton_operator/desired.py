"""What an LLMService should consist of: service + defaults -> manifests. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from baton_operator.objects import Desired
from baton_operator.resources import LLMService


@dataclass(frozen=True, slots=True)
class Platform:
    """What the operator was told at its start and what the cluster has; the rest is the service's own."""

    gateway_image: str
    worker_image: str
    gpu_worker_image: str
    redis_image: str
    operator_namespace: str
    apis: frozenset[str] = frozenset()
    """Optional kinds that the cluster has, of: monitoring.coreos.com/v1/ServiceMonitor,
    gateway.networking.k8s.io/v1/HTTPRoute, inference.networking.k8s.io/v1/InferencePool."""


def desire(service: LLMService, platform: Platform, *, uid: str, generation: int) -> Desired:
    """Everything of one service, with its revision."""
    raise NotImplementedError
