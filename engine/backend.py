"""The kernels as the runner sees them: a forward pass over a packed step, and draws from its logits.

Native and reference are here; the Triton one is in engine/triton_backend.py, imported only where it was chosen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.kernels.native.library import NativeContext
from engine.kernels.native.program import StepArrays
from engine.kernels.sampling import native as native_sampling
from engine.kernels.sampling import reference as reference_sampling
from engine.kernels.sampling.rows import Draws, SampleRow, empty_draws
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


class Pending(Protocol):
    """Draws of a step that was launched."""

    def draws(self) -> Draws:
        """Waits for the step, not for what was launched after it."""
        ...


class Backend(Protocol):
    """Weights and KV memory on a device, and what computes over them. What it is given is done in that order."""

    feeds: bool
    """Whether a step can be launched while the tokens that it is fed with are still being drawn."""

    @property
    def fingerprint(self) -> str:
        """Names everything of it that could change a bit."""
        ...

    @property
    def attention_calls(self) -> Mapping[str, int]:
        """How often each attention kernel ran; of a backend with one for all, nothing."""
        ...

    def launch(self, step: StepArrays, rows: list[SampleRow], sources: Sequence[int] | None = None) -> Pending:
        """Write the step's KV and draw one token per row. With `sources`, token i is that draw of the step before."""
        ...

    def logits(self, step: StepArrays) -> Tensor:
        """Logits [sampled rows, vocab] of a step; valid until the next one."""
        ...

    def run(self, work: Callable[[], object]) -> None:
        """Do something to the KV in order with the steps."""
        ...

    def settle(self) -> None:
        """Wait until all is done that was given."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Drawn:
    """Draws that are there."""

    drawn: Draws

    def draws(self) -> Draws:
        return self.drawn


class _AtOnce(ABC):
    """A backend on the host's own processor: what it is given is done when the call returns."""

    feeds = False

    @abstractmethod
    def logits(self, step: StepArrays) -> Tensor: ...

    @abstractmethod
    def _sample(self, logits: Tensor, rows: list[SampleRow]) -> Draws: ...

    def launch(self, step: StepArrays, rows: list[SampleRow], sources: Sequence[int] | None = None) -> Pending:
        assert sources is None, "every token is known here"
        logits = self.logits(step)
        return Drawn(self._sample(logits, rows) if rows else empty_draws(rows))

    def run(self, work: Callable[[], object]) -> None:
        work()

    def settle(self) -> None:  # noqa: B027, nothing is ever outstanding
        """Return at once."""


class NativeBackend(_AtOnce):
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

    def logits(self, step: StepArrays) -> Tensor:
        return self._decoder.forward(step)

    def _sample(self, logits: Tensor, rows: list[SampleRow]) -> Draws:
        return native_sampling.sample(self._context, logits, rows)

    def close(self) -> None:
        """Stop the kernel threads."""
        self._context.close()


class ReferenceBackend(_AtOnce):
    """Plain torch. Slower, and its results depend on the batch, so deterministic mode refuses it."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, SourceTensor], kv: KVStore) -> None:
        self._decoder = TorchDecoder(config, load_decoder_weights(config, TorchStore(weights)), kv.tensor)
        self.fingerprint = f"reference torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"
        self.attention_calls: Mapping[str, int] = {}

    def logits(self, step: StepArrays) -> Tensor:
        return self._decoder.forward(step)

    def _sample(self, logits: Tensor, rows: list[SampleRow]) -> Draws:
        return reference_sampling.sample(logits.numpy(), rows)

    def close(self) -> None:
        """Nothing is open."""
