"""Build or install the programs of the test cluster, once: `python -m tests.cluster.build [TIER...]`.

Kubernetes, helm and the rest come from public Go modules, pinned by the go.mod and go.sum of their folder below `go/`.
The binaries lie in `$XDG_CACHE_HOME/baton/cluster/<module>-<key>/` (`~/.cache` where that is unset), outside the
checkout; the key is the hash of go.mod, go.sum and our sources, so that a version is built once per machine. What Go
modules do not offer comes from Debian (`debian.py`).

Tests never build: `find` gives them the path, or `Unavailable` with the reason to print beside the skip.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import base_image, debian
from tests.cluster.errors import BuildFailed, Unavailable

GO_FOLDER = Path(__file__).parent / "go"
HEARTBEAT_S = 30.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Tool:
    """One program built from a Go module."""

    name: str
    module: str
    """Folder below `go/` that pins it."""
    package: str
    cold_s: int
    """Seconds of a first build on 2 idle cores, in the order of TIERS (later ones find parts built); for progress."""


_KUBERNETES = "k8s.io/kubernetes/cmd"
TOOLS = {
    tool.name: tool
    for tool in (
        Tool("kube-apiserver", "kubernetes", f"{_KUBERNETES}/kube-apiserver", 240),
        Tool("kube-controller-manager", "kubernetes", f"{_KUBERNETES}/kube-controller-manager", 60),
        Tool("kubectl", "kubernetes", f"{_KUBERNETES}/kubectl", 30),
        Tool("kubelet", "kubernetes", f"{_KUBERNETES}/kubelet", 20),
        Tool("kube-scheduler", "kubernetes", f"{_KUBERNETES}/kube-scheduler", 10),
        Tool("kube-proxy", "kubernetes", f"{_KUBERNETES}/kube-proxy", 40),
        Tool("pod", "pod", ".", 10),
        Tool("dns", "dns", ".", 100),
        Tool("metrics-server", "metrics-server", "sigs.k8s.io/metrics-server/cmd/metrics-server", 240),
        Tool("helm", "helm", "helm.sh/helm/v4/cmd/helm", 150),
        Tool("kubeconform", "kubeconform", "github.com/yannh/kubeconform/cmd/kubeconform", 10),
        Tool("kwok", "kwok", "sigs.k8s.io/kwok/cmd/kwok", 140),
    )
}


@dataclass(frozen=True)
class Tier:
    """Programs that one kind of test needs."""

    tools: tuple[str, ...]
    commands: tuple[str, ...]
    """Programs of the machine: on PATH or installed from Debian."""
    needs_root: bool = False
    needs_base_image: bool = False


TIERS = {
    "control-plane": Tier(("kube-apiserver", "kube-controller-manager", "kubectl"), ("etcd", "openssl")),
    "chart": Tier(("helm", "kubeconform"), ()),
    "node": Tier(
        (
            "kube-apiserver", "kube-controller-manager", "kubectl",
            "kubelet", "kube-scheduler", "kube-proxy", "pod", "dns", "metrics-server",
        ),
        (
            "etcd", "openssl", "containerd", "containerd-shim-runc-v2", "ctr", "runc", "host-local", "nft", "ip",
            "mount", "nsenter", "unshare",
        ),
        needs_root=True,
    ),
    "registry": Tier((), ("redis-server", "openssl")),
    "images": Tier((), ("buildah", "debootstrap"), needs_root=True, needs_base_image=True),
    "scale": Tier(("kwok",), ()),
}  # fmt: skip
DEFAULT_TIERS = ("registry", "control-plane", "chart", "node", "images")


def find(*tools: str) -> dict[str, Path]:
    """Paths of built tools by name; builds nothing.

    Raises: Unavailable if one is neither in KUBEBUILDER_ASSETS nor in the cache.
    """
    found = {name: path for name in tools if (path := _existing(name)) is not None}
    if missing := [name for name in tools if name not in found]:
        raise Unavailable(f"not built: {', '.join(missing)} (run `make cluster-tools`)")
    return found


def find_tier(name: str) -> dict[str, Path]:
    """Paths of all programs of the tier, those of the machine included.

    Raises: Unavailable with everything that is missing, root and Linux included.
    """
    tier = TIERS[name]
    _refuse_wrong_machine(name, tier)
    return {command: debian.find(command) for command in tier.commands} | find(*tier.tools)


def find_base_image() -> Path:
    """A root file system for `images/build.py --builder buildah --base-tar TAR --into ARCHIVE`.

    Raises: Unavailable if it was not made.
    """
    path = cache_folder() / base_image.file_name()
    if not path.is_file():
        raise Unavailable("the base of the images was not made (run `make cluster-tools`)")
    return path


def ensure_tier(name: str, say: Say) -> None:
    """Install and build what the tier lacks, saying how far it is.

    Raises: Unavailable where this machine cannot have the tier; BuildFailed with the end of the compiler's output.
    """
    tier = TIERS[name]
    _refuse_wrong_machine(name, tier)
    debian.ensure(tier.commands, say)
    if tier.needs_base_image:
        _ensure_base_image(say)
    if all(_existing(tool) for tool in tier.tools):
        return
    with _only_one_build(say):
        missing = [TOOLS[tool] for tool in tier.tools if not _existing(tool)]
        for number, tool in enumerate(missing, start=1):
            _build(tool, f"{number} of {len(missing)}", say)


def cache_folder() -> Path:
    """Where the test cluster keeps what outlives a checkout."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "baton" / "cluster"


