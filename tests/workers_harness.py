"""Prefill and decode workers with fake models in the test's own event loop, and a gateway's end of the Generate stream.

Everything between the gRPC ports is real: services, engines on their threads, kvtransfer, shared memory, verification.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import mmap
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grpc.aio
import numpy as np
import pytest

from decode_service import worker as decode_worker_module
from decode_service.config import DecodeConfig
from engine.config import EngineConfig
from engine.dispatch import Device, Kernels, KVPlace
from engine.engine import Engine
from engine.fake_runner import FakeRunner
from engine.kernels.block_digest.reference import block_digest
from engine.worker import (
    DEVICE_DIGEST_KIND,
    DIGEST_KIND,
    OnProgress,
    Replica,
    ReplicaIdentity,
    ReplicaSpec,
    layout_fingerprint,
)
from kvtransfer import nixl_agent
from kvtransfer.liveness import HEARTBEAT_INTERVAL_S
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.protocol import baton_pb2_grpc as stubs
from kvtransfer.transport import sealed_memory
from prefill_service import worker as prefill_worker_module
from prefill_service.config import PrefillConfig
from servicekit.failpoints import Failpoints
from workerkit.process import WorkerProcess

BLOCK_SIZE = 4
TRANSPORTS = (
    "grpc",
    "shm",
    pytest.param("nixl", marks=pytest.mark.skipif(not nixl_agent.is_available(), reason="needs the extra nixl")),
)
PATIENCE_S = 60.0
SECRET = "correct horse"


class FakeKV:
    """KV memory of a FakeRunner in a memfd, as engine.kv_memory.KVMemory has it."""

    place = KVPlace.HOST

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self.num_blocks, self.block_bytes = num_blocks, block_bytes
        self.fd = sealed_memory("fake-kv", num_blocks * block_bytes)
        self._map = mmap.mmap(self.fd, num_blocks * block_bytes)
        self.buffer = memoryview(self._map)

    def block(self, block_id: int) -> memoryview:
        return self.buffer[block_id * self.block_bytes : (block_id + 1) * self.block_bytes]


class FakeDeviceKV:
    """KV memory of a FakeRunner that transports cannot reach, as engine.device_kv.DeviceKVMemory has it."""

    place = KVPlace.DEVICE
    device_id = None

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self.num_blocks, self.block_bytes = num_blocks, block_bytes
        self.rows = np.zeros((num_blocks + 1, block_bytes), np.uint8)
        self.address = self.rows.ctypes.data

    def pin(self, memory: memoryview) -> None: ...

    def wait_for_writes(self) -> None: ...

    def copy_out(self, block_ids: Sequence[int], into: Sequence[memoryview]) -> None:
        for block_id, memory in zip(block_ids, into, strict=True):
            memory[:] = self.rows[block_id].data

    def copy_in(self, sources: Sequence[memoryview], block_ids: Sequence[int]) -> None:
        for memory, block_id in zip(sources, block_ids, strict=True):
            self.rows[block_id].data[:] = memory

    def digests(self, block_ids: Sequence[int]) -> list[bytes]:
        return [block_digest(self.rows[block_id].data) for block_id in block_ids]


@dataclass(frozen=True)
class FakeModel:
    """A loader in place of engine.worker.load_replica. `step_s` slows each step, so that a test can come in between."""

    num_blocks: int = 64
    max_num_seqs: int = 8
    digest: str = "fake"
    step_s: float = 0.0
    overrides: dict[str, Any] = field(default_factory=dict[str, Any])
    on_device: bool = False  # KV where no transport may touch it, as in a GPU's memory
    digests_on_device: bool = False

    def __call__(self, spec: ReplicaSpec, on_progress: OnProgress) -> Replica:
        num_host_blocks = self.overrides.get("num_host_blocks", 0)
        runner = _SlowRunner(self.num_blocks, BLOCK_SIZE, self.step_s, num_host_blocks)
        kv = self._kv(runner)
        config = EngineConfig(
            num_blocks=self.num_blocks,
            block_size=BLOCK_SIZE,
            max_model_len=128,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=32,
            chunk_size=8,
            **self.overrides,
        )
        digest_kind = DEVICE_DIGEST_KIND if self.digests_on_device else DIGEST_KIND
        layout = layout_fingerprint(self.digest, "uint64", BLOCK_SIZE, digest_kind)
        identity = ReplicaIdentity(
            layout_fingerprint=layout,
            numerics_fingerprint=layout,
            deterministic=True,
            max_model_len=128,
            block_size=BLOCK_SIZE,
            block_bytes=runner.block_bytes,
            num_blocks=self.num_blocks,
            max_num_seqs=self.max_num_seqs,
            kv_dtype="uint64",
            kernels=Kernels.REFERENCE,
            device=Device.CPU,
            digests_on_device=self.digests_on_device,
        )
        return Replica(identity, Engine(config, runner), kv, {})

    def _kv(self, runner: FakeRunner) -> Any:
        """What is used of KVMemory or of DeviceKVMemory."""
        if not self.on_device:
            kv = FakeKV(self.num_blocks, runner.block_bytes)
            runner.slots = np.frombuffer(kv.buffer, dtype=np.uint64).reshape(self.num_blocks, BLOCK_SIZE)
            return kv
        device_kv = FakeDeviceKV(self.num_blocks, runner.block_bytes)
        runner.slots = device_kv.rows.view(np.uint64)
        return device_kv


class _SlowRunner(FakeRunner):
    def __init__(self, num_blocks: int, block_size: int, step_s: float, num_host_blocks: int) -> None:
        super().__init__(num_blocks, block_size, num_host_blocks=num_host_blocks)
        self._step_s = step_s

    def execute(self, batch: Any) -> Any:
        if self._step_s:
            time.sleep(self._step_s)
        return super().execute(batch)


@dataclass
class RunningWorker:
    """One worker in this loop. `end` is its SIGTERM."""

    process: WorkerProcess
    replica: Replica
    task: asyncio.Task[int]

    @property
    def address(self) -> str:
        return self.process.address

    @property
    def candidate(self) -> pb.PrefillCandidate:
        return pb.PrefillCandidate(
            worker_id=self.process.config.worker_id, address=self.address, boot_id=self.process.boot_id
        )

    def metric(self, name: str, **labels: str) -> float:
        self.process.refresh_metrics()
        return self.process.metrics.registry.get_sample_value(name, labels) or 0.0

    async def at_baseline(self, num_cached: int | None = None) -> None:
        """Wait until every block is free or cached again, then assert the engine's invariants (T1, T8)."""
        engine = self.replica.engine
        await until(lambda: not engine.has_work and engine.load().num_blocks_free == engine.load().num_blocks_total)
        engine.check()

    async def end(self) -> int:
        self.process.drain_signal.request()
        return await asyncio.wait_for(self.task, PATIENCE_S)


