"""Paged attention against float64: block sizes, groups, head sizes, mixed batches, poisoned slots; and the same bits
however the work is cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.kernels.attention import native, reference
from engine.kernels.native.library import NativeContext, load_library
from engine.kernels.native.program import Program, StepArrays

Chunks = list[tuple[int, int]]  # (start, num_tokens)
StepMaker = Callable[..., StepArrays]
LAYER = 1


class Paged:
    """Sequences of given lengths in a shuffled paged cache; slots that belong to nobody are NaN."""

    def __init__(self, lengths: list[int], kv_heads: int, block_size: int, dim: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        needs = [-(-length // block_size) for length in lengths]
        order = torch.randperm(sum(needs) + 3, generator=generator).tolist()
        self.cache = torch.full((len(order), kv_heads, 3, 2, block_size, dim), float("nan"))
        self.tables: list[list[int]] = []
        for length, need in zip(lengths, needs, strict=True):
            table = [order.pop() for _ in range(need)]
            self.tables.append(table)
            positions = torch.arange(length)
            blocks = torch.tensor(table)[positions // block_size]
            values = torch.randn(length, kv_heads, 2, dim, generator=generator)
            self.cache[blocks, :, LAYER, :, positions % block_size] = values

    def run(
        self, context: NativeContext, make_step: StepMaker, q: Tensor, chunks: dict[int, tuple[int, int]]
    ) -> Tensor:
        heads, dim = q.shape[1:]
        flat = q.flatten(1).contiguous()
        out = torch.full_like(flat, float("nan"))
        op = native.attention(flat, self.cache, LAYER, heads, out, dim**-0.5)
        step = make_step([(start, length, self.tables[i]) for i, (start, length) in chunks.items()])
        Program(context, [op]).run(step)
        return out.view_as(q)

    def want(self, q: Tensor, sequence: int, start: int) -> Tensor:
        table = torch.tensor(self.tables[sequence])
        keys, values = reference.gather_kv(self.cache, LAYER, table, start + q.shape[0])
        return reference.attention(q.double(), keys.double(), values.double(), start, q.shape[2] ** -0.5)


@pytest.mark.parametrize("block_size", [1, 4, 16, 128])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(1, 1, 2), (3, 1, 64), (9, 3, 64), (4, 4, 20), (6, 2, 80), (8, 1, 128), (2, 2, 256), (16, 1, 96)],
    ids=lambda value: str(value),
)
def test_mixed_batch_equals_float64(
    context: NativeContext, make_step: StepMaker, heads: int, kv_heads: int, dim: int, block_size: int
) -> None:
    chunks = {0: (0, 1), 1: (62, 1), 2: (0, 63), 3: (64, 1), 4: (17, 100), 5: (700, 1), 6: (500, 45)}
    paged = Paged([start + length for start, length in chunks.values()], kv_heads, block_size, dim)
    q = torch.randn(sum(length for _, length in chunks.values()), heads, dim)
    out = paged.run(context, make_step, q, chunks)
    begin = 0
    for sequence, (start, length) in chunks.items():
        rows = q[begin : begin + length]
        torch.testing.assert_close(
            out[begin : begin + length].double(), paged.want(rows, sequence, start), rtol=2e-5, atol=2e-6
        )
        begin += length


def test_large_scores_do_not_overflow(context: NativeContext, make_step: StepMaker) -> None:
    paged = Paged([130], 1, 16, 32)
    q = torch.randn(130, 1, 32) * 100
    torch.testing.assert_close(
        paged.run(context, make_step, q, {0: (0, 130)}).double(), paged.want(q, 0, 0), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_bits_do_not_depend_on_chunks_neighbours_or_threads(
    context: NativeContext, make_step: StepMaker, num_threads: int
) -> None:
    length = 1100  # three splits
    paged = Paged([length, 300], 2, 16, 64)
    q = torch.randn(length, 6, 64)
    whole = paged.run(context, make_step, q, {0: (0, length)})
    own = NativeContext(num_threads, load_library(context.library.build.isa))
    for start, end in ((0, 1), (63, 64), (64, 65), (511, 512), (512, 513), (1099, 1100), (1, 700), (500, 1100)):
        part = paged.run(own, make_step, q[start:end], {0: (start, end - start)})
        assert torch.equal(part, whole[start:end]), (start, end)
    mixed = paged.run(own, make_step, torch.cat((torch.randn(9, 6, 64), q[1024:1100])), {1: (291, 9), 0: (1024, 76)})
    assert torch.equal(mixed[9:], whole[1024:1100])
    own.close()


def test_shapes_that_do_not_fit_are_refused() -> None:
    cache = torch.zeros(2, 2, 1, 2, 4, 8)
    with pytest.raises(ValueError, match="must divide"):
        native.attention(torch.zeros(1, 24), cache, 0, 3, torch.zeros(1, 24), 1.0)
    with pytest.raises(ValueError, match="head_dim is 512"):
        native.attention(torch.zeros(1, 512), torch.zeros(1, 1, 1, 2, 4, 512), 0, 1, torch.zeros(1, 512), 1.0)
    with pytest.raises(ValueError, match="slots must be contiguous"):
        native.attention(torch.zeros(1, 16), torch.zeros(2, 2, 1, 2, 3, 8), 0, 2, torch.zeros(1, 16), 1.0)
