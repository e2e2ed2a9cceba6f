"""Host blocks hold what was copied there, and a batch's copies run in the stated order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.batch import Batch
from engine.errors import ConfigInvalid
from engine.kv_memory import KVMemory, KVShape
from engine.runner import ModelRunner, kv_shape
from engine.sizing import HostLimits
from engine.swap_memory import Copies, SwapMemory
from engine.worker import ReplicaSpec, _make_swap
from modelfiles import load_config
from modelfiles.weights import open_weights

SHAPE = KVShape(num_kv_heads=2, num_layers=3, block_size=4, head_dim=8)


def filled(num_blocks: int) -> KVMemory:
    kv = KVMemory(SHAPE, num_blocks)
    kv.tensor.copy_(torch.randn(kv.tensor.shape))
    return kv


def test_a_block_comes_back_to_another_place_with_every_bit() -> None:
    kv = filled(4)
    swap, before = SwapMemory(kv.tensor, 2), kv.tensor.clone()
    swap.start([(3, 1), (0, 0)], [])
    kv.tensor.fill_(float("nan"))
    swap.start([], [(1, 2), (0, 3)])
    assert torch.equal(kv.tensor[2], before[3])
    assert torch.equal(kv.tensor[3], before[0])
    assert kv.tensor[:2].isnan().all()


def test_swap_outs_come_before_swap_ins_of_the_same_places() -> None:
    kv = filled(2)
    swap, before = SwapMemory(kv.tensor, 2), kv.tensor.clone()
    swap.start([(0, 0)], [])
    swap.start([(1, 1)], [(0, 1)])  # the block is saved, then overwritten
    assert torch.equal(kv.tensor[1], before[0])
    swap.start([], [(1, 0)])
    assert torch.equal(kv.tensor[0], before[1])
    swap.start([(0, 0)], [(0, 1)])  # the host block is written, then read
    assert torch.equal(kv.tensor[1], before[1])


def test_measuring_leaves_every_block_as_it_was() -> None:
    kv = filled(3)
    before = kv.tensor.clone()
    assert SwapMemory(kv.tensor, 2).measure_copy_s() > 0
    assert torch.equal(kv.tensor, before)


def test_swap_memory_that_holds_no_block_is_refused_by_name() -> None:
    kv, host = KVMemory(SHAPE, 3), HostLimits(2**30, 2**30, 1)
    spec = ReplicaSpec(model=Path("m"), swap_memory_bytes=kv.block_bytes - 1)
    with pytest.raises(ConfigInvalid, match=r"swap_memory.*does not hold one block") as caught:
        _make_swap(spec, kv, host)
    assert caught.value.field == "swap_memory"
    made = _make_swap(ReplicaSpec(model=Path("m"), swap_memory_bytes=2 * kv.block_bytes + 1), kv, host)
    assert made is not None
    assert made.num_blocks == 2
    for off in (0, None):
        assert _make_swap(ReplicaSpec(model=Path("m"), swap_memory_bytes=off), kv, host) is None


def test_a_batch_without_copies_still_awaits_the_swap_ins_of_the_batch_before(tiny_llama: Path) -> None:
    """On a GPU they arrive on a stream of their own, and only `start` makes the forward pass wait for it."""

    class Recorder(SwapMemory):
        def start(self, swap_outs: Copies, swap_ins: Copies) -> None:
            started.append((tuple(swap_outs), tuple(swap_ins)))

    started: list[tuple[Copies, Copies]] = []
    config = load_config(tiny_llama)
    kv = KVMemory(kv_shape(config, 16), 4)
    runner = ModelRunner(config, open_weights(tiny_llama), kv, swap=Recorder(kv.tensor, 2))
    runner.execute(Batch((), (), swap_ins=((0, 1),)))
    runner.execute(Batch((), ()))
    assert started == [((), ((0, 1),)), ((), ())]
    runner.close()
