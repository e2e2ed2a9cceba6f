"""Attention: prompts in TFLOP/s, decodes in bytes per second beside a copy's, and FlashInfer where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.gpu.harness import Bench, Figure
from engine.kernels.attention.launch import AttentionOptions, make_workspace, paged_attention
from engine.kernels.device_step import DeviceStep

HEADS, KV_HEADS, DIM = 32, 8, 128  # Llama-3.1-8B
TOKENS = 16384  # of a prefill case, in as many prompts as that makes
PREFILL_GOAL = 400.0
DECODE_GOAL = 0.85
GOAL_BATCH = 32


class Case:
    """Sequences whose last `query_len` tokens are computed, all of one length."""

    def __init__(self, bench: Bench, batch: int, query_len: int, seq_len: int, block_size: int = 16) -> None:
        device, dtype = bench.device, torch.float32 if bench.is_rehearsal else torch.bfloat16
        self.batch, self.query_len, self.seq_len, self.block_size = batch, query_len, seq_len, block_size
        blocks = -(-seq_len // block_size)
        self.q = torch.randn(batch * query_len, HEADS, DIM, device=device, dtype=dtype)
        # Each block's K and V of each head as the engine keeps them; in no order, as after hours of serving.
        self.cache = torch.randn(batch * blocks, KV_HEADS, 1, 2, block_size, DIM, device=device, dtype=dtype)
        order = torch.randperm(batch * blocks, device=device)
        self.block_tables = order.view(batch, blocks).to(torch.int32)
        self.out = torch.empty_like(self.q)
        rows = torch.arange(batch * query_len, device=device, dtype=torch.int32)
        self.step = DeviceStep(
            token_ids=rows,
            positions=rows,
            slot_mapping=rows.long(),
            cu_seqlens_q=torch.arange(batch + 1, device=device, dtype=torch.int32) * query_len,
            seq_lens=torch.full((batch,), seq_len, device=device, dtype=torch.int32),
            block_tables=self.block_tables,
            sampled_rows=rows[:0],
            max_query_len=query_len,
            max_seq_len=seq_len,
        )
        self._workspace = make_workspace(max(2048, batch * 64), HEADS, DIM, device)

    def ours(self, *, deterministic: bool = False) -> Callable[[], None]:
        options = AttentionOptions(scale=DIM**-0.5, deterministic=deterministic)
        return lambda: paged_attention(self.q, self.cache, 0, self.step, self.out, options, self._workspace)

    def flash_infer(self) -> Callable[[], Tensor] | None:
        """FlashInfer on the same cache (layout HND); None where it is not installed."""
        if self.q.device.type == "cpu" or importlib.util.find_spec("flashinfer") is None:
            return None
        import flashinfer  # pyright: ignore[reportMissingImports]

        pages = self.block_tables.shape[1]
        starts = torch.arange(self.batch + 1, device=self.q.device, dtype=torch.int32)
        last = torch.full_like(starts[1:], (self.seq_len - 1) % self.block_size + 1)
        space = torch.empty(256 << 20, dtype=torch.uint8, device=self.q.device)
        paging = (starts * pages, self.block_tables.flatten(), last, HEADS, KV_HEADS, DIM, self.block_size)
        kv = self.cache[:, :, 0].transpose(1, 2)
        wrapper: Any
        if self.query_len == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "HND", use_tensor_cores=True)
            wrapper.plan(*paging, q_data_type=self.q.dtype, kv_data_type=kv.dtype)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "HND")
            wrapper.plan(self.step.cu_seqlens_q, *paging, causal=True, q_data_type=self.q.dtype)
        # Strides of ours: a block's heads lie before K and V. A copy in FlashInfer's own order is fair to it.
        own = kv.contiguous()
        return lambda: wrapper.run(self.q, own)

    def torch_sdpa(self) -> Callable[[], Tensor]:
        """torch on contiguous K and V of whole prompts: no paging, so it has less to do than we."""
        shape = (self.batch, self.seq_len, HEADS, DIM)
        q = self.q.view(self.batch, self.query_len, HEADS, DIM).transpose(1, 2)
        k = torch.randn(shape[0], KV_HEADS, self.seq_len, DIM, device=q.device, dtype=q.dtype)
        v = torch.randn_like(k)
        return lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    @property
    def flops(self) -> float:
        """Of the causal half only: what a row does not see is not counted."""
        seen = self.query_len * (self.seq_len - self.query_len) + self.query_len * (self.query_len + 1) / 2
        return 4.0 * self.batch * HEADS * DIM * seen

    @property
    def kv_bytes(self) -> float:
        return 2.0 * self.batch * self.seq_len * KV_HEADS * DIM * self.cache.element_size()


def prefill(bench: Bench) -> None:
    """Whole prompts of 1k to 16k tokens, then chunks of 2k behind a prefix."""
    cases = [(TOKENS // n, n, n) for n in (1024, 2048, 4096, 8192, 16384)] + [(1, 2048, 8192), (1, 2048, 32768)]
    for batch, query_len, seq_len in [(2, 24, 24), (1, 8, 40)] if bench.is_rehearsal else cases:
        if not bench.has_time(5):
            return
        case = Case(bench, batch, query_len, seq_len)
        whole = query_len == seq_len
        peer, name = case.flash_infer(), "FlashInfer"
        if peer is None and whole:
            peer, name = case.torch_sdpa(), "torch SDPA, contiguous"
        bench.add(
            Figure(
                part="prefill",
                case=f"{batch} x {query_len} tokens of {seq_len}, hd {DIM}",
                unit="TFLOP/s",
                ours=case.flops / bench.seconds_of(case.ours()) / 1e12,
                theirs=case.flops / bench.seconds_of(peer) / 1e12 if peer else 0.0,
                theirs_name=name if peer else "",
                goal=PREFILL_GOAL if whole else 0.0,
            )
        )


def decode(bench: Bench) -> None:
    """One token per sequence; bytes of K and V per second beside what a copy moves."""
    cases = [(1, 4096), (8, 4096), (32, 1024), (32, 4096), (64, 2048), (128, 1024), (256, 1024), (8, 32768)]
    for batch, seq_len in [(3, 40)] if bench.is_rehearsal else cases:
        if not bench.has_time(5):
            return
        case = Case(bench, batch, 1, seq_len)
        peer = case.flash_infer()
        bench.add(
            Figure(
                part="decode",
                case=f"{batch} sequences of {seq_len}",
                unit="GB/s of KV",
                ours=case.kv_bytes / bench.seconds_of(bench.graph_of(case.ours())) / 1e9,
                theirs=case.kv_bytes / bench.seconds_of(bench.graph_of(peer)) / 1e9 if peer else 0.0,
                theirs_name="FlashInfer" if peer else "",
                goal=DECODE_GOAL * bench.bandwidth / 1e9 if batch >= GOAL_BATCH else 0.0,
            )
        )


def determinism(bench: Bench) -> None:
    """Share of its speed that attention keeps in deterministic mode."""
    shapes = [(1, 16, 16), (2, 1, 40)] if bench.is_rehearsal else [(2, 8192, 8192), (64, 1, 2048)]
    for batch, query_len, seq_len in shapes:
        if not bench.has_time(5):
            return
        case = Case(bench, batch, query_len, seq_len)
        fast = bench.seconds_of(bench.graph_of(case.ours()))
        fixed = bench.seconds_of(bench.graph_of(case.ours(deterministic=True)))
        bench.add(
            Figure(
                part="fixed",
                case=f"attention, {batch} x {query_len} tokens of {seq_len}",
                unit="of its speed",
                ours=fast / fixed,
                goal=0.9,
            )
        )
