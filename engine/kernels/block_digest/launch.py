"""Launch the digest of KV blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.kernels.arch import INTERPRETER, arch_of
from engine.kernels.block_digest.triton import finish_digest_kernel, partial_digest_kernel
from engine.kernels.compile_case import CompileCase, CompileConfig, with_constants
from engine.kernels.shipped import SHIPPED, ModelShape

DIGEST_BYTES = 16
FINISH = CompileConfig(constants={"TILE": 128})
"""A block's chunks are added up by one program, so many at a time."""


def tile_config(arch: int) -> CompileConfig:
    """Constants in 64-bit words: a program adds up CHUNK of them, TILE at a time. They change no digest."""
    if arch == INTERPRETER:
        return CompileConfig(constants={"CHUNK": 8192, "TILE": 8192})
    return CompileConfig(constants={"CHUNK": 8192, "TILE": 1024}, num_warps=4, num_stages=3)


def block_digest(cache: Tensor, block_ids: Tensor, kv_scales: Tensor | None = None) -> Tensor:
    """Digests [n, 16] uint8 of the blocks `block_ids` [n] int32 or int64, on their device, by the kernel's own hash.

    cache [num_blocks, ...] of any dtype and kv_scales [num_blocks, ...]: each block one contiguous region. What no
    token of a block fills must hold zeros, or the digest speaks of leftovers.
    """
    words, num_words = _words(cache)
    scale_words, num_scale_words = (None, 0) if kv_scales is None else _words(kv_scales)
    if kv_scales is not None and kv_scales.shape[0] != cache.shape[0]:
        raise ValueError(f"kv_scales of {kv_scales.shape[0]} blocks for a cache of {cache.shape[0]}")
    if block_ids.dim() != 1 or block_ids.dtype not in (torch.int32, torch.int64) or not block_ids.is_contiguous():
        raise ValueError(f"block_ids are {tuple(block_ids.shape)} {block_ids.dtype}, expected [n] int32 or int64")
    num_blocks = block_ids.shape[0]
    digests = torch.empty((num_blocks, 2), dtype=torch.int64, device=cache.device)
    if num_blocks:
        config = tile_config(arch_of(cache))
        chunks = sum(-(-count // config.constants["CHUNK"]) for count in (num_words, num_scale_words))
        partials = torch.empty((num_blocks, chunks, 2), dtype=torch.int64, device=cache.device)
        lengths = {"NUM_WORDS": num_words, "NUM_SCALE_WORDS": num_scale_words}
        partial_digest_kernel[(chunks, num_blocks)](
            words,
            words if scale_words is None else scale_words,
            block_ids,
            partials,
            words.stride(0),
            0 if scale_words is None else scale_words.stride(0),
            **lengths,
            **config.arguments,
        )
        finish_digest_kernel[(num_blocks,)](partials, digests, chunks, **with_constants(FINISH, **lengths).arguments)
    return digests.view(torch.uint8)


def _words(blocks: Tensor) -> tuple[Tensor, int]:
    """Blocks as rows of 64-bit words, without a copy, and how many words a block has."""
    num_bytes = math.prod(blocks.shape[1:]) * blocks.element_size()
    if not blocks[0].is_contiguous():
        raise ValueError(f"blocks {tuple(blocks.shape)} with strides {blocks.stride()}: each must be one region")
    if num_bytes % 8 or (blocks.stride(0) * blocks.element_size()) % 8 or blocks.data_ptr() % 8:
        raise ValueError(f"blocks of {num_bytes} bytes at {blocks.data_ptr():#x}: expected multiples of 8")
    rows = blocks.view(blocks.shape[0], -1) if blocks.is_contiguous() else blocks.flatten(1)
    return rows.view(torch.int64), num_bytes // 8


def _words_per_block(model: ModelShape) -> tuple[int, int]:
    """64-bit words of a block of 16 tokens in one byte per number, and of its scales."""
    rows = model.kv_heads * model.num_layers * 2 * 16
    return rows * model.head_dim // 8, rows * 4 // 8


def _partial_case(model: ModelShape) -> CompileCase:
    num_words, num_scale_words = _words_per_block(model)
    return CompileCase(
        name="partial_digest",
        kernel=lambda: partial_digest_kernel,
        shape=f"{model.name} blocks of 16, {8 * num_words} + {8 * num_scale_words} bytes",
        signature={
            "words": "*i64",
            "scale_words": "*i64",
            "block_ids": "*i32",
            "partials": "*i64",
            "block_stride": "i32",
            "scale_stride": "i32",
        },
        aligned=("words", "scale_words", "partials", "block_stride", "scale_stride"),
        config=lambda arch: with_constants(tile_config(arch), NUM_WORDS=num_words, NUM_SCALE_WORDS=num_scale_words),
        flops=20 * tile_config(80).constants["TILE"],
        bytes=8 * tile_config(80).constants["TILE"],
        programs_per_sm=6,  # of 128 threads with 64 bytes on their way each: 48 KiB per SM
    )


def _finish_case(model: ModelShape) -> CompileCase:
    num_words, num_scale_words = _words_per_block(model)
    return CompileCase(
        name="finish_digest",
        kernel=lambda: finish_digest_kernel,
        shape=f"{model.name} blocks of 16",
        signature={"partials": "*i64", "digests": "*i64", "num_chunks": "i32"},
        aligned=("partials", "digests"),
        config=lambda arch: with_constants(FINISH, NUM_WORDS=num_words, NUM_SCALE_WORDS=num_scale_words),
        flops=2 * 128,
        bytes=2 * 8 * 128,
        vector_loads=False,
    )


COMPILE_CASES = (*map(_partial_case, SHIPPED), _finish_case(SHIPPED[0]))
