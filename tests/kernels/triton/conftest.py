"""Triton's interpreter runs the kernels here: it must be asked for before the first of them is imported."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_inputs() -> None:
    """Random inputs differ in every run; a failed test shows how to have its own again."""
    print(f"torch.manual_seed({torch.seed()})")
