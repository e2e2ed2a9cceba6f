"""P's end of the hand-over: serves Hello, Prefill and Pull, and bridges to the engine through `PrefillBackend`.

    engine thread --deliver(events)--> digest thread --> asyncio loop: PrefillSide --> messages, backend calls

Control streams, heartbeats and Pull run on the asyncio loop; the engine has its own thread and no coroutine waits for
it. Blocks are made ready (kvtransfer/exposure.py: digested, and copied out of a GPU's memory) on a third thread that
handles events in the order in which they were delivered.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, assert_never

from kvtransfer import rpc
from kvtransfer.exposure import Exposure, HostExposure
from kvtransfer.grpc_transport import GrpcBlockServer
from kvtransfer.liveness import HEARTBEAT_INTERVAL_S, LivenessMonitor, Verdict
from kvtransfer.prefill_events import BackendEvent, BlocksFilled, PrefillDone, PrefillGivenUp, PrefillStarting
from kvtransfer.prefill_side import (
    CloseTicket,
    GrantBackend,
    HeldTokens,
    OpenTicket,
    PrefillAction,
    PrefillLimits,
    PrefillSide,
    Publish,
    ReadyBlock,
    ReleaseBackend,
    SendDown,
    StartBackend,
)
from kvtransfer.protocol import PROTOCOL_VERSION
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.transport import BlockSource

log = logging.getLogger(__name__)

TICK_S = 0.25
DIGEST_GROUP_BLOCKS = 4
"""Blocks published together: D copies these while the digests of the next are taken. With the 12 blocks of a chunk
in one group, D waits for all their digests before its first byte."""
MAX_QUEUED_MESSAGES = 65_536
"""Messages that one D may leave unread before its stream is ended."""


class PrefillBackend(Protocol):
    """The engine as P's end sees it. Called on the asyncio thread: must not block, answers through `deliver`."""

    def start_prefill(self, key: int, start: pb.StartPrefill) -> None:
        """Queue a prompt (deadline_s and ttft_left_s count from now). `key` is unique in this process."""
        ...

    def grant_credit(self, key: int, num_blocks: int) -> None:
        """The engine may fill so many blocks more. Publishing is bounded by credit here in any case."""
        ...

    def release(self, key: int, ok: bool, is_suspect: bool) -> None:
        """The transfer lets go of every block of `key`, or wants it no more: exactly once per start_prefill, whatever
        happened before, and no read of its blocks is under way. Stops the prompt if it still runs. Suspect blocks are
        not what their digests say: they serve no other prompt."""
        ...

    def load(self) -> pb.WorkerLoad:
        """For heartbeats and Hello; num_held_tokens is filled in by the server."""
        ...


@dataclass(eq=False, slots=True)
class _Session:
    """One control stream: one D."""

    side: PrefillSide
    monitor: LivenessMonitor
    outgoing: asyncio.Queue[pb.PrefillDown] = field(default_factory=asyncio.Queue[pb.PrefillDown])


