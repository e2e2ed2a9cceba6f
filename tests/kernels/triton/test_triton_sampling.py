"""The Triton sampler, in the interpreter, draws the tokens that the numpy reference draws."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.kernels.sampling import launch, reference
from engine.kernels.sampling.packed_rows import Results, RowLayout, pack_rows
from engine.kernels.sampling.rows import Draws, SampleRow
from tests.sampling_rows import HISTORY, ROW, assert_min_p_holds, min_p_rows, seen
from tests.sampling_rows import VARIANTS as PLAIN_VARIANTS

CPU = torch.device("cpu")
SMALL = launch.Config(tile=64, block=32, listed=4, group=2, capacity=48)
"""Many tiles, lists in parts, and more candidates than room: every loop turns more than once."""


VARIANTS = PLAIN_VARIANTS | {
    "banned-and-seen": replace(ROW, banned=(5, 9), presence=-20.0, seen=seen(*HISTORY, num_prompt=0)),
}


def sample(
    logits: Tensor, rows: list[SampleRow], config: launch.Config | None = None, *, gumbel: bool = False
) -> Draws:
    """Through poisoned workspace and results."""
    packed = pack_rows(rows, logits.shape[1], CPU)
    work = launch.Workspace(len(rows), logits.shape[1], CPU, num_edited=packed.kinds.num_edited, config=config)
    for part in vars(work).values():
        if isinstance(part, Tensor):
            part.fill_(float("nan") if part.is_floating_point() else -77)
    results = Results.empty(len(rows), packed.kinds.max_top, CPU)
    results.flat.fill_(-77)
    return launch.sample_packed(logits, packed, gumbel=gumbel, workspace=work, results=results).draws(len(rows))


def check(drawn: Draws, logits: Tensor, rows: list[SampleRow]) -> None:
    plain = reference.sample(logits.float().numpy(), rows)
    assert drawn.tokens.tolist() == plain.tokens.tolist()
    assert drawn.top_ids.tolist() == plain.top_ids.tolist()
    np.testing.assert_allclose(drawn.logprobs, plain.logprobs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(drawn.top_logprobs, plain.top_logprobs, rtol=1e-5, atol=1e-5)


def logits_of(vocab: int, spread: float = 3.0) -> Tensor:
    return torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)) * spread


@pytest.mark.parametrize("vocab", [32, 49, 1000, 4097], ids=lambda n: f"V{n}")
def test_tokens_equal_the_references(vocab: int) -> None:
    logits = logits_of(vocab)
    rows = [
        replace(row, logits_row=i % 3, seed=seed, choice=i % 2, position=i, num_logprobs=3)
        for i, row in enumerate(VARIANTS.values())
        for seed in (2**64 - 1 - i,)
    ]
    check(sample(logits, rows), logits, rows)


def test_tiles_blocks_and_overflowing_candidates_change_no_token() -> None:
    logits = logits_of(197)
    rows = [
        replace(row, logits_row=i % 3, seed=i, num_logprobs=2)
        for i, row in enumerate(VARIANTS[name] for name in ("plain", "top-p", "top-p-hot", "all-cuts", "all-penalties"))
    ]
    check(sample(logits, rows, SMALL), logits, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_with_many_equals_are_drawn_by_lower_id(dtype: torch.dtype) -> None:
    logits = logits_of(100, 1.0).round().to(dtype)  # -0.0 among them, which equals 0.0
    rows = [replace(VARIANTS["both"], logits_row=i, seed=i, num_logprobs=4) for i in range(3)]
    rows.append(replace(VARIANTS["greedy"], num_logprobs=4))
    check(sample(logits, rows), logits, rows)


def test_top_k_of_equals_keeps_the_k_lowest_ids() -> None:
    rows = [replace(ROW, top_k=3, seed=seed, num_logprobs=0) for seed in range(12)]
    drawn = sample(torch.zeros(1, 100), rows)
    assert set(drawn.tokens.tolist()) == {0, 1, 2}
    check(drawn, torch.zeros(1, 100), rows)


def test_no_draw_falls_below_min_p() -> None:
    logits = logits_of(49, 2.0)[:1]
    rows = min_p_rows(logits.numpy(), 3)
    for gumbel in (False, True):
        assert_min_p_holds(logits.numpy(), rows, sample(logits, rows, SMALL, gumbel=gumbel).tokens)


def test_a_row_without_any_number_still_answers_with_a_token() -> None:
    logits = torch.full((2, 40), float("nan"))
    logits[1] = float("-inf")
    rows = [replace(ROW, logits_row=row, top_k=k) for row in range(2) for k in (0, 5)]
    assert sample(logits, rows).tokens.tolist() == [0, 0, 0, 0]


def test_gumbels_maximum_is_the_references() -> None:
    logits = logits_of(49)
    rows = [replace(VARIANTS[name], seed=i) for i, name in enumerate(("plain", "both", "min-p", "top-p"))]
    want = reference.sample(logits.numpy(), rows, use_gumbel=True).tokens.tolist()
    assert sample(logits, rows, gumbel=True).tokens.tolist() == want


def test_gumbels_maximum_follows_the_distribution() -> None:
    """Chi-square over 20,000 draws of the reference; 40 is beyond the 0.9999 quantile for 9 degrees of freedom."""
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(3))
    rows = [replace(ROW, seed=7, position=position) for position in range(20_000)]
    counts = np.bincount(reference.sample(logits.numpy(), rows, use_gumbel=True).tokens, minlength=10)
    expected = logits[0].double().softmax(0).numpy() * 20_000
    assert ((counts - expected) ** 2 / expected).sum() < 40


def test_padding_writes_nothing() -> None:
    logits = logits_of(49)
    layout = RowLayout(4, 10)
    memory = torch.full((layout.num_bytes,), 0x7F, dtype=torch.uint8)
    kinds = layout.write([replace(ROW, num_logprobs=1)], 49, memory.numpy())
    results = Results.empty(4, 2, CPU)
    results.flat.fill_(-77)
    launch.sample_packed(logits, layout.rows_in(memory, replace(kinds, selects=True)), results=results)
    for part in (results.tokens, results.logprobs.view(torch.int32), results.top_ids):
        assert (part[0] != -77).any()
        assert (part[1:] == -77).all()
    assert results.top_ids[0, 1] == -77


def test_a_draw_does_not_depend_on_its_neighbours() -> None:
    logits = logits_of(49)
    rows = [replace(VARIANTS[name], num_logprobs=1) for name in ("plain", "both", "all-penalties")]
    together = sample(logits, rows)
    alone = [sample(logits, [row]) for row in rows]
    assert together.tokens.tolist() == [int(each.tokens[0]) for each in alone]
    assert together.logprobs.tolist() == [float(each.logprobs[0]) for each in alone]


@pytest.mark.parametrize(
    ("logits", "row", "message"),
    [
        (torch.zeros(1, 8), replace(ROW, presence=1.0, seen=seen(8, num_prompt=1)), "outside"),
        (torch.zeros(8), ROW, "expected"),
        (torch.zeros(1, 8, dtype=torch.int32), ROW, "expected"),
    ],
    ids=["history", "shape", "dtype"],
)
def test_what_does_not_fit_is_refused(logits: Tensor, row: SampleRow, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch.sample_packed(logits, pack_rows([row], 8, CPU))


def test_memory_or_a_workspace_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="room"):
        RowLayout(1).write([ROW, ROW], 8, np.zeros(RowLayout(1).num_bytes, np.uint8))
    packed = pack_rows([replace(ROW, banned=(1,), num_logprobs=2)], 8, CPU)
    with pytest.raises(ValueError, match="penalties or bans"):
        launch.sample_packed(torch.zeros(1, 8), packed, workspace=launch.Workspace(1, 8, CPU, num_edited=0))
    with pytest.raises(ValueError, match="top logprobs"):
        launch.sample_packed(torch.zeros(1, 8), packed, results=Results.empty(1, 1, CPU))


MUTATIONS = {
    "ties by higher id": ("rank == inside", "rank == num_equal"),
    "sum up to the goal": ("tl.sum(sums, 0) > goal", "tl.sum(sums, 0) >= goal"),
    "one key too many": ("tl.where(keys > low, weights, 0)", "tl.where(keys >= low, weights, 0)"),
    "top-k off by one": ("goal, wanted = top_k - 1,", "goal, wanted = top_k,"),
    "no nucleus": ("wanted = top_p != 0", "wanted = top_p == 1"),
    "min-p ignored": ("x >= lowest", "x == x"),
    "presence for the prompt": ("tl.where(counts > 0, presence, 0.0)", "presence"),
    "bans before the edges": ("ids < start + TILE", "ids < start + TILE - 1"),
    "choice ignored": ("tl.load(fields_at + CHOICE)", "tl.load(fields_at + POSITION)"),
    "no rescale of the tiles' sums": ("sums * tl.exp(tops - top)", "sums"),
}


def core_check() -> None:
    """The cheapest rows that notice every mutation."""
    logits = logits_of(130, 1.0).round()
    logits[0, 63] = 9.0
    rows = [
        replace(VARIANTS[each], logits_row=i % 3, seed=i, choice=3, num_logprobs=1)
        for i, each in enumerate(("both", "min-p", "all-penalties", "top-7", "top-p"))
    ]
    rows += [replace(ROW, top_k=2, temperature=100.0, seed=seed, num_logprobs=1) for seed in range(4)]
    rows.append(replace(ROW, min_p=0.9, logits_row=1, num_logprobs=1))
    rows.append(replace(ROW, temperature=0.0, num_logprobs=1, banned=(63,)))
    rows.append(replace(ROW, temperature=0.0, num_logprobs=1, presence=9.5, seen=seen(63, num_prompt=1)))
    check(sample(logits, rows, SMALL), logits, rows)


def test_without_a_mutation_the_core_check_passes() -> None:
    core_check()


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old, new = MUTATIONS[name]
    source = Path(launch.__file__).with_name("triton.py").read_text()
    assert old in source
    mutated = tmp_path / "mutated.py"
    mutated.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutated", mutated)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutated", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(launch, "_kernel", lambda kernel: getattr(module, kernel))
    with pytest.raises(AssertionError):
        core_check()
