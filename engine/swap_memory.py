"""Host memory for the KV of preempted sequences. The only place that copies between it and the device.

On the CPU both are host memory and a copy is a copy. On a GPU the host's is pinned, so that copies need no staging:
swap-outs run on the stream of the forward pass, before it; swap-ins on a stream of their own, beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor

_MEASURED_BLOCKS = 64
_MEASURED_ROUNDS = 3

Copies = Iterable[tuple[int, int]]


class SwapMemory:
    """`num_blocks` host blocks beside the KV memory `kv`, whose first dimension is the block."""

    def __init__(self, kv: Tensor, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._kv = kv
        self._host = torch.empty((num_blocks, *kv.shape[1:]), dtype=kv.dtype, pin_memory=kv.is_cuda)
        self._arriving = torch.cuda.Stream(kv.device) if kv.is_cuda else None

    def start(self, swap_outs: Copies, swap_ins: Copies) -> None:
        """Make a batch's copies (engine.batch.Batch says in which order). Call before anything else of the batch.

        On a GPU the copies are only queued: what follows on its current stream finds swap-outs read, and the swap-ins
        of the calls before written.
        """
        if self._arriving is None:
            self._copy_out(swap_outs)
            self._copy_in(swap_ins)
            return
        current = torch.cuda.current_stream(self._kv.device)
        current.wait_stream(self._arriving)
        self._copy_out(swap_outs)
        self._arriving.wait_stream(current)
        with torch.cuda.stream(self._arriving):
            self._copy_in(swap_ins)

    def measure_copy_s(self) -> float:
        """Seconds that one block takes one way, the best of a few rounds. Call while no block is in use."""
        pairs = [(i, i) for i in range(min(_MEASURED_BLOCKS, self.num_blocks, len(self._kv)))]
        return min(self._round_trip_s(pairs) for _ in range(_MEASURED_ROUNDS)) / (2 * len(pairs))

    def _round_trip_s(self, pairs: list[tuple[int, int]]) -> float:
        began = time.perf_counter()
        self.start(pairs, pairs)
        if self._arriving is not None:
            self._arriving.synchronize()
        return time.perf_counter() - began

    def _copy_out(self, swap_outs: Copies) -> None:
        for block, host_block in swap_outs:
            self._host[host_block].copy_(self._kv[block], non_blocking=True)

    def _copy_in(self, swap_ins: Copies) -> None:
        for host_block, block in swap_ins:
            self._kv[block].copy_(self._host[host_block], non_blocking=True)
