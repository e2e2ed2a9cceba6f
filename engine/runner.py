"""Run batches on the CPU: pack the step, one forward pass, draw.

The native kernels are batch-invariant by construction (engine/kernels/native): a token's KV, logits and draw are the
same bits whatever the chunking, the batch and the number of threads. So `deterministic` costs nothing here; it only
refuses the reference kernels, which do not have that property.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch, Chunk
from engine.kernels.native.build import KernelsUnavailable
from engine.kernels.native.library import NativeContext
from engine.kernels.native.program import StepArrays
from engine.kernels.sampling import native as native_sampling
from engine.kernels.sampling import reference as reference_sampling
from engine.kernels.sampling.rows import Draws, SampleRow
from engine.kv_memory import KVMemory, KVShape
from engine.loading.region import PackedRegion, open_region
from engine.models.native_ops import NativeDecoder
from engine.models.rope import RopeTable
from engine.models.torch_ops import TorchDecoder, TorchStore
from engine.models.weights import SourceTensor, load_decoder_weights
from engine.request import SampledToken, Sequence
from engine.token_counts import TokenCounts
from modelfiles.config import ModelConfig

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16")
"""How weights are stored. KV and arithmetic are float32 with either; bfloat16 halves what a decode reads."""


class RunnerError(Exception):
    """The runner cannot be built as asked; the message names the setting."""


class CpuRunner:
    """The engine's Runner on the CPU (see engine.batch.Runner)."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, SourceTensor],
        kv: KVMemory,
        *,
        deterministic: bool = False,
        num_threads: int = 1,
        dtype: str = "float32",
        reference_kernels: bool = False,
        packed: PackedRegion | None = None,
    ) -> None:
        """Use the `packed` weights, or pack `weights` into memory of this process. Raises: RunnerError."""
        if dtype not in DTYPES:
            raise RunnerError(f"dtype {dtype!r} is not supported on the CPU (known: {', '.join(DTYPES)})")
        expected = kv_shape(config, kv.block_size)
        if kv.shape != expected:
            raise RunnerError(f"KV memory has {kv.shape}, the model needs {expected}")
        self._config = config
        self._kv = kv
        self._rope = RopeTable(config)
        self._backend = _make_backend(config, weights, kv, deterministic, num_threads, dtype, reference_kernels, packed)

    def execute(self, batch: Batch) -> list[SampledToken]:
        """Copy blocks, run one forward pass over all chunks, draw one token per sampler."""
        for source, destination in batch.copies:
            self._kv.copy_block(source, destination)
        if not batch.chunks:
            return []
        logits = self._backend.forward(self._pack(batch))
        samplers = [(i, s, c) for i, c in enumerate(c for c in batch.chunks if c.samplers) for s in c.samplers]
        if not samplers:
            return []
        rows = [_sample_row(i, sampler, chunk, self._config) for i, sampler, chunk in samplers]
        draws = self._backend.sample(logits, rows)
        return [_sampled_token(draws, i, sampler) for i, (_, sampler, _) in enumerate(samplers)]

    def logits(self, batch: Batch) -> Tensor:
        """Logits of the chunks that have samplers, as a copy: what tests compare."""
        return self._backend.forward(self._pack(batch)).clone()

    def zero_slots(self, block_id: int, first_slot: int) -> None:
        """Zero the slots of a block from `first_slot` on, in every layer."""
        self._kv.zero_slots(block_id, first_slot)

    def numerics_fingerprint(self) -> str:
        """Names everything of this runner that could change a bit: kernels, compiler, instruction set, dtype.

        The number of threads is not among it: native results do not depend on it.
        """
        return self._backend.fingerprint

    def close(self) -> None:
        """Stop the kernel threads."""
        self._backend.close()

    def _pack(self, batch: Batch) -> StepArrays:
        return pack_step(batch, self._rope, self._config.vocab_size)


class _Backend(Protocol):
    fingerprint: str

    def forward(self, step: StepArrays) -> Tensor: ...
    def sample(self, logits: Tensor, rows: list[SampleRow]) -> Draws: ...
    def close(self) -> None: ...


class _NativeBackend:
    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, SourceTensor],
        kv: KVMemory,
        num_threads: int,
        dtype: str,
        packed: PackedRegion | None,
    ) -> None:
        self._context = NativeContext(num_threads)
        packed = packed or open_region(config, weights, self._context.library, dtype)
        self._decoder = NativeDecoder(config, packed.decoder_weights(), kv.tensor, self._context)
        self.fingerprint = f"native {self._context.library.build.key} {dtype}"

    def forward(self, step: StepArrays) -> Tensor:
        return self._decoder.forward(step)

    def sample(self, logits: Tensor, rows: list[SampleRow]) -> Draws:
        return native_sampling.sample(self._context, logits, rows)

    def close(self) -> None:
        self._context.close()


