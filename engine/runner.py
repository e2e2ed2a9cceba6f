"""Run batches: pack the step, one forward pass, draw. On whichever kernels were chosen (engine/dispatch.py).

Where the backend can feed a step with draws that are not there yet, batches run a step ahead (engine/lookahead.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from engine import request
from engine.backend import Backend, KVStore, NativeBackend, Pending, ReferenceBackend
from engine.batch import Batch, Chunk
from engine.buckets import DecodeLimits
from engine.cuda_device import DeviceQueue
from engine.dispatch import Dtype, Kernels
from engine.kernels.native.build import KernelsUnavailable
from engine.kernels.native.program import StepArrays
from engine.kv_memory import KVShape
from engine.loading.region import PackedRegion
from engine.lookahead import Lookahead
from engine.models.rope import RopeTable
from engine.models.weights import SourceTensor
from engine.packing import pack_step, sample_rows, sampled_token
from engine.request import SampledToken
from engine.swap_memory import SwapMemory
from modelfiles.config import ModelConfig


class RunnerError(Exception):
    """The runner cannot be built as asked; the message names the setting."""


class ModelRunner:
    """The engine's Runner (see engine.batch.Runner), on the device that the KV memory is on."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, SourceTensor],
        kv: KVStore,
        *,
        kernels: Kernels = Kernels.NATIVE,
        deterministic: bool = False,
        num_threads: int = 1,
        dtype: str = "float32",
        packed: PackedRegion | None = None,
        swap: SwapMemory | None = None,
        limits: DecodeLimits | None = None,
        queue: DeviceQueue | None = None,
    ) -> None:
        """Native kernels use the `packed` weights, or pack `weights` for this process alone.

        Triton kernels run decodes within `limits` as graphs and a step ahead; `queue` is the device's unless given.
        Raises: RunnerError.
        """
        if dtype not in list(Dtype):
            raise RunnerError(f"dtype {dtype!r} is not supported (known: {', '.join(Dtype)})")
        expected = kv_shape(config, kv.block_size, kv_dtype(kernels, dtype))
        if kv.shape != expected:
            raise RunnerError(f"KV memory has {kv.shape}, the model needs {expected}")
        self._config = config
        self._kv = kv
        self._swap = swap
        self._rope = RopeTable(config)
        self._backend = _make_backend(
            config, weights, kv, self._rope, kernels, deterministic, num_threads, dtype, packed, limits, queue
        )
        self._lookahead: Lookahead | None = None
        if limits is not None and self._backend.feeds:
            self._lookahead = Lookahead(self._launch, kv.block_size, limits.max_model_len)

    def execute(self, batch: Batch) -> list[SampledToken]:
        """Copy blocks, run one forward pass over all chunks, draw one token per sampler.

        Its KV is written when this returns, and so is all that went before; a step ahead may still be at work.
        """
        if self._swap is not None:
            if batch.swap_outs or batch.swap_ins:
                self.settle()  # a step ahead that nobody wants any more may yet write to a block that is swapped into
            self._swap.start(batch.swap_outs, batch.swap_ins)  # without copies too: it awaits those of the batch before
        for source, destination in batch.copies:
            self._backend.run(partial(self._kv.copy_block, source, destination))
        if not batch.chunks:
            self.settle()
            return []
        if self._lookahead is not None:
            return self._lookahead.execute(batch.chunks)
        return self._launch(batch.chunks, None).tokens()

    def logits(self, batch: Batch) -> Tensor:
        """Logits of the chunks that have samplers, as a copy: what tests compare."""
        return self._backend.logits(self._pack(batch.chunks)).clone()

    def zero_slots(self, block_id: int, first_slot: int) -> None:
        """Zero the slots of a block from `first_slot` on, in every layer."""
        self._backend.run(partial(self._kv.zero_slots, block_id, first_slot))
        self.settle()

    def settle(self) -> None:
        """Wait for all work in flight.

        Call it before KV is read or written by another way than this runner's: before a freed block is filled by a
        transfer or a swap, above all, since a step ahead may still write to it.
        """
        self._backend.settle()

    @property
    def num_steps_ahead(self) -> int:
        """How many batches came as they had been predicted."""
        return self._lookahead.num_hits if self._lookahead is not None else 0

    @property
    def looks_ahead(self) -> bool:
        """Whether sequences should have the slot after a step's before they need it (EngineConfig.reserve_ahead)."""
        return self._lookahead is not None

    def numerics_fingerprint(self) -> str:
        """Names everything of this runner that could change a bit: kernels, compiler, device, dtype."""
        return self._backend.fingerprint

    @property
    def attention_calls(self) -> Mapping[str, int]:
        """How often each attention kernel ran so far, by name."""
        return self._backend.attention_calls

    def close(self) -> None:
        """Stop the kernel threads."""
        self._backend.close()

    def _launch(self, chunks: tuple[Chunk, ...], sources: Sequence[int] | None) -> _Flight:
        step = self._pack(chunks, is_fed=sources is not None)
        wanted = sample_rows(chunks, self._config)
        pending = self._backend.launch(step, [row for _, row in wanted], sources)
        return _Flight(pending, [sampler for sampler, _ in wanted])

    def _pack(self, chunks: Sequence[Chunk], *, is_fed: bool = False) -> StepArrays:
        return pack_step(chunks, self._rope, self._config.vocab_size, is_fed=is_fed)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step in the backend's hands."""

    pending: Pending
    samplers: list[request.Sequence]

    def tokens(self) -> list[SampledToken]:
        draws = self.pending.draws()
        return [sampled_token(draws, i, sampler) for i, sampler in enumerate(self.samplers)]


def kv_dtype(kernels: Kernels, dtype: str) -> str:
    """The type of the KV beside weights of type `dtype`."""
    return dtype if kernels is Kernels.TRITON else "float32"


def kv_shape(config: ModelConfig, block_size: int, dtype: str = "float32") -> KVShape:
    """The blocks that a model needs."""
    return KVShape(config.num_kv_heads, config.num_layers, block_size, config.head_dim, dtype)


def _make_backend(
    config: ModelConfig,
    weights: Mapping[str, SourceTensor],
    kv: KVStore,
    rope: RopeTable,
    kernels: Kernels,
    deterministic: bool,
    num_threads: int,
    dtype: str,
    packed: PackedRegion | None,
    limits: DecodeLimits | None,
    queue: DeviceQueue | None,
) -> Backend:
    match kernels:
        case Kernels.NATIVE:
            try:
                return NativeBackend(config, weights, kv, num_threads, dtype, packed)
            except KernelsUnavailable as error:
                raise RunnerError(f"native kernels: {error}") from error
        case Kernels.TRITON:
            from engine.triton_backend import TritonBackend  # imports Triton, which a machine may lack

            return TritonBackend(config, weights, kv, rope, deterministic, num_threads, limits, queue)
        case Kernels.REFERENCE:
            if deterministic:
                raise RunnerError("deterministic mode needs native or triton kernels; reference kernels were asked for")
            if dtype != "float32":
                raise RunnerError(f"dtype {dtype!r} needs native or triton kernels")
            return ReferenceBackend(config, weights, kv)
