"""RMSNorm in Triton, with and without the residual, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.kernels.rms_norm import launch
from engine.kernels.rms_norm.reference import rms_norm as reference
from tests.kernels.triton.mutants import assert_caught

NAN = float("nan")
SHAPES = [(1, 1), (3, 15), (16, 16), (17, 63), (33, 577)]
# Half of what the last bit is worth, and the interpreter cuts bfloat16 off instead of rounding it: the whole bit.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def room(rows: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """NaN for an output, and a view of its inner part [rows, width]."""
    whole = torch.full((rows + 2, width + 3), NAN, dtype=dtype)
    return whole, whole[1:-1, 1:-2]


def assert_close(y: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    eps = TOLERANCES[dtype]
    torch.testing.assert_close(y.double(), want, rtol=2 * eps, atol=eps / 8)


def assert_outside_untouched(whole: Tensor) -> None:
    whole[1:-1, 1:-2] = NAN
    assert whole.isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("rows", "width"), SHAPES, ids=lambda v: str(v))
def test_rms_norm_equals_float64(rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, width + 5).to(dtype)[:, 2 : 2 + width], torch.randn(width).to(dtype)
    whole, y = room(rows, width, dtype)
    launch.rms_norm(x, weight, y, 1e-5)
    assert_close(y, reference(x.double(), weight.double(), 1e-5), dtype)
    assert_outside_untouched(whole)


def test_rows_are_gathered_while_they_are_normalised() -> None:
    x, weight, (whole, y) = torch.randn(9, 24), torch.randn(24), room(3, 24)
    rows = torch.tensor([8, 0, 4], dtype=torch.int32)
    launch.rms_norm(x, weight, y, 1e-5, rows)
    assert_close(y, reference(x[[8, 0, 4]].double(), weight.double(), 1e-5), torch.float32)
    assert_outside_untouched(whole)


def test_rms_norm_in_place() -> None:
    x, weight = torch.randn(19, 40), torch.randn(40)
    want = reference(x.double(), weight.double(), 1e-6)
    launch.rms_norm(x, weight, x, 1e-6)
    assert_close(x, want, torch.float32)


@pytest.mark.parametrize("residual_dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("rows", "width"), SHAPES, ids=lambda v: str(v))
def test_addition_and_norm_are_the_two_steps_bit_for_bit(rows: int, width: int, residual_dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, width).bfloat16(), torch.randn(width)
    before = torch.randn(rows, width).to(residual_dtype)
    whole_residual, residual = room(rows, width, residual_dtype)
    residual.copy_(before)
    whole, y = room(rows, width)
    launch.add_rms_norm(x, residual, weight, y, 1e-5)
    assert_close(residual, x.double() + before.double(), residual_dtype)
    apart = torch.empty_like(y)
    launch.rms_norm(residual, weight, apart, 1e-5)
    assert torch.equal(y, apart)
    assert_close(y, reference(residual.double(), weight.double(), 1e-5), torch.float32)
    assert_outside_untouched(whole)
    assert_outside_untouched(whole_residual)


def test_a_row_is_normalised_the_same_alone_and_among_others() -> None:
    x, weight, y, alone = torch.randn(37, 65), torch.randn(65), torch.full((37, 65), NAN), torch.full((1, 65), NAN)
    launch.rms_norm(x, weight, y, 1e-5)
    launch.rms_norm(x[20:21], weight, alone, 1e-5)
    assert torch.equal(y[20:21], alone)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.empty(2, 8)
    with pytest.raises(ValueError, match="do not fit"):
        launch.rms_norm(x, torch.empty(7), torch.empty(2, 8), 1e-5)
    with pytest.raises(ValueError, match="3 rows for 2"):
        launch.rms_norm(x, torch.empty(8), torch.empty(3, 8), 1e-5)
    with pytest.raises(ValueError, match="residual"):
        launch.add_rms_norm(x, torch.empty(2, 9), torch.empty(8), x, 1e-5)
    with pytest.raises(ValueError, match="at most"):
        launch.rms_norm(torch.empty(1, 1 << 16), torch.empty(1 << 16), torch.empty(1, 1 << 16), 1e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(row < num_rows)[:, None] &", "(row <= num_rows)[:, None] &"),
        ("(column < N)[None, :]", "(column <= N)[None, :]"),
        ("(column < N)[None, :]", "(column < N - 1)[None, :]"),
        ("/ N + epsilon", "/ BLOCK + epsilon"),
        ("/ N + epsilon", "/ N"),
        ("* scale[None, :]", ""),
        ("tl.rsqrt(", "1.0 / ("),
        ("values = stored.to(tl.float32)", "values = added"),
        ("tl.store(place, stored, mask)", ""),
        ("source = tl.load(rows + row", "source = tl.load(rows + row // 2"),
    ],
)
def test_a_broken_kernel_is_noticed(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        test_rms_norm_equals_float64(3, 15, torch.float32)
        test_addition_and_norm_are_the_two_steps_bit_for_bit(3, 15, torch.float32)
        test_rows_are_gathered_while_they_are_normalised()
        x, y = torch.full((2, 4), 1e-3), torch.empty(2, 4)
        launch.rms_norm(x, torch.ones(4), y, 1e-5)
        assert_close(y, reference(x.double(), torch.ones(4).double(), 1e-5), torch.float32)

    assert_caught(launch, old, new, check, tmp_path, monkeypatch)
