"""The GPU benchmark, rehearsed: every part runs, so that it works the first time there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton")


@pytest.mark.timeout(900)
def test_every_part_runs_in_the_rehearsal(tmp_path: Path) -> None:
    """In a process of its own: the interpreter must be chosen before a kernel is imported."""
    ran = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--rehearse", "--json", str(tmp_path / "out.json")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    said = json.loads((tmp_path / "out.json").read_text())
    assert said["failed"] == []
    assert said["device"] == "interpreter"
    parts = {"copy", "prefill", "decode", "fixed", "sampler", "fused", "step", "serving"}
    assert {figure["part"] for figure in said["figures"]} == parts
    assert all(figure["ours"] > 0 for figure in said["figures"])
    assert {"commit", "date", "torch", "triton"} <= said.keys()


@pytest.mark.timeout(900)
def test_without_a_gpu_it_says_how_to_rehearse() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [sys.executable, "-m", "bench.gpu"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert ran.returncode == 2
    assert "--rehearse" in ran.stderr
