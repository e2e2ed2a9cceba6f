"""The API server as the operator sees it: a handful of verbs on dictionaries, and its errors as ours.

The official asynchronous client carries them. Its resources are made from our table of kinds, so nothing is discovered
and nothing is cached on disk.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple

import aiohttp
import orjson
from kubernetes.aio import client as kubernetes_client
from kubernetes.aio import config as kubernetes_config
from kubernetes.aio.dynamic import DynamicClient
from kubernetes.aio.dynamic.exceptions import DynamicApiError

from baton_operator.errors import ApiError, Conflict, Refused, Unreachable
from baton_operator.kinds import BY_KIND, Kind
from baton_operator.metrics import Metrics
from baton_operator.objects import FIELD_MANAGER, Manifest, Ref

_TIMEOUT_S = 15.0
_MAX_IN_FLIGHT = 16
_CHUNK = 100  # objects per page of a list: a page is parsed whole
_APPLY = "application/apply-patch+yaml"
_MERGE = "application/merge-patch+json"


async def client_configuration() -> Any:
    """In a pod its service account (the token is read again each minute), elsewhere KUBECONFIG."""
    configuration: Any = kubernetes_client.Configuration()
    loaders: Any = kubernetes_config  # its functions are not annotated
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        loaders.load_incluster_config(client_configuration=configuration)
    else:
        await loaders.load_kube_config(client_configuration=configuration, persist_config=False)
    return configuration


class Page(NamedTuple):
    """Part of a list; `version` is that of the whole."""

    items: Sequence[Manifest]
    version: int


class Api:
    """Raises everywhere: Refused, Conflict, Unreachable."""

    def __init__(self, configuration: Any, metrics: Metrics) -> None:
        self._client: Any = kubernetes_client.ApiClient(configuration)
        self._dynamic: Any = DynamicClient(self._client)
        self._metrics = metrics
        self._slots = asyncio.Semaphore(_MAX_IN_FLIGHT)

    async def close(self) -> None:
        await self._client.close()

    async def get(self, namespace: str, ref: Ref) -> Manifest | None:
        try:
            return await self._call("get", "GET", kind_of(ref), _path(ref, namespace))
        except Refused as error:
            if error.code == 404:
                return None
            raise

    async def apply(self, namespace: str, manifest: Manifest, manager: str = FIELD_MANAGER) -> Manifest:
        """Server-side apply of our fields, by force: what is in the manifest is ours."""
        ref = Ref(manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"])
        return await self._apply(kind_of(ref), _path(ref, namespace), manifest, manager)

    async def apply_status(self, namespace: str, ref: Ref, uid: str, status: Mapping[str, Any]) -> Manifest:
        """Replace our part of the status; a conflict if the object with this uid is gone."""
        metadata = {"name": ref.name, "namespace": namespace, "uid": uid}
        manifest = {"apiVersion": ref.api_version, "kind": ref.kind, "metadata": metadata, "status": status}
        return await self._apply(kind_of(ref), f"{_path(ref, namespace)}/status", manifest, FIELD_MANAGER)

    async def create(self, namespace: str, manifest: Manifest) -> Manifest:
        kind = BY_KIND[manifest["apiVersion"], manifest["kind"]]
        return await self._call("create", "POST", kind, _folder(kind, namespace), manifest, manager=FIELD_MANAGER)

    async def merge(self, namespace: str, ref: Ref, patch: Manifest) -> Manifest:
        path = _path(ref, namespace)
        return await self._call("patch", "PATCH", kind_of(ref), path, patch, content=_MERGE, manager=FIELD_MANAGER)

    async def delete(self, namespace: str, ref: Ref, uid: str, version: str) -> None:
        """Delete exactly what was seen, its dependents later; that it is gone is success."""
        preconditions = {"uid": uid, "resourceVersion": version}
        options = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        try:
            body = options | {"preconditions": preconditions}
            await self._call("delete", "DELETE", kind_of(ref), _path(ref, namespace), body)
        except Refused as error:
            if error.code != 404:
                raise

    async def list(self, kind: Kind, namespace: str | None) -> AsyncIterator[Page]:
        """The objects that the operator watches; without a namespace, of all."""
        query: list[tuple[str, Any]] = [("limit", _CHUNK)]
        if kind.selector:
            query.append(("labelSelector", kind.selector))
        following = ""
        while True:
            page = [*query, ("continue", following)] if following else query
            found: Any = await self._call("list", "GET", kind, _folder(kind, namespace), query=page)
            for item in found["items"]:  # the API server says them once for the whole list
                item.setdefault("apiVersion", kind.api_version)
                item.setdefault("kind", kind.kind)
            yield Page(found["items"], int(found["metadata"]["resourceVersion"]))
            following = found["metadata"].get("continue") or ""
            if not following:
                return

    async def has(self, kind: Kind) -> bool:
        """Whether the cluster has this kind (discovery: everybody may ask)."""
        try:
            found: Any = await self._call("get", "GET", kind, f"/apis/{kind.api_version}")
        except Refused as error:
            if error.code == 404:
                return False
            raise
        return any(resource["name"] == kind.plural for resource in found["resources"])

    async def _apply(self, kind: Kind, path: str, manifest: Manifest, manager: str) -> Manifest:
        return await self._call("apply", "PATCH", kind, path, manifest, content=_APPLY, manager=manager, force=True)

    async def _call(
        self,
        verb: str,
        method: str,
        kind: Kind,
        path: str,
        body: Any = None,
        *,
        query: list[tuple[str, Any]] | None = None,
        content: str = "application/json",
        manager: str | None = None,
        force: bool | None = None,
    ) -> Any:
        code = "0"
        try:
            async with self._slots, asyncio.timeout(_TIMEOUT_S):
                answer = await self._dynamic.request(
                    method.lower(), path, body=body, query_params=list(query or ()), content_type=content,
                    field_manager=manager, force_conflicts=force, serialize=False,
                )  # fmt: skip
                code = str(answer.status)
                return orjson.loads(await answer.read())
        except DynamicApiError as error:
            answered: Any = error
            code = str(answered.status)
            raise translate(answered, f"{verb} {kind.kind} {path.rpartition('/')[2]}") from error
        except (aiohttp.ClientError, TimeoutError, OSError, orjson.JSONDecodeError) as error:
            raise Unreachable(f"{verb} {kind.kind}: {type(error).__name__} {error}", 0) from error
        finally:
            self._metrics.api_calls.labels(verb, kind.kind, code).inc()


def translate(error: Any, what: str) -> ApiError:
    """The client's DynamicApiError (not annotated) as one of ours, with the API server's own words."""
    code = int(error.status or 0)
    message = f"{what}: {_words(error)}"
    if code == 409:
        return Conflict(message, code)
    if code in (400, 403, 404, 405, 415, 422):
        return Refused(message, code)
    return Unreachable(message, code, after_s=_retry_after(error))


def kind_of(ref: Ref) -> Kind:
    return BY_KIND[ref.api_version, ref.kind]


def _folder(kind: Kind, namespace: str | None) -> str:
    prefix = f"/apis/{kind.api_version}" if kind.group else f"/api/{kind.api_version}"
    return f"{prefix}/{kind.plural}" if namespace is None else f"{prefix}/namespaces/{namespace}/{kind.plural}"


def _path(ref: Ref, namespace: str) -> str:
    return f"{_folder(kind_of(ref), namespace)}/{ref.name}"


def _words(error: Any) -> str:
    try:
        return str(orjson.loads(error.body)["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return f"{error.status} {error.reason}"


def _retry_after(error: Any) -> float:
    headers: Mapping[str, str] = error.headers or {}
    value = headers.get("Retry-After", "")
    return float(value) if value.isdigit() else 0.0