def _existing(name: str) -> Path | None:
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    candidates = [Path(assets) / name] if assets else []
    candidates.append(_target(TOOLS[name]))
    return next((path for path in candidates if path.is_file()), None)


def _target(tool: Tool) -> Path:
    folder = GO_FOLDER / tool.module
    digest = hashlib.sha256(f"{platform.system()} {platform.machine()}".encode())
    for source in sorted(folder.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return cache_folder() / f"{tool.module}-{digest.hexdigest()[:12]}" / tool.name


def _refuse_wrong_machine(name: str, tier: Tier) -> None:
    if not tier.needs_root:
        return
    if platform.system() != "Linux":
        raise Unavailable(f"the {name} tier needs Linux: it makes namespaces and cgroups")
    if os.geteuid() != 0:
        raise Unavailable(f"the {name} tier needs root: it makes namespaces and cgroups")


@contextmanager
def _only_one_build(say: Say) -> Iterator[None]:
    """Two test runs that start together build once."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with (cache_folder() / "build.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build is running: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _ensure_base_image(say: Say) -> None:
    path = cache_folder() / base_image.file_name()
    if path.is_file():
        return
    with _only_one_build(say):
        if not path.is_file():
            say("making the base of the images with debootstrap: about 100 s")
            base_image.make(path)


def _build(tool: Tool, place: str, say: Say) -> None:
    """Build under another name, then rename: a half-written program never has the final name."""
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if go is None:
        raise Unavailable(f"Go is needed to build {tool.name}; install it, or name a folder in KUBEBUILDER_ASSETS")
    target = _target(tool)
    target.parent.mkdir(parents=True, exist_ok=True)
    half = target.with_name(f".{tool.name}.{os.getpid()}")
    say(f"building {tool.name} ({place}): about {tool.cold_s} s on 2 cores where nothing of it is cached")
    started = time.monotonic()
    command = [go, "build", "-trimpath", "-buildvcs=false", "-ldflags", _ldflags(tool), "-o", str(half), tool.package]
    environment = os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly"}
    try:
        _run_with_heartbeat(["nice", "-n", "10", *command], GO_FOLDER / tool.module, environment, tool, say)
        half.replace(target)
    finally:
        half.unlink(missing_ok=True)
    say(f"built {tool.name} in {time.monotonic() - started:.0f} s")


def _run_with_heartbeat(
    command: Sequence[str], folder: Path, environment: dict[str, str], tool: Tool, say: Say
) -> None:
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        started = time.monotonic()
        while True:
            try:
                output, _ = process.communicate(timeout=HEARTBEAT_S)
                break
            except subprocess.TimeoutExpired:
                say(f"still building {tool.name}: {time.monotonic() - started:.0f} s of about {tool.cold_s} s")
    if process.returncode != 0:
        raise BuildFailed(f"{tool.name} could not be built:\n{output[-4000:]}")


def _ldflags(tool: Tool) -> str:
    """Kubernetes learns its version from the linker: without it clients that ask for a version see v0.0.0."""
    if tool.module != "kubernetes":
        return "-s -w"
    version = kubernetes_version()
    major, minor, _ = version.removeprefix("v").split(".")
    prefix = "-X k8s.io/component-base/version."
    return f"-s -w {prefix}gitVersion={version} {prefix}gitMajor={major} {prefix}gitMinor={minor}"


def kubernetes_version() -> str:
    """The pinned version, such as v1.35.4."""
    for line in (GO_FOLDER / "kubernetes" / "go.mod").read_text().splitlines():
        words = line.removeprefix("require").split()
        if words[:1] == ["k8s.io/kubernetes"]:
            return words[1]
    raise AssertionError("go/kubernetes/go.mod requires no k8s.io/kubernetes")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster.build", description="Build or install what the test cluster runs."
    )
    parser.add_argument(
        "tiers", nargs="*", metavar="TIER", help=f"of {', '.join(TIERS)}; without any: {' '.join(DEFAULT_TIERS)}"
    )
    tiers = parser.parse_args().tiers or DEFAULT_TIERS
    if unknown := set(tiers) - set(TIERS):
        parser.error(f"unknown tier: {', '.join(sorted(unknown))}")

    def say(line: str) -> None:
        print(f"cluster tools: {line}", file=sys.stderr, flush=True)

    for tier in tiers:
        try:
            ensure_tier(tier, say)
        except Unavailable as reason:
            say(f"tests of the {tier} tier will be skipped: {reason}")
        except BuildFailed as reason:
            say(str(reason))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
