"""Programs of the machine that the test cluster uses, and the Debian packages that bring them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.errors import BuildFailed, Unavailable

_PACKAGES = {
    "etcd": "etcd-server",
    "openssl": "openssl",
    "containerd": "containerd",
    "containerd-shim-runc-v2": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "host-local": "containernetworking-plugins",
    "nft": "nftables",
    "ip": "iproute2",
    "mount": "mount",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "redis-server": "redis-server",
}
# Where Debian puts programs that are not on everybody's PATH; the last is for network plugins alone.
_FOLDERS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/lib/cni")
_POLICY = Path("/usr/sbin/policy-rc.d")


def find(command: str) -> Path:
    """Where the program is; KUBEBUILDER_ASSETS comes first, as for the built ones.

    Raises: Unavailable with the package that would bring it.
    """
    if found := _which(command):
        return Path(found)
    raise Unavailable(f"{command} is not installed (Debian package {_PACKAGES[command]})")


def ensure(commands: Sequence[str], say: Callable[[str], None]) -> None:
    """Install the packages of missing programs, if this is Debian and we are root."""
    missing = [command for command in commands if _which(command) is None]
    if not missing:
        return
    packages = sorted({_PACKAGES[command] for command in missing})
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise Unavailable(f"{', '.join(missing)} not installed (Debian: apt-get install {' '.join(packages)})")
    say(f"installing {' '.join(packages)}")
    with _services_stay_off():
        if not (_apt_get("install", packages) or (_apt_get("update", []) and _apt_get("install", packages))):
            raise BuildFailed(f"apt-get could not install {' '.join(packages)}")


def _which(command: str) -> str | None:
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    path = os.pathsep.join([*filter(None, [assets, os.environ.get("PATH")]), *_FOLDERS])
    return shutil.which(command, path=path)


def _apt_get(verb: str, packages: Sequence[str]) -> bool:
    options = ["-y", "-qq", "-o", "DPkg::Lock::Timeout=300"] + (["--no-install-recommends"] if packages else [])
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(["apt-get", verb, *options, *packages], env=environment, check=False).returncode == 0


@contextmanager
def _services_stay_off() -> Iterator[None]:
    """etcd, containerd and Redis bring services that would start at once: we only want the programs."""
    if _POLICY.exists():
        yield
        return
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink(missing_ok=True)
