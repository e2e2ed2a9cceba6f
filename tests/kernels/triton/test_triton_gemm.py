"""The batch-invariant GEMM in Triton: right against float64, and a row's bits are its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels.gemm import launch
from engine.kernels.gemm.reference import gemm as reference
from tests.kernels.triton.mutants import assert_caught

ROOT = Path(__file__).parents[3]
NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TILE = launch.tile_config(0).constants
SHAPES = [(1, 1, 1), (TILE["BLOCK_M"] - 1, TILE["BLOCK_N"] + 1, 63), (TILE["BLOCK_M"] + 1, 70, 2 * TILE["BLOCK_K"] + 1)]
LONG = 8 * TILE["BLOCK_K"] + 65  # K of two pieces, the second with a ragged end
BY_PIECE = (TILE["BLOCK_M"] + 1, 70, LONG)  # a program for each piece
IN_TURN = (2 * TILE["BLOCK_M"] + 1, 70, LONG)  # one program for both
SHAPES += [BY_PIECE, IN_TURN]


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


@pytest.mark.parametrize("k", [150, LONG])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_alone_and_among_others(dtype: torch.dtype, k: int) -> None:
    x, weight = torch.randn(37, k).to(dtype), torch.randn(70, k).to(dtype)
    whole = torch.full((37, 70), NAN)
    launch.gemm(x, weight, whole)
    for begin, end in [(0, 1), (20, 21), (36, 37), (7, 30), (15, 18)]:
        part = torch.full((end - begin, 70), NAN)
        launch.gemm(x[begin:end], weight, part)
        assert torch.equal(part, whole[begin:end])


_ROWS_BY_THEMSELVES = """
import torch
from engine.dispatch import Device, Dispatch, Kernels, enter
enter(Dispatch(Kernels.TRITON, Device.CPU, ""))
from engine.kernels.gemm.launch import gemm
x, weight, whole = torch.randn(16, 150), torch.randn(70, 150), torch.empty(16, 70)
gemm(x, weight, whole)
for shift in range(16):
    shifted = torch.empty(16, 70)
    gemm(x.roll(shift, 0), weight, shifted)
    assert torch.equal(shifted, whole.roll(shift, 0)), shift
"""


def test_a_rows_bits_depend_on_no_processors_blas() -> None:
    """In a process of its own, whose BLAS believes that it runs on AVX2: a worker that interprets its kernels."""
    environment = os.environ | {"OPENBLAS_CORETYPE": "Haswell"}
    command = [sys.executable, "-c", _ROWS_BY_THEMSELVES]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, timeout=100, check=False, text=True, stderr=subprocess.PIPE
    )
    assert done.returncode == 0, done.stderr


def test_a_program_takes_its_pieces_in_turn_only_where_there_are_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes above do go both ways."""
    ran = list[str]()
    for name in ("gemm_kernel", "gemm_piece_kernel", "gemm_join_kernel"):
        kernel = getattr(launch, name)

        class Noting:
            def __init__(self, name: str, kernel: Any) -> None:
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                ran.append(f"{self.name} {grid}")
                return self.kernel[grid]

        monkeypatch.setattr(launch, name, Noting(name, kernel))
    for m, n, k in (BY_PIECE, IN_TURN, SHAPES[0]):
        launch.gemm(torch.randn(m, k), torch.randn(n, k), torch.empty(m, n))
    assert ran == [
        "gemm_piece_kernel (2, 2, 2)",
        f"gemm_join_kernel ({BY_PIECE[0]}, 1)",
        "gemm_kernel (3, 2)",
        "gemm_kernel (1, 1)",
    ]


@pytest.mark.parametrize(
    ("n", "k", "num_pieces"),
    [
        (4096, 4096, 8),  # an 8B model's attention output
        (4096, 14336, 8),  # its MLP's output
        (6144, 4096, 5),  # its QKV
        (28672, 4096, 1),  # gate and up: programs enough
        (151936, 4096, 1),  # a head
        (1024, 2048, 8),  # a 0.6B model's attention output
        (1024, 3072, 12),
        (64, 128, 1),
    ],
)
def test_pieces_of_k_make_programs_for_a_whole_gpu(n: int, k: int, num_pieces: int) -> None:
    tile = launch.tile_config(90)
    piece = launch.piece_of(n, k, tile)
    assert -(-k // piece) == num_pieces
    assert piece % tile.constants["BLOCK_K"] == 0
    assert num_pieces == 1 or 256 <= piece < k


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
        ("(inner < k - at)[None, :]", "(inner <= k - at)[None, :]"),
        ("(inner < k - at)[:, None]", "(inner < k - at - 1)[:, None]"),
        ("w_place + at", "w_place"),
        ("tl.dot(a, b, total,", "tl.dot(a, b,"),
        ("range(begin, end, BLOCK_K)", "range(begin, end - BLOCK_K, BLOCK_K)"),
        ("bias + column, column", "bias + column // 2, column"),
        ("total += tl.load(residual + row[", "total = tl.load(residual + row["),
        ("total += _sum_of_piece(", "total = _sum_of_piece("),
        ("range(0, k, piece)", "range(piece, k, piece)"),
        ("begin = number * piece", "begin = number * BLOCK_K"),
        ("number.to(tl.int64) * m + row", "number.to(tl.int64) + row"),
        ("place, total, (row < m)", "place, total, (row < m - 1)"),
        ("range(0, num_pieces)", "range(0, num_pieces - 1)"),
        ("mask = column < n", "mask = column <= n"),
        ("bias + column, mask", "bias + column // 2, mask"),
        ("total += tl.load(residual + row *", "total = tl.load(residual + row *"),
        ("y + row * y_stride + column, total", "y + row * y_stride + column + 1, total"),
    ],
)
def test_a_broken_kernel_is_noticed(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        for shape in (SHAPES[2], BY_PIECE, IN_TURN):
            test_gemm_equals_float64(*shape, torch.float32, "both")
            # Past its end the residual is NaN, as what must stay of the output is.
            test_gemm_equals_float64(*shape, torch.float32, "bias")

    assert_caught(launch, old, new, check, tmp_path, monkeypatch)
