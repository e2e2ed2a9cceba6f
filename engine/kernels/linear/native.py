"""Pack weights once, and check what the GEMM is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from engine.kernels.native.library import NativeContext, NativeOp, OpKind, Rows, make_op


class Epilogue(IntEnum):
    """What happens to a finished tile; gemm.hpp's `Epilogue`."""

    STORE = 0
    ADD = 1
    SILU_MUL = 2


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """Weights [n, k] as panels [ceil(n / panel), k, panel]; with `gated`, panels hold a vector of gate and one of up.

    `n` counts columns of the result. Packed weights are float32 or bfloat16; the arithmetic is float32 either way.
    """

    panels: Tensor
    n: int
    k: int
    gated: bool
    bias: Tensor | None = None


def packed_size(context: NativeContext, n: int, k: int, gated: bool = False) -> int:
    """Elements that the packed form takes."""
    columns = context.library.vector_width if gated else context.library.panel
    return -(-n // columns) * k * context.library.panel


def pack(
    context: NativeContext, sources: Sequence[Tensor], panels: Tensor | None = None, bias: Tensor | None = None
) -> PackedWeight:
    """Pack the rows of `sources` [n_i, k] one after another (fused QKV); into `panels` if given, which must be zero."""
    k = sources[0].shape[1]
    n = sum(source.shape[0] for source in sources)
    panels = _panels(context, panels, packed_size(context, n, k))
    offset = 0
    for source in sources:
        _check_source(source, k)
        context.pack(panels, source, offset, -1)
        offset += source.shape[0]
    if bias is not None and (bias.shape != (n,) or bias.dtype != torch.float32):
        raise ValueError(f"bias is {tuple(bias.shape)} {bias.dtype}, expected ({n},) float32")
    return PackedWeight(panels, n, k, gated=False, bias=bias)


def pack_gated(context: NativeContext, gate: Tensor, up: Tensor, panels: Tensor | None = None) -> PackedWeight:
    """Pack gate and up [n, k] side by side, so that one tile holds both and SiLU(gate) * up needs no second pass."""
    n, k = gate.shape
    if up.shape != gate.shape:
        raise ValueError(f"gate is {tuple(gate.shape)} but up is {tuple(up.shape)}")
    panels = _panels(context, panels, packed_size(context, n, k, gated=True))
    for which, source in enumerate((gate, up)):
        _check_source(source, k)
        context.pack(panels, source, 0, which)
    return PackedWeight(panels, n, k, gated=True)


def linear(
    x: Tensor, weight: PackedWeight, y: Tensor, epilogue: Epilogue = Epilogue.STORE, rows: Rows = Rows.TOKENS
) -> NativeOp:
    """y = x weight^T, by `epilogue`. x [>= rows, k], y [>= rows, n], float32, rows contiguous.

    Row strides that are multiples of 4 KiB let the rows of a tile fight for the same cache sets; the callers pad them.
    """
    if x.dtype != torch.float32 or y.dtype != torch.float32:
        raise TypeError(f"x is {x.dtype} and y {y.dtype}, expected float32")
    if x.shape[1] != weight.k or y.shape[1] != weight.n or x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError(f"x {tuple(x.shape)}, y {tuple(y.shape)} do not fit a weight of n={weight.n}, k={weight.k}")
    if weight.gated != (epilogue is Epilogue.SILU_MUL):
        raise ValueError(f"epilogue {epilogue.name} with a weight packed as gated={weight.gated}")
    half = int(weight.panels.dtype == torch.bfloat16)
    return make_op(
        OpKind.LINEAR,
        (x, weight.panels, weight.bias, y),
        (x.stride(0), y.stride(0), weight.k, weight.n, epilogue, half),
        rows=rows,
    )


def _panels(context: NativeContext, panels: Tensor | None, size: int) -> Tensor:
    if panels is None:
        return torch.zeros(size, dtype=torch.float32)
    if panels.numel() != size or panels.dtype not in (torch.float32, torch.bfloat16) or not panels.is_contiguous():
        raise ValueError(f"panels have {panels.numel()} elements of {panels.dtype}, expected {size}")
    return panels


def _check_source(source: Tensor, k: int) -> None:
    if source.dtype != torch.float32 or source.dim() != 2 or source.shape[1] != k or source.stride(1) != 1:
        raise ValueError(f"weight is {tuple(source.shape)} {source.dtype}, expected [*, {k}] float32, rows contiguous")
