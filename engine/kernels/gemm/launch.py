"""Launch the batch-invariant GEMM."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.arch import INTERPRETER, arch_of
from engine.kernels.compile_case import CompileCase, CompileConfig, with_constants
from engine.kernels.gemm.triton import gemm_kernel

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def tile_config(arch: int, *, is_float32: bool = False) -> CompileConfig:
    """Constants by architecture and type: were they chosen by m, the order of additions would follow the batch."""
    if arch == INTERPRETER:
        return CompileConfig(constants={"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "UPCAST": True})
    if is_float32:  # no tensor core takes it as it is, and the larger tile would exceed an A100's shared memory
        return CompileConfig(
            constants={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "UPCAST": False}, num_warps=8, num_stages=3
        )
    return CompileConfig(
        constants={"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "UPCAST": False}, num_warps=4, num_stages=4
    )


def gemm(x: Tensor, weight: Tensor, y: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
    """y = x weight^T (+ bias) (+ residual), accumulated in float32; every row as if it were alone.

    x [m, k], weight [n, k], rows contiguous, of one dtype: float32 (multiplied in full precision, no TF32), float16 or
    bfloat16. y [m, n] of any of them; bias [n]; residual [m, n], which may be y.
    """
    m, k = x.shape
    n = weight.shape[0]
    if weight.shape[1] != k or y.shape != (m, n) or x.stride(1) != 1 or weight.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, y {tuple(y.shape)} do not fit")
    if x.dtype != weight.dtype or x.dtype not in _FLOATS:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}: expected one of float32, float16, bfloat16")
    if bias is not None and (bias.shape != (n,) or bias.stride(0) != 1):
        raise ValueError(f"bias is {tuple(bias.shape)}, expected ({n},)")
    if residual is not None and (residual.shape != (m, n) or residual.stride(1) != 1):
        raise ValueError(f"residual is {tuple(residual.shape)}, expected ({m}, {n})")
    if m == 0:
        return
    tile = tile_config(arch_of(x), is_float32=x.dtype == torch.float32)
    config = with_constants(tile, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None)
    grid = (-(-m // config.constants["BLOCK_M"]), -(-n // config.constants["BLOCK_N"]))
    gemm_kernel[grid](
        x,
        weight,
        y,
        bias,
        residual,
        m,
        n,
        k,
        x.stride(0),
        weight.stride(0),
        y.stride(0),
        0 if residual is None else residual.stride(0),
        **config.arguments,
    )


def _case(extra: str, kind: str = "bf16") -> CompileCase:
    is_float32 = kind == "fp32"
    constants = {
        "HAS_BIAS": extra == "bias",
        "HAS_RESIDUAL": extra == "residual",
        **{name: None for name in ("bias", "residual") if name != extra},
    }
    types = {
        **dict.fromkeys(("x", "weight", "y", "bias", "residual"), f"*{kind}"),
        **dict.fromkeys(("m", "n", "k", "x_stride", "weight_stride", "y_stride", "residual_stride"), "i32"),
    }
    tile = tile_config(90, is_float32=is_float32).constants
    size_m, size_n, size_k = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    return CompileCase(
        name=f"gemm{'_' + extra if extra else ''}",
        kernel=lambda: gemm_kernel,
        shape=f"{size_m} x {size_n} x {size_k} {kind}, every layer of every model",
        signature={name: kind for name, kind in types.items() if name not in constants},
        aligned=tuple(name for name in types if name not in (*constants, "m")),
        config=lambda arch: with_constants(tile_config(arch, is_float32=is_float32), **constants),
        flops=2 * size_m * size_n * size_k,
        bytes=(4 if is_float32 else 2) * (size_m + size_n) * size_k,
        has_dot=not is_float32,
        programs_per_sm=2,
    )


COMPILE_CASES = (_case(""), _case("bias"), _case("residual"), _case("", "fp32"))
