"""A real gRPC decode worker with a pseudo-model: for tests of the gateway and for its benchmark.

The pseudo-model is a pure function of (prompt, seed, choice, position), so whichever worker continues a log says the
same: the property that failover rests on. Faults are scripted and each happens once. Ships in the package so that it
and the real worker can be held to one contract.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import grpc
import grpc.aio

from kvtransfer.protocol import PROTOCOL_VERSION
from kvtransfer.protocol import baton_pb2 as pb

_grpc: Any = grpc  # its hints do not reach strict checking
_aio: Any = grpc.aio

NextToken = Callable[[pb.GenerateRequest, int, int], int]  # request, choice, index -> token id


class Fault(Enum):
    """What goes wrong when a choice reaches index `at`."""

    DIE = "die"  # the stream breaks, the server goes
    STALL = "stall"  # silence: heartbeats go on, steps do not
    MUTE = "mute"  # not even heartbeats
    DUPLICATE = "duplicate"  # the token is sent twice
    SKIP = "skip"  # the token is never sent, later ones are
    REORDER = "reorder"  # the token comes after its successor
    END_EARLY = "end_early"  # Ended(FINISHED) though tokens are due
    FAIL = "fail"  # Ended(INTERNAL)
    DRAIN = "drain"  # Ended(DRAINING)


@dataclass(frozen=True, slots=True)
class Script:
    """How a fake behaves. `at` is an index in a choice's output; `times` bounds how often the fault happens."""

    fault: Fault | None = None
    at: int = 0
    times: int = 1
    refuse: int | None = None  # an EndReason that answers every start
    step_s: float = 0.0
    stats: pb.AttemptStats = field(default_factory=lambda: pb.AttemptStats(prefill_path="local", path_reason="fake"))


def pseudo_token(request: pb.GenerateRequest, choice: int, index: int) -> int:
    """A byte token of printable ASCII (ids as in tests/conftest.py), fixed by prompt, seed, choice and index."""
    prompt = bytes(token % 256 for token in request.prompt_token_ids)
    digest = hashlib.blake2b(prompt, digest_size=2, key=b"%d %d %d" % (request.sampling.seed, choice, index)).digest()
    return 3 + digest[0] % 94


def scripted(token_ids: Sequence[int]) -> NextToken:
    """Say exactly these tokens."""
    return lambda request, choice, index: token_ids[index]


@dataclass(slots=True)
class _Run:
    """One attempt at the fake: next index per choice that still runs."""

    request: pb.GenerateRequest
    next_index: dict[int, int]


