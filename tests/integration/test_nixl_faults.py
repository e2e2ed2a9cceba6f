"""What a stale one-sided read may do, and what stands between it and the next owner of D's blocks.

UCX_TLS=tcp: there a read needs the other process to run, so a stopped one keeps it in flight for certain.
Each test has its own processes, for UCX reads its environment once.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvtransfer import nixl_agent

pytestmark = pytest.mark.skipif(not nixl_agent.is_available(), reason="needs the extra nixl")

ROOT = Path(__file__).parents[2]


def _play(scene: str, timeout_s: float = 110, **environment: str) -> str:
    """One scene of tests/nixl_scenes.py, in a process of its own."""
    played = subprocess.run(
        [sys.executable, "-m", "tests.nixl_scenes", scene],
        cwd=ROOT,
        env=os.environ | {"UCX_TLS": "tcp"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert played.returncode == 0, played.stderr[-4000:]
    return played.stdout.strip().splitlines()[-1]  # UCX writes its warnings to stdout, too


def test_blocks_are_not_given_back_while_a_stale_read_may_land_in_them() -> None:
    """P stops for longer than D's patience and continues: what D wrote into its blocks meanwhile stays."""
    assert _play("reuse") == "ended by TransportLost, 2 agents, 0 blocks overwritten"


def test_without_the_quarantine_the_stale_read_overwrites_the_next_owners_blocks() -> None:
    """Proves that the test above can fail: the same scene, with a pull that does not wait for its reads."""
    told = _play("reuse-without-quarantine")
    assert re.fullmatch(r"ended by TransportLost, 1 agents, [1-8] blocks overwritten", told), told


def test_a_prefill_worker_that_continues_within_the_patience_costs_no_agent() -> None:
    assert _play("continue") == "ended by TransportLost, 1 agents, 0 blocks overwritten"


def test_a_prefill_worker_killed_before_a_read_or_during_it_ends_the_pull() -> None:
    assert _play("kill") == "before: TransportLost, during: TransportLost"


def test_a_restart_under_the_same_address_is_another_incarnation() -> None:
    assert _play("restart") == "old boot id: TransportLost, new boot id: read"


def test_no_registration_thread_descriptor_or_mapping_is_left_after_many_hand_overs_and_restarts() -> None:
    assert _play("leaks", UCX_TLS="all") == "1000 hand-overs, 100 restarts: nothing left"


@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    ("scene", "timeout_s", "told"),
    [
        ("restarts", 110, "300 hand-overs, 30 restarts: nothing left"),
        pytest.param("many-restarts", 1800, "1000 hand-overs, 100 restarts: nothing left", marks=pytest.mark.soak),
    ],
    ids=["30", "100"],
)
def test_nothing_of_prefill_processes_that_were_killed_is_left(scene: str, timeout_s: float, told: str) -> None:
    assert _play(scene, timeout_s, UCX_TLS="all") == told
