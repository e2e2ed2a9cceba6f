"""Sizes derive from cgroup limits and free memory, and say how."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.sizing import (
    GPU_RESERVE_BYTES,
    RESERVE_BYTES,
    HostLimits,
    MemoryTooSmall,
    derive_gpu_kv_size,
    derive_kv_size,
    derive_swap_size,
    derive_threads,
    read_host_limits,
)

GIB = 1024**3
MEMINFO = "MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:   12582912 kB\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def limits(root: Path) -> HostLimits:
    return read_host_limits(root, root / "meminfo", cpus=8)


def test_without_cgroup_limits_the_host_counts(tmp_path: Path) -> None:
    write(tmp_path, {"meminfo": MEMINFO, "memory.max": "max", "cpu.max": "max 100000"})
    assert limits(tmp_path) == HostLimits(16 * GIB, 12 * GIB, 8)


def test_cgroup_v2_limits_count(tmp_path: Path) -> None:
    files = {"meminfo": MEMINFO, "memory.max": f"{4 * GIB}", "memory.current": f"{GIB}", "cpu.max": "250000 100000"}
    assert limits(write(tmp_path, files)) == HostLimits(4 * GIB, 3 * GIB, 2)


def test_cgroup_v1_limits_count(tmp_path: Path) -> None:
    files = {
        **{"meminfo": MEMINFO, "memory/memory.limit_in_bytes": f"{2 * GIB}", "memory/memory.usage_in_bytes": "0"},
        **{"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"},
    }
    assert limits(write(tmp_path, files)) == HostLimits(2 * GIB, 2 * GIB, 1)


@pytest.mark.parametrize(
    ("current", "stat", "text"),
    [
        ("memory.current", "memory.stat", f"anon {GIB}\nactive_file {GIB // 2}\ninactive_file {GIB // 2}\nshmem 0\n"),
        (
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            f"active_file 0\ninactive_file 0\ntotal_inactive_file {GIB}\ntotal_active_file 0\n",
        ),
    ],
    ids=["v2", "v1"],
)
def test_cached_files_do_not_count_as_used(tmp_path: Path, current: str, stat: str, text: str) -> None:
    """Else the weights that another worker has mapped would count twice."""
    limit = "memory.max" if current == "memory.current" else "memory/memory.limit_in_bytes"
    write(tmp_path, {"meminfo": MEMINFO, limit: f"{4 * GIB}", current: f"{2 * GIB}", stat: text})
    assert limits(tmp_path) == HostLimits(4 * GIB, 3 * GIB, 8)


def test_an_absurd_cgroup_v1_limit_does_not_count(tmp_path: Path) -> None:
    files = {
        **{"meminfo": MEMINFO, "memory/memory.limit_in_bytes": "9223372036854771712"},
        **{"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
    }
    assert limits(write(tmp_path, files)) == HostLimits(16 * GIB, 12 * GIB, 8)


def test_this_host_can_be_read() -> None:
    found = read_host_limits()
    assert 0 < found.available_bytes <= found.memory_bytes
    assert found.num_cpus >= 1


def test_the_kv_memory_is_a_share_of_what_is_available() -> None:
    size = derive_kv_size(
        HostLimits(16 * GIB, 10 * GIB, 8), block_bytes=1024**2, min_blocks=1, weight_bytes=GIB, workers_on_host=2
    )
    assert size.kv_bytes == size.num_blocks * 1024**2
    assert size.num_blocks == (4 * GIB - GIB - RESERVE_BYTES) // 1024**2
    assert "10240 MiB" in size.explanation
    assert "2 workers" in size.explanation


def test_weights_that_workers_share_count_once() -> None:
    """Ten workers of a model of 10 GiB fit where nine tenths of it would be missing if each had its own."""
    host = HostLimits(32 * GIB, 30 * GIB, 10)
    shared = derive_kv_size(
        host, block_bytes=1024**2, min_blocks=1, weight_bytes=10 * GIB, weights_shared=True, workers_on_host=10
    )
    assert shared.num_blocks == (14 * GIB // 10 - RESERVE_BYTES) // 1024**2
    assert "- shared weights 10240 MiB) / 10 workers" in shared.explanation
    with pytest.raises(MemoryTooSmall):
        derive_kv_size(host, block_bytes=1024**2, min_blocks=1, weight_bytes=10 * GIB, workers_on_host=10)


def test_a_request_overrides_the_derivation_and_a_cap_limits_it() -> None:
    host = HostLimits(GIB, GIB, 1)
    assert derive_kv_size(host, block_bytes=100, min_blocks=1, requested_bytes=1050).num_blocks == 10
    capped = derive_kv_size(host, block_bytes=100, min_blocks=1, requested_bytes=1050, max_blocks=7)
    assert capped.num_blocks == 7
    assert "never be used" in capped.explanation


def test_too_little_memory_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(MemoryTooSmall, match=r"= 10 blocks, but one sequence .* needs 11"):
        derive_kv_size(HostLimits(GIB, GIB, 1), block_bytes=100, min_blocks=11, requested_bytes=1050)


def test_workers_of_one_gpu_get_parts_that_fit_together_whichever_starts_first() -> None:
    total, weights = 80 * GIB, 10 * GIB
    how = {"block_bytes": 1024**2, "min_blocks": 1, "weight_bytes": weights, "workers_on_gpu": 2}
    first = derive_gpu_kv_size(total, total, **how)
    used = first.kv_bytes + 1024**2 + weights + GPU_RESERVE_BYTES
    second = derive_gpu_kv_size(total - used, total, **how)
    assert first.num_blocks == second.num_blocks == (36 * GIB - weights - GPU_RESERVE_BYTES) // 1024**2 - 1
    assert 2 * used <= 0.9 * total
    assert "min(GPU memory 81920 MiB * 0.9 / 2 workers, free 81920 MiB) - weights 10240 MiB" in first.explanation


def test_what_others_hold_of_a_gpu_is_not_ours() -> None:
    size = derive_gpu_kv_size(12 * GIB, 80 * GIB, block_bytes=1024**2, min_blocks=1, weight_bytes=GIB)
    assert size.num_blocks == (11 * GIB - GPU_RESERVE_BYTES) // 1024**2 - 1


def test_a_stated_fraction_replaces_the_even_one() -> None:
    how = {"block_bytes": 1024**2, "min_blocks": 1, "weight_bytes": GIB, "workers_on_gpu": 4}
    size = derive_gpu_kv_size(80 * GIB, 80 * GIB, fraction=0.5, **how)
    assert size.num_blocks == (39 * GIB - GPU_RESERVE_BYTES) // 1024**2 - 1
    assert "* 0.5, free" in size.explanation


def test_a_gpu_that_is_too_small_is_refused_with_the_arithmetic_and_what_would_do() -> None:
    how = {"block_bytes": 1024**2, "min_blocks": 100, "weight_bytes": 7 * GIB}
    with pytest.raises(MemoryTooSmall, match=r"= 0 blocks, .* needs 100: .*gpu_memory_fraction, 105906176 bytes"):
        derive_gpu_kv_size(8 * GIB, 8 * GIB, **how)
    enough = derive_gpu_kv_size(8 * GIB, 8 * GIB, requested_bytes=105906176, **how)
    assert enough.num_blocks == 100


@pytest.mark.parametrize(("cpus", "workers", "threads"), [(8, 1, 8), (8, 3, 2), (2, 4, 1)])
def test_processors_are_shared(cpus: int, workers: int, threads: int) -> None:
    assert derive_threads(HostLimits(GIB, GIB, cpus), workers) == threads


def test_swap_memory_is_none_where_kv_is_in_host_memory_unless_it_is_asked_for() -> None:
    host = HostLimits(16 * GIB, 8 * GIB, 8)
    off = derive_swap_size(host, block_bytes=100, max_blocks=5, is_device_apart=False)
    assert (off.num_blocks, off.explanation) == (0, "none: KV is in host memory already")
    asked = derive_swap_size(host, block_bytes=100, max_blocks=5, is_device_apart=False, requested_bytes=1050)
    assert asked.num_blocks == 10, "who asks may have more than the device"


def test_swap_memory_beside_a_device_is_a_share_of_the_host_and_at_most_the_devices_kv() -> None:
    host = HostLimits(16 * GIB, 8 * GIB, 8)
    size = derive_swap_size(host, block_bytes=1024**2, max_blocks=10**6, is_device_apart=True, workers_on_host=2)
    assert size.num_blocks == 1024
    assert "available 8192 MiB) * 0.25 / 2 workers = 1024 MiB" in size.explanation
    capped = derive_swap_size(host, block_bytes=1024**2, max_blocks=7, is_device_apart=True)
    assert capped.num_blocks == 7
    assert "capped at 7: as many as the device has" in capped.explanation
    assert not derive_swap_size(
        host, block_bytes=1024**2, max_blocks=7, is_device_apart=True, requested_bytes=0
    ).num_blocks