class _ReferenceBackend:
    def __init__(self, config: ModelConfig, weights: Mapping[str, SourceTensor], kv: KVMemory) -> None:
        self._decoder = TorchDecoder(config, load_decoder_weights(config, TorchStore(weights)), kv.tensor)
        self.fingerprint = f"reference torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"

    def forward(self, step: StepArrays) -> Tensor:
        return self._decoder.forward(step)

    def sample(self, logits: Tensor, rows: list[SampleRow]) -> Draws:
        return reference_sampling.sample(logits.numpy(), rows)

    def close(self) -> None:
        pass


def kv_shape(config: ModelConfig, block_size: int) -> KVShape:
    """The blocks that a model needs."""
    return KVShape(config.num_kv_heads, config.num_layers, block_size, config.head_dim)


def pack_step(batch: Batch, rope: RopeTable, vocab_size: int) -> StepArrays:
    """Lay the chunks one after another, without padding."""
    chunks = batch.chunks
    tokens: list[int] = []
    tables = [np.asarray(chunk.sequence.block_table, np.int32) for chunk in chunks]
    starts, sampled = [0], []
    for chunk in chunks:
        end = chunk.start + chunk.num_tokens
        tokens += chunk.sequence.token_ids[chunk.start : end]
        starts.append(len(tokens))
        if chunk.samplers:
            sampled.append(len(tokens) - 1)
    rope.ensure(max(chunk.start + chunk.num_tokens for chunk in chunks))
    token_ids = np.array(tokens, np.int32)
    assert len(token_ids) == batch.num_tokens
    assert 0 <= token_ids.min() <= token_ids.max() < vocab_size
    return StepArrays(
        token_ids=token_ids,
        query_starts=np.array(starts, np.int32),
        positions=np.array([chunk.start for chunk in chunks], np.int32),
        table_offsets=np.cumsum([0, *map(len, tables[:-1])], dtype=np.int64),
        block_tables=np.concatenate(tables),
        sampled_rows=np.array(sampled, np.int32),
        rope_cos=rope.cos,
        rope_sin=rope.sin,
    )


def _make_backend(
    config: ModelConfig,
    weights: Mapping[str, SourceTensor],
    kv: KVMemory,
    deterministic: bool,
    num_threads: int,
    dtype: str,
    reference_kernels: bool,
    packed: PackedRegion | None,
) -> _Backend:
    if not reference_kernels:
        try:
            return _NativeBackend(config, weights, kv, num_threads, dtype, packed)
        except KernelsUnavailable as error:
            if deterministic:
                raise RunnerError(f"deterministic mode needs the native kernels: {error}") from error
            log.warning("kernels: reference, several times slower than native: %s", error)
    if deterministic:
        raise RunnerError("deterministic mode needs the native kernels; reference kernels were asked for")
    if dtype != "float32":
        raise RunnerError(f"dtype {dtype!r} needs the native kernels")
    return _ReferenceBackend(config, weights, kv)


def _sample_row(logits_row: int, sampler: Sequence, chunk: Chunk, config: ModelConfig) -> SampleRow:
    params = sampler.sampling
    position = chunk.start + chunk.num_tokens
    banned: tuple[int, ...] = ()
    if position - sampler.num_prompt_tokens < params.min_tokens:
        stops = params.stop_token_ids + (() if params.ignore_eos else config.eos_token_ids)
        banned = tuple(each for each in stops if each < config.vocab_size)  # others are never drawn anyhow
    return SampleRow(
        logits_row=logits_row,
        seed=params.seed,
        choice=sampler.choice,
        position=position,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        repetition=params.repetition_penalty,
        frequency=params.frequency_penalty,
        presence=params.presence_penalty,
        num_logprobs=params.num_logprobs,
        seen=_seen(sampler, position) if params.has_penalties else None,
        banned=banned,
    )


def _seen(sampler: Sequence, position: int) -> TokenCounts:
    assert position == len(sampler.token_ids), "drawn for another position than the one behind all known tokens"
    return sampler.counts.advance(sampler.token_ids, sampler.num_prompt_tokens)


def _sampled_token(draws: Draws, i: int, sampler: Sequence) -> SampledToken:
    wanted = sampler.sampling.num_logprobs
    if wanted < 0:
        return SampledToken(sampler.sequence_id, int(draws.tokens[i]))
    wanted = min(wanted, draws.top_ids.shape[1])
    top = tuple(zip(draws.top_ids[i, :wanted].tolist(), draws.top_logprobs[i, :wanted].tolist(), strict=True))
    return SampledToken(sampler.sequence_id, int(draws.tokens[i]), float(draws.logprobs[i]), top)
