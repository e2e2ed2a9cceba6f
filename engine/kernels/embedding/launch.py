"""Launch the embedding lookup."""

from __future__ import annotations

from torch import Tensor

from engine.kernels.arch import INTERPRETER, arch_of, next_power_of_2
from engine.kernels.compile_case import CompileCase, CompileConfig
from engine.kernels.embedding.triton import embed_kernel
from engine.kernels.shipped import SHIPPED, ModelShape


def tile_config(arch: int, n: int) -> CompileConfig:
    """Constants for rows of n numbers."""
    if arch == INTERPRETER:
        return CompileConfig(constants={"N": n, "ROWS": 16, "BLOCK": min(next_power_of_2(n), 4096)})
    return CompileConfig(constants={"N": n, "ROWS": 1, "BLOCK": 1024})


def embed(token_ids: Tensor, weight: Tensor, y: Tensor) -> None:
    """y[i] = weight[token_ids[i]]. token_ids [T] int32, weight [vocab, n], y [T, n], rows contiguous.

    Whoever made the token ids checked that they are below the vocabulary: the device cannot raise.
    """
    num_tokens, n = y.shape
    if token_ids.shape != (num_tokens,) or weight.shape[1] != n or weight.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError(
            f"token_ids {tuple(token_ids.shape)}, weight {tuple(weight.shape)}, y {tuple(y.shape)} do not fit"
        )
    if num_tokens == 0:
        return
    config = tile_config(arch_of(y), n)
    grid = (-(-num_tokens // config.constants["ROWS"]), -(-n // config.constants["BLOCK"]))
    embed_kernel[grid](
        token_ids,
        weight,
        y,
        num_tokens,
        weight.stride(0),
        y.stride(0),
        **config.arguments,
    )


def _case(model: ModelShape) -> CompileCase:
    return CompileCase(
        name="embed",
        kernel=lambda: embed_kernel,
        shape=f"{model.name} rows of {model.hidden} bf16",
        signature={
            "token_ids": "*i32",
            "weight": "*bf16",
            "y": "*bf16",
            **dict.fromkeys(("num_tokens", "weight_stride", "y_stride"), "i32"),
        },
        aligned=("token_ids", "weight", "y", "weight_stride", "y_stride"),
        config=lambda arch: tile_config(arch, model.hidden),
        flops=0,
        bytes=2 * 2 * min(1024, model.hidden),
        programs_per_sm=8,
    )


COMPILE_CASES = tuple(map(_case, SHIPPED))
