"""Say the same in a cluster: `baton export` turns an LLMService file into what kubectl or helm takes.

What the user wrote stays as written; fields that only local mode reads are left out, and named.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import yaml

from baton_operator.resources import API_VERSION, KIND, LLMService, fields_unused


@dataclass(frozen=True, slots=True)
class Export:
    """`left_out`: the fields of local mode that the file states."""

    text: str
    left_out: tuple[str, ...]


def for_kubectl(service: LLMService, stated: dict[str, Any]) -> Export:
    """The LLMService as `kubectl apply -f -` takes it."""
    spec, left_out = _cluster_spec(service, stated)
    metadata: dict[str, Any] = {"name": service.metadata.name} | dict(stated.get("metadata") or {})
    manifest = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec}
    return Export(_yaml(manifest), left_out)


def for_helm(service: LLMService, stated: dict[str, Any]) -> Export:
    """Values of the chart helm/baton that keep the LLMService with the release."""
    spec, left_out = _cluster_spec(service, stated)
    name, namespace = service.metadata.name, service.metadata.namespace
    head = (
        "# The chart brings the kind LLMService, so install it once without these values:\n"
        f"#   helm install baton helm/baton --namespace {namespace} --create-namespace\n"
        f"#   helm upgrade baton helm/baton --namespace {namespace} --values THIS-FILE\n"
    )
    return Export(head + _yaml({"services": {name: spec}}), left_out)


def _cluster_spec(service: LLMService, stated: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    left_out = fields_unused(service, mode="cluster")
    document = copy.deepcopy(stated)
    for path in left_out:
        _remove(document, path.split("."))
    return dict(document.get("spec") or {}), left_out


def _remove(part: dict[str, Any], path: list[str]) -> None:
    """Take the field away, and with it what is empty without it."""
    key, *rest = path
    if rest:
        inner = cast("dict[str, Any]", part[key])
        _remove(inner, rest)
        if inner:
            return
    del part[key]


def _yaml(document: dict[str, Any]) -> str:
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
