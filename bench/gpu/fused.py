"""Fused element-wise operations: ours beside what torch.compile makes of the same lines of torch.

Where Inductor's are faster, the product should use them: this table decides, and nothing is switched without it. In
the rehearsal there is no GPU to compile for: the lines are traced and run as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu.harness import Bench, Figure
from bench.gpu.step import BLOCK_SIZE, LLAMA_8B, tiny
from engine.kernels.activation.launch import silu_mul
from engine.kernels.rms_norm.launch import add_rms_norm
from engine.kernels.rope.launch import rope_write
from engine.models.rope import RopeTable

Work = Callable[[], object]


def fused(bench: Bench) -> None:
    """A decode step's rows and a prompt chunk's."""
    if bench.is_rehearsal:
        print("fused: no GPU to compile for, so torch.compile only traces", flush=True)
    for num_rows in (3,) if bench.is_rehearsal else (128, 2048):
        for make in (_norm, _activation, _rope):
            if not bench.has_time(15):
                return
            case, num_bytes, ours, theirs = make(bench, num_rows)
            bench.add(
                Figure(
                    part="fused",
                    case=f"{case}, {num_rows} rows",
                    unit="GB/s",
                    ours=num_bytes / bench.seconds_of(bench.graph_of(ours)) / 1e9,
                    theirs=num_bytes / bench.seconds_of(bench.graph_of(theirs)) / 1e9,
                    theirs_name="Inductor",
                )
            )


def _compiled(bench: Bench, function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, backend="eager" if bench.is_rehearsal else "inductor")


def _random(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(shape, device=bench.device, dtype=torch.float32 if bench.is_rehearsal else torch.bfloat16)


def _norm(bench: Bench, num_rows: int) -> tuple[str, int, Work, Work]:
    config = tiny(LLAMA_8B) if bench.is_rehearsal else LLAMA_8B
    x, residual = (_random(bench, num_rows, config.hidden_size) for _ in range(2))
    weight, y = _random(bench, config.hidden_size), torch.empty_like(x)

    def plain(x: Tensor, residual: Tensor, weight: Tensor, y: Tensor) -> None:
        residual.add_(x)
        row = residual.float()
        y.copy_(row * torch.rsqrt(row.square().mean(-1, keepdim=True) + 1e-5) * weight.float())

    theirs = _compiled(bench, plain)
    num_bytes = 4 * x.numel() * x.element_size()
    return (
        f"add + rms_norm of {config.hidden_size}",
        num_bytes,
        lambda: add_rms_norm(x, residual, weight, y, 1e-5),
        lambda: theirs(x, residual, weight, y),
    )


def _activation(bench: Bench, num_rows: int) -> tuple[str, int, Work, Work]:
    config = tiny(LLAMA_8B) if bench.is_rehearsal else LLAMA_8B
    x = _random(bench, num_rows, 2 * config.intermediate_size)
    y = _random(bench, num_rows, config.intermediate_size)

    def plain(x: Tensor, y: Tensor) -> None:
        gate, up = x.float().chunk(2, -1)
        y.copy_(torch.nn.functional.silu(gate) * up)

    theirs = _compiled(bench, plain)
    num_bytes = 3 * y.numel() * y.element_size()
    return f"silu_mul of {config.intermediate_size}", num_bytes, lambda: silu_mul(x, y), lambda: theirs(x, y)


def _rope(bench: Bench, num_rows: int) -> tuple[str, int, Work, Work]:
    """Rotation of q and k with the write of k and v to the paged cache: ours is one kernel."""
    config = tiny(LLAMA_8B) if bench.is_rehearsal else LLAMA_8B
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    table = RopeTable(config)
    table.ensure(config.max_position_embeddings)
    cos, sin = table.cos.to(bench.device), table.sin.to(bench.device)
    qkv = _random(bench, num_rows, (heads + 2 * kv_heads) * dim)
    cache = _random(bench, -(-num_rows // BLOCK_SIZE), kv_heads, 1, 2, BLOCK_SIZE, dim)
    positions = torch.arange(num_rows, device=bench.device, dtype=torch.int32) % config.max_position_embeddings
    slots = torch.arange(num_rows, device=bench.device)

    def plain(qkv: Tensor, cache: Tensor) -> None:
        rows = qkv.unflatten(1, (-1, dim))
        turned = rows[:, : heads + kv_heads].float()
        low, high = turned.chunk(2, -1)
        c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
        turned = torch.cat((low * c - high * s, high * c + low * s), -1).to(qkv.dtype)
        rows[:, :heads] = turned[:, :heads]
        blocks, places = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        cache[blocks, :, 0, 0, places] = turned[:, heads:]
        cache[blocks, :, 0, 1, places] = rows[:, heads + kv_heads :]

    theirs = _compiled(bench, plain)
    num_bytes = (2 * heads + 4 * kv_heads) * dim * num_rows * qkv.element_size()
    return (
        f"rope + KV write, {heads}/{kv_heads} heads of {dim}",
        num_bytes,
        lambda: rope_write(qkv, cos, sin, positions, slots, cache, 0, heads),
        lambda: theirs(qkv, cache),
    )
