"""What Triton's interpreter leaves to the machine's libraries, settled."""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_create_dot = InterpreterBuilder.create_dot


def settle_dots() -> None:
    """Have `tl.dot` of float32 give a row the same bits wherever in a tile it stands, as on a GPU. May be called again.

    For this process. The interpreter asks BLAS, and with some processors' kernels (OpenBLAS 0.3.31's for AVX2, not
    those for AVX-512) a row's bits depend on its place among the others, and deterministic mode with them. einsum over
    contiguous arrays adds up each result along K by itself.
    """
    InterpreterBuilder.create_dot = _settled_dot


def _settled_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    if not a.data.dtype == b.data.dtype == d.data.dtype == np.float32:
        return _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
    rows, columns = np.ascontiguousarray(a.data), np.ascontiguousarray(b.data)
    return TensorHandle(np.einsum("...mk,...kn->...mn", rows, columns) + d.data, d.dtype.scalar)
