"""What prefill and decode workers have in common: one model replica built from a spec, and the fingerprints naming it.

    spec -> metadata -> torch -> kernels and device -> weights -> KV memory -> runner -> warm-up -> engine

Knows nothing of gRPC, HTTP or settings. torch is imported inside `load_replica`: a worker answers its probes first.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import EngineConfig
from engine.dispatch import Device, Dispatch, Dtype, Kernels, KVPlace, ThisMachine, choose, enter
from engine.errors import ConfigInvalid
from engine.messages import EngineRequest
from engine.request import SamplingParams

if TYPE_CHECKING:
    from engine.device_kv import DeviceKVMemory
    from engine.engine import Engine
    from engine.kv_memory import KVMemory, KVShape
    from engine.loading.region import PackedRegion
    from engine.runner import ModelRunner
    from engine.sizing import HostLimits, KVSize
    from engine.swap_memory import SwapMemory
    from modelfiles.config import ModelConfig
    from modelfiles.weights import Weights

log = logging.getLogger(__name__)

DIGEST_KIND = "xxh3-128"
DEVICE_DIGEST_KIND = "block-digest-128/1"  # engine/kernels/block_digest: taken where the blocks are
KV_LAYOUT = "block,kv_heads,layers,kv,slot,head_dim/1"  # raise its number when the meaning of a block's bytes changes


class LoadPhase(Enum):
    """Parts of a worker's start, in order; the names are the health port's."""

    READ_MODEL = "read_model"
    IMPORT_TORCH = "import_torch"
    LOAD_WEIGHTS = "load_weights"
    WARMUP = "warmup"


WARMUP_TOKENS = 64

OnProgress = Callable[[LoadPhase, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """What to build. Zero or None: derive it from what this process may use."""

    model: Path
    dtype: Dtype | None = None
    kernels: Kernels | None = None
    device: Device | None = None
    deterministic: bool = False
    max_model_len: int = 0
    num_threads: int = 0
    kv_memory_bytes: int | None = None
    swap_memory_bytes: int | None = 0  # host memory for preempted sequences; 0: none
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    prefix_caching: bool = True
    max_held_tokens: int = 65536
    workers_on_host: int = 1
    gpu_memory_fraction: float = 0.0
    digests_on_device: bool = False  # KV is handed over where it lies in a GPU's memory, not through the host's
    separate_kv: bool = False  # KV on the CPU as if on a device, where transports may not touch it: for tests


@dataclass(frozen=True, slots=True)
class ReplicaIdentity:
    """What does not change while the worker lives, and what others compare before KV moves."""

    layout_fingerprint: str
    numerics_fingerprint: str
    deterministic: bool
    max_model_len: int
    block_size: int
    block_bytes: int
    num_blocks: int
    max_num_seqs: int
    kv_dtype: str
    kernels: Kernels
    device: Device
    digests_on_device: bool = False

    @property
    def kv_bytes_per_token(self) -> int:
        return self.block_bytes // self.block_size


@dataclass(frozen=True, slots=True)
class Replica:
    """A model that is ready to run: give `engine` to an EngineThread; `kv` is what transports read and write, or what
    they reach through host memory (`kv.place` says which).

    `attention_calls` only grow: how often each attention kernel ran, by name.
    """

    identity: ReplicaIdentity
    engine: Engine
    kv: KVMemory | DeviceKVMemory
    attention_calls: Mapping[str, int]


def layout_fingerprint(model_digest: str, kv_dtype: str, block_size: int, digest_kind: str = DIGEST_KIND) -> str:
    """Equal wherever KV may move: the same model and tokenizer, blocks that mean the same bytes, one kind of digest."""
    return _fingerprint(model_digest, kv_dtype, str(block_size), digest_kind, KV_LAYOUT)


def numerics_fingerprint(layout: str, runner: str, deterministic: bool) -> str:
    """Equal wherever the same request gives the same bits; compared in deterministic mode only.

    `runner` is the runner's own account: kernels, compiler, instruction set, type of the weights.
    """
    return _fingerprint(layout, runner, platform.machine(), str(deterministic))


def _fingerprint(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def load_replica(spec: ReplicaSpec, on_progress: OnProgress) -> Replica:
    """Read, size, load, warm up. Slow; call it on a thread of its own.

    Raises: what modelfiles raises for a model that cannot be read, ConfigInvalid, MemoryTooSmall.
    """
    from engine import sizing
    from modelfiles.digest import model_digest
    from modelfiles.read_config import load_config
    from modelfiles.weights import open_weights

    on_progress(LoadPhase.READ_MODEL, 0.0)
    config = load_config(spec.model)
    digest = model_digest(spec.model)
    weights = open_weights(spec.model)
    limits = sizing.read_host_limits()
    num_threads = spec.num_threads or sizing.derive_threads(limits, spec.workers_on_host)

    on_progress(LoadPhase.IMPORT_TORCH, 0.0)
    importlib.import_module("engine.runner")  # with the weights shared, the longest phase; so it is told apart

    dispatch = _dispatch(spec)
    on_progress(LoadPhase.LOAD_WEIGHTS, 0.0)
    packed = None
    if dispatch.kernels is Kernels.NATIVE:
        packed = _open_packed(
            config, weights, _dtype(spec, dispatch), digest, partial(on_progress, LoadPhase.LOAD_WEIGHTS)
        )
    runner, kv, swap = _make_runner(spec, dispatch, config, weights, packed, limits, num_threads)

    on_progress(LoadPhase.WARMUP, 0.0)
    max_model_len = _max_model_len(spec, config)
    engine = _make_engine(spec, config, runner, kv.num_blocks, swap, max_model_len, digest)
    _warm_up(engine, min(max_model_len, spec.max_num_batched_tokens))
    identity = _identify(spec, dispatch, kv, digest, runner.numerics_fingerprint(), max_model_len)
    on_progress(LoadPhase.WARMUP, 1.0)
    return Replica(identity, engine, kv, runner.attention_calls)


def _dispatch(spec: ReplicaSpec) -> Dispatch:
    """Decide, say so, and make Triton ready for it."""
    dispatch = choose(spec.kernels, spec.device, spec.deterministic, ThisMachine())
    enter(dispatch)
    level = logging.WARNING if dispatch.kernels is Kernels.REFERENCE else logging.INFO
    log.log(level, "kernels: %s on %s: %s", dispatch.kernels, dispatch.device, dispatch.reason)
    if dispatch.device is Device.CUDA:
        log.warning("the code for GPUs was never run on one: check its answers before you rely on them")
        if _dtype(spec, dispatch) is Dtype.FLOAT32:
            log.warning("dtype float32 keeps a GPU's tensor cores idle: bfloat16 is several times faster")
    if dispatch.is_interpreted:
        log.warning("Triton kernels run in Triton's interpreter: that proves them, and is thousands of times slower")
    return dispatch


def _dtype(spec: ReplicaSpec, dispatch: Dispatch) -> Dtype:
    """What was asked for, else the type that the device is made for."""
    return spec.dtype or (Dtype.BFLOAT16 if dispatch.device is Device.CUDA else Dtype.FLOAT32)


def _max_model_len(spec: ReplicaSpec, config: ModelConfig) -> int:
    if spec.max_model_len > config.max_position_embeddings:
        rule = f"the model was trained for {config.max_position_embeddings} positions"
        raise ConfigInvalid("max_model_len", spec.max_model_len, rule)
    return spec.max_model_len or config.max_position_embeddings


def _open_packed(
    config: ModelConfig, weights: Weights, dtype: str, digest: str, on_fraction: Callable[[float], None]
) -> PackedRegion:
    """Weights as the native kernels read them, shared by this host's workers."""
    from engine.kernels.native.library import load_library
    from engine.loading.region import open_region
    from modelfiles.cache import default_cache_dir

    cache = default_cache_dir() / "packed"
    return open_region(
        config, weights, load_library(), dtype, cache=cache, model_digest=digest, on_fraction=on_fraction
    )


