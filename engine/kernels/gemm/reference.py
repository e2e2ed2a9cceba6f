"""What the batch-invariant GEMM computes, in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def gemm(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x weight^T (+ bias) (+ residual). x [m, k], weight [n, k], bias [n], residual [m, n]."""
    y = functional.linear(x, weight, bias)
    return y if residual is None else y + residual