class PrefillServer:
    """All control and data streams of one prefill worker. Lives on one asyncio loop; only `deliver` is thread-safe."""

    def __init__(
        self,
        worker: pb.WorkerInfo,
        backend: PrefillBackend,
        source: BlockSource,
        limits: PrefillLimits,
        held: HeldTokens,
        exposure: Exposure | None = None,
    ) -> None:
        """Without an `exposure` the source's memory is where the engine's blocks are."""
        assert worker.boot_id == source.boot_id
        assert worker.block_bytes == source.block_bytes
        self.ignored: Counter[str] = Counter()
        self.num_event_failures = 0
        self._worker = worker
        self._backend = backend
        self._source = source
        self._limits = limits
        self._held = held
        self._keys = itertools.count(1)
        self._sessions: set[_Session] = set()
        self._by_key: dict[int, _Session] = {}
        self._is_draining = False
        self._loop = asyncio.get_running_loop()
        self._exposure: Exposure = exposure or HostExposure(source)
        self._digest_thread = ThreadPoolExecutor(1, thread_name_prefix="digest")

    def add_to(self, server: Any) -> None:
        """Register PrefillWorker's methods on a grpc.aio server (before it starts)."""
        methods = {
            "Hello": rpc.unary_handler(self._hello, pb.HelloRequest.FromString, pb.HelloReply.SerializeToString),
            "Prefill": rpc.stream_handler(self._prefill, pb.PrefillUp.FromString, pb.PrefillDown.SerializeToString),
            "Pull": GrpcBlockServer(self._source).method_handler,
        }
        server.add_generic_rpc_handlers((rpc.service_handler("baton.v1.PrefillWorker", methods),))

    def deliver(self, events: Sequence[BackendEvent]) -> None:
        """What the engine did, in order. Thread-safe, returns at once."""
        self._on_digest_thread(self._take, events)

    def drain(self) -> None:
        """Refuse new prompts; those under way go on. `num_tickets` says when they are done."""
        self._is_draining = True
        for session in self._sessions:
            session.side.is_draining = True

    async def aclose(self) -> None:
        """End every ticket."""
        for session in list(self._sessions):
            self._perform(session, session.side.stream_lost())
        self._digest_thread.shutdown(wait=False)

    @property
    def num_tickets(self) -> int:
        return sum(session.side.num_tickets for session in self._sessions)

    # ------------------------------------------------------------ the three methods

    async def _hello(self, request: pb.HelloRequest, context: rpc.Context) -> pb.HelloReply:
        return pb.HelloReply(protocol_version=PROTOCOL_VERSION, worker=self._worker, load=self._load())

    async def _prefill(self, requests: AsyncIterator[pb.PrefillUp], context: rpc.Context) -> None:
        """One control stream: read, write and watch until one of them ends; then every ticket on it ends."""
        await context.send_initial_metadata(())  # before the first write, which would send it at the same time
        session = self._open_session()
        tasks = [
            asyncio.ensure_future(self._read(session, requests)),
            asyncio.ensure_future(self._write(session, context)),
            asyncio.ensure_future(self._watch(session)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._sessions.discard(session)
            self._perform(session, session.side.stream_lost())
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, rpc.RPC_ERRORS):
                    log.info("a control stream ended: %s", rpc.status(outcome))
                elif isinstance(outcome, Exception):
                    log.error("a control stream failed", exc_info=outcome)

    # ------------------------------------------------------------ one stream

    def _open_session(self) -> _Session:
        side = PrefillSide(
            self._worker.boot_id,
            self._worker.layout_fingerprint,
            self._worker.block_size,
            self._limits,
            self._held,
            lambda: next(self._keys),
            ignored=self.ignored,
        )
        side.is_draining = self._is_draining
        session = _Session(side, LivenessMonitor(self._loop.time()))
        self._sessions.add(session)
        return session

    async def _read(self, session: _Session, requests: AsyncIterator[pb.PrefillUp]) -> None:
        async for message in requests:
            now = self._loop.time()
            session.monitor.heard(now)
            if message.WhichOneof("kind") != "heartbeat":
                self._perform(session, session.side.handle(message, now))

    async def _write(self, session: _Session, context: rpc.Context) -> None:
        while True:
            await context.write(await session.outgoing.get())

    async def _watch(self, session: _Session) -> None:
        """Heartbeats and deadlines; returns, and so ends the stream, when D is silent or does not read."""
        heartbeat_at = self._loop.time()
        while True:
            now = self._loop.time()
            if now >= heartbeat_at:
                heartbeat_at = now + HEARTBEAT_INTERVAL_S
                session.outgoing.put_nowait(pb.PrefillDown(heartbeat=self._heartbeat(session)))
            self._perform(session, session.side.tick(now))
            if session.monitor.verdict(now) is not Verdict.ALIVE or session.outgoing.qsize() > MAX_QUEUED_MESSAGES:
                log.warning("a decode worker is silent or does not read: its stream ends")
                return
            await asyncio.sleep(TICK_S)

    def _heartbeat(self, session: _Session) -> pb.Heartbeat:
        return pb.Heartbeat(load=self._load(), num_pending=session.side.num_waiting_for_peer)

    def _load(self) -> pb.WorkerLoad:
        load = self._backend.load()
        load.num_held_tokens = self._held.num_tokens
        load.draining = load.draining or self._is_draining
        return load

    # ------------------------------------------------------------ engine events

    def _on_digest_thread(self, work: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the server is closed
            self._digest_thread.submit(work, *args)

    def _take(self, events: Sequence[BackendEvent]) -> None:
        """On the digest thread.

        Of a key that is live here, `_let_go` runs on this thread later: it is submitted after the key was removed.
        """
        for event in events:
            if event.key not in self._by_key:
                self._tell_loop(functools.partial(self._apply, event, []))
                continue
            try:
                may_go_on = self._exposure.arrive(event)
            except Exception as error:  # nobody looks at this thread's results: the prompt's end is told on the loop
                self._tell_loop(functools.partial(self._fail_event, event, error))
            else:
                self._make_ready(may_go_on)

    def _let_go(self, key: int) -> None:
        """On the digest thread, once the ticket is closed."""
        try:
            self._make_ready(self._exposure.release(key))
        except Exception:  # the thread's boundary; what this prompt had is lost to others, and only that
            log.exception("a prompt's memory could not be given back")

    def _make_ready(self, events: Sequence[BackendEvent]) -> None:
        for event in in_groups(events):
            try:
                told = functools.partial(self._apply, event, self._exposure.ready(event))
            except Exception as error:  # as above
                told = functools.partial(self._fail_event, event, error)
            self._tell_loop(told)

    def _tell_loop(self, told: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(told)
        except RuntimeError:
            log.debug("engine events after the loop was closed")

    def _apply(self, event: BackendEvent, blocks: list[ReadyBlock]) -> None:
        session = self._by_key.get(event.key)
        if session is None:
            self.ignored["late_engine_event"] += 1
            return
        try:
            self._perform(session, _tell(session.side, event, blocks, self._loop.time()))
        except Exception as error:  # the loop would only log it, and D would wait for blocks until its own deadline
            self._fail_event(event, error)

    def _fail_event(self, event: BackendEvent, error: Exception) -> None:
        """A bug in handling an event is its prompt's end, and no other's. Later events for it come too late."""
        session = self._by_key.get(event.key)
        if session is None:
            self.ignored["late_engine_event"] += 1
            return
        log.error("%s could not be handled", type(event).__name__, exc_info=error)
        self.num_event_failures += 1
        message = f"{type(event).__name__} could not be handled"
        self._perform(session, session.side.prefill_failed(event.key, pb.PREFILL_FAILURE_INTERNAL, message))

    # ------------------------------------------------------------ actions

    def _perform(self, session: _Session, actions: Sequence[PrefillAction]) -> None:
        for action in actions:
            match action:
                case SendDown():
                    session.outgoing.put_nowait(action.message)
                case OpenTicket():
                    self._source.open(action.ticket)
                case Publish():
                    self._source.publish(action.ticket, action.blocks)
                case CloseTicket():
                    self._source.close(action.ticket)
                case StartBackend():
                    self._by_key[action.key] = session
                    self._backend.start_prefill(action.key, action.start)
                case GrantBackend():
                    self._backend.grant_credit(action.key, action.num_blocks)
                case ReleaseBackend():
                    del self._by_key[action.key]
                    self._backend.release(action.key, action.ok, action.is_suspect)
                    self._on_digest_thread(self._let_go, action.key)
                case _:
                    assert_never(action)


def in_groups(events: Sequence[BackendEvent]) -> Iterator[BackendEvent]:
    """The same events, in order, with blocks in groups that are digested and published together."""
    for event in events:
        if not isinstance(event, BlocksFilled):
            yield event
            continue
        for first in range(0, len(event.blocks), DIGEST_GROUP_BLOCKS):
            yield BlocksFilled(event.key, event.blocks[first : first + DIGEST_GROUP_BLOCKS])


def _tell(side: PrefillSide, event: BackendEvent, blocks: list[ReadyBlock], now: float) -> list[PrefillAction]:
    match event:
        case PrefillStarting():
            return side.prefill_starting(event.key, event.num_blocks, event.num_cached_tokens, now)
        case BlocksFilled():
            return side.blocks_filled(event.key, blocks, now)
        case PrefillDone():
            tail = blocks[0] if blocks else None
            return side.prefill_done(event.key, tail, event.first_tokens, event.queue_s, event.prefill_s, now)
        case PrefillGivenUp():
            return side.prefill_failed(event.key, event.reason, event.message)
        case _:
            assert_never(event)
