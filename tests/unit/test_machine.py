"""What this process may use, read from copies of /proc and /sys as different machines have them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from baton.local.machine import read_machine

GIB = 2**30


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def make_root(root: Path, files: dict[str, str], *, available_gib: int = 16) -> Path:
    meminfo = f"MemTotal: {32 * GIB // 1024} kB\nMemAvailable: {available_gib * GIB // 1024} kB\n"
    for name, text in ({"proc/meminfo": meminfo} | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_limits_it_is_the_affinity_and_the_available_memory(tmp_path: Path) -> None:
    machine = read_machine(make_root(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}))
    assert (machine.cpus, machine.memory_bytes) == (8.0, 16 * GIB)
    assert machine.source == "affinity, available memory"


def test_cgroup_v2_limits_count_and_the_smallest_of_the_path_wins(tmp_path: Path) -> None:
    machine = read_machine(
        make_root(
            tmp_path,
            {
                "proc/self/cgroup": "0::/pod/container\n",
                "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/pod/memory.max": f"{4 * GIB}\n",
                "sys/fs/cgroup/pod/container/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/pod/container/memory.max": "max\n",
            },
        )
    )
    assert (machine.cpus, machine.memory_bytes) == (1.5, 4 * GIB)
    assert machine.source == "cgroup quota, cgroup limit"


def test_cgroup_v1_limits_count(tmp_path: Path) -> None:
    machine = read_machine(
        make_root(
            tmp_path,
            {
                "proc/self/cgroup": "4:memory:/job\n2:cpu,cpuacct:/job\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{2 * GIB}\n",
            },
        )
    )
    assert (machine.cpus, machine.memory_bytes) == (2.0, 2 * GIB)


def test_cgroup_v1_writes_no_limit_as_minus_one_and_a_huge_number(tmp_path: Path) -> None:
    machine = read_machine(
        make_root(
            tmp_path,
            {
                "proc/self/cgroup": "4:memory:/\n2:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
        )
    )
    assert (machine.cpus, machine.memory_bytes) == (8.0, 16 * GIB)


def test_a_containers_path_that_is_the_hosts_falls_back_to_the_mounts_root(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/docker/0123\n", "sys/fs/cgroup/memory.max": f"{GIB}\n"}
    assert read_machine(make_root(tmp_path, files)).memory_bytes == GIB


def test_a_limit_above_what_is_available_does_not_make_more_of_it(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{64 * GIB}\n"}
    assert read_machine(make_root(tmp_path, files, available_gib=3)).memory_bytes == 3 * GIB


def test_a_machine_without_cgroups_is_read_too(tmp_path: Path) -> None:
    assert read_machine(make_root(tmp_path, {})).cpus == 8.0
