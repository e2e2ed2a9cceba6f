"""For which architecture a kernel is about to be launched."""

from __future__ import annotations

import torch
from torch import Tensor

INTERPRETER = 0
"""Triton's interpreter, where a program costs a millisecond: launchers choose larger tiles than any GPU would like."""


def arch_of(tensor: Tensor) -> int:
    """Compute capability of the tensor's device as in `sm_90`: 80, 90, 100, ...; INTERPRETER for the CPU."""
    if tensor.device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n: tiles have such sizes."""
    return 1 << max(n - 1, 0).bit_length()
