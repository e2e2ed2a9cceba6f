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
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_TARGETS = ("gateway", "operator", "worker", "redis")
TARGETS = (*DEFAULT_TARGETS, "worker-cuda")
BASE_NAME = "localhost/baton-base:local"


def main() -> int:
    options = parse_options()
    builder = Builder(options.builder or find_builder(), options.storage, options.ca_file)
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
    return 0


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
        if tool == "buildah" and storage:
            self._command += ["--root", str(storage / "root"), "--runroot", str(storage / "run")]

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
        self._run("build", "--layers", *chroot, *offline, *ignore, *arguments, str(ROOT))

    def make_base(self, root_file_system: Path) -> str:
        """A base image out of a tar, such as debootstrap's folder packed. Made again when the tar is newer."""
        if self.tool != "buildah":
            raise SystemExit(f"--base-tar needs buildah, not {self.tool}")
        with tempfile.TemporaryDirectory() as folder:
            os.link(root_file_system, Path(folder, "base.tar"))
            Path(folder, "Dockerfile").write_text('FROM scratch\nADD base.tar /\nCMD ["bash"]\n')
            self._run("build", "--layers", "--isolation", "chroot", "--tag", BASE_NAME, folder)
        return BASE_NAME

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

    def _run(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        command = [*self._command, *arguments]
        done = subprocess.run(command, env={**os.environ, **(environment or {})}, check=False, stdout=sys.stderr)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed with {done.returncode}")


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
