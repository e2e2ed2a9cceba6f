"""Check what the attention kernel is given."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.native.library import NativeOp, OpKind, make_op
from engine.kernels.rope.native import cache_numbers

MAX_HEAD_DIM = 256
MAX_GROUP = 96


def attention(q: Tensor, cache: Tensor, layer: int, num_heads: int, out: Tensor, scale: float) -> NativeOp:
    """out = causal attention of q over the paged cache, for every sequence of the step.

    q [>= tokens, >= num_heads * head_dim] (may be the front of a qkv row), out [>= tokens, num_heads * head_dim].
    """
    kv_heads, head_dim = cache.shape[1], cache.shape[5]
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {head_dim}, the limit is {MAX_HEAD_DIM}")
    if num_heads % kv_heads or num_heads // kv_heads > MAX_GROUP:
        raise ValueError(f"{num_heads} heads over {kv_heads} KV heads: must divide, into groups of at most {MAX_GROUP}")
    width = num_heads * head_dim
    if q.shape[1] < width or out.shape[1] != width or q.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError(f"q {tuple(q.shape)}, out {tuple(out.shape)} do not fit {num_heads} heads of {head_dim}")
    if {q.dtype, out.dtype} != {torch.float32}:
        raise TypeError(f"q {q.dtype}, out {out.dtype}: expected float32")
    numbers = (*cache_numbers(cache), q.stride(0), layer, num_heads, kv_heads, head_dim, out.stride(0))
    return make_op(OpKind.ATTENTION, (cache, q, out), numbers, (scale,))