class FakeDecodeWorker:
    """`async with FakeDecodeWorker(...) as worker:` serves on `worker.address`."""

    def __init__(
        self,
        worker_id: str = "decode-0",
        script: Script | None = None,
        next_token: NextToken = pseudo_token,
        *,
        eos_token_ids: Sequence[int] = (),
        numerics: str = "numerics-a",
        secret: str = "",
        max_model_len: int = 2048,
    ) -> None:
        self.worker_id = worker_id
        self.script = script or Script()
        self.eos_token_ids = frozenset(eos_token_ids)
        self.requests: list[pb.GenerateRequest] = []
        self.cancelled: list[pb.CancelAttempt] = []
        self.was_cancelled = asyncio.Event()
        self.num_steps = 0
        self.num_tokens_sent = 0
        self.address = ""
        self.boot_id = secrets.token_bytes(16)
        self._next_token = next_token
        self._numerics = numerics
        self._secret = secret
        self._max_model_len = max_model_len
        self._num_faults = 0
        self._server: Any = None

    async def __aenter__(self) -> FakeDecodeWorker:
        self._server = _aio.server()
        self._server.add_generic_rpc_handlers((self._handlers(),))
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def kill(self) -> None:
        """End at once, as a process that is killed: every stream breaks."""
        if self._server is not None:
            await self._server.stop(None)

    # ------------------------------------------------------------ the service

    async def Hello(self, request: pb.HelloRequest, context: Any) -> pb.HelloReply:
        await self._authorise(context)
        return pb.HelloReply(protocol_version=PROTOCOL_VERSION, worker=self._info(), load=self._load(0))

    async def Generate(self, messages: AsyncIterator[pb.GenerateUp], context: Any) -> AsyncIterator[pb.GenerateDown]:
        await self._authorise(context)
        stream = _Stream(self)
        reader = asyncio.create_task(stream.read(messages))
        try:
            async for down in stream.steps():
                yield down
                if stream.is_broken:
                    await context.abort(_grpc.StatusCode.UNAVAILABLE, "the fake died")
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError, _aio.AioRpcError):
                await reader

    def _handlers(self) -> Any:
        hello = _grpc.unary_unary_rpc_method_handler(
            self.Hello, pb.HelloRequest.FromString, pb.HelloReply.SerializeToString
        )
        generate = _grpc.stream_stream_rpc_method_handler(
            self.Generate, pb.GenerateUp.FromString, pb.GenerateDown.SerializeToString
        )
        methods = {"Hello": hello, "Generate": generate}
        return _grpc.method_handlers_generic_handler("baton.v1.DecodeWorker", methods)

    async def _authorise(self, context: Any) -> None:
        metadata: dict[str, str] = dict(context.invocation_metadata() or ())
        given = metadata.get("baton-secret", "")
        if self._secret and given != self._secret:
            await context.abort(_grpc.StatusCode.UNAUTHENTICATED, "baton-secret")

    def _info(self) -> pb.WorkerInfo:
        return pb.WorkerInfo(
            worker_id=self.worker_id,
            role=pb.ROLE_DECODE,
            boot_id=self.boot_id,
            layout_fingerprint="layout-a",
            numerics_fingerprint=self._numerics,
            deterministic=True,
            max_model_len=self._max_model_len,
            block_size=16,
            max_num_seqs=256,
        )

    def _load(self, num_running: int) -> pb.WorkerLoad:
        return pb.WorkerLoad(
            step_counter=self.num_steps, num_running=num_running, num_blocks_free=100, num_blocks_total=100
        )

    def take_fault(self, index: int) -> Fault | None:
        """The fault due at this index, if it has not happened often enough."""
        script = self.script
        if script.fault is None or index != script.at or self._num_faults >= script.times:
            return None
        self._num_faults += 1
        return script.fault

    def next_token(self, request: pb.GenerateRequest, choice: int, index: int) -> pb.Token:
        sampling = request.sampling
        token_id = self._next_token(request, choice, index)
        is_stop = token_id in sampling.stop_token_ids or (token_id in self.eos_token_ids and not sampling.ignore_eos)
        finish = pb.FINISH_NONE
        if is_stop and index + 1 >= sampling.min_tokens:
            finish = pb.FINISH_STOP
        elif index + 1 >= sampling.max_tokens:
            finish = pb.FINISH_LENGTH
        token = pb.Token(key=request.key, choice=choice, index=index, token_id=token_id, finish=finish)
        if sampling.num_logprobs >= 0:
            token.logprob = -0.5
            for rank in range(sampling.num_logprobs):
                token.top_logprobs.add(token_id=3 + (token_id - 3 + rank) % 256, logprob=-0.5 - rank)
        return token


