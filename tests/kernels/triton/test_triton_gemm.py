"""The batch-invariant GEMM in Triton: right against float64, and a row's bits are its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.kernels.gemm import launch
from engine.kernels.gemm.reference import gemm as reference
from tests.kernels.triton.mutants import assert_caught

NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TILE = launch.tile_config(0).constants
SHAPES = [(1, 1, 1), (TILE["BLOCK_M"] - 1, TILE["BLOCK_N"] + 1, 63), (TILE["BLOCK_M"] + 1, 70, 2 * TILE["BLOCK_K"] + 1)]


def room(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """NaN for an output, and a view of its inner part [rows, width]."""
    whole = torch.full((rows + 2, width + 3), NAN)
    return whole, whole[1:-1, 1:-2]


def padded(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Random numbers [rows, width] with NaN around them, as the next tensor in memory may hold."""
    whole = torch.full((rows + 2, width + 5), NAN, dtype=dtype)
    whole[1:-1, 2:-3] = torch.randn(rows, width).to(dtype)
    return whole[1:-1, 2:-3]


@pytest.mark.parametrize("extra", ["", "bias", "residual", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES, ids=lambda v: str(v))
def test_gemm_equals_float64(m: int, n: int, k: int, dtype: torch.dtype, extra: str) -> None:
    x, weight = padded(m, k, dtype), padded(n, k, dtype)
    bias = torch.randn(n).to(dtype) if extra in ("bias", "both") else None
    residual = padded(m, n, dtype) if extra in ("residual", "both") else None
    whole, y = room(m, n)
    launch.gemm(x, weight, y, bias, residual)
    want = reference(x.double(), weight.double(), *(t if t is None else t.double() for t in (bias, residual)))
    # The products are exact and the sums float32, whatever the inputs are: an error of 2^-24 per addition at most.
    error = 2.0**-23 * (k + 4) ** 0.5 * (x.double().abs() @ weight.double().abs().T + 8).max()
    assert (y.double() - want).abs().max() <= error
    y.fill_(NAN)
    assert whole.isnan().all()


def test_the_residual_may_be_the_result() -> None:
    x, weight, y = torch.randn(5, 40), torch.randn(9, 40), torch.randn(5, 9)
    want = reference(x.double(), weight.double(), None, y.double())
    launch.gemm(x, weight, y, residual=y)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    x, weight = torch.randn(37, 150).to(dtype), torch.randn(70, 150).to(dtype)
    whole = torch.full((37, 70), NAN)
    launch.gemm(x, weight, whole)
    for begin, end in [(0, 1), (20, 21), (36, 37), (7, 30), (15, 18)]:
        part = torch.full((end - begin, 70), NAN)
        launch.gemm(x[begin:end], weight, part)
        assert torch.equal(part, whole[begin:end])


def test_neighbours_that_are_not_numbers_stay_out_of_a_row() -> None:
    x, weight = torch.randn(6, 50), torch.randn(8, 50)
    alone, among = torch.full((1, 8), NAN), torch.full((6, 8), NAN)
    launch.gemm(x[3:4], weight, alone)
    x[[0, 1, 2, 4, 5]] = NAN
    launch.gemm(x, weight, among)
    assert torch.equal(among[3:4], alone)


def test_what_does_not_fit_is_refused() -> None:
    x, weight, y = torch.empty(2, 8), torch.empty(4, 8), torch.empty(2, 4)
    with pytest.raises(ValueError, match="do not fit"):
        launch.gemm(x, torch.empty(4, 9), y)
    with pytest.raises(ValueError, match="bfloat16"):
        launch.gemm(x.bfloat16(), weight, y)
    with pytest.raises(ValueError, match="bias"):
        launch.gemm(x, weight, y, torch.empty(5))
    with pytest.raises(ValueError, match="residual"):
        launch.gemm(x, weight, y, residual=torch.empty(4, 2))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mask = (row < m)[:, None]", "mask = (row <= m)[:, None]"),
        ("mask = (row < m)[:, None] & (column < n)", "mask = (row < m)[:, None] & (column <= n)"),
        ("(inner < k - begin)[None, :]", "(inner <= k - begin)[None, :]"),
        ("(inner < k - begin)[:, None]", "(inner < k - begin - 1)[:, None]"),
        ("w_place + begin", "w_place"),
        ("tl.dot(a, b, total,", "tl.dot(a, b,"),
        ("range(0, k, BLOCK_K)", "range(0, k - BLOCK_K, BLOCK_K)"),
        ("bias + column,", "bias + column // 2,"),
        ("total += tl.load(residual", "total = tl.load(residual"),
    ],
)
def test_a_broken_kernel_is_noticed(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        test_gemm_equals_float64(*SHAPES[2], torch.float32, "both")
        # Past its end the residual is NaN, as what must stay of the output is.
        test_gemm_equals_float64(*SHAPES[2], torch.float32, "bias")

    assert_caught(launch, old, new, check, tmp_path, monkeypatch)
