"""Keys and certificates of a test cluster's API server, made anew for each run with openssl."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Certificates:
    """Paths of PEM files."""

    ca: Path
    server: Path
    server_key: Path
    service_account_key: Path
    proxy_client: Path
    """With it the API server proves to aggregated API servers (metrics-server) that it asks."""
    proxy_client_key: Path


def make_certificates(folder: Path, names: Sequence[str]) -> Certificates:
    """Make them for a server that answers to these subject alternative names (`IP:127.0.0.1`, `DNS:localhost`)."""
    folder.mkdir(parents=True, exist_ok=True)
    ca, ca_key = folder / "ca.crt", folder / "ca.key"
    _new_key(ca_key)
    _openssl("req", "-x509", "-new", "-key", ca_key, "-subj", "/CN=baton-test-ca", "-days", "30", "-out", ca)
    server, server_key = _signed(folder, "server", "/CN=kube-apiserver", names, ca, ca_key)
    client, client_key = _signed(folder, "proxy-client", "/CN=front-proxy-client", (), ca, ca_key)
    _new_key(folder / "service-account.key")
    return Certificates(ca, server, server_key, folder / "service-account.key", client, client_key)


def _signed(folder: Path, name: str, subject: str, names: Sequence[str], ca: Path, ca_key: Path) -> tuple[Path, Path]:
    key, request, certificate, extensions = (folder / f"{name}.{end}" for end in ("key", "csr", "crt", "ext"))
    _new_key(key)
    extensions.write_text(f"subjectAltName={','.join(names)}\n" if names else "extendedKeyUsage=clientAuth\n")
    _openssl("req", "-new", "-key", key, "-subj", subject, "-out", request)
    _openssl(
        "x509", "-req", "-in", request, "-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-days", "30",
        "-extfile", extensions, "-out", certificate,
    )  # fmt: skip
    return certificate, key


def _new_key(path: Path) -> None:
    _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path)


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
