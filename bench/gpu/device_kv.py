"""KV blocks on the device that is measured: what a runner needs of them, without what only hand-overs need."""

from __future__ import annotations

import torch

from engine.kv_memory import KVShape


class DeviceKV:
    """A KVStore (engine/backend.py) with a dummy block for the padding of graphs."""

    def __init__(self, shape: KVShape, num_blocks: int, device: torch.device) -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        self.block_size = shape.block_size
        sizes = (num_blocks + 1, shape.num_kv_heads, shape.num_layers, 2, shape.block_size, shape.head_dim)
        self.tensor = torch.zeros(sizes, dtype=getattr(torch, shape.dtype), device=device)

    def copy_block(self, source: int, destination: int) -> None:
        self.tensor[destination].copy_(self.tensor[source])

    def zero_slots(self, block_id: int, first_slot: int) -> None:
        self.tensor[block_id, :, :, :, first_slot:].zero_()
