"""Load the compiled kernels and call them. Everything that knows a C layout is in this file.

Calls go through ctypes, which gives up Python's lock for their duration: the threads that serve gRPC and HTTP run while
the model computes.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from functools import cache

import torch
from torch import Tensor

from engine.kernels.native.build import Isa, NativeBuild, build

_i32, _i64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class OpKind(IntEnum):
    """Operations of a program; baton.cpp's `Kind`."""

    EMBED = 0
    RMS_NORM = 1
    LINEAR = 2
    ROPE_WRITE = 3
    ATTENTION = 4


class Rows(IntEnum):
    """Which rows an operation covers: every token of the step, or those whose logits are wanted."""

    TOKENS = 0
    SAMPLED = 1


class NativeOp(ctypes.Structure):
    """One operation of a program; baton.cpp's `Op`. Made by the `native.py` of each kernel, after its checks.

    `tensors` are those it points at; whoever holds the operation keeps them alive.
    """

    tensors: tuple[Tensor | None, ...] = ()

    _fields_ = (
        ("kind", _i64),
        ("rows", _i64),
        ("pointers", _pointer * 6),
        ("numbers", _i64 * 12),
        ("reals", ctypes.c_double * 2),
    )


class NativeStep(ctypes.Structure):
    """What differs from step to step; step.hpp's `Step`."""

    _fields_ = (
        ("num_tokens", _i64),
        ("num_sequences", _i64),
        ("num_sampled", _i64),
        ("token_ids", _pointer),
        ("query_starts", _pointer),
        ("positions", _pointer),
        ("table_offsets", _pointer),
        ("block_tables", _pointer),
        ("sampled_rows", _pointer),
        ("rope_cos", _pointer),
        ("rope_sin", _pointer),
    )


class NativeSampling(ctypes.Structure):
    """One call of the sampler; sampling.hpp's `Sampling`."""

    _fields_ = (
        ("logits", _pointer),
        ("ld", _i64),
        ("vocab", _i64),
        ("rows", _pointer),
        ("num_rows", _i64),
        ("seen_ids", _pointer),
        ("seen_counts", _pointer),
        ("banned", _pointer),
        ("tokens", _pointer),
        ("logprobs", _pointer),
        ("top_ids", _pointer),
        ("top_logprobs", _pointer),
        ("max_top", _i64),
    )


def make_op(
    kind: OpKind,
    pointers: tuple[Tensor | None, ...],
    numbers: tuple[int, ...],
    reals: tuple[float, ...] = (),
    rows: Rows = Rows.TOKENS,
) -> NativeOp:
    """Fill an operation."""
    op = NativeOp(kind=kind, rows=rows)
    op.tensors = pointers
    for i, tensor in enumerate(pointers):
        op.pointers[i] = tensor.data_ptr() if tensor is not None else None
    for i, number in enumerate(numbers):
        op.numbers[i] = number
    for i, real in enumerate(reals):
        op.reals[i] = real
    return op


class Library:
    """The loaded library of one instruction set."""

    def __init__(self, native: NativeBuild) -> None:
        self.build = native
        self.functions = ctypes.CDLL(str(native.path))
        self._declare("baton_open", _pointer, _i32)
        self._declare("baton_close", None, _pointer)
        self._declare("baton_vector_width", _i32)
        self._declare("baton_panel", _i32)
        self._declare("baton_pack", None, _pointer, _pointer, _pointer, *[_i64] * 5, _i32)
        self._declare("baton_run", None, _pointer, _pointer, _i64, _pointer)
        self._declare("baton_sample", None, _pointer, _pointer)
        self.vector_width: int = self.functions.baton_vector_width()
        self.panel: int = self.functions.baton_panel()

    def _declare(self, name: str, result: type | None, *arguments: type) -> None:
        function = getattr(self.functions, name)
        function.restype = result
        function.argtypes = list(arguments)


@cache
def load_library(isa: Isa | None = None) -> Library:
    """Build if needed, then load. Raises: KernelsUnavailable."""
    return Library(build(isa))


class NativeContext:
    """A pool of threads with its scratch memory. Calls on one context run one after another."""

    def __init__(self, num_threads: int, library: Library | None = None) -> None:
        self.library = library or load_library()
        self.num_threads = max(1, num_threads)
        self._handle: int | None = self.library.functions.baton_open(self.num_threads)
        if not self._handle:
            raise MemoryError("cannot start the kernel threads")

    def close(self) -> None:
        """Stop the threads. Idempotent."""
        handle, self._handle = self._handle, None
        if handle:
            self.library.functions.baton_close(handle)

    def __del__(self) -> None:
        """Threads must not outlive the runner that is forgotten without `close`."""
        if getattr(self, "_handle", None):
            self.close()

    def pack(self, panels: Tensor, source: Tensor, offset: int, interleave: int) -> None:
        """Copy weight rows into panels (see linear/native.py)."""
        rows, depth = source.shape
        half = int(panels.dtype == torch.bfloat16)
        self.library.functions.baton_pack(
            self._handle, panels.data_ptr(), source.data_ptr(), source.stride(0), rows, depth, offset, interleave, half
        )

    def run(self, ops: ctypes.Array[NativeOp], step: NativeStep) -> None:
        """Run a program's operations in order."""
        self.library.functions.baton_run(self._handle, ops, len(ops), ctypes.byref(step))

    def sample(self, sampling: NativeSampling) -> None:
        """Draw one token per row."""
        self.library.functions.baton_sample(self._handle, ctypes.byref(sampling))
