"""A step's arrays, as they lie in a piece of the device's memory, as the tensors that kernels take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.device_step import DeviceStep
from engine.models.triton_ops import DECODE_KERNEL, PREFILL_KERNEL, StepPart
from engine.step_layout import ArrayPlace, StepLayout, StepSizes


def step_of(layout: StepLayout, memory: Tensor, max_query_len: int, max_seq_len: int) -> DeviceStep:
    """The step whose arrays lie in `memory`, bytes on the device."""
    return DeviceStep(
        token_ids=view_of(layout.token_ids, memory),
        positions=view_of(layout.positions, memory),
        slot_mapping=view_of(layout.slot_mapping, memory),
        cu_seqlens_q=view_of(layout.cu_seqlens_q, memory),
        seq_lens=view_of(layout.seq_lens, memory),
        block_tables=view_of(layout.block_tables, memory),
        sampled_rows=view_of(layout.sampled_rows, memory),
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
    )


def parts_of(step: DeviceStep, layout: StepLayout, memory: Tensor, sizes: StepSizes) -> Sequence[StepPart]:
    """Decodes and prompt chunks apart: each kind has its own attention kernel."""
    decodes, parts = sizes.num_decodes, list[StepPart]()
    if decodes:
        starts, max_query_len = step.cu_seqlens_q[: decodes + 1], 1
        part = _part(step, slice(0, decodes), slice(0, decodes), starts, max_query_len)
        parts.append(StepPart(DECODE_KERNEL, 0, decodes, part))
    if sizes.num_prefills:
        starts = view_of(layout.prefill_starts, memory)
        part = _part(step, slice(decodes, None), slice(decodes, None), starts, step.max_query_len)
        parts.append(StepPart(PREFILL_KERNEL, decodes, sizes.num_tokens, part))
    return parts


def feed(token_ids: Tensor, sources: Tensor, drawn: Tensor) -> None:
    """token_ids[i] = drawn[sources[i]] where there is a source; on the device, so that no host need know the token."""
    fed = drawn.index_select(0, sources.clamp(min=0))
    token_ids.copy_(torch.where(sources < 0, token_ids, fed))


def view_of(place: ArrayPlace, memory: Tensor) -> Tensor:
    """One array in `memory`, bytes on the device."""
    dtype = torch.int64 if place.dtype == "int64" else torch.int32
    return memory[place.offset : place.offset + place.num_bytes].view(dtype).view(place.shape)


def _part(step: DeviceStep, rows: slice, sequences: slice, starts: Tensor, max_query_len: int) -> DeviceStep:
    return DeviceStep(
        token_ids=step.token_ids[rows],
        positions=step.positions[rows],
        slot_mapping=step.slot_mapping[rows],
        cu_seqlens_q=starts,
        seq_lens=step.seq_lens[sequences],
        block_tables=step.block_tables[sequences],
        sampled_rows=step.sampled_rows[:0],
        max_query_len=max_query_len,
        max_seq_len=step.max_seq_len,
    )
