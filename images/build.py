"""Build the container images and load them where pods run.

    python images/build.py                               docker, podman or buildah, whichever works; all images but CUDA
    python images/build.py --into containerd             and import them into the node's containerd (k8s.io)
    python images/build.py --into kind                   and load them into kind's nodes
    python images/build.py --into /tmp/images.tar        and write one OCI archive
    python images/build.py --base-tar base.tar           without a registry: a root file system as the base

The archive holds all images, common layers once. `make images ARGS="..."` passes arguments on.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_TARGETS = ("gateway", "operator", "worker", "redis")
TARGETS = (*DEFAULT_TARGETS, "worker-cuda")
BASE_NAME = "localhost/baton-base:local"


def main() -> int:
    options = parse_options()
    builder = Builder(options.builder or find_builder(), options.storage, options.ca_file)
    with builder.at_work() as is_alone:
        build_and_load(builder, options)
        if is_alone():
            builder.remove_unused(round(options.storage_limit * 1e9))
    return 0


def build_and_load(builder: Builder, options: argparse.Namespace) -> None:
    base = builder.make_base(options.base_tar) if options.base_tar else options.base
    names = {target: f"{options.prefix}{target}:{options.tag}" for target in options.targets}
    for target, name in names.items():
        began = time.monotonic()
        builder.build(target, name, base)
        print(f"{name}: built in {time.monotonic() - began:.0f} s", flush=True)
    if options.into:
        began = time.monotonic()
        load(builder, list(names.values()), options)
        print(f"loaded into {options.into} in {time.monotonic() - began:.0f} s", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("targets", nargs="*", default=DEFAULT_TARGETS, metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    add("--prefix", default="localhost/baton-", help="what the names begin with (registry and path)")
    add("--tag", default="dev")
    add("--base", help="base image instead of the Dockerfile's pinned one")
    add("--base-tar", type=Path, help="make the base image of this root file system (buildah only)")
    ca_file = os.environ.get("PIP_CERT")
    help_ca = "authorities to trust while building, instead of the base's; default: those of $PIP_CERT"
    add("--ca-file", type=Path, default=Path(ca_file) if ca_file else None, help=help_ca)
    add("--builder", choices=("docker", "podman", "buildah"), help="default: the first that works")
    add("--storage", type=Path, help="folder of buildah's own layers, instead of the system's")
    help_limit = "of --storage: beyond it, layers that this build did not use are removed; default: %(default)s"
    add("--storage-limit", type=float, default=20.0, metavar="GB", help=help_limit)
    add("--into", help="containerd, kind, or a file for an OCI archive")
    add("--containerd-address", help="its socket, if not the system's")
    add("--kind-cluster", default="kind")
    options = parser.parse_args()
    unknown = set(options.targets) - set(TARGETS)
    if unknown:
        parser.error(f"unknown target {', '.join(sorted(unknown))}; known: {', '.join(TARGETS)}")
    return options


def find_builder() -> str:
    for name in ("docker", "podman", "buildah"):
        if shutil.which(name) and subprocess.run([name, "info"], capture_output=True, check=False).returncode == 0:
            return name
    raise SystemExit("no container builder works here: start docker, or install podman or buildah")


class Builder:
    """docker, podman or buildah behind one face."""

    def __init__(self, tool: str, storage: Path | None, ca_file: Path | None) -> None:
        self.tool = tool
        self._ca_file = ca_file
        self._command = [tool]
        self._storage = storage if tool == "buildah" else None
        self._used: set[str] = set()  # beginnings of the ids of layers, each an image without a name
        if self._storage:
            self._command += ["--root", str(self._storage / "root"), "--runroot", str(self._storage / "run")]

    @contextmanager
    def at_work(self) -> Iterator[Callable[[], bool]]:
        """For as long as layers of the storage are read and made; yields whether nobody else is at it (nor begins)."""
        if self._storage is None:
            yield lambda: False
            return
        self._storage.mkdir(parents=True, exist_ok=True)
        with (self._storage / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)

            def is_alone() -> bool:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                return True

            yield is_alone

    def build(self, target: str, name: str, base: str | None) -> None:
        arguments = ["--target", target, "--tag", name, "--file", str(ROOT / "images" / "Dockerfile")]
        arguments += ["--build-arg", f"BASE={base}"] if base else []
        arguments += ["--secret", f"id=ca,src={self._ca_file}"] if self._ca_file else []
        if self.tool == "docker":
            self._run("build", *arguments, str(ROOT), environment={"DOCKER_BUILDKIT": "1"})
            return
        ignore = ["--ignorefile", str(ROOT / "images" / "Dockerfile.dockerignore")]
        offline = ["--pull-never"] if base == BASE_NAME and self.tool == "buildah" else []
        chroot = ["--isolation", "chroot"] if self.tool == "buildah" else []
        self._run("build", "--layers", *chroot, *offline, *ignore, *arguments, str(ROOT), notes_layers=True)

    def make_base(self, root_file_system: Path) -> str:
        """A base image out of a tar, such as debootstrap's folder packed. Made again when the tar is newer."""
        if self.tool != "buildah":
            raise SystemExit(f"--base-tar needs buildah, not {self.tool}")
        with tempfile.TemporaryDirectory() as folder:
            os.link(root_file_system, Path(folder, "base.tar"))
            Path(folder, "Dockerfile").write_text('FROM scratch\nADD base.tar /\nCMD ["bash"]\n')
            self._run("build", "--layers", "--isolation", "chroot", "--tag", BASE_NAME, folder, notes_layers=True)
        return BASE_NAME

    def remove_unused(self, max_bytes: int) -> None:
        """Where the storage holds more, remove layers of former builds; buildah keeps what others are made of."""
        before = self._num_bytes()
        if before <= max_bytes:
            return
        while leaves := unused_layers(self._images(), self._used):
            num_before = len(self._images())
            self._run("rmi", *leaves, may_fail=True)
            if len(self._images()) == num_before:
                break
        left = self._num_bytes()
        words = (
            "" if left <= max_bytes else f"; the rest belongs to this build or to images with names: {self._names()}"
        )
        print(f"removed {(before - left) / 1e9:.1f} of {before / 1e9:.1f} GB of layers{words}", flush=True)

    def _num_bytes(self) -> int:
        said = subprocess.run(["du", "-s", "-B1", str(self._storage)], capture_output=True, text=True, check=False)
        return int(said.stdout.split()[0])

    def _images(self) -> list[dict[str, Any]]:
        command = [*self._command, "images", "--all", "--json"]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    def _names(self) -> str:
        return ", ".join(sorted(name for image in self._images() for name in image["names"] or ()))

    def archive(self, names: list[str], file: Path) -> None:
        """All images into one file; with buildah layers that they share are there once."""
        if self.tool != "buildah":
            self._run("save", "--output", str(file), *names)
            return
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            layout = OciLayout(Path(folder))
            for name in names:
                with tempfile.TemporaryDirectory(dir=folder) as pushed:
                    self._run("push", "--quiet", "--format", "oci", "--disable-compression", name, f"dir:{pushed}")
                    layout.add(name, Path(pushed))
            layout.write(file)

    def _run(
        self,
        *arguments: str,
        environment: dict[str, str] | None = None,
        notes_layers: bool = False,
        may_fail: bool = False,
    ) -> None:
        """What it says goes to stderr; with `notes_layers` it is read for the layers that it used or made."""
        command = [*self._command, *arguments]
        with subprocess.Popen(
            command, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE if notes_layers else sys.stderr,
            text=True,
        ) as process:  # fmt: skip
            for line in process.stdout or ():
                sys.stderr.write(line)
                self._used |= layers_in(line)
        if process.returncode and not may_fail:
            raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")