async def until(condition: Callable[[], bool]) -> None:
    """Poll a condition that real threads and sockets bring about."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


class Workers:
    """Starts workers and ends what is left of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[RunningWorker] = []
        self.secret_file = folder / "secret"
        self.secret_file.write_text(SECRET)
        self.secret_file.chmod(0o600)

    async def prefill(self, model: FakeModel = FakeModel(), **settings: Any) -> RunningWorker:
        config = PrefillConfig(**self._settings("p", settings))
        return await self._start(config, pb.ROLE_PREFILL, model, settings, prefill_worker_module.serve)

    async def decode(self, model: FakeModel = FakeModel(), **settings: Any) -> RunningWorker:
        config = DecodeConfig(**self._settings("d", settings))
        return await self._start(config, pb.ROLE_DECODE, model, settings, decode_worker_module.serve)

    async def aclose(self) -> None:
        await asyncio.gather(*(worker.end() for worker in self._running if not worker.task.done()))

    def _settings(self, letter: str, settings: dict[str, Any]) -> dict[str, Any]:
        own = {key: value for key, value in settings.items() if key != "faults"}
        defaults = {
            "model": self._folder,
            "worker_id": f"{letter}{len(self._running)}",
            "secret_file": self.secret_file,
            "drain_s": 5.0,
        }
        return defaults | own

    async def _start(self, config: Any, role: pb.Role, model: FakeModel, settings: dict[str, Any], serve: Any) -> Any:
        loaded: list[Replica] = []

        def load(spec: ReplicaSpec, on_progress: OnProgress) -> Replica:
            loaded.append(model(spec, on_progress))
            return loaded[0]

        process = WorkerProcess(config, role, load)
        process.failpoints = Failpoints(settings.get("faults"))
        task = asyncio.create_task(serve(config, process))
        await until(lambda: process.health.is_started or task.done())
        if task.done():
            task.result()
        worker = RunningWorker(process, loaded[0], task)
        self._running.append(worker)
        return worker


