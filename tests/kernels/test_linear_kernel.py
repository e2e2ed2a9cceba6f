"""The packed GEMM against float64, with every end, odd sizes and poisoned outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels.linear import native, reference
from engine.kernels.linear.native import Epilogue, PackedWeight
from engine.kernels.native.library import NativeContext, NativeOp
from engine.kernels.native.program import Program, rows_step

EPSILON = torch.finfo(torch.float32).eps
SHAPES = [(1, 1, 1), (1, 576, 33), (5, 31, 16), (7, 96, 100), (11, 577, 64), (13, 64, 31), (97, 40, 65), (205, 17, 48)]
IDS = [f"M{m}-K{k}-N{n}" for m, k, n in SHAPES]


def poisoned(rows: int, columns: int) -> Tensor:
    return torch.full((rows, columns), float("nan"))


def run(context: NativeContext, op: NativeOp, rows: int) -> None:
    Program(context, [op]).run(rows_step(rows))


def chain_error(x: Tensor, weight: Tensor) -> Tensor:
    """What a chain of k float32 multiply-adds may err by."""
    return (x.shape[1] + 4) * EPSILON * (x.abs().double() @ weight.abs().double().T) + 1e-30


@pytest.mark.parametrize(("m", "k", "n"), SHAPES, ids=IDS)
def test_linear_with_bias_equals_float64_and_writes_nothing_else(
    context: NativeContext, m: int, k: int, n: int
) -> None:
    x, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    room = poisoned(m + 1, n + 3)
    packed = native.pack(context, [weight], bias=bias)
    run(context, native.linear(x, packed, room[:, :n]), m)
    want = reference.linear(x.double(), weight.double(), bias.double())
    assert bool(((room[:m, :n] - want).abs() <= chain_error(x, weight) + EPSILON * want.abs()).all())
    assert room[m].isnan().all()
    assert room[:, n:].isnan().all()


@pytest.mark.parametrize(("m", "k", "n"), SHAPES, ids=IDS)
def test_linear_add_adds_to_the_residual(context: NativeContext, m: int, k: int, n: int) -> None:
    x, weight, y = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
    want = reference.linear_add(x.double(), weight.double(), y.double())
    run(context, native.linear(x, native.pack(context, [weight]), y, Epilogue.ADD), m)
    assert bool(((y - want).abs() <= chain_error(x, weight) + EPSILON * want.abs()).all())


@pytest.mark.parametrize(("m", "k", "n"), SHAPES, ids=IDS)
def test_gated_linear_equals_silu_times_up(context: NativeContext, m: int, k: int, n: int) -> None:
    x, gate, up = torch.randn(m, k), torch.randn(n, k) / k**0.5, torch.randn(n, k) / k**0.5
    y = poisoned(m, n)
    run(context, native.linear(x, native.pack_gated(context, gate, up), y, Epilogue.SILU_MUL), m)
    want = reference.linear_silu_mul(x.double(), gate.double(), up.double())
    slack = 2 * (chain_error(x, gate) + chain_error(x, up)) * (1 + (x.double() @ up.double().T).abs())
    assert bool(((y - want).abs() <= slack + 8 * EPSILON * (1 + want.abs())).all())


def test_silu_is_right_far_from_zero(context: NativeContext) -> None:
    gate = torch.tensor([[-200.0], [-90.0], [-20.0], [0.0], [20.0], [90.0], [200.0]])
    x, y = torch.ones(1, 1), poisoned(1, 7)
    packed = native.pack_gated(context, gate, torch.ones(7, 1))
    run(context, native.linear(x, packed, y, Epilogue.SILU_MUL), 1)
    want = torch.nn.functional.silu(gate.double().T)
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-30)


def test_several_sources_are_packed_one_after_another(context: NativeContext) -> None:
    sources = [torch.randn(n, 24) for n in (37, 5, 64)]
    x, y = torch.randn(3, 24), poisoned(3, 106)
    run(context, native.linear(x, native.pack(context, sources), y), 3)
    torch.testing.assert_close(y, x @ torch.cat(sources).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m", [1, 12, 37])
def test_bfloat16_weights_are_rounded_once_and_computed_in_float32(context: NativeContext, m: int) -> None:
    x, weight, y = torch.randn(m, 65), torch.randn(50, 65), poisoned(m, 50)
    panels = torch.zeros(native.packed_size(context, 50, 65), dtype=torch.bfloat16)
    run(context, native.linear(x, native.pack(context, [weight], panels), y), m)
    rounded = weight.bfloat16().float()
    assert bool(((y - x.double() @ rounded.double().T).abs() <= chain_error(x, rounded)).all())


@pytest.mark.parametrize("epilogue", list(Epilogue))
def test_a_row_has_the_same_bits_alone_and_in_any_batch(context: NativeContext, epilogue: Epilogue) -> None:
    x, first, second = torch.randn(60, 131), torch.randn(77, 131), torch.randn(77, 131)
    packed: PackedWeight = (
        native.pack_gated(context, first, second)
        if epilogue is Epilogue.SILU_MUL
        else native.pack(context, [first], bias=torch.randn(77))
    )

    def rows(begin: int, end: int) -> Tensor:
        part, y = x[begin:end], torch.ones(end - begin, 77)
        run(context, native.linear(part, packed, y, epilogue), end - begin)
        return y

    whole = rows(0, 60)
    for begin, end in ((0, 1), (59, 60), (3, 10), (1, 13), (20, 31), (5, 60)):
        assert torch.equal(rows(begin, end), whole[begin:end])


def test_shapes_that_do_not_fit_are_refused(context: NativeContext) -> None:
    packed = native.pack(context, [torch.randn(8, 4)])
    with pytest.raises(ValueError, match="do not fit"):
        native.linear(torch.randn(2, 5), packed, torch.randn(2, 8))
    with pytest.raises(TypeError, match="float64"):
        native.linear(torch.randn(2, 4).double(), packed, torch.randn(2, 8))
    with pytest.raises(ValueError, match="SILU_MUL"):
        native.linear(torch.randn(2, 4), packed, torch.randn(2, 8), Epilogue.SILU_MUL)
