"""Check what the Triton attention kernels are given, choose their constants, and launch them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache as cached
from typing import Any

import torch
import triton as triton_package
import triton.language as tl
from torch import Tensor

from engine.kernels.attention import triton as kernels
from engine.kernels.device_step import DeviceStep

MAX_HEAD_DIM = 256
MAX_GROUP = 128
MAX_BLOCK_SIZE = 256
# A step of at most so many rows per KV head and sequence is a decode (or a tree): its tile is as small as may be.
DECODE_ROWS = 16
MAX_SPLITS = 128
COMBINE_WARPS = 1
LOG2_E = 1.4426950408889634
DOT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
QUANTISED = (torch.int8, torch.float8_e4m3fn)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOptions:
    """What a layer's attention is, besides its tensors.

    scale: factor of q·k. window: keys that a query sees, itself the last (0: all). soft_cap: scores become
    cap * tanh(score / cap) (0: they stay). deterministic: the bits of a row do not depend on the batch, on the chunks, or
    on whether it is a prompt's or a decode's. unified_maximum: weights of decodes are taken relative to this score
    (FlashDecoding++), splits where that fails are counted and done over; not with `deterministic`.
    """

    scale: float
    window: int = 0
    soft_cap: float = 0.0
    deterministic: bool = False
    unified_maximum: float | None = None


@dataclass(frozen=True, slots=True)
class Workspace:
    """Memory for results of splits, shared by all layers of a device's steps.

    partials [rows, num_heads, padded head_dim] and stats [rows, num_heads, 2] float32, a row per token and split;
    fallbacks [1] int32 counts what the unified maximum could not do.
    """

    partials: Tensor
    stats: Tensor
    fallbacks: Tensor


def make_workspace(rows: int, num_heads: int, head_dim: int, device: torch.device) -> Workspace:
    """Room for `rows` pairs of token and split: a step that needs more has each tile's splits done by one program."""
    return Workspace(
        torch.empty((rows, num_heads, triton_package.next_power_of_2(head_dim)), device=device),
        torch.empty((rows, num_heads, 2), device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What constants are chosen for. `arch`: compute capability as 80, 90, 100; 0 is Triton's interpreter."""

    arch: int
    num_sms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """Constants of one compilation: rows and keys of a tile, keys of a split (0: equal splits), warps, pipeline stages."""

    block_m: int
    block_n: int
    split_size: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


def paged_attention(
    q: Tensor,
    cache: Tensor,
    layer: int,
    step: DeviceStep,
    out: Tensor,
    options: AttentionOptions,
    workspace: Workspace,
    *,
    kv_scales: Tensor | None = None,
    tree_ends: Tensor | None = None,
    config: TileConfig | None = None,
) -> None:
    """out = causal attention of a packed step over the paged cache, prompt chunks and decodes alike.

    Shapes: q, out [T, num_heads, head_dim], rows and heads at any stride; cache [num_blocks, kv_heads, num_layers, 2,
    block_size, head_dim]; kv_scales [num_blocks, kv_heads, num_layers, 2, block_size] float32 with an int8 or fp8 cache;
    tree_ends [T] int32: the rows of a sequence are nodes of a tree in depth-first order, whose keys lie in that order
    behind the context; entry j is the index in its sequence behind j's last descendant: a node sees its ancestors.
    The step's own keys and values are in the cache already. A padding sequence (`seq_lens` 0) gets zeros.
    Nothing here waits for the device. The grid and all constants follow from shapes and `max_query_len`,
    `max_seq_len`, so a captured graph holds for every step within them.
    """
    shape = check_attention(q, cache, layer, step, out, options, kv_scales, tree_ends)
    device = find_device(q.device)
    decode = step.max_query_len * shape.group <= DECODE_ROWS
    config = config or tile_config(device.arch, shape, decode=decode, deterministic=options.deterministic)
    num_tokens, num_seqs = q.shape[0], step.seq_lens.shape[0]
    if not num_tokens:
        return
    one_token = step.max_query_len == 1 and num_tokens == num_seqs
    tiles = num_seqs if one_token else num_tokens // (config.block_m // shape.group) + num_seqs
    splits = max_splits(step.max_seq_len, config, workspace.partials.shape[0] // num_tokens)
    num_programs = device.num_sms * config.programs_per_sm
    kv = cache[:, :, layer]
    scales = None if kv_scales is None else kv_scales[:, :, layer]
    constants: dict[str, Any] = {
        "KV_HEADS": shape.kv_heads, "GROUP": shape.group, "HEAD_DIM": shape.head_dim, "BLOCK_D": shape.block_d,
        "BLOCK_N": config.block_n, "SPLIT_SIZE": config.split_size, "WINDOW": options.window, "ONE_TOKEN": one_token,
    }  # fmt: skip
    kernels.attention_kernel[(num_programs,)](
        q, kv, scales, out, workspace.partials, workspace.stats, workspace.fallbacks,
        step.cu_seqlens_q, step.seq_lens, step.block_tables, tree_ends,
        num_seqs, tiles, splits, num_tokens, options.scale, (options.unified_maximum or 0.0) * LOG2_E,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), kv.stride(0), kv.stride(1), kv.stride(2), kv.stride(3),
        *((0, 0, 0) if scales is None else scales.stride()[:3]), step.block_tables.stride(0),
        **constants, BLOCK_SIZE=shape.block_size, BLOCK_M=config.block_m, SOFT_CAP=options.soft_cap, DOT=shape.dot,
        PARALLEL_SPLITS=splits > 1, UNIFIED=decode and options.unified_maximum is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        kernels.combine_kernel[(num_tokens, shape.kv_heads)](
            workspace.partials, workspace.stats, out, step.cu_seqlens_q, step.seq_lens,
            num_seqs, tiles, splits, num_programs, num_tokens, out.stride(0), out.stride(1),
            **constants, BLOCK_H=triton_package.next_power_of_2(shape.group), num_warps=COMBINE_WARPS,
        )  # fmt: skip


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def max_splits(max_seq_len: int, config: TileConfig, room: int) -> int:
    """How many splits of a sequence may be computed side by side; 1: each tile is done by one program.

    With a fixed split size the bits are the same either way, so a lack of room may decide.
    """
    if config.split_size:
        needed = cdiv(max_seq_len, config.split_size)
        return needed if needed <= room else 1
    return max(1, min(cdiv(max_seq_len, 4 * config.block_n), room, MAX_SPLITS))


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What of the tensors' shapes is compiled in. dot: the type that tiles are multiplied in."""

    kv_heads: int
    group: int
    head_dim: int
    block_size: int
    kv_dtype: torch.dtype
    dot: tl.dtype

    @property
    def block_d(self) -> int:
        return max(16, triton_package.next_power_of_2(self.head_dim))


def tile_config(arch: int, shape: AttentionShape, *, decode: bool, deterministic: bool) -> TileConfig:
    """Tile constants for one architecture; with `deterministic` prompts and decodes have the same ones."""
    rows = max(16, triton_package.next_power_of_2(shape.group))
    if not arch:  # the interpreter: time goes by operations, not by their size
        return TileConfig(
            block_m=max(32, rows), block_n=64, split_size=256 * deterministic, num_warps=4, num_stages=1,
            programs_per_sm=1,
        )  # fmt: skip
    block_m = max(64, rows) if deterministic or not decode else rows
    return TileConfig(
        block_m=block_m, block_n=64, split_size=512 * deterministic, num_warps=4, num_stages=3, programs_per_sm=2
    )


@cached
def find_device(device: torch.device) -> Device:
    """The device's architecture and number of multiprocessors."""
    interpreted = not isinstance(kernels.attention_kernel, triton_package.JITFunction)
    if device.type == "cpu":
        if not interpreted:
            raise RuntimeError("Triton runs on a CPU only in its interpreter: set TRITON_INTERPRET=1 before the start")
        return Device(arch=0, num_sms=2)
    properties = torch.cuda.get_device_properties(device)
    arch = properties.major * 10 if properties.major in (8, 9, 10) else 80
    return Device(arch=0 if interpreted else arch, num_sms=properties.multi_processor_count)


def check_attention(
    q: Tensor,
    cache: Tensor,
    layer: int,
    step: DeviceStep,
    out: Tensor,
    options: AttentionOptions,
    kv_scales: Tensor | None,
    tree_ends: Tensor | None,
) -> AttentionShape:
    """The shape to compile for. Raises ValueError where the tensors do not fit each other or a limit."""
    if cache.dim() != 6 or cache.shape[3] != 2 or cache.stride(5) != 1 or cache.dtype not in FLOATS + QUANTISED:
        raise ValueError(f"KV cache is {tuple(cache.shape)} {cache.dtype} with strides {cache.stride()}")
    _, kv_heads, num_layers, _, block_size, head_dim = cache.shape
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer is {layer}, the cache has {num_layers}")
    if block_size > MAX_BLOCK_SIZE or block_size & (block_size - 1):
        raise ValueError(f"block_size is {block_size}, expected a power of two of at most {MAX_BLOCK_SIZE}")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {head_dim}, the limit is {MAX_HEAD_DIM}")
    if q.dim() != 3 or q.shape[2] != head_dim or q.stride(2) != 1 or q.dtype not in FLOATS:
        raise ValueError(f"q is {tuple(q.shape)} {q.dtype} with strides {q.stride()}, head_dim is {head_dim}")
    if out.shape != q.shape or out.stride(2) != 1 or out.dtype not in FLOATS:
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype} with strides {out.stride()}, q {tuple(q.shape)}")
    group = q.shape[1] // kv_heads
    if q.shape[1] != group * kv_heads or not 0 < group <= MAX_GROUP:
        raise ValueError(
            f"{q.shape[1]} heads over {kv_heads} KV heads: must divide, into groups of at most {MAX_GROUP}"
        )
    if (kv_scales is not None) != (cache.dtype in QUANTISED):
        raise ValueError(f"a {cache.dtype} cache {'needs no' if kv_scales is not None else 'needs'} kv_scales")
    if kv_scales is not None and (
        kv_scales.shape != cache.shape[:5] or kv_scales.dtype != torch.float32 or kv_scales.stride(4) != 1
    ):
        raise ValueError(f"kv_scales are {tuple(kv_scales.shape)} {kv_scales.dtype}, cache {tuple(cache.shape)}")
    check_step(step, q.shape[0], tree_ends)
    if not options.scale > 0 or options.window < 0 or options.soft_cap < 0:
        raise ValueError(f"scale must be positive, window and soft_cap not negative: {options}")
    if tree_ends is not None and options.window:
        raise ValueError("a tree's nodes have no single order that a window could count in")
    if options.deterministic and options.unified_maximum is not None:
        raise ValueError("the unified maximum falls back by tile: a row's bits would depend on its neighbours")
    interpreted = find_device(q.device).arch == 0
    dot = q.dtype if cache.dtype in QUANTISED else torch.promote_types(q.dtype, cache.dtype)
    # The interpreter multiplies bfloat16 by its bit patterns.
    dot = torch.float32 if interpreted and dot == torch.bfloat16 else dot
    return AttentionShape(
        kv_heads=kv_heads, group=group, head_dim=head_dim, block_size=block_size, kv_dtype=cache.dtype,
        dot=DOT_TYPES[dot],
    )  # fmt: skip


def check_step(step: DeviceStep, num_tokens: int, tree_ends: Tensor | None) -> None:
    """Raises ValueError where the step's tensors do not belong to `num_tokens` packed rows."""
    num_seqs = step.seq_lens.shape[0]
    if step.cu_seqlens_q.shape != (num_seqs + 1,) or step.block_tables.shape[0] != num_seqs:
        raise ValueError(
            f"{num_seqs} seq_lens, cu_seqlens_q {tuple(step.cu_seqlens_q.shape)}, "
            f"block_tables {tuple(step.block_tables.shape)}"
        )
    tensors = {"cu_seqlens_q": step.cu_seqlens_q, "seq_lens": step.seq_lens, "block_tables": step.block_tables}
    if tree_ends is not None:
        if tree_ends.shape != (num_tokens,):
            raise ValueError(f"tree_ends is {tuple(tree_ends.shape)}, the step has {num_tokens} rows")
        tensors["tree_ends"] = tree_ends
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32 or tensor.stride(-1) != 1:
            raise ValueError(f"{name} is {tensor.dtype} with strides {tensor.stride()}, expected contiguous int32")