def _make_runner(
    spec: ReplicaSpec,
    dispatch: Dispatch,
    config: ModelConfig,
    weights: Weights,
    packed: PackedRegion | None,
    limits: HostLimits,
    num_threads: int,
) -> tuple[ModelRunner, KVMemory | DeviceKVMemory, SwapMemory | None]:
    """KV memory that fits beside the weights, what runs batches over both, and host memory for preempted sequences."""
    from engine.buckets import DecodeLimits
    from engine.runner import ModelRunner, kv_dtype, kv_shape

    shape = kv_shape(config, spec.block_size, kv_dtype(dispatch.kernels, _dtype(spec, dispatch)))
    if dispatch.device is Device.CUDA:
        size = _size_gpu_kv(spec, config, weights, shape)
    else:
        size = _size_host_kv(spec, config, weights, packed, limits, shape)
    log.info("KV memory: %s", size.explanation, extra={"num_threads": num_threads})
    kv = _make_kv(spec, dispatch, shape, size.num_blocks)
    swap = _make_swap(spec, kv, limits)
    runner = ModelRunner(
        config,
        weights,
        kv,
        kernels=dispatch.kernels,
        deterministic=spec.deterministic,
        num_threads=num_threads,
        dtype=_dtype(spec, dispatch),
        packed=packed,
        swap=swap,
        limits=DecodeLimits(spec.max_num_seqs, _max_model_len(spec, config)),
    )
    return runner, kv, swap


def _make_swap(spec: ReplicaSpec, kv: KVMemory | DeviceKVMemory, limits: HostLimits) -> SwapMemory | None:
    from engine import sizing
    from engine.swap_memory import SwapMemory

    size = sizing.derive_swap_size(
        limits,
        block_bytes=kv.block_bytes,
        max_blocks=kv.num_blocks,
        is_device_apart=kv.tensor.is_cuda,
        workers_on_host=spec.workers_on_host,
        requested_bytes=spec.swap_memory_bytes,
    )
    log.info("swap memory: %s", size.explanation)
    if size.num_blocks:
        return SwapMemory(kv.tensor, size.num_blocks)
    if spec.swap_memory_bytes:
        rule = f"it does not hold one block of {kv.block_bytes} bytes; 0 means none"
        raise ConfigInvalid("swap_memory", spec.swap_memory_bytes, rule)
    return None


