"""Gated activations and the soft cap in Triton against float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.kernels.activation import launch
from engine.kernels.activation import reference as truth
from tests.kernels.triton.mutants import assert_caught

NAN = float("nan")
# The last bit's worth for the 16-bit ones: the interpreter cuts off instead of rounding.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
GATED: dict[str, tuple[Callable[[Tensor, Tensor], None], Callable[[Tensor], Tensor]]] = {
    "silu": (launch.silu_mul, truth.silu_mul),
    "gelu-tanh": (lambda x, y: launch.gelu_mul(x, y, True), lambda x: truth.gelu_mul(x, True)),
    "gelu-erf": (lambda x, y: launch.gelu_mul(x, y, False), lambda x: truth.gelu_mul(x, False)),
}


def room(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """NaN for an output, and a view of its inner part [rows, width]."""
    whole = torch.full((rows + 2, width + 3), NAN, dtype=dtype)
    return whole, whole[1:-1, 1:-2]


def assert_outside_untouched(whole: Tensor) -> None:
    whole[1:-1, 1:-2] = NAN
    assert whole.isnan().all()


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (15, 8), (17, 63)], ids=lambda v: str(v))
def test_gated_activation_equals_float64(rows: int, n: int, dtype: torch.dtype, kind: str) -> None:
    run, reference = GATED[kind]
    gate_up = (3 * torch.randn(rows, 2 * n)).to(dtype)
    whole, y = room(rows, n, dtype)
    run(gate_up, y)
    eps = TOLERANCES[dtype]
    # 1 + tanh and 1 + erf cancel where the gate is far below 0: what is lost there is absolute.
    torch.testing.assert_close(y.double(), reference(gate_up.double()), rtol=2 * eps, atol=max(eps / 8, 4e-6))
    assert_outside_untouched(whole)


def test_rows_wider_than_a_tile_are_whole() -> None:
    n = launch.tile_config(0, 1 << 20).constants["BLOCK"] + 1
    gate_up, (whole, y) = torch.randn(2, 2 * n), room(2, n, torch.float32)
    launch.silu_mul(gate_up, y)
    torch.testing.assert_close(y.double(), truth.silu_mul(gate_up.double()), rtol=4e-6, atol=1e-6)
    assert_outside_untouched(whole)


def test_gates_of_any_size_give_numbers() -> None:
    gate_up = torch.tensor([[-1e4, -88.0, 0.0, 88.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0]])
    for run, reference in GATED.values():
        y = torch.full((1, 5), NAN)
        run(gate_up, y)
        torch.testing.assert_close(y.double(), reference(gate_up.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("rows", "n"), [(1, 1), (17, 63)], ids=lambda v: str(v))
def test_soft_cap_keeps_the_relative_precision_of_small_logits(rows: int, n: int) -> None:
    x = torch.randn(rows, n) * 10.0 ** torch.randint(-4, 5, (rows, n))
    whole, y = room(rows, n, torch.float32)
    launch.soft_cap(x, y, 30.0)
    torch.testing.assert_close(y.double(), truth.soft_cap(x.double(), 30.0), rtol=1e-6, atol=0.0)
    assert y.abs().max() <= 30.0
    assert_outside_untouched(whole)
    launch.soft_cap(x, x, 30.0)
    assert x.abs().max() <= 30.0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="twice its columns"):
        launch.silu_mul(torch.empty(2, 7), torch.empty(2, 4))
    with pytest.raises(ValueError, match="do not fit"):
        launch.soft_cap(torch.empty(2, 7), torch.empty(2, 8), 1.0)
    with pytest.raises(ValueError, match="positive"):
        launch.soft_cap(torch.empty(2, 7), torch.empty(2, 7), 0.0)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(row < num_rows)[:, None]", "(row <= num_rows)[:, None]"),
        ("(column < N)", "(column <= N)"),
        ("(column < N)", "(column < N - 1)"),
        ("source + N,", "source + N + 1,"),
        ("tl.where(gate < 0, e, 1.0)", "tl.where(gate < 0, 1.0, e)"),
        ("tl.erf(gate * 0.7071067811865476)", "tl.erf(gate)"),
        ("0.044715", "0.04"),
        ("(1.0 - e) / (1.0 + e)", "1.0 / (1.0 + e)"),
        ("-positive, positive", "positive, positive"),
        ("size < 0.625", "size < 0.0"),
        ("size < 0.625", "size < 1.5"),
        ("active * up", "active"),
        ("cap * tanh", "tanh"),
    ],
)
def test_a_broken_kernel_is_noticed(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        for kind in GATED:
            test_gated_activation_equals_float64(15, 13, torch.float32, kind)
        test_soft_cap_keeps_the_relative_precision_of_small_logits(17, 63)

    assert_caught(launch, old, new, check, tmp_path, monkeypatch)
