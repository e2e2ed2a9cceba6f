"""The Triton kernels behind the runner: inputs to the device, one forward pass, draws there, tokens back.

Importing this imports Triton; engine/dispatch.py decides whether that happens, and sets up its interpreter first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import triton
from torch import Tensor

from engine.backend import KVStore
from engine.kernels.device_step import DeviceStep
from engine.kernels.native.program import StepArrays
from engine.kernels.sampling.launch import sample
from engine.kernels.sampling.rows import Draws, SampleRow
from engine.models.rope import RopeTable
from engine.models.triton_ops import DECODE_KERNEL, PREFILL_KERNEL, StepPart, TritonDecoder
from engine.models.weights import SourceTensor
from engine.step_layout import ArrayPlace, StepLayout, StepSizes, lay_out, sizes_of, write_step
from modelfiles.config import ModelConfig


class TritonBackend:
    """Weights and computation on the device of the KV memory."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, SourceTensor],
        kv: KVStore,
        rope: RopeTable,
        deterministic: bool,
        num_threads: int,
    ) -> None:
        torch.set_num_threads(num_threads)
        self._block_size = kv.block_size
        self._decoder = TritonDecoder(config, weights, kv.tensor, rope, deterministic=deterministic)
        where = f"interpreter numpy {np.__version__}"
        mode = "deterministic" if deterministic else "fast"
        self.fingerprint = f"triton {triton.__version__} torch {torch.__version__} {where} {kv.shape.dtype} {mode}"

    @property
    def attention_calls(self) -> Mapping[str, int]:
        return self._decoder.attention_calls

    def forward(self, step: StepArrays) -> Tensor:
        sizes = sizes_of(step, self._block_size)
        layout = lay_out(sizes)
        memory = torch.empty(layout.num_bytes, dtype=torch.uint8)
        write_step(step, self._block_size, sizes, layout, 0, memory.numpy())
        lengths = np.diff(step.query_starts)
        seq_lens = step.positions + lengths
        device_step = step_of(layout, memory, int(lengths.max()), int(seq_lens.max()))
        parts = parts_of(device_step, layout, memory, sizes)
        self._decoder.count(parts)
        return self._decoder.forward(device_step, parts)

    def sample(self, logits: Tensor, rows: list[SampleRow]) -> Draws:
        return sample(logits, rows)

    def close(self) -> None:
        """Nothing is open."""


def step_of(layout: StepLayout, memory: Tensor, max_query_len: int, max_seq_len: int) -> DeviceStep:
    """The step whose arrays lie in `memory`, bytes on the device."""
    return DeviceStep(
        token_ids=_view(layout.token_ids, memory),
        positions=_view(layout.positions, memory),
        slot_mapping=_view(layout.slot_mapping, memory),
        cu_seqlens_q=_view(layout.cu_seqlens_q, memory),
        seq_lens=_view(layout.seq_lens, memory),
        block_tables=_view(layout.block_tables, memory),
        sampled_rows=_view(layout.sampled_rows, memory),
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
        starts = _view(layout.prefill_starts, memory)
        part = _part(step, slice(decodes, None), slice(decodes, None), starts, step.max_query_len)
        parts.append(StepPart(PREFILL_KERNEL, decodes, sizes.num_tokens, part))
    return parts


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


def _view(place: ArrayPlace, memory: Tensor) -> Tensor:
    dtype = torch.int64 if place.dtype == "int64" else torch.int32
    return memory[place.offset : place.offset + place.num_bytes].view(dtype).view(place.shape)