class _Stream:
    """One Generate stream at the fake: reads starts and cancels, makes one message per step."""

    def __init__(self, worker: FakeDecodeWorker) -> None:
        self._worker = worker
        self._runs: dict[int, _Run] = {}
        self._out: asyncio.Queue[pb.GenerateDown] = asyncio.Queue()
        self._has_work = asyncio.Event()
        self._is_stalled = False
        self.is_broken = False

    async def read(self, messages: AsyncIterator[pb.GenerateUp]) -> None:
        async for up in messages:
            match up.WhichOneof("kind"):
                case "start":
                    self._start(up.start)
                case "cancel":
                    self._cancel(up.cancel)
                case _:
                    if self._worker.script.fault is not Fault.MUTE or not self._is_stalled:
                        load = self._worker._load(len(self._runs))  # pyright: ignore[reportPrivateUsage]  # same module
                        self._out.put_nowait(pb.GenerateDown(heartbeat=pb.Heartbeat(load=load)))
                        self._has_work.set()

    async def steps(self) -> AsyncIterator[pb.GenerateDown]:
        while True:
            while not self._out.empty():
                yield self._out.get_nowait()
            if self._runs and not self._is_stalled:
                yield self._step()
                if self._worker.script.step_s:
                    await asyncio.sleep(self._worker.script.step_s)
                else:
                    await asyncio.sleep(0)
                continue
            self._has_work.clear()
            await self._has_work.wait()

    def _start(self, request: pb.GenerateRequest) -> None:
        worker = self._worker
        worker.requests.append(request)
        if worker.script.refuse is not None:
            self._say_ended(request.key, worker.script.refuse, "refused by script")
            return
        self._out.put_nowait(pb.GenerateDown(accepted=pb.Accepted(key=request.key)))
        running = {log.choice: len(log.committed_token_ids) for log in request.choices if not log.finished}
        self._runs[request.key] = _Run(request, running)
        self._has_work.set()

    def _cancel(self, cancel: pb.CancelAttempt) -> None:
        self._worker.cancelled.append(cancel)
        self._worker.was_cancelled.set()
        run = self._runs.get(cancel.key)
        if run is None:
            return
        for choice in list(cancel.choices) or list(run.next_index):
            run.next_index.pop(choice, None)
        if not run.next_index:
            del self._runs[cancel.key]
            self._say_ended(cancel.key, pb.END_CANCELLED, "")

    def _say_ended(self, key: int, reason: Any, message: str) -> None:
        ended = pb.Ended(key=key, reason=reason, message=message, stats=self._worker.script.stats)
        self._out.put_nowait(pb.GenerateDown(step=pb.Step(ended=[ended])))
        self._has_work.set()

    def _step(self) -> pb.GenerateDown:
        """One token for every running choice."""
        step = pb.Step()
        self._worker.num_steps += 1
        for key, run in list(self._runs.items()):
            for choice in list(run.next_index):
                self._advance(step, key, run, choice)
                if key not in self._runs or self._is_stalled or self.is_broken:
                    break
            if key in self._runs and not run.next_index:
                del self._runs[key]
                step.ended.add(key=key, reason=pb.END_FINISHED, stats=self._worker.script.stats)
        self._worker.num_tokens_sent += len(step.tokens)
        return pb.GenerateDown(step=step)

    def _advance(self, step: pb.Step, key: int, run: _Run, choice: int) -> None:
        worker, index = self._worker, run.next_index[choice]
        match worker.take_fault(index):
            case None:
                self._emit(step, run, choice, index)
            case Fault.DIE:
                self.is_broken = True
            case Fault.STALL | Fault.MUTE:
                self._is_stalled = True
            case Fault.DUPLICATE:
                step.tokens.append(worker.next_token(run.request, choice, index))
                self._emit(step, run, choice, index)
            case Fault.SKIP:
                run.next_index[choice] = index + 1
            case Fault.REORDER:
                step.tokens.append(worker.next_token(run.request, choice, index + 1))
                self._emit(step, run, choice, index)
            case Fault.END_EARLY | Fault.FAIL | Fault.DRAIN as fault:
                reasons = {Fault.END_EARLY: pb.END_FINISHED, Fault.FAIL: pb.END_INTERNAL, Fault.DRAIN: pb.END_DRAINING}
                del self._runs[key]
                step.ended.add(key=key, reason=reasons[fault], message=fault.value)

    def _emit(self, step: pb.Step, run: _Run, choice: int, index: int) -> None:
        token = self._worker.next_token(run.request, choice, index)
        step.tokens.append(token)
        run.next_index[choice] = index + 1
        if token.finish:
            del run.next_index[choice]
