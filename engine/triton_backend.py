"""The Triton kernels behind the runner: inputs to the device, one forward pass, draws there, tokens back.

A launch enqueues and returns; its tokens come by one copy, and whoever reads them waits for that copy alone. Importing
this imports Triton; engine/dispatch.py decides whether that happens, and sets up its interpreter first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
from torch import Tensor

from engine.backend import KVStore
from engine.buckets import DecodeLimits
from engine.cuda_device import DeviceQueue, Mark, Work, queue_of
from engine.decode_graphs import DecodeGraphs
from engine.kernels.native.program import StepArrays
from engine.kernels.sampling.launch import sample_packed
from engine.kernels.sampling.packed_rows import Results, RowLayout, results_bytes
from engine.kernels.sampling.rows import Draws, SampleRow
from engine.models.rope import RopeTable
from engine.models.triton_ops import TritonDecoder
from engine.models.weights import SourceTensor
from engine.step_layout import lay_out, sizes_of, write_step
from engine.step_tensors import feed, parts_of, step_of, view_of
from modelfiles.config import ModelConfig


class TritonBackend:
    """Weights and computation on the device of the KV memory.

    With `limits`, and a dummy block in the KV memory, decodes run as graphs, and steps may be fed with the draws of the
    step before.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, SourceTensor],
        kv: KVStore,
        rope: RopeTable,
        deterministic: bool,
        num_threads: int,
        limits: DecodeLimits | None,
        queue: DeviceQueue | None,
    ) -> None:
        torch.set_num_threads(num_threads)
        self._queue = queue or queue_of(kv.tensor.device)
        self._block_size = kv.block_size
        self._vocab_size = config.vocab_size
        self._decoder = TritonDecoder(config, weights, kv.tensor, rope, deterministic=deterministic)
        most = limits.max_num_seqs if limits is not None else 0
        self._drawn = torch.zeros(most, dtype=torch.int32, device=self._queue.device)
        self._graphs: DecodeGraphs | None = None
        if limits is not None and kv.tensor.shape[0] > kv.num_blocks:
            self._graphs = DecodeGraphs(
                self._queue, self._decoder, limits, self._drawn, dummy_block=kv.num_blocks, vocab_size=self._vocab_size
            )
        self.feeds = limits is not None
        mode = "deterministic" if deterministic else "fast"
        self.fingerprint = (
            f"triton {triton.__version__} torch {torch.__version__} {self._queue.description} {kv.shape.dtype} {mode}"
        )

    @property
    def attention_calls(self) -> Mapping[str, int]:
        return self._decoder.attention_calls

    def launch(self, step: StepArrays, rows: list[SampleRow], sources: Sequence[int] | None = None) -> PendingDraws:
        sizes = sizes_of(step, self._block_size)
        max_seq_len = int((step.positions + np.diff(step.query_starts)).max())
        graph = self._graphs.find(sizes, max_seq_len) if self._graphs is not None else None
        if graph is None:
            return self._draw(self._forward(step, sources), rows)
        assert self._graphs is not None
        if self._graphs.launch(graph, step, rows, sources):
            return self._bring(lambda: graph.results, len(rows), graph.results.num_slots, 0)
        return self._draw(lambda: graph.logits, rows)

    def logits(self, step: StepArrays) -> Tensor:
        get = self._forward(step, None)
        self.settle()
        return get()

    def run(self, work: Work) -> None:
        self._queue.run(work)

    def settle(self) -> None:
        self._queue.mark().wait()

    def close(self) -> None:
        self.settle()

    def _forward(self, step: StepArrays, sources: Sequence[int] | None) -> Callable[[], Tensor]:
        """Enqueue a forward pass without a graph; the logits are there once the queue has come to it."""
        sizes = sizes_of(step, self._block_size)
        layout = lay_out(sizes)
        host = self._queue.host_memory(layout.num_bytes)
        write_step(step, self._block_size, sizes, layout, 0, host.numpy(), sources)
        lengths = np.diff(step.query_starts)
        max_query_len, max_seq_len = int(lengths.max()), int((step.positions + lengths).max())
        made: list[Tensor] = []

        def work() -> None:
            memory = host.to(self._queue.device, non_blocking=True)
            device_step = step_of(layout, memory, max_query_len, max_seq_len)
            if sources is not None:
                feed(device_step.token_ids, view_of(layout.token_sources, memory), self._drawn)
            parts = parts_of(device_step, layout, memory, sizes)
            self._decoder.count(parts)
            made.append(self._decoder.forward(device_step, parts))

        self._queue.run(work)
        return lambda: made[0]

    def _draw(self, get_logits: Callable[[], Tensor], rows: list[SampleRow]) -> PendingDraws:
        """Enqueue the draws of any rows, without a graph."""
        if not rows:
            return PendingDraws(self._queue.mark(), torch.empty(0, dtype=torch.uint8), 0, 0, 0)
        layout = RowLayout.of(rows)
        host = self._queue.host_memory(layout.num_bytes)
        kinds = layout.write(rows, self._vocab_size, host.numpy())
        made: list[Results] = []

        def work() -> None:
            memory = host.to(self._queue.device, non_blocking=True)
            results = sample_packed(get_logits(), layout.rows_in(memory, kinds))
            made.append(results)
            # Of more rows than may decode, as prompts for others draw them, none is ever fed from here.
            tokens = results.tokens[: len(self._drawn)]
            self._drawn[: len(tokens)].copy_(tokens)

        self._queue.run(work)
        return self._bring(lambda: made[0], len(rows), len(rows), kinds.max_top)

    def _bring(self, get: Callable[[], Results], num_rows: int, num_slots: int, max_top: int) -> PendingDraws:
        """Enqueue the one copy that brings tokens back."""
        host = self._queue.host_memory(results_bytes(num_slots, max_top))
        self._queue.run(lambda: host.view(torch.int32).copy_(get().flat, non_blocking=True))
        return PendingDraws(self._queue.mark(), host, num_rows, num_slots, max_top)


@dataclass(frozen=True, slots=True)
class PendingDraws:
    """Draws on their way to the host."""

    mark: Mark
    host: Tensor
    num_rows: int
    num_slots: int
    max_top: int

    def draws(self) -> Draws:
        """Wait for them."""
        self.mark.wait()
        return Results(self.host.view(torch.int32), self.num_slots, self.max_top).draws(self.num_rows)
