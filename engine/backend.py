"""The kernels as the runner sees them: a forward pass over a packed step, and draws from its logits.

Native and reference are here; the Triton one is in engine/triton_backend.py, imported only where it was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from engine.kernels.native.library import NativeContext
from engine.kernels.native.program import StepArrays
from engine.kernels.sampling import native as native_sampling
from engine.kernels.sampling import reference as reference_sampling
from engine.kernels.sampling.rows import Draws, SampleRow
from engine.kv_memory import KVShape
from engine.loading.region import PackedRegion, open_region
from engine.models.native_ops import NativeDecoder
from engine.models.torch_ops import TorchDecoder, TorchStore
from engine.models.weights import SourceTensor, load_decoder_weights
from modelfiles.config import ModelConfig


class KVStore(Protocol):
    """The KV memory as runners need it: engine.kv_memory.KVMemory, or blocks on a device.

    `tensor` [num_blocks, kv_heads, num_layers, 2, block_size, head_dim] may have one block more, behind all others,
    that nobody owns: where the padding of a step writes.
    """

    @property
    def shape(self) -> KVShape: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def tensor(self) -> Tensor: ...
    def copy_block(self, source: int, destination: int) -> None: ...
    def zero_slots(self, block_id: int, first_slot: int) -> None: ...


class Backend(Protocol):
    """Weights and KV memory on a device, and what computes over them."""

    @property
    def fingerprint(self) -> str:
        """Names everything of it that could change a bit."""
        ...

    @property
    def attention_calls(self) -> Mapping[str, int]:
        """How often each attention kernel ran; of a backend with one for all, nothing."""
        ...

    def forward(self, step: StepArrays) -> Tensor:
        """Logits [sampled rows, vocab] of a step; valid until the next one."""
        ...

    def sample(self, logits: Tensor, rows: list[SampleRow]) -> Draws:
        """One token per row."""
        ...

    def close(self) -> None: ...


class NativeBackend:
    """The C++ kernels, batch-invariant by construction (engine/kernels/native): a token's KV, logits and draw are the
    same bits whatever the chunking, the batch and the number of threads, so that deterministic mode costs nothing.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, SourceTensor],
        kv: KVStore,
        num_threads: int,
        dtype: str,
        packed: PackedRegion | None,
    ) -> None:
        self._context = NativeContext(num_threads)
        packed = packed or open_region(config, weights, self._context.library, dtype)
        self._decoder = NativeDecoder(config, packed.decoder_weights(), kv.tensor, self._context)
        # The number of threads is not among it: results do not depend on it.
        self.fingerprint = f"native {self._context.library.build.key} {dtype}"
        self.attention_calls: Mapping[str, int] = {}

    def forward(self, step: StepArrays) -> Tensor:
        return self._decoder.forward(step)

    def sample(self, logits: Tensor, rows: list[SampleRow]) -> Draws:
        return native_sampling.sample(self._context, logits, rows)

    def close(self) -> None:
        """Stop the kernel threads."""
        self._context.close()


class ReferenceBackend:
    """Plain torch. Slower, and its results depend on the batch, so deterministic mode refuses it."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, SourceTensor], kv: KVStore) -> None:
        self._decoder = TorchDecoder(config, load_decoder_weights(config, TorchStore(weights)), kv.tensor)
        self.fingerprint = f"reference torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"
        self.attention_calls: Mapping[str, int] = {}

    def forward(self, step: StepArrays) -> Tensor:
        return self._decoder.forward(step)

    def sample(self, logits: Tensor, rows: list[SampleRow]) -> Draws:
        return reference_sampling.sample(logits.numpy(), rows)

    def close(self) -> None:
        """Nothing is open."""