def _size_host_kv(
    spec: ReplicaSpec,
    config: ModelConfig,
    weights: Weights,
    packed: PackedRegion | None,
    limits: HostLimits,
    shape: KVShape,
) -> KVSize:
    from engine import sizing

    blocks_per_sequence = -(-_max_model_len(spec, config) // spec.block_size)
    return sizing.derive_kv_size(
        limits,
        block_bytes=shape.block_bytes,
        min_blocks=blocks_per_sequence,
        weight_bytes=packed.layout.num_bytes if packed else weights.num_float32_bytes,
        weights_shared=packed is not None and packed.shared,
        workers_on_host=spec.workers_on_host,
        requested_bytes=spec.kv_memory_bytes,
        max_blocks=blocks_per_sequence * spec.max_num_seqs,
    )


def _size_gpu_kv(spec: ReplicaSpec, config: ModelConfig, weights: Weights, shape: KVShape) -> KVSize:
    import torch

    from engine import sizing
    from engine.device_kv import read_device_memory

    memory = read_device_memory(torch.device("cuda"))
    blocks_per_sequence = -(-_max_model_len(spec, config) // spec.block_size)
    return sizing.derive_gpu_kv_size(
        memory.free_bytes,
        memory.total_bytes,
        block_bytes=shape.block_bytes,
        min_blocks=blocks_per_sequence,
        weight_bytes=weights.num_float32_bytes * getattr(torch, shape.dtype).itemsize // 4,
        workers_on_gpu=spec.workers_on_host,
        fraction=spec.gpu_memory_fraction,
        requested_bytes=spec.kv_memory_bytes,
        max_blocks=blocks_per_sequence * spec.max_num_seqs,
    )


def _make_kv(spec: ReplicaSpec, dispatch: Dispatch, shape: KVShape, num_blocks: int) -> KVMemory | DeviceKVMemory:
    from engine.kv_memory import KVMemory

    if dispatch.device is Device.CPU and not spec.separate_kv:
        return KVMemory(shape, num_blocks, has_dummy=dispatch.kernels is Kernels.TRITON)
    import torch

    from engine.device_kv import DeviceKVMemory

    return DeviceKVMemory(shape, num_blocks, torch.device(dispatch.device))


def _make_engine(
    spec: ReplicaSpec,
    config: ModelConfig,
    runner: ModelRunner,
    num_blocks: int,
    swap: SwapMemory | None,
    max_model_len: int,
    digest: str,
) -> Engine:
    from engine.engine import Engine

    engine_config = EngineConfig(
        num_blocks=num_blocks,
        block_size=spec.block_size,
        max_model_len=max_model_len,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        eos_token_ids=config.eos_token_ids,
        vocab_size=config.vocab_size,
        prefix_caching=spec.prefix_caching,
        cache_namespace=digest.encode(),
        max_held_tokens=spec.max_held_tokens,
        num_host_blocks=swap.num_blocks if swap else 0,
        host_copy_s=swap.measure_copy_s() if swap else 0.0,
        reserve_ahead=runner.looks_ahead,
    )
    return Engine(engine_config, runner)


def _warm_up(engine: Engine, num_tokens: int) -> None:
    """A prompt and two decode steps, twice: first code is compiled and threads start, then the speed is measured.

    The first run alone said 167 tokens/s of a worker that does 360, and placement believed it.
    """
    for key in (0, 1):
        engine.forget_speeds()
        _run_prompt(engine, key, num_tokens)


def _run_prompt(engine: Engine, key: int, num_tokens: int) -> None:
    prompt = tuple(3 + i % 7 for i in range(max(1, min(WARMUP_TOKENS, num_tokens - 3))))
    sampling = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    request = EngineRequest(key, "warm-up", prompt, sampling, cache_salt=b"warm-up %d" % key)
    engine.match(request)
    engine.start_local(key)
    while engine.has_work:
        engine.step()


def _identify(
    spec: ReplicaSpec,
    dispatch: Dispatch,
    kv: KVMemory | DeviceKVMemory,
    digest: str,
    numerics: str,
    max_model_len: int,
) -> ReplicaIdentity:
    digest_kind = DEVICE_DIGEST_KIND if spec.digests_on_device else DIGEST_KIND
    layout = layout_fingerprint(digest, kv.shape.dtype, spec.block_size, digest_kind)
    if kv.place is KVPlace.DEVICE and kv.device_id is not None:
        numerics = f"{numerics} {kv.architecture}"
    return ReplicaIdentity(
        layout_fingerprint=layout,
        numerics_fingerprint=numerics_fingerprint(layout, numerics, spec.deterministic),
        deterministic=spec.deterministic,
        max_model_len=max_model_len,
        block_size=spec.block_size,
        block_bytes=kv.block_bytes,
        num_blocks=kv.num_blocks,
        max_num_seqs=spec.max_num_seqs,
        kv_dtype=kv.shape.dtype,
        kernels=dispatch.kernels,
        device=dispatch.device,
        digests_on_device=spec.digests_on_device,
    )
