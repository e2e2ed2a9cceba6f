"""ggml's quantised blocks back to float32, vectorised.

Each function reads blocks [n, block bytes] uint8 and fills out [n, block elements] float32, multiplying and adding in
the order of the `gguf` package's reference, to which the tests compare bit for bit.
Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from modelfiles.gguf_file import BLOCK_SIZES, TensorType

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]

CHUNK_ELEMENTS = 1 << 17
"""Elements per piece: 512 KiB of output stay in the level-2 cache between the passes."""


def dequantize(tensor_type: TensorType, raw: Bytes, out: Floats) -> None:
    """Fill `out` (flat) with the values of the blocks in `raw` (flat)."""
    elements, num_bytes = BLOCK_SIZES[tensor_type]
    _DEQUANTIZE[tensor_type](raw.reshape(-1, num_bytes), out.reshape(-1, elements))


def dequantize_all(tensor_type: TensorType, raw: Bytes) -> Floats:
    """The values of the blocks in `raw`, computed piece by piece."""
    elements, num_bytes = BLOCK_SIZES[tensor_type]
    num_blocks, step = raw.size // num_bytes, CHUNK_ELEMENTS // elements
    out = np.empty(num_blocks * elements, np.float32)
    for start in range(0, num_blocks, step):
        end = min(start + step, num_blocks)
        dequantize(tensor_type, raw[start * num_bytes : end * num_bytes], out[start * elements : end * elements])
    return out


def _f32(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks.view("<f4")


def _f16(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks.view("<f2")


def _bf16(blocks: Bytes, out: Floats) -> None:
    """bfloat16 is the upper half of a float32."""
    np.left_shift(blocks.view("<u2"), 16, out=out.view(np.uint32), dtype=np.uint32)


def _q4_0(blocks: Bytes, out: Floats) -> None:
    _nibbles(blocks[:, 2:], out)
    out -= np.float32(8)
    out *= _half(blocks, 0)


def _q4_1(blocks: Bytes, out: Floats) -> None:
    _nibbles(blocks[:, 4:], out)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q8_0(blocks: Bytes, out: Floats) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), _half(blocks, 0), out=out, dtype=np.float32)


def _q4_k(blocks: Bytes, out: Floats) -> None:
    """Eight groups of 32 with 6-bit scales and minima: half d, half dmin, 12 bytes of scales, 128 of nibbles."""
    packed = blocks[:, 4:16].reshape(-1, 3, 4)
    low_scale, low_minimum, high = packed[:, 0], packed[:, 1], packed[:, 2]
    scales = np.concatenate([low_scale & 0x3F, (high & 0x0F) | ((low_scale >> 2) & 0x30)], axis=1)
    minima = np.concatenate([low_minimum & 0x3F, (high >> 4) | ((low_minimum >> 2) & 0x30)], axis=1)
    scales = _half(blocks, 0) * scales.astype(np.float32)
    minima = _half(blocks, 2) * minima.astype(np.float32)
    nibbles = blocks[:, 16:].reshape(-1, 4, 32)
    groups = out.reshape(-1, 4, 2, 32)
    groups[:, :, 0] = nibbles & 0x0F
    groups[:, :, 1] = nibbles >> 4
    values = out.reshape(-1, 8, 32)
    values *= scales[:, :, None]
    values -= minima[:, :, None]


def _q6_k(blocks: Bytes, out: Floats) -> None:
    """Sixteen groups of 16 with 8-bit scales: 128 bytes of low nibbles, 64 of high bit pairs, scales, half d."""
    low = blocks[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    bits = (low & 0x0F).reshape(-1, 8, 32) | ((high & 0x03).reshape(-1, 8, 32) << 4)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    values = out.reshape(-1, 16, 16)
    np.subtract(bits.reshape(-1, 16, 16), np.float32(32), out=values, dtype=np.float32)
    values *= scales[:, :, None]


def _half(blocks: Bytes, start: int) -> Floats:
    """The float16 at byte `start` of every block, [n, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes, out: Floats) -> None:
    """Sixteen bytes: the lower nibbles are elements 0..15, the upper ones 16..31."""
    out[:, :16] = packed & 0x0F
    out[:, 16:] = packed >> 4


_DEQUANTIZE: Mapping[TensorType, Callable[[Bytes, Floats], None]] = MappingProxyType(
    {
        TensorType.F32: _f32,
        TensorType.F16: _f16,
        TensorType.BF16: _bf16,
        TensorType.Q4_0: _q4_0,
        TensorType.Q4_1: _q4_1,
        TensorType.Q8_0: _q8_0,
        TensorType.Q4_K: _q4_k,
        TensorType.Q6_K: _q6_k,
    }
)
