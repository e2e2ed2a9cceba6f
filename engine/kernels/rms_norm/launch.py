"""Launch RMSNorm, alone or with the addition of the residual before it."""

from __future__ import annotations

from torch import Tensor

from engine.kernels.arch import INTERPRETER, arch_of, next_power_of_2
from engine.kernels.compile_case import CompileCase, CompileConfig, with_constants
from engine.kernels.rms_norm.triton import add_rms_norm_kernel, rms_norm_kernel
from engine.kernels.shipped import SHIPPED, ModelShape

MAX_WIDTH = 1 << 15
"""A row is held in the registers of one program."""


def tile_config(arch: int, n: int) -> CompileConfig:
    """Constants for rows of n numbers. They never depend on how many rows there are."""
    block = next_power_of_2(n)
    if arch == INTERPRETER:
        return CompileConfig(constants={"N": n, "ROWS": 16, "BLOCK": block})
    return CompileConfig(constants={"N": n, "ROWS": 1, "BLOCK": block}, num_warps=min(max(block // 512, 1), 16))


def rms_norm(x: Tensor, weight: Tensor, y: Tensor, epsilon: float, rows: Tensor | None = None) -> None:
    """y = x / sqrt(mean(x^2) + epsilon) * weight over the last dimension.

    x [T, n], weight [n], y [T, n]; float32, float16 or bfloat16 each, rows contiguous; the arithmetic is float32.
    y may be x. With `rows` [M] int32, y [M, n] is made of x[rows] and must not be x.
    """
    _check_rows(x, weight, y)
    num_rows = x.shape[0] if rows is None else rows.shape[0]
    if y.shape[0] != num_rows:
        raise ValueError(f"y has {y.shape[0]} rows for {num_rows} normalised ones")
    if num_rows == 0:
        return
    config = with_constants(tile_config(arch_of(x), x.shape[1]), GATHER=rows is not None)
    rms_norm_kernel[(-(-num_rows // config.constants["ROWS"]),)](
        x,
        weight,
        y,
        rows,
        num_rows,
        x.stride(0),
        y.stride(0),
        epsilon,
        **config.arguments,
    )


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, y: Tensor, epsilon: float) -> None:
    """residual += x, then y = rms_norm(residual): the bits of both steps taken apart.

    x, residual, y [T, n], weight [n]; float32, float16 or bfloat16 each, rows contiguous. y may be x, not residual.
    """
    _check_rows(x, weight, y)
    if residual.shape != x.shape or y.shape != x.shape or residual.stride(1) != 1:
        raise ValueError(f"x {tuple(x.shape)}, residual {tuple(residual.shape)}, y {tuple(y.shape)} do not fit")
    if x.shape[0] == 0:
        return
    config = tile_config(arch_of(x), x.shape[1])
    add_rms_norm_kernel[(-(-x.shape[0] // config.constants["ROWS"]),)](
        x,
        residual,
        weight,
        y,
        x.shape[0],
        x.stride(0),
        residual.stride(0),
        y.stride(0),
        epsilon,
        **config.arguments,
    )


def _check_rows(x: Tensor, weight: Tensor, y: Tensor) -> None:
    n = x.shape[1]
    if weight.shape != (n,) or y.shape[1] != n or x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, y {tuple(y.shape)} do not fit")
    if n > MAX_WIDTH:
        raise ValueError(f"rows of {n} numbers: at most {MAX_WIDTH} fit the registers of one program")


def _norm_case(model: ModelShape) -> CompileCase:
    return CompileCase(
        name="rms_norm",
        kernel=lambda: rms_norm_kernel,
        shape=f"{model.name} rows of {model.hidden} bf16",
        signature={
            **dict.fromkeys(("x", "weight", "y"), "*bf16"),
            **dict.fromkeys(("num_rows", "x_stride", "y_stride"), "i32"),
            "epsilon": "fp32",
        },
        aligned=("x", "weight", "y", "x_stride", "y_stride"),
        config=lambda arch: with_constants(tile_config(arch, model.hidden), rows=None, GATHER=False),
        flops=4 * model.hidden,
        bytes=3 * 2 * model.hidden,
    )


def _add_norm_case(model: ModelShape) -> CompileCase:
    return CompileCase(
        name="add_rms_norm",
        kernel=lambda: add_rms_norm_kernel,
        shape=f"{model.name} rows of {model.hidden} bf16",
        signature={
            **dict.fromkeys(("x", "residual", "weight", "y"), "*bf16"),
            **dict.fromkeys(("num_rows", "x_stride", "residual_stride", "y_stride"), "i32"),
            "epsilon": "fp32",
        },
        aligned=("x", "residual", "weight", "y", "x_stride", "residual_stride", "y_stride"),
        config=lambda arch: tile_config(arch, model.hidden),
        flops=5 * model.hidden,
        bytes=5 * 2 * model.hidden,
        programs_per_sm=2,
    )


COMPILE_CASES = (*map(_norm_case, SHIPPED), *map(_add_norm_case, SHIPPED))
