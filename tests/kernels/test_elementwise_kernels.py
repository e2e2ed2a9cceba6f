"""Embedding, RMSNorm, and RoPE with the KV write against their references."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from engine.kernels.embedding.native import embed
from engine.kernels.linear import native as linear
from engine.kernels.native.library import NativeContext, Rows
from engine.kernels.native.program import Program, StepArrays
from engine.kernels.rms_norm import native as rms_norm
from engine.kernels.rms_norm.reference import rms_norm as reference_norm
from engine.kernels.rope import native as rope
from engine.kernels.rope.reference import rotate

StepMaker = Callable[..., StepArrays]


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 15), (40, 16), (33, 577)], ids=lambda v: str(v))
def test_rms_norm_equals_float64(context: NativeContext, make_step: StepMaker, rows: int, width: int) -> None:
    x, weight, y = torch.randn(rows, width), torch.randn(width), torch.full((rows + 1, width), float("nan"))
    Program(context, [rms_norm.rms_norm(x, weight, y, 1e-5)]).run(make_step([(0, rows, [0])]))
    want = reference_norm(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(y[:rows].double(), want, rtol=1e-5, atol=1e-6)
    assert y[rows].isnan().all()


def test_sampled_rows_are_gathered_while_they_are_normalised(context: NativeContext, make_step: StepMaker) -> None:
    x, weight, y = torch.randn(9, 24), torch.randn(24), torch.full((3, 24), float("nan"))
    op = rms_norm.rms_norm(x, weight, y, 1e-5, Rows.SAMPLED)
    Program(context, [op]).run(make_step([(0, 9, [0])], sampled=[8, 0, 4]))
    torch.testing.assert_close(y, reference_norm(x[[8, 0, 4]], weight, 1e-5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embedding_reads_rows_of_the_packed_weight(
    context: NativeContext, make_step: StepMaker, dtype: torch.dtype
) -> None:
    weight, ids = torch.randn(101, 23), [0, 100, 7, 7, 64, 33]
    panels = torch.zeros(linear.packed_size(context, 101, 23), dtype=dtype)
    packed, y = linear.pack(context, [weight], panels), torch.full((6, 23), float("nan"))
    Program(context, [embed(packed, y)]).run(make_step([(0, 6, [0])], token_ids=ids))
    assert torch.equal(y, weight[ids].to(dtype).float())


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize(("dim", "block_size"), [(2, 1), (20, 4), (64, 16), (128, 128)], ids=lambda v: str(v))
def test_rope_rotates_queries_and_writes_only_its_own_slots(
    context: NativeContext, make_step: StepMaker, dim: int, block_size: int, normed: bool
) -> None:
    heads, kv_heads, chunks = 6, 2, [(0, 5), (30, 1), (7, 20)]
    blocks = [-(-(start + length) // block_size) for start, length in chunks]
    tables = [list(range(sum(blocks[:i]), sum(blocks[: i + 1]))) for i in range(3)]
    cache = torch.full((sum(blocks), kv_heads, 2, 2, block_size, dim), float("nan"))
    positions = torch.cat([torch.arange(start, start + length) for start, length in chunks])
    angles = torch.rand(64, dim // 2)
    cos, sin = angles.cos(), angles.sin()
    qkv = torch.randn(len(positions), (heads + 2 * kv_heads) * dim)
    q, k, v = qkv.clone().unflatten(1, (-1, dim)).split((heads, kv_heads, kv_heads), 1)
    norms = (torch.randn(dim), torch.randn(dim)) if normed else (None, None)
    if norms[0] is not None and norms[1] is not None:
        q, k = reference_norm(q, norms[0], 1e-6), reference_norm(k, norms[1], 1e-6)
    op = rope.rope_write(qkv, cache, 1, heads, *norms, epsilon=1e-6)
    step = make_step([(*chunk, table) for chunk, table in zip(chunks, tables, strict=True)], cos=cos, sin=sin)
    Program(context, [op]).run(step)

    want_q, want_k = (rotate(x, cos[positions], sin[positions]) for x in (q, k))
    torch.testing.assert_close(qkv[:, : heads * dim], want_q.flatten(1), rtol=1e-5, atol=1e-5)
    row_blocks = torch.tensor([tables[i][p // block_size] for i, (s, n) in enumerate(chunks) for p in range(s, s + n)])
    slots = positions % block_size
    torch.testing.assert_close(cache[row_blocks, :, 1, 0, slots], want_k, rtol=1e-5, atol=1e-5)
    assert torch.equal(cache[row_blocks, :, 1, 1, slots], v)
    cache[row_blocks, :, 1, :, slots] = float("nan")
    assert cache.isnan().all()
