"""The block digest: the kernel's bytes are the reference's, and no small accident keeps them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.kernels.block_digest import launch
from engine.kernels.block_digest.reference import block_digest as reference
from engine.kernels.compile_case import CompileConfig
from tests.kernels.triton.mutants import assert_caught


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def random_blocks(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def with_tiles(monkeypatch: pytest.MonkeyPatch, chunk: int, tile: int) -> None:
    monkeypatch.setattr(launch, "tile_config", lambda arch: CompileConfig(constants={"CHUNK": chunk, "TILE": tile}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("block_size", [1, 4, 16], ids=lambda v: str(v))
def test_kernel_and_reference_agree_on_every_byte(block_size: int, dtype: torch.dtype) -> None:
    cache = (100 * torch.randn(5, 2, 3, 2, block_size, 24)).to(dtype)
    scales = torch.rand(5, 2, 3, 2, block_size)
    ids = torch.tensor([3, 0, 3, 4], dtype=torch.int32)
    plain, scaled = launch.block_digest(cache, ids), launch.block_digest(cache, ids.long(), scales)
    assert plain.shape == (4, launch.DIGEST_BYTES)
    for i, block in enumerate(ids.tolist()):
        assert bytes_of(plain[i]) == reference(bytes_of(cache[block]))
        assert bytes_of(scaled[i]) == reference(bytes_of(cache[block]), bytes_of(scales[block]))


def test_tiles_and_chunks_change_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, scales = random_blocks(3, 8 * 77), random_blocks(3, 8 * 21)
    want = launch.block_digest(cache, torch.arange(3), scales)
    for chunk, tile in [(1, 1), (64, 32), (128, 128), (16, 4)]:
        with_tiles(monkeypatch, chunk, tile)
        assert torch.equal(launch.block_digest(cache, torch.arange(3), scales), want)


def test_blocks_further_apart_than_they_are_long_and_no_blocks() -> None:
    room = random_blocks(4, 96)
    digests = launch.block_digest(room[:, :64], torch.tensor([2, 1]))
    assert [bytes_of(d) for d in digests] == [reference(bytes_of(room[i, :64])) for i in (2, 1)]
    assert launch.block_digest(room, torch.empty(0, dtype=torch.int32)).shape == (0, launch.DIGEST_BYTES)


def test_other_blocks_and_what_lies_between_them_do_not_matter() -> None:
    room = random_blocks(4, 96)
    before = launch.block_digest(room[:, :64], torch.tensor([2]))
    room[[0, 1, 3]] = 0
    room[:, 64:] = 1
    assert torch.equal(launch.block_digest(room[:, :64], torch.tensor([2])), before)


def test_every_flipped_bit_changes_the_digest() -> None:
    block, scales = random_blocks(1, 8 * 9), random_blocks(1, 8 * 3)
    num_bits = 8 * (block.shape[1] + scales.shape[1])
    both = torch.cat((block, scales), 1).numpy().view(np.uint8).repeat(num_bits + 1, 0)
    for bit in range(num_bits):
        both[bit, bit // 8] ^= np.uint8(1 << bit % 8)
    flipped = torch.from_numpy(both).view(torch.int8)
    digests = launch.block_digest(flipped[:, :72], torch.arange(num_bits + 1), flipped[:, 72:])
    assert len({bytes_of(digest) for digest in digests}) == num_bits + 1
    changed = np.unpackbits((digests[:-1] ^ digests[-1]).numpy(), axis=1).sum(1)
    assert changed.min() > 24, "a flipped bit reaches about half of the 128"
    assert 60 < changed.mean() < 68


def test_every_swap_of_two_words_changes_the_digest() -> None:
    words = np.random.default_rng(torch.seed() % 2**32).integers(0, 2**64, 24, dtype=np.uint64)
    blocks = [words]
    for i in range(24):
        for j in range(i):
            blocks.append(words.copy())
            blocks[-1][[i, j]] = words[[j, i]]
    swapped = torch.from_numpy(np.stack(blocks).view(np.int64))
    digests = launch.block_digest(swapped, torch.arange(len(blocks)))
    assert len({bytes_of(digest) for digest in digests}) == len(blocks)


def test_bytes_that_move_between_a_block_and_its_scales_change_the_digest() -> None:
    content = bytes(range(64))
    assert len({reference(content[:n], content[n:]) for n in range(0, 65, 8)}) == 9


def test_zeros_of_different_lengths_truncations_and_shifts_differ() -> None:
    words = np.arange(1, 65, dtype=np.uint64)
    variants = [bytes(8 * n) for n in range(65)]
    variants += [words[:n].tobytes() for n in range(1, 65)]
    variants += [np.roll(words, n).tobytes() for n in range(1, 64)]
    variants += [words[n:].tobytes() for n in range(1, 64)]
    digests = {reference(variant) for variant in variants}
    assert len(digests) == len(set(variants))


def test_blocks_of_few_ones_have_digests_like_random_ones() -> None:
    num_bits = 8 * 16
    pairs = [(i, j) for i in range(num_bits) for j in range(i)]
    blocks = np.zeros((len(pairs), 16), np.uint8)
    for row, pair in zip(blocks, pairs, strict=True):
        for bit in pair:
            row[bit // 8] |= 1 << bit % 8
    sparse = torch.from_numpy(blocks).view(torch.int8)
    digests = launch.block_digest(sparse, torch.arange(len(pairs))[:512]).numpy()
    for begin in range(0, 16, 4):
        assert len(np.unique(digests[:, begin : begin + 4].copy().view(np.uint32))) >= 510
    assert len({reference(block.tobytes()) for block in blocks}) == len(pairs)


def test_what_does_not_fit_is_refused() -> None:
    ids = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="multiples of 8"):
        launch.block_digest(random_blocks(2, 12), ids)
    with pytest.raises(ValueError, match="one region"):
        launch.block_digest(random_blocks(2, 8, 8).transpose(1, 2), ids)
    with pytest.raises(ValueError, match="block_ids"):
        launch.block_digest(random_blocks(2, 8), ids.float())
    with pytest.raises(ValueError, match="kv_scales of 3"):
        launch.block_digest(random_blocks(2, 8), ids, torch.empty(3, 2))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mask = lane < count - offset", "mask = lane <= count - offset"),
        ("mask = lane < count - offset", "mask = lane < count - offset - 1"),
        ("begin + offset + lane + 1", "offset + lane + 1"),
        ("begin = NUM_WORDS + skipped", "begin = skipped"),
        ("block * block_stride", "which * block_stride"),
        ("tl.where(mask, z, 0)", "z"),
        ("tl.where(mask, t ^ (t >> 32), 0)", "tl.where(mask, t, 0)"),
        ("z ^ (z >> 30)", "z ^ (z >> 31)"),
        ("chunk < num_chunks", "chunk < num_chunks - 1"),
        ("NUM_SCALE_WORDS, tl.uint64", "NUM_WORDS, tl.uint64"),
    ],
)
def test_a_broken_kernel_is_noticed(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_tiles(monkeypatch, 32, 16)
    ids = torch.tensor([2, 0])
    cache, scales = random_blocks(4, 8 * 75), random_blocks(4, 8 * 37)

    def check() -> None:
        digests = launch.block_digest(cache[:3], ids, scales[:3])
        for digest, block in zip(digests, ids.tolist(), strict=True):
            assert bytes_of(digest) == reference(bytes_of(cache[block]), bytes_of(scales[block]))

    assert_caught(launch, old, new, check, tmp_path, monkeypatch)
