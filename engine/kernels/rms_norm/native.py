"""Check what the RMSNorm kernel is given."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.native.library import NativeOp, OpKind, Rows, make_op


def rms_norm(x: Tensor, weight: Tensor, y: Tensor, epsilon: float, rows: Rows = Rows.TOKENS) -> NativeOp:
    """y = rms_norm(x). With `Rows.SAMPLED`, y's row i is made from x's row sampled_rows[i].

    x, y [>= rows, n] float32, rows contiguous; y may be x only for `Rows.TOKENS`.
    """
    n = x.shape[1]
    if weight.shape != (n,) or y.shape[1] != n or x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, y {tuple(y.shape)} do not fit")
    if {x.dtype, weight.dtype, y.dtype} != {torch.float32}:
        raise TypeError(f"x {x.dtype}, weight {weight.dtype}, y {y.dtype}: expected float32")
    return make_op(OpKind.RMS_NORM, (x, weight, y), (x.stride(0), y.stride(0), n), (epsilon,), rows)
