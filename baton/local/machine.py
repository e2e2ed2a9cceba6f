"""Read what this process may use: CPUs and memory, after cgroup v1 or v2 limits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from baton.local.plan import Machine

_UNLIMITED = 2**60  # cgroup v1 writes "no limit" as a number near 2**63


def read_machine(root: Path = Path("/")) -> Machine:
    """The machine as this process may use it. `root` is another file system in tests."""
    cpus, cpu_words = _num_cpus(), "affinity"
    quota = _smallest(_cpu_quotas(root))
    if quota is not None and quota < cpus:
        cpus, cpu_words = quota, "cgroup quota"
    memory, memory_words = _available_memory(root), "available memory"
    limit = _smallest(_memory_limits(root))
    if limit is not None and limit < memory:
        memory, memory_words = limit, "cgroup limit"
    return Machine(cpus, int(memory), f"{cpu_words}, {memory_words}")


def _num_cpus() -> float:
    if hasattr(os, "sched_getaffinity"):
        return float(len(os.sched_getaffinity(0)))
    return float(os.cpu_count() or 1)


def _available_memory(root: Path) -> float:
    """MemAvailable, not MemTotal: a laptop runs other things too."""
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():
        import psutil  # macOS; 20 ms that Linux need not wait for

        return float(psutil.virtual_memory().available)
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    raise ValueError(f"{meminfo} has no MemAvailable line")


def _cpu_quotas(root: Path) -> Iterator[float]:
    for folder in _cgroup_folders(root, "cpu"):
        match _read(folder / "cpu.max").split():  # v2: "max 100000" or "150000 100000"
            case [quota, period] if quota != "max":
                yield float(quota) / float(period)
            case _:
                pass
        quota_us, period_us = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota_us and period_us and float(quota_us) > 0:  # v1: -1 is no limit
            yield float(quota_us) / float(period_us)


def _memory_limits(root: Path) -> Iterator[float]:
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name)
            if text and text != "max" and float(text) < _UNLIMITED:
                yield float(text)


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """This process's cgroup for the controller and all above it: each of them may hold the limit.

    Inside a container the path may be the host's and not exist here; the mount's root is the container's group then.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, names, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup"
        if hierarchy == "0":
            mount = mount / "unified" if (mount / "unified").is_dir() else mount
        elif controller in names.split(","):
            mount = mount / names if (mount / names).is_dir() else mount / controller
        else:
            continue
        parts = Path(path.lstrip("/")).parts
        for depth in range(len(parts), -1, -1):
            folder = mount.joinpath(*parts[:depth])
            if folder.is_dir():
                yield folder


def _read(path: Path) -> str:
    """A small file's text; "" where there is none, which is normal: each machine has one kind of cgroup."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _smallest(values: Iterator[float]) -> float | None:
    return min(values, default=None)
