"""What the operator knows of the cluster: objects as bytes, by service. Pure: watches, lists and own writes feed it.

Objects are kept as JSON and parsed when a service is looked at: a thousand services have twenty thousand objects, which
as dictionaries take ten times the memory. resourceVersions decide which of two views of an object is newer; the API
promises that they compare as numbers (KEP-5504). So an own write shows at once, and the watch event of an older state
that comes after it changes nothing.

One version of an object may read in two ways: an upgraded CRD fills in defaults and lets fields through without writing
anything, and for seconds after the upgrade watches still show objects as the CRD before it would. So of two views of a
version that differ the later one counts; a watch with the older CRD ends, and the list after it has the last word.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import orjson

from baton_operator.objects import POOL_KIND, SERVICE_KIND, SERVICE_LABEL, Manifest, Ref

Key: TypeAlias = tuple[str, str]
"""Namespace and name of an LLMService."""
_OWN_KINDS = (SERVICE_KIND, POOL_KIND)
"""Those of our CRDs: of other kinds, which are many and do not change their shape, two views of a version are one."""


@dataclass(frozen=True, slots=True)
class Entry:
    uid: str
    version: int
    service: str
    data: bytes


class Cache:
    """Owned by the event loop; not for threads."""

    def __init__(self) -> None:
        self._services: dict[Key, dict[Ref, Entry]] = {}
        self._owner: dict[tuple[str, Ref], str] = {}  # namespace, object -> service whose entry it is
        self._gone: dict[
            tuple[str, Ref], int
        ] = {}  # version at which it was deleted, so that no late answer revives it

    def put(self, manifest: Manifest) -> Key | None:
        """Take a view of an object. The service that it belongs to if the view was news, else None."""
        namespace, ref, service = _where(manifest)
        version = _version(manifest)
        if not service:
            return self.remove(manifest)  # the label was taken away: it is ours no more
        known = self._entry(namespace, ref)
        if (known is not None and version < known.version) or version <= self._gone.get((namespace, ref), -1):
            return None
        is_same_version = known is not None and version == known.version
        if is_same_version and ref.kind not in _OWN_KINDS:
            return None
        entry = Entry(manifest["metadata"]["uid"], version, service, _packed(manifest))
        if is_same_version and entry == known:
            return None
        self._gone.pop((namespace, ref), None)
        if known is not None and known.service != service:
            self._drop(namespace, ref)
        self._services.setdefault((namespace, service), {})[ref] = entry
        self._owner[namespace, ref] = service
        return namespace, service

    def remove(self, manifest: Manifest) -> Key | None:
        """Take the last view of a deleted object (its resourceVersion is that of the deletion)."""
        namespace, ref, _ = _where(manifest)
        return self._remove(namespace, ref, _version(manifest))

    def forget(self, namespace: str, ref: Ref, uid: str) -> Key | None:
        """The API server says that the object with this uid is gone."""
        known = self._entry(namespace, ref)
        return self._remove(namespace, ref, known.version) if known is not None and known.uid == uid else None

    def reconcile_with(
        self, api_version: str, kind: str, namespace: str | None, listed: Collection[tuple[str, str]], version: int
    ) -> set[Key]:
        """After a whole list at `version`: drop what it does not hold and what was not made since.

        `listed` are namespace and name. Returns the services that lost something: deletions that no watch has shown.
        """
        self._gone = {key: gone for key, gone in self._gone.items() if key[1].kind != kind or gone > version}
        ghosts = [
            (space, ref)
            for space, ref in self._owner
            if (ref.api_version, ref.kind) == (api_version, kind)
            and namespace in (None, space)
            and (space, ref.name) not in listed
        ]
        found = {self._remove(space, ref, version) for space, ref in ghosts if self._version_of(space, ref) <= version}
        return {key for key in found if key is not None}

    def of(self, key: Key) -> dict[Ref, Manifest]:
        """Every object of one service, the LLMService itself included."""
        return {ref: _unpacked(entry) for ref, entry in self._services.get(key, {}).items()}

    def services(self) -> Iterator[Key]:
        """The LLMServices that there are."""
        for key, objects in self._services.items():
            if any(ref.kind == SERVICE_KIND for ref in objects):
                yield key

    def counts(self) -> dict[str, int]:
        """How many objects of each kind."""
        found: dict[str, int] = {}
        for _, ref in self._owner:
            found[ref.kind] = found.get(ref.kind, 0) + 1
        return found

    def _remove(self, namespace: str, ref: Ref, version: int) -> Key | None:
        known = self._entry(namespace, ref)
        if known is not None and known.version > version:
            return None  # made anew since
        self._gone[namespace, ref] = version
        if known is None:
            return None
        self._drop(namespace, ref)
        return namespace, known.service

    def _drop(self, namespace: str, ref: Ref) -> None:
        service = self._owner.pop((namespace, ref))
        objects = self._services[namespace, service]
        del objects[ref]
        if not objects:
            del self._services[namespace, service]

    def _entry(self, namespace: str, ref: Ref) -> Entry | None:
        service = self._owner.get((namespace, ref))
        return None if service is None else self._services[namespace, service][ref]

    def _version_of(self, namespace: str, ref: Ref) -> int:
        entry = self._entry(namespace, ref)
        return -1 if entry is None else entry.version


def _where(manifest: Manifest) -> tuple[str, Ref, str]:
    """Namespace, object, and the service that it belongs to ('' if none)."""
    metadata = manifest["metadata"]
    # Each word once: a thousand services say the same twenty kinds and one namespace twenty thousand times.
    ref = Ref(sys.intern(manifest["apiVersion"]), sys.intern(manifest["kind"]), metadata["name"])
    labels: Manifest = metadata.get("labels") or {}
    service = metadata["name"] if ref.kind == SERVICE_KIND else labels.get(SERVICE_LABEL, "")
    return sys.intern(metadata["namespace"]), ref, sys.intern(service)


def _version(manifest: Manifest) -> int:
    return int(manifest["metadata"]["resourceVersion"])


def _packed(manifest: Manifest) -> bytes:
    """As compressed JSON, a third of it (docs/log.md). orjson's own bytes would keep the buffer that they grew in."""
    return zlib.compress(orjson.dumps(_trimmed(manifest), option=orjson.OPT_SORT_KEYS), level=1)


def _unpacked(entry: Entry) -> Manifest:
    return orjson.loads(zlib.decompress(entry.data))


def _trimmed(manifest: Manifest) -> dict[str, Any]:
    """Without what nobody reads: half of an object is managedFields, which matter for a pool's replicas alone."""
    metadata = dict(manifest["metadata"])
    if manifest["kind"] != POOL_KIND:
        metadata.pop("managedFields", None)
    trimmed = {**manifest, "metadata": metadata}
    if manifest["kind"] == "Secret":
        trimmed.pop("data", None)
    return trimmed
