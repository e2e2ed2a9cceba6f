"""Run batches: pack the step, one forward pass, draw. On whichever kernels were chosen (engine/dispatch.py)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from engine.backend import Backend, KVStore, NativeBackend, ReferenceBackend
from engine.batch import Batch
from engine.dispatch import Kernels
from engine.kernels.native.build import KernelsUnavailable
from engine.kernels.native.program import StepArrays
from engine.kv_memory import KVShape
from engine.loading.region import PackedRegion
from engine.models.rope import RopeTable
from engine.models.weights import SourceTensor
from engine.packing import pack_step, sample_rows, sampled_token
from engine.request import SampledToken
from engine.swap_memory import SwapMemory
from modelfiles.config import ModelConfig

DTYPES = ("float32", "bfloat16")
"""Of the weights. Native kernels compute and keep KV in float32 with either; Triton kernels keep KV in this type, too,
and accumulate in float32."""


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
    ) -> None:
        """Native kernels use the `packed` weights, or pack `weights` for this process alone. Raises: RunnerError."""
        if dtype not in DTYPES:
            raise RunnerError(f"dtype {dtype!r} is not supported (known: {', '.join(DTYPES)})")
        expected = kv_shape(config, kv.block_size, kv_dtype(kernels, dtype))
        if kv.shape != expected:
            raise RunnerError(f"KV memory has {kv.shape}, the model needs {expected}")
        self._config = config
        self._kv = kv
        self._swap = swap
        self._rope = RopeTable(config)
        self._backend = _make_backend(
            config, weights, kv, self._rope, kernels, deterministic, num_threads, dtype, packed
        )

    def execute(self, batch: Batch) -> list[SampledToken]:
        """Copy blocks, run one forward pass over all chunks, draw one token per sampler."""
        if self._swap is not None:
            self._swap.start(batch.swap_outs, batch.swap_ins)
        for source, destination in batch.copies:
            self._kv.copy_block(source, destination)
        if not batch.chunks:
            return []
        logits = self._backend.forward(self._pack(batch))
        wanted = sample_rows(batch, self._config)
        if not wanted:
            return []
        draws = self._backend.sample(logits, [row for _, row in wanted])
        return [sampled_token(draws, i, sampler) for i, (sampler, _) in enumerate(wanted)]

    def logits(self, batch: Batch) -> Tensor:
        """Logits of the chunks that have samplers, as a copy: what tests compare."""
        return self._backend.forward(self._pack(batch)).clone()

    def zero_slots(self, block_id: int, first_slot: int) -> None:
        """Zero the slots of a block from `first_slot` on, in every layer."""
        self._kv.zero_slots(block_id, first_slot)

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

    def _pack(self, batch: Batch) -> StepArrays:
        return pack_step(batch, self._rope, self._config.vocab_size)


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
) -> Backend:
    match kernels:
        case Kernels.NATIVE:
            try:
                return NativeBackend(config, weights, kv, num_threads, dtype, packed)
            except KernelsUnavailable as error:
                raise RunnerError(f"native kernels: {error}") from error
        case Kernels.TRITON:
            from engine.triton_backend import TritonBackend  # imports Triton, which a machine may lack

            return TritonBackend(config, weights, kv, rope, deterministic, num_threads)
        case Kernels.REFERENCE:
            if deterministic:
                raise RunnerError("deterministic mode needs native or triton kernels; reference kernels were asked for")
            if dtype != "float32":
                raise RunnerError(f"dtype {dtype!r} needs native or triton kernels")
            return ReferenceBackend(config, weights, kv)
