"""The embedding lookup in Triton against indexing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.kernels.embedding import launch
from engine.kernels.embedding.reference import embed as reference
from tests.kernels.triton.mutants import assert_caught

NAN = float("nan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "n"), [(1, 1), (15, 64), (17, 63)], ids=lambda v: str(v))
def test_embedding_copies_the_rows_of_the_tokens(tokens: int, n: int, dtype: torch.dtype) -> None:
    weight, ids = torch.randn(29, n + 2).to(dtype)[:, 1 : 1 + n], torch.randint(29, (tokens,), dtype=torch.int32)
    whole = torch.full((tokens + 2, n + 3), NAN, dtype=dtype)
    y = whole[1:-1, 1:-2]
    launch.embed(ids, weight, y)
    assert torch.equal(y, reference(ids, weight))
    y.fill_(NAN)
    assert whole.isnan().all()


def test_rows_wider_than_a_tile_are_whole() -> None:
    n = launch.tile_config(0, 1 << 20).constants["BLOCK"] + 1
    weight, ids, y = torch.randn(3, n), torch.tensor([2, 0], dtype=torch.int32), torch.full((2, n), NAN)
    launch.embed(ids, weight, y)
    assert torch.equal(y, weight[[2, 0]])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        launch.embed(torch.zeros(3, dtype=torch.int32), torch.empty(5, 8), torch.empty(2, 8))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(row < num_tokens)[:, None]", "(row <= num_tokens)[:, None]"),
        ("(column < N)", "(column <= N)"),
        ("token_ids + row,", "token_ids + row // 2,"),
        ("+ column[None, :], mask, 0.0)", "+ column[None, :] // 2, mask, 0.0)"),
    ],
)
def test_a_broken_kernel_is_noticed(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        torch.manual_seed(1)
        test_embedding_copies_the_rows_of_the_tokens(15, 63, torch.float32)

    assert_caught(launch, old, new, check, tmp_path, monkeypatch)
