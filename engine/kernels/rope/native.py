"""Check what the RoPE + KV write kernel is given."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.native.library import NativeOp, OpKind, make_op


def cache_numbers(cache: Tensor) -> tuple[int, int, int, int, int]:
    """Strides that address the paged cache [num_blocks, kv_heads, num_layers, 2, block_size, head_dim] float32."""
    if cache.dim() != 6 or cache.dtype != torch.float32 or cache.shape[3] != 2:
        raise ValueError(f"KV cache is {tuple(cache.shape)} {cache.dtype}")
    block_size, head_dim = cache.shape[4:]
    if block_size & (block_size - 1) or cache.stride(4) != head_dim or cache.stride(5) != 1:
        raise ValueError(f"KV blocks of {block_size} slots with strides {cache.stride()}: slots must be contiguous")
    return cache.stride(0), cache.stride(1), cache.stride(2), cache.stride(3), block_size.bit_length() - 1


def rope_write(
    qkv: Tensor,
    cache: Tensor,
    layer: int,
    num_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    epsilon: float = 0.0,
) -> NativeOp:
    """Rotate q in place, write rotated k and v to the slots that the step's block tables name.

    qkv [>= tokens, (num_heads + 2 kv_heads) * head_dim]: q heads, k heads, v heads. `q_norm`, `k_norm` [head_dim]:
    RMSNorm per head before the rotation (Qwen3).
    """
    kv_heads, head_dim = cache.shape[1], cache.shape[5]
    if qkv.shape[1] != (num_heads + 2 * kv_heads) * head_dim or qkv.stride(1) != 1 or qkv.dtype != torch.float32:
        raise ValueError(
            f"qkv {tuple(qkv.shape)} {qkv.dtype} does not fit {num_heads}+2*{kv_heads} heads of {head_dim}"
        )
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}, rotary embedding needs an even one")
    for norm in (q_norm, k_norm):
        if norm is not None and (norm.shape != (head_dim,) or norm.dtype != torch.float32):
            raise ValueError(f"head norm is {tuple(norm.shape)} {norm.dtype}, expected ({head_dim},) float32")
    numbers = (*cache_numbers(cache), qkv.stride(0), layer, num_heads, kv_heads, head_dim)
    return make_op(OpKind.ROPE_WRITE, (cache, qkv, q_norm, k_norm), numbers, (epsilon,))
