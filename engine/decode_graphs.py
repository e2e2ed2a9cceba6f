"""Steps of decodes as graphs over buckets (engine/buckets.py): fixed inputs, one copy, one or two replays.

All graphs read one piece of device memory, each by the layout of its own sizes, and write one tensor of logits: they
run one after another, and a step's inputs are copied behind the graph before it. Two graphs per bucket: the forward
pass, and the draws of plain rows. Rows with penalties, bans or top logprobs have lists of any length: those steps are
drawn without a graph, behind the forward pass's. Captured at the start, the largest first, so that the others find
room in the memory it has taken, and so that no request waits for a capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.buckets import Bucket, DecodeLimits, buckets, smallest
from engine.cuda_device import DeviceQueue, Graph
from engine.kernels.native.program import StepArrays, rows_step
from engine.kernels.sampling.launch import Workspace, sample_packed
from engine.kernels.sampling.packed_rows import PLAIN, Results, RowLayout, are_plain
from engine.kernels.sampling.rows import SampleRow
from engine.models.triton_ops import StepPart, TritonDecoder
from engine.step_layout import StepLayout, StepSizes, decode_sizes, lay_out, write_step
from engine.step_tensors import feed, parts_of, step_of, view_of


@dataclass(frozen=True, slots=True)
class DecodeGraph:
    """One bucket's."""

    sizes: StepSizes
    layout: StepLayout
    rows: RowLayout
    parts: Sequence[StepPart]
    forward: Graph
    draw: Graph
    logits: Tensor
    results: Results

    @property
    def num_bytes(self) -> int:
        return self.layout.num_bytes + self.rows.num_bytes


class DecodeGraphs:
    """The graphs of one decoder. `drawn` [max_num_seqs] int32 holds the tokens of the step that was drawn last."""

    def __init__(
        self,
        queue: DeviceQueue,
        decoder: TritonDecoder,
        limits: DecodeLimits,
        drawn: Tensor,
        dummy_block: int,
        vocab_size: int,
    ) -> None:
        self._queue = queue
        self._decoder = decoder
        self._drawn = drawn
        self._dummy_block = dummy_block
        self._vocab_size = vocab_size
        self._block_size = decoder.cache.shape[4]
        self._shapes = buckets(limits.max_num_seqs, limits.max_model_len)
        most, device = limits.max_num_seqs, queue.device
        largest = lay_out(decode_sizes(most, limits.max_model_len, self._block_size))
        self._inputs = torch.zeros(largest.num_bytes + RowLayout(most).num_bytes, dtype=torch.uint8, device=device)
        self._logits = torch.empty(most, vocab_size, dtype=decoder.cache.dtype, device=device)
        self._workspace = Workspace(most, vocab_size, device, num_edited=0)
        self._graphs = {bucket: self._capture(bucket) for bucket in reversed(self._shapes)}

    def find(self, sizes: StepSizes, max_seq_len: int) -> DecodeGraph | None:
        """The smallest graph that holds a step; None if it has chunks of prompts, or none holds it."""
        if sizes.num_prefills or sizes.num_sampled != sizes.num_tokens:
            return None
        bucket = smallest(self._shapes, sizes.num_sequences, max_seq_len)
        return None if bucket is None else self._graphs[bucket]

    def launch(
        self, graph: DecodeGraph, step: StepArrays, rows: list[SampleRow], sources: Sequence[int] | None
    ) -> bool:
        """Enqueue the forward pass, and the draws if all rows are plain: whether they were."""
        host = self._queue.host_memory(graph.num_bytes)
        memory, end = host.numpy(), graph.layout.num_bytes
        write_step(step, self._block_size, graph.sizes, graph.layout, self._dummy_block, memory[:end], sources)
        # Several choices of a prompt of one token draw from one row of logits: more rows than the graph has.
        is_plain = len(rows) <= graph.rows.num_slots and are_plain(rows)
        graph.rows.write(rows if is_plain else [], self._vocab_size, memory[end:])
        inputs = self._inputs[: graph.num_bytes]
        self._queue.run(lambda: inputs.copy_(host, non_blocking=True))
        graph.forward.replay()
        self._decoder.count(graph.parts)
        if is_plain:
            graph.draw.replay()
        return is_plain

    def _capture(self, bucket: Bucket) -> DecodeGraph:
        """With inputs of padding alone, since capturing may run it."""
        sizes = decode_sizes(bucket.num_seqs, bucket.max_seq_len, self._block_size)
        layout, rows = lay_out(sizes), RowLayout(bucket.num_seqs)
        end = layout.num_bytes
        padding = torch.empty(end + rows.num_bytes, dtype=torch.uint8)
        write_step(rows_step(0), self._block_size, sizes, layout, self._dummy_block, padding.numpy()[:end])
        rows.write([], self._vocab_size, padding.numpy()[end:])
        inputs = self._inputs[: len(padding)]
        inputs.copy_(padding)
        step = step_of(layout, inputs, max_query_len=1, max_seq_len=bucket.max_seq_len)
        parts, sources = parts_of(step, layout, inputs, sizes), view_of(layout.token_sources, inputs)
        logits = self._logits[: bucket.num_seqs]
        packed = rows.rows_in(inputs[end:], PLAIN)
        results = Results.empty(bucket.num_seqs, 0, self._queue.device)

        def forward() -> None:
            feed(step.token_ids, sources, self._drawn)
            self._decoder.forward(step, parts, logits)

        def draw() -> None:
            sample_packed(logits, packed, workspace=self._workspace, results=results)
            self._drawn[: bucket.num_seqs].copy_(results.tokens)

        return DecodeGraph(
            sizes, layout, rows, parts, self._queue.capture(forward), self._queue.capture(draw), logits, results
        )
