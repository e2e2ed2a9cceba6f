"""Container images without a registry: written as OCI archives, imported into the node's containerd.

An image of one static program needs no builder: `write_image`. Images of Dockerfiles are built by buildah
(CONTRIBUTING.md, "A cluster to work with") and come as archives too: `NodeCluster.import_image` takes both.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def write_image(archive: Path, name: str, program: Path, entrypoint: Sequence[str]) -> Path:
    """Write an OCI archive of an image that holds one static program, as `/NAME-OF-PROGRAM`."""
    layer = _layer(program)
    config = {
        "architecture": _ARCHITECTURES[platform.machine()],
        "os": "linux",
        "config": {"Entrypoint": list(entrypoint), "User": "65532:65532"},
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
    }
    blobs = {_digest(layer): layer}
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _described(blobs, "application/vnd.oci.image.config.v1+json", config),
        "layers": [
            {
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "digest": _digest(layer),
                "size": len(layer),
            }
        ],
    }
    index = {
        "schemaVersion": 2,
        "manifests": [
            _described(blobs, "application/vnd.oci.image.manifest.v1+json", manifest)
            | {"annotations": {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}}
        ],
    }
    with tarfile.open(archive, "w") as tar:
        _add(tar, "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
        _add(tar, "index.json", json.dumps(index).encode())
        for digest, blob in blobs.items():
            _add(tar, f"blobs/{digest.replace(':', '/')}", blob)
    return archive


def _layer(program: Path) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        _add(tar, program.name, program.read_bytes(), mode=0o755)
    return content.getvalue()


def _described(blobs: dict[str, bytes], media_type: str, document: dict[str, Any]) -> dict[str, Any]:
    """Add the document to the blobs; return the descriptor that points at it."""
    blob = json.dumps(document).encode()
    blobs[_digest(blob)] = blob
    return {"mediaType": media_type, "digest": _digest(blob), "size": len(blob)}


def _digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _add(tar: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))
