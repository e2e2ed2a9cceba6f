"""A checkpoint's rows become panels, piece by piece, on all processors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from engine.kernels.linear.native import pack, pack_gated
from engine.kernels.native.library import Library, NativeContext
from engine.loading.layout import PackedLayout, Part, PartKind, Piece
from engine.models.weights import SourceTensor

OnFraction = Callable[[float], None]
Consume = Callable[[int, Piece, memoryview], None]
"""What to do with the bytes of piece number i; they are overwritten after it returns."""


def pack_pieces(
    layout: PackedLayout,
    weights: Mapping[str, SourceTensor],
    library: Library,
    num_threads: int,
    consume: Consume,
    on_fraction: OnFraction,
) -> None:
    """Pack every piece of the layout and hand its bytes to `consume`, which several threads call at once."""
    pieces = layout.pieces()
    local = threading.local()
    lock = threading.Lock()
    done = 0

    def run(i: int) -> None:
        nonlocal done
        if not hasattr(local, "context"):
            local.context = NativeContext(1, library)
        consume(i, pieces[i], _bytes(_pack_piece(local.context, layout, weights, pieces[i])))
        with lock:
            done += pieces[i].num_bytes
            on_fraction(done / layout.num_bytes)

    with ThreadPoolExecutor(num_threads, "pack") as pool:
        for _ in pool.map(run, range(len(pieces))):
            pass


def _pack_piece(
    context: NativeContext, layout: PackedLayout, weights: Mapping[str, SourceTensor], piece: Piece
) -> Tensor:
    part = piece.part
    begin, end = piece.begin * part.columns, min(piece.end * part.columns, part.n)
    if part.kind is PartKind.VECTOR:
        return torch.cat(list(_rows(part, weights, begin, end)))
    item_size = layout.format.item_size
    panels = torch.zeros(piece.num_bytes // item_size, dtype=getattr(torch, layout.format.dtype))
    if part.kind is PartKind.MATRIX:
        pack(context, list(_rows(part, weights, begin, end)), panels)
    else:
        gate, up = (_tensor(weights[name], begin, end) for name, _ in part.sources)
        pack_gated(context, gate, up, panels)
    return panels


def _rows(part: Part, weights: Mapping[str, SourceTensor], begin: int, end: int) -> Iterator[Tensor]:
    """Rows [begin, end) of the sources laid one after another."""
    start = 0
    for name, count in part.sources:
        first, last = max(begin - start, 0), min(end - start, count)
        if first < last:
            yield _tensor(weights[name], first, last)
        start += count


def _tensor(source: SourceTensor, begin: int, end: int) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(source.float32(begin, end)))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data
