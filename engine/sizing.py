"""How much a worker may use: threads, and bytes for KV blocks. Pure arithmetic; reading the host is at the end.

limit   = least of cgroup limit, physical memory
budget  = (limit * fraction - weights) / workers on this host - reserve
          (weights once per host; each worker its own where they cannot be shared)
blocks  = budget // block_bytes

In a GPU's memory:
share   = total * fraction, by default GPU_FRACTION / workers on this GPU
budget  = least of share, free  - weights - GPU_RESERVE_BYTES
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

RESERVE_BYTES = 512 * 1024**2
"""For Python, torch, gRPC and activations: a worker without model measured about 400 MB."""

SWAP_FRACTION = 0.25
"""Of a host's memory, what its workers may pin for preempted sequences."""


GPU_RESERVE_BYTES = 1024**3
"""For the CUDA context, compiled kernels, graphs and activations of one worker on a GPU: an estimate, unmeasured."""

GPU_FRACTION = 0.9
"""Of a GPU's memory that its workers may use together."""


@dataclass(frozen=True, slots=True)
class HostLimits:
    """What this process may use, as the system says."""

    memory_bytes: int
    available_bytes: int
    num_cpus: int


@dataclass(frozen=True, slots=True)
class KVSize:
    """The decision and its arithmetic in words, for the log."""

    num_blocks: int
    kv_bytes: int
    explanation: str


class MemoryTooSmall(Exception):
    """The KV memory would not hold one sequence; the message shows the arithmetic."""