@dataclass
class Answer:
    """All that a gateway heard of one attempt."""

    tokens: dict[int, list[pb.Token]] = field(default_factory=dict[int, list[pb.Token]])
    is_accepted: bool = False
    ended: asyncio.Future[pb.Ended] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def ids(self) -> dict[int, list[int]]:
        return {choice: [token.token_id for token in tokens] for choice, tokens in self.tokens.items()}

    async def end(self) -> pb.Ended:
        return await asyncio.wait_for(self.ended, PATIENCE_S)


class GatewayEnd:
    """The gateway's end of one Generate stream; asserts what every gateway may rely on."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._keys = itertools.count(1)
        self._answers: dict[int, Answer] = {}
        self._logs: dict[tuple[int, int], int] = {}
        self._writing = asyncio.Lock()
        self.loads: list[pb.WorkerLoad] = []
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._beat())]

    async def start(
        self,
        prompt: Sequence[int],
        candidates: Sequence[pb.PrefillCandidate] = (),
        *,
        disaggregation: Any = pb.DISAGGREGATION_ALWAYS,
        logs: Sequence[Sequence[int]] = ((),),
        max_tokens: int = 8,
        seed: int = 7,
        salt: bytes = b"tenant",
        deadline_s: float = PATIENCE_S,
        num_logprobs: int = -1,
    ) -> tuple[int, Answer]:
        """Send one attempt; `logs` are the committed tokens of each choice."""
        key = next(self._keys)
        answer = self._answers[key] = Answer(tokens={choice: [] for choice in range(len(logs))})
        self._logs |= {(key, choice): len(log) for choice, log in enumerate(logs)}
        sampling = pb.SamplingParams(
            max_tokens=max_tokens, temperature=1.0, top_p=1.0, seed=seed, num_logprobs=num_logprobs,
            repetition_penalty=1.0, ignore_eos=True,
        )  # fmt: skip
        request = pb.GenerateRequest(
            key=key,
            request_id=f"request-{key}",
            attempt=1,
            prompt_token_ids=prompt,
            sampling=sampling,
            choices=[pb.ChoiceLog(choice=c, committed_token_ids=log) for c, log in enumerate(logs)],
            prefill_candidates=candidates,
            disaggregation=disaggregation,
            deadline_s=deadline_s,
            cache_salt=salt,
        )
        await self._write(pb.GenerateUp(start=request))
        return key, answer

    async def ask(self, prompt: Sequence[int], candidates: Sequence[pb.PrefillCandidate] = (), **how: Any) -> Answer:
        """Send one attempt and wait for its end."""
        _, answer = await self.start(prompt, candidates, **how)
        await answer.end()
        return answer

    async def cancel(self, key: int) -> None:
        await self._write(pb.GenerateUp(cancel=pb.CancelAttempt(key=key)))

    async def leave(self) -> None:
        """Cut the stream as a killed gateway does."""
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _write(self, message: pb.GenerateUp) -> None:
        async with self._writing:  # gRPC refuses a second write beside the first
            await self._call.write(message)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)
            await self._write(pb.GenerateUp(heartbeat=pb.Heartbeat()))

    async def _read(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):  # a worker that was killed
            await self._read_all()

    async def _read_all(self) -> None:
        async for message in self._call:
            match message.WhichOneof("kind"):
                case "accepted":
                    self._answers[message.accepted.key].is_accepted = True
                case "step":
                    for token in message.step.tokens:
                        self._take(token)
                    for ended in message.step.ended:
                        self._answers[ended.key].ended.set_result(ended)
                case _:
                    self.loads.append(message.heartbeat.load)

    def _take(self, token: pb.Token) -> None:
        answer = self._answers[token.key]
        assert answer.is_accepted, "a token before Accepted"
        assert not answer.ended.done(), "a token after Ended"
        first = self._logs.get((token.key, token.choice), 0)
        assert token.index == first + len(answer.tokens[token.choice]), "a gap, or a token twice"
        answer.tokens[token.choice].append(token)


class HasAddress(Protocol):
    @property
    def address(self) -> str: ...


@asynccontextmanager
async def gateway_to(worker: HasAddress) -> AsyncGenerator[GatewayEnd]:
    async with grpc.aio.insecure_channel(worker.address) as channel:
        call = stubs.DecodeWorkerStub(channel).Generate(metadata=(("baton-secret", SECRET),))
        gateway = GatewayEnd(call)
        try:
            yield gateway
        finally:
            await gateway.leave()
