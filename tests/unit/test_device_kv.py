"""KV on a device: the same layout, whole blocks in and out, the device's digest. On the CPU; unmeasured on a GPU."""

from __future__ import annotations

import pytest
import torch

from engine.device_kv import DeviceKVMemory
from engine.dispatch import KVPlace
from engine.kernels.block_digest import reference
from engine.kv_memory import KVMemory, KVShape

SHAPE = KVShape(num_kv_heads=2, num_layers=3, block_size=4, head_dim=8, dtype="bfloat16")
CPU = torch.device("cpu")


def random_block(seed: int, kv: DeviceKVMemory) -> memoryview:
    numbers = torch.randint(0, 256, (kv.block_bytes,), dtype=torch.uint8, generator=torch.manual_seed(seed))
    return numbers.numpy().data


def test_blocks_lie_as_in_host_memory() -> None:
    host, device = KVMemory(SHAPE, 3), DeviceKVMemory(SHAPE, 3, CPU)
    numbers = torch.randn(host.tensor.shape[1:]).bfloat16()
    host.tensor[1] = numbers
    device.tensor[1] = numbers
    copied = memoryview(bytearray(device.block_bytes))
    device.copy_out([1], [copied])
    assert copied == host.block(1)
    assert device.tensor[1].data_ptr() == device.address + device.block_bytes
    assert (device.block_bytes, device.block_size) == (host.block_bytes, host.block_size)


def test_blocks_go_in_and_come_out_whole_and_touch_no_other() -> None:
    kv = DeviceKVMemory(SHAPE, 5, CPU)
    blocks = [random_block(seed, kv) for seed in range(2)]
    kv.copy_in(blocks, [4, 1])
    out = [memoryview(bytearray(kv.block_bytes)) for _ in range(3)]
    kv.copy_out([1, 4, 3], out)
    assert out == [blocks[1], blocks[0], memoryview(bytes(kv.block_bytes))]


def test_the_block_for_padded_rows_is_none_that_a_transfer_may_name() -> None:
    kv = DeviceKVMemory(SHAPE, 5, CPU)
    assert (kv.dummy_block, kv.num_blocks, kv.tensor.shape[0]) == (5, 5, 6)
    with pytest.raises(IndexError, match="block 5 of 5"):
        kv.copy_out([kv.dummy_block], [memoryview(bytearray(kv.block_bytes))])


def test_the_devices_digest_is_the_kernels() -> None:
    kv = DeviceKVMemory(SHAPE, 3, CPU)
    block = random_block(7, kv)
    kv.copy_in([block], [2])
    zeros = reference.block_digest(bytes(kv.block_bytes))
    assert kv.digests([2, 0]) == [reference.block_digest(block), zeros]


def test_copies_on_write_and_zeroed_slots_are_those_of_host_memory() -> None:
    host, device = KVMemory(SHAPE, 3), DeviceKVMemory(SHAPE, 3, CPU)
    block = random_block(3, device)
    host.block(0)[:] = block
    device.copy_in([block], [0])
    for kv in (host, device):
        kv.copy_block(0, 2)
        kv.zero_slots(2, 1)
    copied = memoryview(bytearray(device.block_bytes))
    device.copy_out([2], [copied])
    assert copied == host.block(2)


def test_on_the_cpu_it_is_no_gpus_memory() -> None:
    kv = DeviceKVMemory(SHAPE, 1, CPU)
    kv.pin(memoryview(bytearray(16)))
    kv.wait_for_writes()
    assert (kv.device_id, kv.architecture, kv.place) == (None, "cpu", KVPlace.DEVICE)


def test_a_shape_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks is 0"):
        DeviceKVMemory(SHAPE, 0, CPU)