def derive_threads(limits: HostLimits, workers_on_host: int = 1) -> int:
    """Threads of one worker: the processors shared evenly, at least one."""
    return max(1, limits.num_cpus // max(1, workers_on_host))


def derive_kv_size(
    limits: HostLimits,
    *,
    block_bytes: int,
    min_blocks: int,
    weight_bytes: int = 0,
    weights_shared: bool = False,
    workers_on_host: int = 1,
    fraction: float = 0.8,
    requested_bytes: int | None = None,
    max_blocks: int | None = None,
) -> KVSize:
    """Blocks for one worker. `requested_bytes` overrides the derivation, `max_blocks` caps it.

    `weight_bytes` are not among what `limits` count as used. Raises: MemoryTooSmall.
    """
    if requested_bytes is not None:
        budget = requested_bytes
        explanation = f"asked for {_mib(requested_bytes)}"
    else:
        limit = min(limits.memory_bytes, limits.available_bytes)
        workers = max(1, workers_on_host)
        usable = f"min(limit {_mib(limits.memory_bytes)}, available {_mib(limits.available_bytes)}) * {fraction}"
        if weights_shared:
            share = (int(limit * fraction) - weight_bytes) // workers
            explanation = f"({usable} - shared weights {_mib(weight_bytes)}) / {workers} workers"
        else:
            share = int(limit * fraction) // workers - weight_bytes
            explanation = f"{usable} / {workers} workers - weights {_mib(weight_bytes)}"
        budget = share - RESERVE_BYTES
        explanation += f" - reserve {_mib(RESERVE_BYTES)} = {_mib(budget)}"
    blocks = max(0, budget) // block_bytes
    explanation += f"; {_mib(budget)} / {block_bytes} bytes per block = {blocks} blocks"
    return _checked(blocks, block_bytes, min_blocks, max_blocks, explanation)


def derive_gpu_kv_size(
    free_bytes: int,
    total_bytes: int,
    *,
    block_bytes: int,
    min_blocks: int,
    weight_bytes: int,
    workers_on_gpu: int = 1,
    fraction: float = 0.0,
    requested_bytes: int | None = None,
    max_blocks: int | None = None,
) -> KVSize:
    """Blocks for one worker in a GPU's memory, where one more lies beside them; the rest as above.

    What is free is read before the weights are loaded, which is why they are subtracted. Workers that start at the same
    time each see all of the GPU free, so no one may exceed its part of the total. `fraction` 0: an even part of
    GPU_FRACTION. Raises: MemoryTooSmall.
    """
    free = f"free {_mib(free_bytes)}"
    if requested_bytes is not None:
        budget = requested_bytes
        explanation = f"asked for {_mib(requested_bytes)}, of GPU memory {_mib(total_bytes)}, {free}"
    else:
        workers = max(1, workers_on_gpu)
        share = fraction or GPU_FRACTION / workers
        budget = min(int(total_bytes * share), free_bytes) - weight_bytes - GPU_RESERVE_BYTES
        part = f"{fraction:g}" if fraction else f"{GPU_FRACTION:g} / {workers} workers"
        explanation = (
            f"min(GPU memory {_mib(total_bytes)} * {part}, {free}) - weights {_mib(weight_bytes)} "
            f"- reserve {_mib(GPU_RESERVE_BYTES)} = {_mib(budget)}"
        )
    blocks = max(0, max(0, budget) // block_bytes - 1)
    explanation += f"; {_mib(budget)} / {block_bytes} bytes per block - 1 for padded rows = {blocks} blocks"
    return _checked(blocks, block_bytes, min_blocks, max_blocks, explanation, "a larger gpu_memory_fraction, ")


def _checked(
    blocks: int, block_bytes: int, min_blocks: int, max_blocks: int | None, explanation: str, remedy: str = ""
) -> KVSize:
    if blocks < min_blocks:
        raise MemoryTooSmall(
            f"KV memory: {explanation}, but one sequence of the greatest length needs {min_blocks}: give it "
            f"{remedy}{(min_blocks + bool(remedy)) * block_bytes} bytes (kv_memory) or state a smaller max_model_len"
        )
    if max_blocks is not None and blocks > max_blocks:
        blocks = max_blocks
        explanation += f", capped at {max_blocks}: more could never be used"
    return KVSize(blocks, blocks * block_bytes, explanation)


def derive_swap_size(
    limits: HostLimits,
    *,
    block_bytes: int,
    max_blocks: int,
    is_device_apart: bool,
    workers_on_host: int = 1,
    requested_bytes: int | None = None,
) -> KVSize:
    """Host blocks for preempted sequences of one worker. None by default where the KV is in host memory itself.

    On a device with memory of its own the default is a share of the host's, at most as much as the device's KV. It is
    pinned, so it is a small share: the system can take nothing of it back.
    """
    if requested_bytes is not None:
        budget = requested_bytes
        explanation = f"asked for {_mib(requested_bytes)}"
    elif is_device_apart:
        budget = int(min(limits.memory_bytes, limits.available_bytes) * SWAP_FRACTION) // max(1, workers_on_host)
        explanation = (
            f"min(limit {_mib(limits.memory_bytes)}, available {_mib(limits.available_bytes)}) * {SWAP_FRACTION} / "
            f"{max(1, workers_on_host)} workers = {_mib(budget)}"
        )
    else:
        return KVSize(0, 0, "none: KV is in host memory already")
    blocks = budget // block_bytes
    explanation += f"; {_mib(budget)} / {block_bytes} bytes per block = {blocks} blocks"
    if requested_bytes is None and blocks > max_blocks:
        blocks = max_blocks
        explanation += f", capped at {max_blocks}: as many as the device has"
    return KVSize(blocks, blocks * block_bytes, explanation)


def read_host_limits(
    cgroup_root: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo"), cpus: int | None = None
) -> HostLimits:
    """Read cgroup v2 and v1 limits and free memory. A limit that is absent or absurd does not count."""
    total, available = _read_meminfo(meminfo)
    limit = _first_number(cgroup_root / "memory.max", cgroup_root / "memory" / "memory.limit_in_bytes")
    used = _first_number(cgroup_root / "memory.current", cgroup_root / "memory" / "memory.usage_in_bytes") or 0
    cached = _file_pages(cgroup_root / "memory.stat", cgroup_root / "memory" / "memory.stat")
    if limit is not None and limit < total:
        available = min(available, max(0, limit - max(0, used - cached)))
        total = limit
    return HostLimits(total, available, _read_cpus(cgroup_root, cpus or usable_cpus()))


def _read_cpus(root: Path, usable: int) -> int:
    quota = period = None
    v2 = _read_words(root / "cpu.max")
    if len(v2) == 2 and v2[0] != "max":
        quota, period = int(v2[0]), int(v2[1])
    else:
        quota = _first_number(root / "cpu" / "cpu.cfs_quota_us")
        period = _first_number(root / "cpu" / "cpu.cfs_period_us")
    if quota is None or not period or quota <= 0:
        return usable
    return max(1, min(usable, quota // period))


def usable_cpus() -> int:
    """Processors that this process may run on; a cgroup's quota is not seen here."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read_meminfo(path: Path) -> tuple[int, int]:
    fields: dict[str, int] = {}
    try:
        for line in path.read_text().splitlines():
            name, _, rest = line.partition(":")
            fields[name] = int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    if "MemTotal" not in fields:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return pages, pages
    return fields["MemTotal"], fields.get("MemAvailable", fields["MemTotal"])


def _file_pages(*paths: Path) -> int:
    """Bytes of files in the page cache that a cgroup counts as used, the shared weights among them.

    They can be dropped, and `weight_bytes` counts those that must not be. Memory files (KV) are not among them.
    """
    for path in paths:
        words = _read_words(path)
        fields = dict(zip(words[::2], words[1::2], strict=False))
        if fields:
            prefix = "total_" if "total_active_file" in fields else ""  # version 1 counts children apart
            return sum(int(fields.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return 0


def _first_number(*paths: Path) -> int | None:
    for path in paths:
        words = _read_words(path)
        if words and words[0].lstrip("-").isdigit():
            return int(words[0])
    return None


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _mib(size: int) -> str:
    return f"{size / 1024**2:.0f} MiB"
