"""Launch the gated activations and the soft cap."""

from __future__ import annotations

from enum import IntEnum

from torch import Tensor

from engine.kernels.activation.triton import gated_kernel, soft_cap_kernel
from engine.kernels.arch import INTERPRETER, arch_of, next_power_of_2
from engine.kernels.compile_case import CompileCase, CompileConfig, with_constants
from engine.kernels.shipped import SHIPPED, ModelShape


class Activation(IntEnum):
    """What is applied to the gate; the constants of triton.py."""

    SILU = 0
    GELU_TANH = 1
    GELU_ERF = 2


def tile_config(arch: int, n: int) -> CompileConfig:
    """Constants for rows of n numbers."""
    if arch == INTERPRETER:
        return CompileConfig(constants={"N": n, "ROWS": 16, "BLOCK": min(next_power_of_2(n), 4096)})
    return CompileConfig(constants={"N": n, "ROWS": 1, "BLOCK": 1024})


def silu_mul(gate_up: Tensor, y: Tensor) -> None:
    """y = silu(gate) * up. gate_up [T, 2 n]: the gate's columns, then up's; y [T, n]. Rows contiguous."""
    _gated(gate_up, y, Activation.SILU)


def gelu_mul(gate_up: Tensor, y: Tensor, approximate: bool) -> None:
    """y = gelu(gate) * up, by the tanh approximation or by erf; shapes as in `silu_mul`."""
    _gated(gate_up, y, Activation.GELU_TANH if approximate else Activation.GELU_ERF)


def soft_cap(x: Tensor, y: Tensor, cap: float) -> None:
    """y = cap * tanh(x / cap). x, y [M, n], rows contiguous; y may be x."""
    if x.shape != y.shape or x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} do not fit")
    if cap <= 0:
        raise ValueError(f"cap is {cap}, expected a positive number")
    if x.numel() == 0:
        return
    config = tile_config(arch_of(x), x.shape[1])
    grid = (-(-x.shape[0] // config.constants["ROWS"]), -(-x.shape[1] // config.constants["BLOCK"]))
    soft_cap_kernel[grid](x, y, x.shape[0], x.stride(0), y.stride(0), cap, **config.arguments)


def _gated(gate_up: Tensor, y: Tensor, activation: Activation) -> None:
    num_rows, n = y.shape
    if gate_up.shape != (num_rows, 2 * n) or gate_up.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError(f"gate_up {tuple(gate_up.shape)} does not fit y {tuple(y.shape)}: expected twice its columns")
    if num_rows == 0:
        return
    config = with_constants(tile_config(arch_of(y), n), ACTIVATION=int(activation))
    grid = (-(-num_rows // config.constants["ROWS"]), -(-n // config.constants["BLOCK"]))
    gated_kernel[grid](
        gate_up,
        y,
        num_rows,
        gate_up.stride(0),
        y.stride(0),
        **config.arguments,
    )


def _gated_case(model: ModelShape, activation: Activation) -> CompileCase:
    return CompileCase(
        name=f"{activation.name.lower()}_mul",
        kernel=lambda: gated_kernel,
        shape=f"{model.name} rows of 2 x {model.ffn} bf16",
        signature={"gate_up": "*bf16", "y": "*bf16", "num_rows": "i32", "gate_up_stride": "i32", "y_stride": "i32"},
        aligned=("gate_up", "y", "gate_up_stride", "y_stride"),
        config=lambda arch: with_constants(tile_config(arch, model.ffn), ACTIVATION=int(activation)),
        flops=(5 if activation is Activation.SILU else 20) * 1024,
        bytes=3 * 2 * 1024,
        programs_per_sm=8,
    )


def _soft_cap_case(model: ModelShape) -> CompileCase:
    return CompileCase(
        name="soft_cap",
        kernel=lambda: soft_cap_kernel,
        shape=f"{model.name} rows of {model.vocab} fp32",
        signature={
            "x": "*fp32",
            "y": "*fp32",
            **dict.fromkeys(("num_rows", "x_stride", "y_stride"), "i32"),
            "cap": "fp32",
        },
        aligned=("x", "y", "x_stride", "y_stride"),
        config=lambda arch: tile_config(arch, model.vocab),
        flops=20 * 1024,
        bytes=2 * 4 * 1024,
        programs_per_sm=8,
    )


COMPILE_CASES = (
    *(_gated_case(model, Activation.SILU) for model in SHIPPED),
    _gated_case(SHIPPED[0], Activation.GELU_TANH),
    _gated_case(SHIPPED[0], Activation.GELU_ERF),
    _soft_cap_case(SHIPPED[0]),
)