def layers_in(line: str) -> set[str]:
    """`--> Using cache 0123...` or `--> 0123...`, as buildah says it of each step."""
    return set(re.findall(r"^--> (?:Using cache )?([0-9a-f]{11,64})$", line.strip()))


def unused_layers(images: list[dict[str, Any]], used: set[str]) -> list[str]:
    """Those without a name of which this build said nothing. buildah shows the beginning of an id, ever another one."""
    return [
        image["id"]
        for image in images
        if not image["names"] and not any(image["id"].startswith(each) or each.startswith(image["id"]) for each in used)
    ]


class OciLayout:
    """Images as buildah writes them into folders, as one OCI archive.

    buildah's own `oci:` compresses each layer anew, which takes a minute where this takes seconds.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._blobs = folder / "blobs" / "sha256"
        self._blobs.mkdir(parents=True)
        self._manifests: list[dict[str, Any]] = []

    def add(self, name: str, pushed: Path) -> None:
        manifest = (pushed / "manifest.json").read_bytes()
        digest = hashlib.sha256(manifest).hexdigest()
        for blob in pushed.iterdir():
            if blob.name not in ("manifest.json", "version"):
                blob.replace(self._blobs / blob.name)
        (self._blobs / digest).write_bytes(manifest)
        annotations = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}
        media_type = "application/vnd.oci.image.manifest.v1+json"
        described = {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(manifest)}
        self._manifests.append({**described, "annotations": annotations})

    def write(self, file: Path) -> None:
        (self._folder / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
        (self._folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": self._manifests}))
        with tarfile.open(file, "w") as archive:
            for entry in ("oci-layout", "index.json", "blobs"):
                archive.add(self._folder / entry, entry)


def load(builder: Builder, names: list[str], options: argparse.Namespace) -> None:
    if options.into not in ("containerd", "kind"):
        builder.archive(names, Path(options.into).resolve())
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "images.tar")
        builder.archive(names, file)
        if options.into == "kind":
            command = ["kind", "load", "image-archive", "--name", options.kind_cluster, str(file)]
        else:
            address = ["--address", options.containerd_address] if options.containerd_address else []
            command = ["ctr", *address, "--namespace", "k8s.io", "images", "import", str(file)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
