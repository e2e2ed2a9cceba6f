"""KV memory: one region per block, the same bytes through tensor, view and another mapping."""

from __future__ import annotations

import mmap

import pytest

from engine.kv_memory import KVMemory, KVShape

SHAPE = KVShape(num_kv_heads=2, num_layers=3, block_size=4, head_dim=8)


def test_a_block_is_one_region_of_the_stated_size() -> None:
    kv = KVMemory(SHAPE, 5)
    kv.tensor[3] = 1.5
    assert kv.block_bytes == 2 * 3 * 2 * 4 * 8 * 4 == len(kv.block(3))
    assert set(kv.block(3).cast("f")) == {1.5}
    assert set(kv.block(2).cast("f")) == set(kv.block(4).cast("f")) == {0.0}
    assert kv.tensor[3].data_ptr() == kv.address + 3 * kv.block_bytes


def test_another_mapping_of_the_file_sees_the_blocks() -> None:
    kv = KVMemory(SHAPE, 2)
    with mmap.mmap(kv.fd, 2 * kv.block_bytes, prot=mmap.PROT_READ) as other:
        kv.block(1)[:3] = b"abc"
        assert other[kv.block_bytes : kv.block_bytes + 3] == b"abc"


def test_zeroed_slots_are_those_from_the_first_on_in_every_layer() -> None:
    kv = KVMemory(SHAPE, 2)
    kv.tensor.fill_(7)
    kv.zero_slots(1, 3)
    assert bool((kv.tensor[1, :, :, :, :3] == 7).all())
    assert bool((kv.tensor[1, :, :, :, 3:] == 0).all())
    assert bool((kv.tensor[0] == 7).all())


def test_a_copied_block_is_equal_and_apart() -> None:
    kv = KVMemory(SHAPE, 2)
    kv.tensor[0].normal_()
    kv.copy_block(0, 1)
    assert bool((kv.tensor[0] == kv.tensor[1]).all())
    kv.tensor[1].zero_()
    assert bool((kv.tensor[0] != 0).any())


def test_a_dummy_block_lies_behind_the_others_and_no_one_can_ask_for_it() -> None:
    kv = KVMemory(SHAPE, 2, has_dummy=True)
    kv.tensor[:2] = 1
    kv.tensor[2] = 7
    assert (kv.num_blocks, len(kv.tensor), len(kv.buffer)) == (2, 3, 2 * kv.block_bytes)
    assert set(kv.buffer.cast("f")) == {1.0}
    with pytest.raises(IndexError):
        kv.block(2)


@pytest.mark.parametrize("block_id", [-1, 2])
def test_a_block_outside_is_refused(block_id: int) -> None:
    with pytest.raises(IndexError):
        KVMemory(SHAPE, 2).block(block_id)


def test_a_block_size_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(ValueError, match="power of two"):
        KVMemory(KVShape(1, 1, 3, 8), 2)
