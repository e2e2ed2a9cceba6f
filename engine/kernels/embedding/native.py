"""Check what the embedding kernel is given."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.linear.native import PackedWeight
from engine.kernels.native.library import NativeOp, OpKind, make_op


def embed(weight: PackedWeight, y: Tensor) -> NativeOp:
    """y[i] = row token_ids[i] of the packed weight. The caller checks that token ids are below the vocabulary."""
    if weight.gated or y.shape[1] != weight.k or y.stride(1) != 1 or y.dtype != torch.float32:
        raise ValueError(f"y {tuple(y.shape)} {y.dtype} does not fit embeddings of width {weight.k}")
    half = int(weight.panels.dtype == torch.bfloat16)
    return make_op(OpKind.EMBED, (weight.panels, y), (y.stride(0), weight.k, half))
