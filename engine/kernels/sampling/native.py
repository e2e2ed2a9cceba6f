"""Lay out the rows for the native sampler and check them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.kernels.native.library import NativeContext, NativeSampling
from engine.kernels.sampling.rows import Draws, SampleRow, empty_draws

_ROW = np.dtype(
    [
        ("seed", np.uint64),
        ("seen", np.int64),
        ("banned", np.int64),
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("repetition", np.float64),
        ("frequency", np.float64),
        ("presence", np.float64),
        ("logits_row", np.int32),
        ("choice", np.int32),
        ("position", np.int32),
        ("top_k", np.int32),
        ("num_logprobs", np.int32),
        ("num_seen", np.int32),
        ("num_banned", np.int32),
        ("min_p_margin", np.float32),
    ]
)

_NONE = np.empty(0, np.int32)


def sample(context: NativeContext, logits: Tensor, rows: list[SampleRow]) -> Draws:
    """Draw one token per row from logits [n, vocab] float32, rows contiguous."""
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError(f"logits are {tuple(logits.shape)} {logits.dtype}, expected [n, vocab] float32")
    draws = empty_draws(rows)
    seen_ids, seen_counts, num_seen = [_NONE], [_NONE], 0
    banned: list[int] = []
    packed = np.zeros(len(rows), _ROW)
    for i, row in enumerate(rows):
        assert 0 <= row.logits_row < logits.shape[0]
        num_own = len(row.seen.ids) if row.seen else 0
        packed[i] = (
            *(row.seed & 0xFFFFFFFFFFFFFFFF, num_seen, len(banned), row.temperature, row.top_p),
            *(row.repetition, row.frequency, row.presence, row.logits_row, row.choice, row.position, row.top_k),
            *(min(row.num_logprobs, logits.shape[1]), num_own, len(row.banned), row.min_p_margin),
        )
        if row.seen:
            seen_ids.append(np.asarray(row.seen.ids))
            seen_counts.append(np.asarray(row.seen.num_output))
            num_seen += num_own
        banned.extend(row.banned)
    all_ids, all_counts, banned_ids = np.concatenate(seen_ids), np.concatenate(seen_counts), np.array(banned, np.int32)
    if num_seen and not 0 <= all_ids.min() <= all_ids.max() < logits.shape[1]:
        raise ValueError(f"a sequence holds token ids outside [0, {logits.shape[1]})")
    context.sample(
        NativeSampling(
            logits=logits.data_ptr(),
            ld=logits.stride(0),
            vocab=logits.shape[1],
            rows=packed.ctypes.data,
            num_rows=len(rows),
            seen_ids=all_ids.ctypes.data,
            seen_counts=all_counts.ctypes.data,
            banned=banned_ids.ctypes.data,
            tokens=draws.tokens.ctypes.data,
            logprobs=draws.logprobs.ctypes.data,
            top_ids=draws.top_ids.ctypes.data,
            top_logprobs=draws.top_logprobs.ctypes.data,
            max_top=draws.top_ids.shape[1],
        )
    )
    return draws
