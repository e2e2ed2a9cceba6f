"""A real redis-server for tests: started on a free port, killed, stopped, flushed, with a password and with TLS."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.ports import free_port

PASSWORD = "correct-horse-battery"
ADMIN = "admin-of-the-test"

# What docs/registry.md asks of an administrator; the tests run with no more than this.
ACL_COMMANDS = (
    "-@all +sadd +srem +sscan +set +get +getrange +exists +del +watch +unwatch +multi +exec"
    " +select +hello +auth +client"
)
needs_redis = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="redis-server is not installed (apt-get install redis-server)"
)


@dataclass
class Tls:
    """A certificate authority of the test's own and a certificate for localhost."""

    folder: Path

    @property
    def ca_file(self) -> Path:
        return self.folder / "ca.crt"

    @classmethod
    def make(cls, folder: Path) -> Tls:
        folder.mkdir(parents=True)
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        _openssl(folder, "req", "-x509", *key, "-subj", "/CN=test ca", "-keyout", "ca.key", "-out", "ca.crt")
        _openssl(folder, "req", *key[:-2], "-subj", "/CN=localhost", "-keyout", "redis.key", "-out", "redis.csr")
        (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
        _openssl(
            folder, "x509", "-req", "-in", "redis.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
            "-days", "2", "-extfile", "names", "-out", "redis.crt",
        )  # fmt: skip
        return cls(folder)


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)


class RedisServer:
    """`url` is for a user that may do what docs/registry.md lists, and nothing else, to keys of one prefix."""

    def __init__(self, folder: Path, *, prefix: str = "baton", tls: Tls | None = None) -> None:
        self.folder = folder
        self.tls = tls
        self.password = PASSWORD
        self.prefix = prefix
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()  # it comes back to the same one after a kill
        self.password_file = folder / "redis-password"
        self.password_file.write_text(PASSWORD + "\n")

    @property
    def url(self) -> str:
        return f"{'rediss' if self.tls else 'redis'}://baton@localhost:{self.port}/0"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of gateways and workers."""
        found: dict[str, Any] = {
            "registry": self.url, "registry_prefix": self.prefix, "registry_password_file": self.password_file,
        }  # fmt: skip
        return found | {"registry_ca_file": self.tls.ca_file} if self.tls else found

    def start(self) -> None:
        """Start empty; returns when it answers."""
        lines = [
            "bind 127.0.0.1", 'save ""', "appendonly no", f"dir {self.folder}", f"logfile {self.folder / 'redis.log'}",
            f"user default on >{ADMIN} ~* &* +@all",
            f"user baton on >{self.password} ~{self.prefix}:* {ACL_COMMANDS}",
        ]  # fmt: skip
        if self.tls is None:
            lines.append(f"port {self.port}")
        else:
            folder = self.tls.folder
            lines += [
                "port 0", f"tls-port {self.port}", "tls-auth-clients no", f"tls-ca-cert-file {self.tls.ca_file}",
                f"tls-cert-file {folder / 'redis.crt'}", f"tls-key-file {folder / 'redis.key'}",
            ]  # fmt: skip
        config = self.folder / "redis.conf"
        config.write_text("\n".join(lines) + "\n")
        self._process = subprocess.Popen(["redis-server", str(config)])
        deadline = time.monotonic() + 120
        while self.cli("PING") != "PONG":
            assert time.monotonic() < deadline, (self.folder / "redis.log").read_text()
            time.sleep(0.02)

    def cli(self, *command: str) -> str:
        """One command as the administrator, past TLS and ACL."""
        tls = ["--tls", "--cacert", str(self.tls.ca_file)] if self.tls else []
        said = subprocess.run(
            ["redis-cli", "-h", "127.0.0.1", "-p", str(self.port), "--no-auth-warning", *tls, *command],
            env=os.environ | {"REDISCLI_AUTH": ADMIN}, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        return said.stdout.strip()

    def kill(self) -> None:
        """kill -9. What it held is gone: nothing is written to disk."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(60)
            self._process = None

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


@contextmanager
def redis_server(folder: Path, **settings: Any) -> Iterator[RedisServer]:
    folder.mkdir(parents=True, exist_ok=True)
    server = RedisServer(folder, **settings)
    try:
        server.start()
        yield server
    finally:
        server.kill()
