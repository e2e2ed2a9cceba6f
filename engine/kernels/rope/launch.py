"""Launch RoPE together with the write of keys and values."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from engine.kernels.arch import INTERPRETER, arch_of, next_power_of_2
from engine.kernels.compile_case import CompileCase, CompileConfig, with_constants
from engine.kernels.rope.triton import rope_write_kernel
from engine.kernels.shipped import SHIPPED, ModelShape


class KVFormat(IntEnum):
    """How the cache holds a number; the constants of triton.py."""

    AS_IS = 0
    INT8 = 1
    FP8 = 2


LIMITS = {KVFormat.AS_IS: 0.0, KVFormat.INT8: 127.0, KVFormat.FP8: 448.0}
"""The magnitude that the largest number of a head is scaled to."""
_FORMATS = {torch.int8: KVFormat.INT8, torch.float8_e4m3fn: KVFormat.FP8}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def tile_config(arch: int, head_dim: int) -> CompileConfig:
    """Constants for heads of head_dim numbers. They never depend on how many tokens there are."""
    half = head_dim // 2
    block = next_power_of_2(half)
    # 128 threads with 8 numbers each of both halves: 128 bits of bfloat16 at a time.
    rows = 64 if arch == INTERPRETER else max(1024 // block, 1)
    constants = {"HALF": half, "HALF_BLOCK": block, "ROWS": rows}
    return CompileConfig(constants=constants, num_warps=4)


def rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cache: Tensor,
    layer: int,
    num_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    epsilon: float = 0.0,
    kv_scales: Tensor | None = None,
) -> None:
    """Rotate q in place; write rotated k, and v, to the slots of `slot_mapping`. k and v in qkv stay as they are.

    qkv [T, (num_heads + 2 kv_heads) * head_dim]: q heads, k heads, v heads; rows contiguous. cos, sin [positions,
    head_dim / 2] float32, contiguous. positions [T] int32, slot_mapping [T] int64 as in DeviceStep. `q_norm`, `k_norm`
    [head_dim], both or neither: RMSNorm per head before the rotation (Qwen3).
    cache [num_blocks, kv_heads, num_layers, 2, block_size, head_dim], head_dim contiguous: float32, float16, bfloat16;
    or int8 or float8_e4m3fn, and then `kv_scales` [num_blocks, kv_heads, num_layers, 2, block_size] float32, slots
    contiguous: one scale per token, head and K or V, value = stored * scale.
    """
    kv_format = _FORMATS.get(cache.dtype, KVFormat.AS_IS)
    _check(qkv, cos, sin, positions, slot_mapping, cache, layer, num_heads, q_norm, k_norm, kv_scales, kv_format)
    num_tokens, kv_heads = qkv.shape[0], cache.shape[1]
    if num_tokens == 0:
        return
    config = with_constants(
        tile_config(arch_of(qkv), cache.shape[5]),
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        BLOCK_SIZE=cache.shape[4],
        NORM=q_norm is not None,
        FORMAT=int(kv_format),
        LIMIT=LIMITS[kv_format],
    )
    rows = config.constants["ROWS"]
    programs = -(-num_tokens * num_heads // rows) + -(-num_tokens * kv_heads // rows)
    scale_strides = (0, 0, 0, 0) if kv_scales is None else kv_scales.stride()[:4]
    rope_write_kernel[(programs,)](
        qkv,
        cos,
        sin,
        positions,
        slot_mapping,
        q_norm,
        k_norm,
        cache.view(torch.uint8) if kv_format is KVFormat.FP8 else cache,
        kv_scales,
        num_tokens,
        layer,
        qkv.stride(0),
        **dict(zip((*_STRIDES[1:], *_SCALE_STRIDES), (*cache.stride()[:5], *scale_strides), strict=True)),
        epsilon=epsilon,
        **config.arguments,
    )


def _check(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cache: Tensor,
    layer: int,
    num_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    kv_scales: Tensor | None,
    kv_format: KVFormat,
) -> None:
    if cache.dim() != 6 or cache.shape[3] != 2 or cache.stride(5) != 1:
        raise ValueError(f"KV cache is {tuple(cache.shape)} with strides {cache.stride()}: the last must be 1")
    if kv_format is KVFormat.AS_IS and cache.dtype not in _FLOATS:
        raise ValueError(f"KV cache is {cache.dtype}, expected float32, float16, bfloat16, int8 or float8_e4m3fn")
    kv_heads, num_layers, block_size, head_dim = cache.shape[1], cache.shape[2], cache.shape[4], cache.shape[5]
    tokens = qkv.shape[0]
    if qkv.shape[1] != (num_heads + 2 * kv_heads) * head_dim or qkv.stride(1) != 1 or qkv.dtype not in _FLOATS:
        raise ValueError(
            f"qkv {tuple(qkv.shape)} {qkv.dtype} does not fit {num_heads}+2*{kv_heads} heads of {head_dim}"
        )
    if head_dim % 2 or block_size & (block_size - 1) or not 0 <= layer < num_layers:
        raise ValueError(f"head_dim {head_dim}, block_size {block_size}, layer {layer} of {num_layers}")
    for table in (cos, sin):
        if table.shape[1] != head_dim // 2 or table.dtype != torch.float32 or not table.is_contiguous():
            raise ValueError(
                f"rotary table is {tuple(table.shape)} {table.dtype}, expected [*, {head_dim // 2}] float32"
            )
    if positions.shape != (tokens,) or slot_mapping.shape != (tokens,) or slot_mapping.dtype != torch.int64:
        raise ValueError(
            f"positions {tuple(positions.shape)}, slot_mapping {tuple(slot_mapping.shape)} {slot_mapping.dtype}: "
            f"expected ({tokens},) and int64"
        )
    if (q_norm is None) != (k_norm is None):
        raise ValueError("head norms come for queries and keys, or for neither")
    for norm in (q_norm, k_norm):
        if norm is not None and (norm.shape != (head_dim,) or norm.stride(0) != 1):
            raise ValueError(f"head norm is {tuple(norm.shape)}, expected ({head_dim},)")
    if (kv_scales is None) != (kv_format is KVFormat.AS_IS):
        raise ValueError(f"KV cache is {cache.dtype} and kv_scales are {'absent' if kv_scales is None else 'given'}")
    if kv_scales is not None and (
        kv_scales.shape != cache.shape[:5] or kv_scales.dtype != torch.float32 or kv_scales.stride(4) != 1
    ):
        raise ValueError(f"kv_scales {tuple(kv_scales.shape)} {kv_scales.dtype}, expected {tuple(cache.shape[:5])}")


_STRIDES = ("qkv_stride", "block_stride", "head_stride", "layer_stride", "kind_stride", "slot_stride")
_SCALE_STRIDES = ("scale_block_stride", "scale_head_stride", "scale_layer_stride", "scale_kind_stride")
_CACHE_TYPES = {KVFormat.AS_IS: "*bf16", KVFormat.INT8: "*i8", KVFormat.FP8: "*u8"}


def _case(model: ModelShape, kv_format: KVFormat) -> CompileCase:
    constants = {
        "HEADS": model.heads,
        "KV_HEADS": model.kv_heads,
        "BLOCK_SIZE": 16,
        "NORM": model.head_norm,
        "FORMAT": int(kv_format),
        "LIMIT": LIMITS[kv_format],
        **({} if model.head_norm else {"q_norm": None, "k_norm": None}),
        **({"kv_scales": None} if kv_format is KVFormat.AS_IS else {}),
    }
    types = {
        "qkv": "*bf16",
        "cos": "*fp32",
        "sin": "*fp32",
        "positions": "*i32",
        "slot_mapping": "*i64",
        "q_norm": "*bf16",
        "k_norm": "*bf16",
        "cache": _CACHE_TYPES[kv_format],
        "kv_scales": "*fp32",
        "num_tokens": "i32",
        "layer": "i32",
        **dict.fromkeys((*_STRIDES, *_SCALE_STRIDES), "i32"),
        "epsilon": "fp32",
    }
    pointers = ("qkv", "cos", "sin", "q_norm", "k_norm", "cache")
    rows = tile_config(80, model.head_dim).constants["ROWS"]
    return CompileCase(
        name="rope_write",
        kernel=lambda: rope_write_kernel,
        shape=f"{model.name} {model.heads}/{model.kv_heads} heads of {model.head_dim}, KV {kv_format.name.lower()}",
        signature={name: kind for name, kind in types.items() if name not in constants},
        aligned=(*(name for name in pointers if name not in constants), *_STRIDES),
        config=lambda arch: with_constants(tile_config(arch, model.head_dim), **constants),
        flops=3 * rows * model.head_dim,
        bytes=(2 * 2 + 4) * rows * model.head_dim,
        programs_per_sm=4,
    )


COMPILE_CASES = (
    *(_case(model, KVFormat.AS_IS) for model in SHIPPED),
    *(_case(model, kv_format) for model in SHIPPED[:2] for kv_format in (KVFormat.INT8, KVFormat.FP8)),
)
