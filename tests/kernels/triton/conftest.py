"""Triton's interpreter runs the kernels here (tests/conftest.py asks for it before anything imports Triton)."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.interpreter import settle_dots

settle_dots()


@pytest.fixture(autouse=True)
def fresh_inputs() -> None:
    """Random inputs differ in every run; a failed test shows how to have its own again."""
    print(f"torch.manual_seed({torch.seed()})")
