"""Launch the batch-invariant GEMM."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.arch import INTERPRETER, arch_of
from engine.kernels.compile_case import CompileCase, CompileConfig, with_constants
from engine.kernels.gemm.triton import gemm_join_kernel, gemm_kernel, gemm_piece_kernel

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_PROGRAMS = 256
"""About two for each of a GPU's 100 to 150 multiprocessors: with fewer, the memory waits for requests. One number for
all GPUs, since the order of additions follows from it."""
_PIECE_TILES = 4
"""Least of BLOCK_K in a piece: fewer, and a program waits for its first loads most of the time. Unmeasured."""
_MOST_TILES_OF_ROWS = 2
"""With more rows than these have, programs are many anyhow; so the sums of pieces stay below 16 MiB."""
_JOIN = CompileConfig(constants={"BLOCK_N": 512})


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


def piece_of(n: int, k: int, tile: CompileConfig) -> int:
    """How much of K is added up by itself: a few columns of y make few programs unless K is shared out.

    By the weight's shape alone: were it by m, a row's bits would follow the batch.
    """
    block_n, block_k = tile.constants["BLOCK_N"], tile.constants["BLOCK_K"]
    wanted = _PROGRAMS // -(-n // block_n)
    num_pieces = max(1, min(wanted, k // (_PIECE_TILES * block_k)))
    return -(-k // (num_pieces * block_k)) * block_k


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
    extras = {"HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None}
    residual_stride = 0 if residual is None else residual.stride(0)
    piece = piece_of(n, k, tile)
    num_pieces = -(-k // piece)
    grid = (-(-m // tile.constants["BLOCK_M"]), -(-n // tile.constants["BLOCK_N"]))
    if num_pieces > 1 and grid[0] <= _MOST_TILES_OF_ROWS and 2 * grid[0] * grid[1] <= _PROGRAMS:
        sums = torch.empty((num_pieces, m, n), dtype=torch.float32, device=x.device)
        gemm_piece_kernel[*grid, num_pieces](
            x, weight, sums, m, n, k, piece, x.stride(0), weight.stride(0), **tile.arguments
        )
        gemm_join_kernel[m, -(-n // _JOIN.constants["BLOCK_N"])](
            sums, y, bias, residual, m, n, num_pieces, y.stride(0), residual_stride,
            **with_constants(_JOIN, **extras).arguments,
        )  # fmt: skip
        return
    gemm_kernel[grid](
        x, weight, y, bias, residual, m, n, k, piece, x.stride(0), weight.stride(0), y.stride(0), residual_stride,
        **with_constants(tile, **extras, IN_PIECES=num_pieces > 1).arguments,
    )  # fmt: skip


def _case(name: str, *, kind: str = "bf16", extra: str = "", in_pieces: bool = False) -> CompileCase:
    """Of `gemm_kernel` and `gemm_piece_kernel`, which differ in what they do with a tile's sum."""
    is_float32, is_piece = kind == "fp32", name == "gemm_piece"
    constants = {} if is_piece else {"IN_PIECES": in_pieces, **_extras(extra)}
    pointers = ("x", "weight") if is_piece else ("x", "weight", "y", "bias", "residual")
    numbers = ("m", "n", "k", "piece", "x_stride", "weight_stride")
    numbers = numbers if is_piece else (*numbers, "y_stride", "residual_stride")
    types = {**dict.fromkeys(pointers, f"*{kind}"), **dict.fromkeys(numbers, "i32")}
    types |= {"sums": "*fp32"} if is_piece else {}
    tile = tile_config(90, is_float32=is_float32).constants
    size_m, size_n, size_k = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    return CompileCase(
        name=name,
        kernel=lambda: gemm_piece_kernel if is_piece else gemm_kernel,
        shape=f"{size_m} x {size_n} x {size_k} {kind}, every layer of every model",
        signature={name: kind for name, kind in types.items() if name not in constants},
        aligned=tuple(name for name in types if name not in (*constants, "m")),
        config=lambda arch: with_constants(tile_config(arch, is_float32=is_float32), **constants),
        flops=2 * size_m * size_n * size_k,
        bytes=(4 if is_float32 else 2) * (size_m + size_n) * size_k,
        has_dot=not is_float32,
        programs_per_sm=1 if is_float32 and in_pieces else 2,  # two sums without tensor cores fill an A100's registers
    )


def _extras(extra: str) -> dict[str, object]:
    flags = {"HAS_BIAS": extra == "bias", "HAS_RESIDUAL": extra == "residual"}
    return {**flags, **{name: None for name in ("bias", "residual") if name != extra}}


def _join_case() -> CompileCase:
    columns = _JOIN.constants["BLOCK_N"]
    types = {"sums": "*fp32", **dict.fromkeys(("y", "bias"), "*bf16")}
    types |= dict.fromkeys(("m", "n", "num_pieces", "y_stride", "residual_stride"), "i32")
    return CompileCase(
        name="gemm_join",
        kernel=lambda: gemm_join_kernel,
        shape=f"{columns} columns, the sums of pieces of K",
        signature=types,
        aligned=("sums", "y", "bias", "n", "y_stride"),
        config=lambda arch: with_constants(_JOIN, **_extras("bias")),
        flops=columns,
        bytes=4 * columns,
        programs_per_sm=8,
    )


COMPILE_CASES = (
    _case("gemm"),
    _case("gemm_bias", extra="bias"),
    _case("gemm_residual", extra="residual"),
    _case("gemm", kind="fp32"),
    _case("gemm_in_pieces", in_pieces=True),
    _case("gemm_in_pieces", kind="fp32", in_pieces=True),
    _case("gemm_piece"),
    _case("gemm_piece", kind="fp32"),
    _join_case(),
)
