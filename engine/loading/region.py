"""Packed weights in memory, wherever that memory comes from.

Shared: the host's file, mapped read-only; a stray write ends the process instead of changing what others compute.
Private: anonymous memory in huge pages, where no cache folder can be written, and for models too small to matter.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.kernels.linear.native import PackedWeight
from engine.kernels.native.library import Library
from engine.loading.layout import PackedLayout, PanelFormat, Part, PartKind, Piece
from engine.loading.pack import OnFraction, pack_pieces
from engine.loading.packed_file import PackedFile
from engine.models.weights import DecoderWeights, SourceTensor, load_decoder_weights
from engine.sizing import usable_cpus
from modelfiles.config import ModelConfig
from modelfiles.errors import CacheError

log = logging.getLogger(__name__)

MIN_SHARED_BYTES = 16 * 1024**2
"""Packing less takes less time than noticing a file (some 20 ms)."""
_MAX_THREADS = 8  # beyond, memory bandwidth is the limit


@dataclass(frozen=True, slots=True)
class PackedRegion:
    """All packed weights of a model. `shared`: other workers of this host map the same pages."""

    layout: PackedLayout
    memory: Tensor = field(repr=False)
    shared: bool

    def decoder_weights(self) -> DecoderWeights[PackedWeight, Tensor]:
        """Views of the region, which lives as long as they do."""
        return load_decoder_weights(self.layout.config, _Views(self.layout, self.memory))


def open_region(
    config: ModelConfig,
    weights: Mapping[str, SourceTensor],
    library: Library,
    dtype: str,
    *,
    cache: Path | None = None,
    model_digest: str = "",
    min_shared_bytes: int = MIN_SHARED_BYTES,
    on_fraction: OnFraction = lambda fraction: None,
) -> PackedRegion:
    """Packed weights from the host's file in the folder `cache`, which is made if need be; else packed privately.

    All processors that this process may use take part in packing, whatever the worker's own share: others wait for it.
    """
    layout = PackedLayout.of(config, PanelFormat(library.vector_width, library.panel, dtype))
    num_threads = min(usable_cpus(), _MAX_THREADS)
    if cache is not None and layout.num_bytes >= min_shared_bytes:
        file = PackedFile(cache, model_digest, layout)
        try:
            mapping = file.open_or_make(weights, library, num_threads, on_fraction)
        except CacheError as error:
            log.warning("packed weights are kept in this process's own memory: %s", error)
        else:
            return PackedRegion(layout, _read_only(mapping), shared=True)
    return PackedRegion(layout, _pack_privately(layout, weights, library, num_threads, on_fraction), shared=False)


def _pack_privately(
    layout: PackedLayout,
    weights: Mapping[str, SourceTensor],
    library: Library,
    num_threads: int,
    on_fraction: OnFraction,
) -> Tensor:
    memory = mmap.mmap(-1, layout.num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    target = memoryview(memory)

    def copy(i: int, piece: Piece, content: memoryview) -> None:
        target[piece.offset : piece.offset + piece.num_bytes] = content

    pack_pieces(layout, weights, library, num_threads, copy, on_fraction)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _read_only(mapping: mmap.mmap) -> Tensor:
    """torch knows no read-only memory and warns of it: it is given the address, and the mapping to keep."""

    class Mapped(ctypes.c_char * len(mapping)):
        keep = mapping

    return torch.frombuffer(Mapped.from_address(np.frombuffer(mapping, np.uint8).ctypes.data), dtype=torch.uint8)


class _Views:
    """A WeightStore over a region."""

    def __init__(self, layout: PackedLayout, memory: Tensor) -> None:
        self._layout = layout
        self._memory = memory

    def vector(self, names: Sequence[str]) -> Tensor:
        return self._of(self._layout.parts[tuple(names)], torch.float32)

    def matrix(self, names: Sequence[str], biases: Sequence[str] = ()) -> PackedWeight:
        return self._packed(names, self.vector(biases) if biases else None)

    def gated(self, gate: str, up: str) -> PackedWeight:
        return self._packed((gate, up), None)

    def _packed(self, names: Sequence[str], bias: Tensor | None) -> PackedWeight:
        part = self._layout.parts[tuple(names)]
        panels = self._of(part, getattr(torch, self._layout.format.dtype))
        return PackedWeight(panels, part.n, part.k, part.kind is PartKind.GATED, bias)

    def _of(self, part: Part, dtype: torch.dtype) -> Tensor:
        return self._memory[part.offset : part.offset + part.num_bytes].view(dtype)
