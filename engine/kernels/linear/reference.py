"""What the linear kernels compute, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [m, k], weight [n, k] -> [m, n]."""
    return functional.linear(x, weight, bias)


def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """residual + x weight^T."""
    return residual + functional.linear(x, weight)


def linear_silu_mul(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(x gate^T) * (x up^T), the SwiGLU of Llama and Qwen."""
    return torch.nn.functional.silu(functional.linear(x, gate)) * functional.linear(x, up)
