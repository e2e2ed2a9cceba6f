"""Check what the Triton attention kernels are given, choose their constants, and launch them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from engine.kernels.arch import INTERPRETER, arch_of, next_power_of_2
from engine.kernels.attention.triton import attention_kernel, combine_kernel
from engine.kernels.compile_case import CompileCase, CompileConfig
from engine.kernels.device_step import DeviceStep
from engine.kernels.shipped import SHIPPED, ModelShape

MAX_HEAD_DIM = 256
MAX_GROUP = 128
MAX_BLOCK_SIZE = 256
# A step of at most so many rows per KV head and sequence is a decode (or a tree): its tile is as small as may be.
DECODE_ROWS = 16
MAX_SPLITS = 128
COMBINE_WARPS = 1
COMBINE_CONSTANTS = ("KV_HEADS", "GROUP", "HEAD_DIM", "BLOCK_D", "SPLIT_SIZE", "WINDOW", "ONE_TOKEN")
# Hopper's and Blackwell's: two groups of four warps multiply 128 rows by one tile of keys.
WIDE_ARCHS = (90, 100, 103)
LOG2_E = 1.4426950408889634
DOT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
QUANTISED = (torch.int8, torch.float8_e4m3fn)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOptions:
    """What a layer's attention is, besides its tensors.

    scale: factor of q·k. window: keys that a query sees, itself the last (0: all). soft_cap: scores become
    cap * tanh(score / cap) (0: they stay). deterministic: the bits of a row do not depend on the batch, on the chunks,
    or on whether it is a prompt's or a decode's. unified_maximum: weights of decodes are taken relative to this score
    (FlashDecoding++); splits where that fails are counted and done over; not with `deterministic`.
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
    split_size [1] int32 is what the first kernel tells the second; fallbacks [1] int32 counts the splits that the
    unified maximum could not do.
    """

    partials: Tensor
    stats: Tensor
    split_size: Tensor
    fallbacks: Tensor


def make_workspace(rows: int, num_heads: int, head_dim: int, device: torch.device) -> Workspace:
    """Room for `rows` pairs of token and split: a step that needs more has each tile's splits done by one program."""
    return Workspace(
        torch.empty((rows, num_heads, next_power_of_2(head_dim)), device=device),
        torch.empty((rows, num_heads, 2), device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """Constants of one compilation: rows and keys of a tile, keys of a split (0: see `_split_size`), warps, stages."""

    block_m: int
    block_n: int
    split_size: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    max_registers: int | None = None


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
    block_size, head_dim]; kv_scales [num_blocks, kv_heads, num_layers, 2, block_size] float32 with an int8 or fp8
    cache; tree_ends [T] int32: the rows of a sequence are nodes of a tree in depth-first order, whose keys lie in that
    order behind the context; entry j is the index in its sequence behind j's last descendant: a node sees its
    ancestors.
    The step's own keys and values are in the cache already. A padding sequence (`seq_lens` 0) gets zeros.
    Nothing here waits for the device. The grid and all constants follow from shapes and `max_query_len`,
    `max_seq_len`, so a captured graph holds for every step within them.
    """
    shape = check_attention(q, cache, layer, step, out, options, kv_scales, tree_ends)
    arch = arch_of(q)
    decode = step.max_query_len * shape.group <= DECODE_ROWS
    config = config or tile_config(arch, shape, decode=decode, deterministic=options.deterministic)
    num_tokens, num_seqs = q.shape[0], step.seq_lens.shape[0]
    if not num_tokens:
        return
    one_token = step.max_query_len == 1 and num_tokens == num_seqs
    tiles = num_seqs if one_token else num_tokens // (config.block_m // shape.group) + num_seqs
    splits = max_splits(step.max_seq_len, config, workspace.partials.shape[0] // num_tokens)
    num_programs = num_sms(q.device) * config.programs_per_sm
    kv = cache[:, :, layer]
    scales = None if kv_scales is None else kv_scales[:, :, layer]
    scale_strides = (0, 0, 0) if scales is None else (scales.stride(0), scales.stride(1), scales.stride(2))
    attention = {
        "KV_HEADS": shape.kv_heads, "GROUP": shape.group, "HEAD_DIM": shape.head_dim, "BLOCK_D": shape.block_d,
        "BLOCK_SIZE": shape.block_size, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "SPLIT_SIZE": config.split_size, "WINDOW": options.window, "SOFT_CAP": options.soft_cap, "DOT": shape.dot,
        "ONE_TOKEN": one_token, "PARALLEL_SPLITS": splits > 1,
        "UNIFIED": decode and options.unified_maximum is not None,
        "num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": config.max_registers,
    }  # fmt: skip
    attention_kernel[(num_programs,)](
        q, kv, scales, out, workspace.partials, workspace.stats, workspace.split_size, workspace.fallbacks,
        step.cu_seqlens_q, step.seq_lens, step.block_tables, tree_ends,
        num_seqs, tiles, splits, num_tokens, options.scale, (options.unified_maximum or 0.0) * LOG2_E,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), kv.stride(0), kv.stride(1), kv.stride(2), kv.stride(3),
        *scale_strides, step.block_tables.stride(0), **attention,
    )  # fmt: skip
    if splits > 1:
        combine = {name: attention[name] for name in COMBINE_CONSTANTS}
        combine |= {"BLOCK_H": next_power_of_2(shape.group), "num_warps": COMBINE_WARPS}
        combine_kernel[(num_tokens, shape.kv_heads)](
            workspace.partials, workspace.stats, workspace.split_size, out, step.cu_seqlens_q, step.seq_lens,
            num_seqs, num_tokens, out.stride(0), out.stride(1), **combine,
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
    quantised: bool
    dot: tl.dtype

    @property
    def block_d(self) -> int:
        return max(16, next_power_of_2(self.head_dim))


def tile_config(arch: int, shape: AttentionShape, *, decode: bool, deterministic: bool) -> TileConfig:
    """Tile constants for one architecture; with `deterministic` prompts and decodes have the same ones.

    Chosen so that nothing spills (docs/kernels.md has the table); which is fastest on a GPU is unmeasured.
    """
    rows = max(16, next_power_of_2(shape.group))
    if arch == INTERPRETER:
        return TileConfig(
            block_m=max(32, rows), block_n=64, split_size=256 * deterministic, num_warps=4, num_stages=1,
            programs_per_sm=1,
        )  # fmt: skip
    if shape.dot == tl.float32:
        # Without tensor cores each thread holds its operands in registers: larger tiles spill by the kilobyte.
        narrow = decode or deterministic or shape.head_dim > 64
        return TileConfig(
            block_m=max(16 if narrow else 32, rows), block_n=16 if narrow else 32, split_size=512 * deterministic,
            num_warps=8, num_stages=2, programs_per_sm=1,
        )  # fmt: skip
    if deterministic:
        # Sums of a split and of all before it are both in registers: half as many per thread with eight warps.
        return TileConfig(
            block_m=max(64, rows), block_n=64, split_size=512, num_warps=8, num_stages=3, programs_per_sm=1
        )
    if decode:
        # Left alone, ptxas makes room for a third program, which we do not start, and spills in some variants.
        return TileConfig(
            block_m=rows, block_n=64, split_size=0, num_warps=4, num_stages=3, programs_per_sm=2, max_registers=240
        )
    if arch in WIDE_ARCHS:
        return TileConfig(
            block_m=max(128, rows), block_n=64, split_size=0, num_warps=8, num_stages=3, programs_per_sm=1
        )
    # Four warps would have all 255 registers to themselves, and some compilers spill then.
    return TileConfig(
        block_m=max(64, rows), block_n=64, split_size=0, num_warps=8, num_stages=3, programs_per_sm=1
    )  # fmt: skip


@lru_cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU; two for the interpreter, so that its programs have work to share out."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


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
    arch = arch_of(q)
    if cache.dtype == torch.float8_e4m3fn and INTERPRETER < arch < 89:
        raise ValueError(f"a {cache.dtype} cache needs an architecture of 89 or more, this one is {arch}")
    dot = q.dtype if cache.dtype in QUANTISED else torch.promote_types(q.dtype, cache.dtype)
    # The interpreter would multiply the bit patterns of bfloat16.
    dot = torch.float32 if arch == INTERPRETER and dot == torch.bfloat16 else dot
    return AttentionShape(
        kv_heads=kv_heads, group=group, head_dim=head_dim, block_size=block_size,
        quantised=cache.dtype in QUANTISED, dot=DOT_TYPES[dot],
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


_KV_TYPES = {"bf16": ("*bf16", 2), "fp32": ("*fp32", 4), "int8": ("*i8", 1), "fp8": ("*fp8e4nv", 1)}
_INTEGERS = (
    "num_seqs", "tile_bound", "max_splits", "num_tokens", "stride_q", "stride_q_head", "stride_out",
    "stride_out_head", "stride_block", "stride_head", "stride_kv", "stride_slot", "stride_scale_block",
    "stride_scale_head", "stride_scale_kv", "stride_table",
)  # fmt: skip
_ALIGNED = (
    "q", "kv", "out", "partials", "stats", "stride_q", "stride_q_head", "stride_out", "stride_out_head",
    "stride_block", "stride_head", "stride_kv", "stride_slot",
)  # fmt: skip
_ALIGNED_SCALES = ("scales", "stride_scale_block", "stride_scale_head", "stride_scale_kv")


def _attention_case(
    model: ModelShape, kv: str, *, decode: bool, deterministic: bool = False, unified: bool = False, tree: bool = False
) -> CompileCase:
    kv_type, kv_bytes = _KV_TYPES[kv]
    group, is_quantised, is_float32 = model.heads // model.kv_heads, kv_bytes == 1, kv == "fp32"
    shape = AttentionShape(
        kv_heads=model.kv_heads, group=group, head_dim=model.head_dim, block_size=16, quantised=is_quantised,
        dot=tl.float32 if is_float32 else tl.bfloat16,
    )  # fmt: skip
    absent = [name for name, there in (("scales", is_quantised), ("tree_ends", tree)) if not there]
    activations = "*fp32" if is_float32 else "*bf16"
    types = {
        "q": activations, "kv": kv_type, "scales": "*fp32", "out": activations, "partials": "*fp32", "stats": "*fp32",
        "split_sizes": "*i32", "fallbacks": "*i32",
        "cu_seqlens_q": "*i32", "seq_lens": "*i32", "block_tables": "*i32", "tree_ends": "*i32",
        **dict.fromkeys(_INTEGERS, "i32"), "scale": "fp32", "unified_maximum": "fp32",
    }  # fmt: skip

    def config(arch: int) -> CompileConfig:
        tile = tile_config(arch, shape, decode=decode, deterministic=deterministic)
        constants = {
            "KV_HEADS": shape.kv_heads, "GROUP": group, "HEAD_DIM": shape.head_dim, "BLOCK_D": shape.block_d,
            "BLOCK_SIZE": shape.block_size, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
            "SPLIT_SIZE": tile.split_size, "WINDOW": 0, "SOFT_CAP": 0.0, "DOT": shape.dot,
            "ONE_TOKEN": decode and not tree, "PARALLEL_SPLITS": decode, "UNIFIED": unified,
            **dict.fromkeys(absent),
        }  # fmt: skip
        return CompileConfig(
            constants=constants,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            extra={"maxnreg": tile.max_registers},
        )

    tile = tile_config(90, shape, decode=decode, deterministic=deterministic)
    kinds = (("decode" if decode else "prefill", True), ("deterministic", deterministic), ("unified maximum", unified))
    return CompileCase(
        name="attention " + ", ".join(kind for kind, is_so in (*kinds, ("tree", tree)) if is_so),
        kernel=lambda: attention_kernel,
        shape=f"{model.name} {model.heads}/{model.kv_heads} heads of {model.head_dim}, KV {kv}",
        signature={name: kind for name, kind in types.items() if name not in absent},
        aligned=(*_ALIGNED, *_ALIGNED_SCALES) if is_quantised else _ALIGNED,
        config=config,
        flops=4 * tile.block_m * tile.block_n * model.head_dim,
        bytes=2 * kv_bytes * tile.block_n * model.head_dim,
        has_dot=not is_float32,  # no tensor core multiplies float32 as it is, and rounding it would lose what it is for
        programs_per_sm=tile.programs_per_sm,
        archs=(90, 100) if kv == "fp8" else (80, 90, 100),
    )


def _combine_case(model: ModelShape, *, deterministic: bool) -> CompileCase:
    group = model.heads // model.kv_heads
    shape = AttentionShape(
        kv_heads=model.kv_heads, group=group, head_dim=model.head_dim, block_size=16, quantised=False,
        dot=tl.bfloat16,
    )  # fmt: skip

    def config(arch: int) -> CompileConfig:
        tile = tile_config(arch, shape, decode=True, deterministic=deterministic)
        constants = {
            "KV_HEADS": shape.kv_heads, "GROUP": group, "HEAD_DIM": shape.head_dim, "BLOCK_D": shape.block_d,
            "BLOCK_H": next_power_of_2(group), "SPLIT_SIZE": tile.split_size, "WINDOW": 0,
            "ONE_TOKEN": True,
        }  # fmt: skip
        return CompileConfig(constants=constants, num_warps=COMBINE_WARPS, num_stages=3)

    integers = ("num_seqs", "num_tokens", "stride_out", "stride_out_head")
    return CompileCase(
        name="attention combine" + deterministic * ", deterministic",
        kernel=lambda: combine_kernel,
        shape=f"{model.name} {model.heads}/{model.kv_heads} heads of {model.head_dim}",
        signature={
            "partials": "*fp32", "stats": "*fp32", "split_sizes": "*i32", "out": "*bf16",
            "cu_seqlens_q": "*i32", "seq_lens": "*i32",
            **dict.fromkeys(integers, "i32"),
        },
        aligned=("partials", "stats", "out", "stride_out", "stride_out_head"),
        config=config,
        flops=3 * group * model.head_dim,
        bytes=4 * group * (model.head_dim + 2),
        programs_per_sm=8,
    )  # fmt: skip


COMPILE_CASES = (
    *(_attention_case(model, "bf16", decode=decode) for model in SHIPPED for decode in (False, True)),
    *(_attention_case(SHIPPED[0], kv, decode=decode) for kv in ("int8", "fp8") for decode in (False, True)),
    *(_attention_case(model, "fp32", decode=decode) for model in SHIPPED for decode in (False, True)),
    _attention_case(SHIPPED[0], "fp32", decode=False, deterministic=True),
    *(_attention_case(SHIPPED[0], "bf16", decode=decode, deterministic=True) for decode in (False, True)),
    _attention_case(SHIPPED[0], "bf16", decode=True, unified=True),
    _attention_case(SHIPPED[0], "bf16", decode=True, tree=True),
    *(_combine_case(SHIPPED[0], deterministic=deterministic) for deterministic in (False, True)),
)
