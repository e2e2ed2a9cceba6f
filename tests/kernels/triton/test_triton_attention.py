"""Paged attention in Triton against float64: chunks, decodes, trees; slots that belong to nobody are NaN; and the same
bits however the work is cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.kernels.attention import launch, reference
from engine.kernels.attention.launch import AttentionOptions, AttentionShape, TileConfig
from engine.kernels.device_step import DeviceStep
from tests.kernels.triton.mutants import assert_caught

LAYER = 1
FP8 = torch.float8_e4m3fn
TILE = TileConfig(block_m=16, block_n=16, split_size=0, num_warps=4, num_stages=1, programs_per_sm=2)
FIXED = replace(TILE, split_size=32)
ROOM = 1000
MIXED = [(0, 1), (0, 15), (15, 1), (0, 17), (16, 16), (45, 18), (62, 1)]  # (start, num_tokens)


@dataclass
class Batch:
    """Sequences of given (start, num_tokens) in a shuffled paged cache; a (0, 0) is a padding sequence of one row."""

    chunks: list[tuple[int, int]]
    heads: int = 6
    kv_heads: int = 2
    dim: int = 16
    block_size: int = 4
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        kv_dtype = self.kv_dtype or self.dtype
        totals = [start + length for start, length in self.chunks]
        needs = [-(-total // self.block_size) for total in totals]
        order = torch.randperm(sum(needs) + 2).tolist()
        quantised = kv_dtype in (torch.int8, FP8)
        cache = torch.full((len(order), self.kv_heads, 3, 2, self.block_size, self.dim), float("nan"))
        self.scales = torch.full(cache.shape[:5], float("nan")) if quantised else None
        # What is behind a table's last block is no block at all.
        self.tables = torch.full((len(totals), max(*needs, 1) + 1), 2**31 - 1, dtype=torch.int32)
        self.cache = cache.nan_to_num(127).to(kv_dtype) if kv_dtype == torch.int8 else cache.to(kv_dtype)
        for sequence, (total, need) in enumerate(zip(totals, needs, strict=True)):
            table = torch.tensor([order.pop() for _ in range(need)], dtype=torch.int64)
            self.tables[sequence, :need] = table.int()
            at = torch.arange(total)
            blocks, slots = table[at // self.block_size], at % self.block_size
            values = torch.randn(total, self.kv_heads, 2, self.dim) * (40 if quantised else 1)
            self.cache[blocks, :, LAYER, :, slots] = values.to(kv_dtype)
            if self.scales is not None:
                self.scales[blocks, :, LAYER, :, slots] = torch.rand(total, self.kv_heads, 2) / 40
        rows = [length or 1 for _, length in self.chunks]
        starts = torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32)
        empty = torch.empty(0)
        self.step = DeviceStep(
            empty, empty, empty, starts, torch.tensor(totals, dtype=torch.int32), self.tables, empty, max(rows),
            max(totals),
        )  # fmt: skip
        # A view into the rows of a fused projection.
        width = (self.heads + 2 * self.kv_heads) * self.dim
        fused = torch.randn(sum(rows), width).to(self.dtype)
        self.q = fused[:, : self.heads * self.dim].unflatten(1, (self.heads, self.dim))

    def run(
        self,
        config: TileConfig | None = TILE,
        room: int = ROOM,
        parents: list[list[int]] | None = None,
        q: Tensor | None = None,
        workspace: launch.Workspace | None = None,
        **options: float,
    ) -> Tensor:
        q = self.q if q is None else q
        out = torch.full_like(q, float("nan"))
        workspace = workspace or poisoned_workspace(room, self.heads, self.dim)
        ends = torch.tensor([end for tree in parents or () for end in reference.tree_ends(tree)], dtype=torch.int32)
        launch.paged_attention(
            q, self.cache, LAYER, self.step, out, AttentionOptions(**{"scale": self.dim**-0.5, **options}),
            workspace, kv_scales=self.scales, tree_ends=ends if parents else None, config=config,
        )  # fmt: skip
        return out

    def want(self, parents: list[list[int]] | None = None, window: int = 0, soft_cap: float = 0.0) -> Tensor:
        rows = []
        for sequence, (start, length) in enumerate(self.chunks):
            begin = int(self.step.cu_seqlens_q[sequence])
            if not length:
                rows.append(torch.zeros(1, self.heads, self.dim, dtype=torch.float64))
                continue
            table = self.tables[sequence, : -(-(start + length) // self.block_size)].long()
            keys, values = reference.gather_kv(self.cache, LAYER, table, start + length, self.scales)
            rows.append(
                reference.attention(
                    self.q[begin : begin + length].double(), keys.double(), values.double(), start, self.dim**-0.5,
                    window, soft_cap, parents[sequence] if parents else None,
                )
            )  # fmt: skip
        return torch.cat(rows)

    def assert_close(self, out: Tensor, want: Tensor) -> None:
        # A weighted mean of values below 5: weights and the result are rounded once each; sums are in float32.
        # (The interpreter cuts bfloat16 off: the whole last bit.)
        eps = 2 * torch.finfo(self.dtype).eps if self.dtype != torch.float32 else 1e-6
        torch.testing.assert_close(out.double(), want, rtol=eps, atol=5 * eps)


def poisoned_workspace(room: int, heads: int, dim: int) -> launch.Workspace:
    workspace = launch.make_workspace(room, heads, dim, torch.device("cpu"))
    workspace.partials.fill_(float("nan"))
    workspace.stats.fill_(float("nan"))
    return workspace


@pytest.mark.parametrize("room", [0, ROOM], ids=["one-program", "splits"])
@pytest.mark.parametrize("config", [TILE, FIXED], ids=["fast", "fixed"])
def test_a_mixed_batch_equals_float64(config: TileConfig, room: int) -> None:
    batch = Batch(MIXED)
    batch.assert_close(batch.run(config, room), batch.want())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size", "start"),
    [
        (1, 1, 64, 1, 14), (3, 1, 80, 2, 15), (2, 2, 96, 16, 16), (4, 1, 128, 64, 62), (20, 1, 2, 128, 63),
        (2, 1, 112, 32, 31), (2, 1, 256, 256, 299),
    ],
    ids=lambda value: str(value),
)  # fmt: skip
def test_shapes_equal_float64(heads: int, kv_heads: int, dim: int, block_size: int, start: int) -> None:
    batch = Batch([(start, 1), (0, 3), (start - 2, 5)], heads, kv_heads, dim, block_size)
    batch.assert_close(batch.run(replace(TILE, block_m=32)), batch.want())


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, FP8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_types_of_queries_and_cache_equal_float64(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    batch = Batch([(0, 9), (70, 1)], 2, 1, dtype=dtype, kv_dtype=kv_dtype)
    batch.assert_close(batch.run(), batch.want())


@pytest.mark.parametrize("config", [TILE, FIXED], ids=["fast", "fixed"])
@pytest.mark.parametrize(("window", "soft_cap"), [(1, 0.0), (17, 0.0), (40, 2.0), (0, 2.0)])
def test_window_and_soft_cap_equal_float64(window: int, soft_cap: float, config: TileConfig) -> None:
    batch = Batch([(0, 20), (100, 1), (63, 9)], 2, 1)
    out = batch.run(config, window=window, soft_cap=soft_cap)
    batch.assert_close(out, batch.want(window=window, soft_cap=soft_cap))


@pytest.mark.parametrize("config", [TILE, FIXED, None], ids=["fast", "fixed", "shipped"])
def test_a_long_context_equals_float64(config: TileConfig | None) -> None:
    batch = Batch([(1023, 1), (517, 2)], 2, 1, block_size=16)
    batch.assert_close(batch.run(config), batch.want())


@pytest.mark.parametrize("room", [0, ROOM], ids=["one-program", "splits"])
def test_tiles_before_the_window_are_not_even_looked_up(room: int) -> None:
    """Their blocks may be gone: a table's entry of no block would end the interpreter."""
    batch = Batch([(100, 1), (64, 3)], 2, 1)
    want = batch.want(window=17)
    batch.tables[0, : 80 // 4] = batch.tables[1, : 48 // 4] = 2**31 - 1
    batch.assert_close(batch.run(room=room, window=17), want)


def test_large_scores_do_not_overflow() -> None:
    batch = Batch([(0, 20), (50, 1)])
    batch.q.mul_(100)
    # Scores of 1000 have an error of 1e-4 in float32.
    torch.testing.assert_close(batch.run().double(), batch.want(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", [None, FIXED], ids=["shipped", "fixed"])
def test_a_padding_sequence_gets_zeros_and_reads_nothing(config: TileConfig | None) -> None:
    batch = Batch([(0, 0), (40, 1), (0, 0)])
    batch.tables[0] = batch.tables[2] = 2**31 - 1
    out = batch.run(config)
    batch.assert_close(out, batch.want())
    assert not out[0].any()
    assert not out[2].any()
    only_padding = Batch([(0, 0), (0, 0)])
    assert not only_padding.run(config).any()


def random_tree(nodes: int) -> list[int]:
    """Parents in depth-first order: a node's parent is the node before it or one of that node's ancestors."""
    parents = [-1]
    for node in range(1, nodes):
        lineage = [node - 1]
        while parents[lineage[-1]] >= 0:
            lineage.append(parents[lineage[-1]])
        parents.append(lineage[int(torch.randint(len(lineage), ()))])
    return parents


@pytest.mark.parametrize("config", [TILE, FIXED], ids=["fast", "fixed"])
def test_nodes_of_a_tree_see_the_context_and_their_ancestors(config: TileConfig) -> None:
    batch = Batch([(40, 11), (0, 20), (63, 1)], 2, 1)
    parents = [random_tree(length) for _, length in batch.chunks]
    parents[0][5] = -1  # a forest: two candidates for the very next token
    parents[0][6:] = [5, 6, 6, 5, 9]
    batch.assert_close(batch.run(config, parents=parents), batch.want(parents))


def test_a_tree_that_is_a_chain_has_the_bits_of_a_chunk() -> None:
    batch = Batch([(40, 11), (7, 3)], 2, 1)
    chains = [list(range(-1, length - 1)) for _, length in batch.chunks]
    assert torch.equal(batch.run(FIXED, parents=chains), batch.run(FIXED))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_unified_maximum_equals_float64_without_a_fallback(dtype: torch.dtype) -> None:
    batch = Batch([(80, 1), (0, 1), (33, 1)], 4, 2, dtype=dtype)
    workspace = poisoned_workspace(ROOM, 4, 16)
    # Single keys have any score; float16 wants all sums between 1 and 2^15: the level lies a little below.
    out = batch.run(workspace=workspace, unified_maximum=-4.0)
    batch.assert_close(out, batch.want())
    assert workspace.fallbacks.item() == 0


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("level", [-500.0, 500.0])
def test_a_unified_maximum_that_is_far_off_falls_back_and_is_counted(level: float) -> None:
    batch = Batch([(80, 1), (0, 0), (33, 1)], 4, 2)
    workspace = poisoned_workspace(ROOM, 4, 16)
    batch.assert_close(batch.run(workspace=workspace, unified_maximum=level), batch.want())
    # Splits of 64 keys and two KV heads: 2 * 2 of the first sequence, 2 of the last, none of the padding.
    assert workspace.fallbacks.item() == 6


def part_of(batch: Batch, ranges: dict[int, tuple[int, int]]) -> tuple[Batch, Tensor]:
    """A step over positions [start, end) of some sequences of a whole-prompt batch, and its rows there."""
    starts = batch.step.cu_seqlens_q.tolist()
    rows = torch.cat([torch.arange(starts[i] + start, starts[i] + end) for i, (start, end) in ranges.items()])
    part = Batch.__new__(Batch)
    part.__dict__.update(vars(batch))
    lengths = [end - start for start, end in ranges.values()]
    part.q = batch.q[rows]
    part.step = replace(
        batch.step,
        cu_seqlens_q=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        seq_lens=torch.tensor([end for _, end in ranges.values()], dtype=torch.int32),
        block_tables=batch.tables[list(ranges)],
        max_query_len=max(lengths),
        max_seq_len=max(end for _, end in ranges.values()),
    )
    return part, rows


@pytest.mark.parametrize("room", [0, ROOM], ids=["one-program", "splits"])
@pytest.mark.parametrize("window", [0, 21])
def test_a_prompt_has_the_bits_of_its_decodes(window: int, room: int) -> None:
    batch = Batch([(0, 70)], 3, 1, 20)
    whole = batch.run(FIXED, 0, window=window)
    for position in (0, 1, 15, 16, 31, 32, 33, 63, 64, 69):
        decode, rows = part_of(batch, {0: (position, position + 1)})
        assert torch.equal(decode.run(FIXED, room, window=window), whole[rows]), position


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8], ids=str)
def test_bits_do_not_depend_on_chunks_neighbours_or_programs(kv_dtype: torch.dtype) -> None:
    batch = Batch([(0, 70), (0, 20)], 3, 1, 20, kv_dtype=kv_dtype)
    whole = batch.run(FIXED, 0)
    for ranges in ({0: (0, 17)}, {0: (17, 70)}, {1: (3, 20), 0: (33, 35)}, {0: (69, 70), 1: (19, 20)}):
        part, rows = part_of(batch, ranges)
        for room, config in ((0, replace(FIXED, programs_per_sm=1)), (ROOM, FIXED)):
            assert torch.equal(part.run(config, room), whole[rows]), (ranges, room)


def test_the_shipped_deterministic_constants_hold_for_prompts_and_decodes() -> None:
    for arch, dim, group in itertools.product((0, 80, 90, 100), (64, 128, 256), (1, 4, 7)):
        shape = AttentionShape(
            kv_heads=2, group=group, head_dim=dim, block_size=16, quantised=False, dot=launch.tl.bfloat16
        )
        prompt, decode = (
            launch.tile_config(arch, shape, decode=decode, deterministic=True) for decode in (False, True)
        )
        assert prompt == decode
        assert prompt.split_size % prompt.block_n == 0
        assert prompt.split_size > 0


def test_splits_stay_within_the_workspace() -> None:
    assert launch.max_splits(4096, FIXED, 128) == 128
    assert launch.max_splits(4097, FIXED, 128) == 1  # as many as needed or none: the bits are the same
    assert launch.max_splits(4097, TILE, 10) == 10
    assert launch.max_splits(4097, TILE, 0) == 1
    assert launch.max_splits(1, TILE, 10) == 1


def test_offsets_beyond_two_to_the_31_are_reached() -> None:
    batch = Batch([(20, 3)], 2, 1, kv_dtype=torch.int8)
    # Pages of it that nobody touches are not there: the blocks lie 2^29 elements apart.
    far = torch.empty(2**29 * batch.cache.shape[0], dtype=torch.int8).view(batch.cache.shape[0], 2**29)
    view = far[:, : batch.cache[0].numel()].view(batch.cache.shape)
    view.copy_(batch.cache)
    want, batch.cache = batch.want(), view
    batch.assert_close(batch.run(), want)


def wrong_arguments() -> list[tuple[str, str, dict[str, object]]]:
    return [
        ("layer is 3", "layer", {"layer": 3}),
        ("divide", "heads", {"q": torch.zeros(3, 5, 16), "out": torch.zeros(3, 5, 16)}),
        ("out is", "out", {"out": torch.zeros(2, 4, 16)}),
        ("power of two", "block-size", {"cache": torch.zeros(3, 2, 2, 2, 6, 16)}),
        ("needs kv_scales", "scales", {"cache": torch.zeros(3, 2, 2, 2, 4, 16, dtype=torch.int8)}),
        ("needs no kv_scales", "no-scales", {"kv_scales": torch.zeros(3, 2, 2, 2, 4)}),
        ("scale must", "scale", {"options": AttentionOptions(scale=0.0)}),
        ("neighbours", "unified", {"options": AttentionOptions(scale=1.0, deterministic=True, unified_maximum=0.0)}),
        ("tree's", "window", {"options": AttentionOptions(scale=1, window=3), "tree_ends": torch.ones(3).int()}),
        ("tree_ends is", "tree", {"tree_ends": torch.ones(2).int()}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("message", "change"), [pytest.param(message, change, id=name) for message, name, change in wrong_arguments()]
)
def test_what_does_not_fit_is_refused(message: str, change: dict[str, object]) -> None:
    batch = Batch([(0, 3)], 4, 2)
    arguments: dict[str, object] = {
        "q": batch.q, "cache": batch.cache, "layer": LAYER, "step": batch.step, "out": torch.empty_like(batch.q),
        "options": AttentionOptions(scale=1.0), "workspace": poisoned_workspace(0, 4, 16),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        launch.paged_attention(**{**arguments, **change})  # pyright: ignore[reportArgumentType]


def check_chunks() -> None:
    torch.manual_seed(0)  # some inputs hide some mutations
    batch = Batch([(0, 9), (30, 3)], 3, 1, 16)
    batch.assert_close(batch.run(FIXED, 0), batch.want())
    batch.assert_close(batch.run(TILE, 0, window=9), batch.want(window=9))


def check_splits() -> None:
    torch.manual_seed(0)  # some inputs hide some mutations
    batch = Batch([(70, 1), (40, 1)], 3, 1, 16)
    batch.assert_close(batch.run(FIXED), batch.want())
    batch.assert_close(batch.run(FIXED, window=9), batch.want(window=9))


def check_unified() -> None:
    torch.manual_seed(0)  # some inputs hide some mutations
    batch = Batch([(33, 1)], 2, 1)
    for level in (0.0, 500.0):
        batch.assert_close(batch.run(unified_maximum=level), batch.want())


def check_trees_and_caps() -> None:
    torch.manual_seed(0)  # some inputs hide some mutations
    batch = Batch([(18, 4)], 2, 1, kv_dtype=torch.int8)
    parents = [[-1, 0, 1, 0]]
    batch.assert_close(batch.run(parents=parents, soft_cap=2.0), batch.want(parents, soft_cap=2.0))


@pytest.mark.parametrize(
    ("check", "old", "new"),
    [
        (check_chunks, "positions[None, :] <= row_positions", "positions[None, :] < row_positions"),
        (check_chunks, "row_positions[:, None] - WINDOW", "row_positions[:, None] - WINDOW - 1"),
        (check_chunks, "context + first_token - WINDOW + 1", "context + first_token - WINDOW + BLOCK_N + 1"),
        (check_chunks, "known = positions < seq_len", "known = positions <= seq_len"),
        (check_chunks, "context + first_token + 1)", "context + first_token + BLOCK_N)"),
        (check_chunks, "acc = acc * shrink[:, None]\n", "pass\n"),
        (check_chunks, "tl.fma(total, shrink, tl.sum(weights, 1))", "total + tl.sum(weights, 1)"),
        (check_splits, "tl.fma(acc, shrink[:, None], other_acc", "tl.fma(acc, 1.0, other_acc"),
        (check_chunks, "start = start // TOKENS + middle", "start = start // TOKENS"),
        (check_splits, "minimum(end, (split + 1) * split_size)", "minimum(end, (split + 1) * split_size - BLOCK_N)"),
        (check_splits, "range(begin // split_size, tl.cdiv(end, split_size))", "range(0, tl.cdiv(end, split_size))"),
        (check_splits, "tl.cdiv(end, split_size))", "end // split_size)"),
        (check_splits, "other_total * other_shrink", "other_total"),
        (check_splits, "positions % BLOCK_SIZE", "(positions + 1) % BLOCK_SIZE"),
        (check_unified, "(total < least) |", ""),
        (check_trees_and_caps, "row_tokens[:, None] < ends", "row_tokens[:, None] <= ends"),
        (check_trees_and_caps, "scores * key_scales[None, :]", "scores"),
        (check_trees_and_caps, "weights * value_scales[None, :]", "weights"),
        (check_trees_and_caps, "2.0 * LOG2_E / SOFT_CAP", "LOG2_E / SOFT_CAP"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or value[:30].strip().replace(" ", "_"),
)  # fmt: skip
def test_a_mutation_is_caught(
    check: Callable[[], None], old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_caught(launch, old, new, check, tmp_path, monkeypatch)
