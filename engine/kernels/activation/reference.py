"""What the activation kernels compute, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [T, 2 n]: the gate's n columns, then up's."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def gelu_mul(gate_up: Tensor, approximate: bool) -> Tensor:
    """gelu(gate) * up, by the tanh approximation or by erf."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh" if approximate else "none") * up


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap): numbers of any size into (-cap, cap)."""
    return cap * torch.tanh(x / cap)
