"""The root file system that our images are built on where no registry is at hand: Debian with Python, packed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.cluster import debian
from tests.cluster.errors import BuildFailed

# The suite of the base image that images/Dockerfile names; the packages are what it asks of any base.
_SUITE = "bookworm"
_PACKAGES = ("ca-certificates", "python3", "python3-venv")
_LEFT_OUT = ("./dev/*", "./proc/*", "./sys/*", "./var/cache/apt/archives/*.deb", "./var/lib/apt/lists/*")


def file_name() -> str:
    digest = hashlib.sha256(" ".join((_SUITE, *_PACKAGES, *_LEFT_OUT)).encode()).hexdigest()
    return f"base-{_SUITE}-{digest[:12]}.tar"


def make(target: Path) -> None:
    """Make it with debootstrap: about 100 s.

    Raises: Unavailable without debootstrap; BuildFailed with the end of its output.
    """
    debootstrap = debian.find("debootstrap")
    folder = Path(tempfile.mkdtemp(prefix=".base-", dir=target.parent))
    half = folder / "half.tar"
    try:
        root = folder / "root"
        _run(debootstrap, "--variant=minbase", f"--include={','.join(_PACKAGES)}", _SUITE, root)
        _run("tar", "--numeric-owner", *(f"--exclude={name}" for name in _LEFT_OUT), "-C", root, "-cf", half, ".")
        half.replace(target)
    finally:
        shutil.rmtree(folder)


def _run(*command: str | Path) -> None:
    said = subprocess.run(
        ["nice", "-n", "10", *command], env=os.environ | {"LC_ALL": "C"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if said.returncode != 0:
        raise BuildFailed(f"{command[0]}:\n{said.stdout[-4000:]}")
