"""D's end of the hand-over: one control stream to one prefill worker, and the transfers on it.

    fetch(order, reserve)  ->  start -> queued -> starting -> reserve() -> credit
                               -> published -> pull, digest, acknowledge -> manifest -> verified: Fetched

`PrefillClient` keeps the stream: Hello, connect, heartbeats, reconnect with jittered backoff. `_Session` is one life of
the stream and carries out what its DecodeSide decides. Everything runs on the asyncio loop but the pulls, which have
the threads of their transport.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, assert_never

from kvtransfer import rpc
from kvtransfer.auth import Secret
from kvtransfer.decode_side import (
    Action,
    ArrivedBlock,
    Commit,
    DecodeLimits,
    DecodeSide,
    Fail,
    PrefillOrder,
    Pull,
    Reserve,
    Send,
    StopPulling,
)
from kvtransfer.errors import (
    FailureKind,
    PeerUnusable,
    PullError,
    TransferFailed,
    TransferFailure,
    TransportLost,
)
from kvtransfer.grpc_transport import GrpcBlockTransport
from kvtransfer.landing import HostLanding, Landing
from kvtransfer.liveness import HEARTBEAT_INTERVAL_S, LivenessMonitor, Verdict
from kvtransfer.negotiation import AUTO, GRPC, NIXL, SHM, NixlUse, PairFacts, choose_ways
from kvtransfer.nixl_transport import NixlBlockTransport, NixlReader
from kvtransfer.protocol import PROTOCOL_VERSION
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.shm_transport import ShmBlockTransport, host_id
from kvtransfer.transport import BlockPuller, BlockRead, BlockTransport, Destination, OnRead, SourceBlock

log = logging.getLogger(__name__)

TICK_S = 0.25
CONNECT_S = 3.0
CONNECT_WAIT_S = 1.0  # how long a prompt waits for a connect that is under way
WARM_UP_WAIT_S = 4.0
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
MAX_CORRUPT = 3
"""Hand-overs in a row whose bytes were wrong, after which a pair is left alone for QUARANTINE_S."""
QUARANTINE_S = 60.0

_SERVICE = "/baton.v1.PrefillWorker"

ReserveBlocks = Callable[[], Awaitable[Sequence[Destination]]]
"""Gives the destinations of all ordered blocks, in order. May wait for admission; cancelled when the transfer ends."""


@dataclass(frozen=True, slots=True)
class DecodeIdentity:
    """What this decode worker says of itself, and what must be equal at P."""

    worker_id: str
    boot_id: bytes
    layout_fingerprint: str
    block_size: int
    block_bytes: int
    transports: tuple[str, ...] = (AUTO,)  # in order of preference
    needs_rdma: bool = False


@dataclass(frozen=True, slots=True)
class Fetched:
    """A committed hand-over: the KV of all ordered blocks is in its destinations, verified."""

    commit: Commit
    worker_id: str
    transport: str
    num_bytes: int
    pull_s: float  # time in which bytes were moving


TransportFactory = Callable[[pb.WorkerInfo], Sequence[BlockTransport]]


class PrefillClient:
    """One prefill worker, seen from D. `start` it, `fetch` prompts, `aclose` it; all on one asyncio loop."""

    def __init__(
        self,
        address: str,
        identity: DecodeIdentity,
        secret: Secret,
        load: Callable[[], pb.WorkerLoad],
        limits: DecodeLimits | None = None,
        make_transports: TransportFactory | None = None,
        nixl: NixlReader | None = None,
        landing: Landing | None = None,
    ) -> None:
        """`load` is D's own, for its heartbeats. `make_transports` replaces the choice by host (tests).

        `nixl` is this worker's own end of one-sided reads, if it has one. `landing` is where pulled blocks come to
        rest; without one they are pulled into host memory that `reserve` gives.
        """
        self.address = address
        self.ignored: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()  # transports that were wanted and did not work, by name
        self._nixl = nixl
        self._is_warming_up = False
        self._identity = identity
        self._secret = secret
        self._load = load
        self._limits = limits or DecodeLimits()
        self._landing: Landing = landing or HostLanding()
        self._make_transports = make_transports or self._transports_for
        self._session: _Session | None = None
        self._changed = asyncio.Event()  # a connect succeeded or failed
        self._runner: asyncio.Task[None] | None = None
        self._last_error = "not connected yet"
        self._num_corrupt = 0
        self._quarantined_until = 0.0

    def start(self) -> None:
        """Connect in the background, and again whenever the stream ends."""
        self._runner = asyncio.create_task(self._run(), name=f"prefill-client {self.address}")

    async def aclose(self) -> None:
        """End the stream; every fetch under way fails."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)

    @property
    def worker(self) -> pb.WorkerInfo | None:
        """Who is at the other end; None while not connected."""
        return self._session.worker if self._session is not None else None

    @property
    def transport(self) -> str:
        """The way that KV takes now; empty while not connected."""
        return self._session.transport if self._session is not None else ""

    @property
    def num_transfers(self) -> int:
        return self._session.num_transfers if self._session is not None else 0

    async def fetch(self, order: PrefillOrder, reserve: ReserveBlocks) -> Fetched:
        """Have P prefill the prompt and pull its KV into the blocks that `reserve` gives.

        However this ends (return, raise, cancel), nothing writes into the destinations afterwards, and P has been told.
        Raises: TransferFailed; whatever `reserve` raises.
        """
        session = await self._connected()
        try:
            fetched = await session.fetch(order, reserve)
        except TransferFailed as failed:
            self._note_corrupt(failed.failure.kind.is_wrong_bytes)
            raise
        self._note_corrupt(False)
        return fetched

    async def _connected(self) -> _Session:
        """The living session. Waits only for a connect that is under way, never through a backoff; longer for one
        that P has answered and whose transports are being warmed up."""
        if asyncio.get_running_loop().time() < self._quarantined_until:
            raise _failed(FailureKind.UNREACHABLE, f"in quarantine after {MAX_CORRUPT} hand-overs with wrong bytes")
        if self._session is None and not self._changed.is_set():
            await self._until_changed(CONNECT_WAIT_S)
            if self._is_warming_up:
                await self._until_changed(WARM_UP_WAIT_S)
        if self._session is None:
            raise _failed(FailureKind.UNREACHABLE, self._last_error)
        return self._session

    async def _until_changed(self, patience_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), patience_s)

    def _note_corrupt(self, is_corrupt: bool) -> None:
        self._num_corrupt = self._num_corrupt + 1 if is_corrupt else 0
        if self._num_corrupt >= MAX_CORRUPT:
            log.error("wrong bytes again and again: quarantined", extra={"address": self.address})
            self._quarantined_until = asyncio.get_running_loop().time() + QUARANTINE_S
            self._num_corrupt = 0

    # ------------------------------------------------------------ the connection

    async def _run(self) -> None:
        """Connect, live, lose, back off; until cancelled."""
        backoff_s = BACKOFF_FIRST_S
        while True:
            try:
                async with rpc.aio_channel(self.address, rpc.CONTROL_OPTIONS) as channel:
                    await self._live(channel)
                    backoff_s = BACKOFF_FIRST_S
            except PeerUnusable as error:
                self._last_error = str(error)
                log.info("prefill worker unusable", extra={"address": self.address, "reason": str(error)})
            except Exception as error:  # the loop's boundary: a bug in one session must not end reconnecting
                self._last_error = f"{type(error).__name__}"
                log.exception("the client of a prefill worker failed", extra={"address": self.address})
            finally:
                self._changed.set()
            await asyncio.sleep(random.uniform(0.5, 1.0) * backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)
            self._changed.clear()

    async def _live(self, channel: Any) -> None:
        """One life of the stream. Raises: PeerUnusable if it never began."""
        worker = await self._hello(channel)
        self._is_warming_up = True
        try:
            transports = await self._warmed_up(self._make_transports(worker))
        finally:
            self._is_warming_up = False
        session = _Session(
            worker, self._identity, transports, self._landing, self._load, self._limits, self.ignored, self._fall_back
        )
        call = rpc.stream_call(
            channel, f"{_SERVICE}/Prefill", pb.PrefillUp.SerializeToString, pb.PrefillDown.FromString
        )(metadata=self._secret.metadata)
        try:
            await asyncio.wait_for(call.wait_for_connection(), CONNECT_S)
            self._session = session
            self._changed.set()
            await session.run(call)
        except (TimeoutError, *rpc.RPC_ERRORS) as error:
            raise PeerUnusable(f"no control stream: {rpc.status(error)}") from error
        finally:
            self._session = None
            self._last_error = "the stream was lost"
            call.cancel()
            await session.aclose()

    async def _hello(self, channel: Any) -> pb.WorkerInfo:
        hello = rpc.unary_call(
            channel, f"{_SERVICE}/Hello", pb.HelloRequest.SerializeToString, pb.HelloReply.FromString
        )
        request = pb.HelloRequest(
            protocol_version=PROTOCOL_VERSION,
            caller_id=self._identity.worker_id,
            caller_boot_id=self._identity.boot_id,
        )
        try:
            reply: pb.HelloReply = await hello(request, timeout=CONNECT_S, metadata=self._secret.metadata)
        except rpc.RPC_ERRORS as error:
            raise PeerUnusable(f"no answer to Hello: {rpc.status(error)}") from error
        self._check(reply)
        return reply.worker

    def _check(self, reply: pb.HelloReply) -> None:
        mine, worker = self._identity, reply.worker
        for what, theirs, ours in (
            ("protocol version", reply.protocol_version, PROTOCOL_VERSION),
            ("role", worker.role, pb.ROLE_PREFILL),
            ("layout fingerprint", worker.layout_fingerprint, mine.layout_fingerprint),
            ("block_size", worker.block_size, mine.block_size),
            ("block_bytes", worker.block_bytes, mine.block_bytes),
        ):
            if theirs != ours:
                raise PeerUnusable(f"{what} is {theirs}, here {ours}")

    def _transports_for(self, worker: pb.WorkerInfo) -> list[BlockTransport]:
        """What the pair chose, made but not tried yet."""
        theirs = NixlUse.RDMA if worker.nixl.only_rdma else NixlUse.ANY
        facts = PairFacts(
            shares_memory=bool(worker.shared_memory_socket) and worker.host_id == host_id(),
            decode_nixl=self._nixl.nixl_use if self._nixl is not None else NixlUse.NONE,
            prefill_nixl=theirs if worker.HasField("nixl") else NixlUse.NONE,
        )
        choice = choose_ways(self._identity.transports, self._identity.needs_rdma, facts)
        for missing in choice.missing:
            self._fall_back(missing.name, missing.reason)
        return [self._make(name, worker) for name in choice.ways]

    def _make(self, name: str, worker: pb.WorkerInfo) -> BlockTransport:
        if name == SHM:
            return ShmBlockTransport(worker, self._secret)
        if name == NIXL:
            assert self._nixl is not None, "chosen where there is no agent"
            return NixlBlockTransport(self.address, worker, self._secret, self._nixl)
        assert name == GRPC, name
        return GrpcBlockTransport(self.address, self._secret, self._identity.block_bytes)

    async def _warmed_up(self, transports: Sequence[BlockTransport]) -> list[BlockTransport]:
        """Those that work. A pair is not ready before: the first prompt shall not pay for connections.

        Raises: PeerUnusable if none does.
        """
        usable: list[BlockTransport] = []
        for transport in transports:
            try:
                await transport.warm_up()
            except TransportLost as error:
                self._fall_back(transport.name, str(error))
                await transport.aclose()
            else:
                usable.append(transport)
        if not usable:
            raise PeerUnusable(f"none of the transports {', '.join(self._identity.transports)} works")
        return usable

    def _fall_back(self, name: str, reason: str) -> None:
        """Counted each time, logged once: a pair that reconnects would fill the log."""
        log.log(
            logging.DEBUG if self.fallbacks[name] else logging.WARNING,
            "transport unusable",
            extra={"address": self.address, "transport": name, "reason": reason},
        )
        self.fallbacks[name] += 1


@dataclass(eq=False, slots=True)
class _Fetch:
    """One transfer's edge: where its bytes go and who waits for it."""

    order: PrefillOrder
    reserve: ReserveBlocks
    done: asyncio.Future[Commit]
    destinations: Sequence[Destination] = ()
    reserving: asyncio.Task[None] | None = None
    reserve_error: Exception | None = None
    wanted: asyncio.Queue[tuple[SourceBlock, ...]] = field(default_factory=asyncio.Queue[tuple[SourceBlock, ...]])
    pulling: asyncio.Task[None] | None = None
    arrived: deque[ArrivedBlock] = field(default_factory=deque[ArrivedBlock])  # filled by the transport's thread
    is_told: bool = False  # that blocks arrived; the loop has not looked yet
    transport: str = ""
    pull_s: float = 0.0
    num_bytes: int = 0


class _Session:
    """One life of a control stream."""

    def __init__(
        self,
        worker: pb.WorkerInfo,
        identity: DecodeIdentity,
        transports: Sequence[BlockTransport],
        landing: Landing,
        load: Callable[[], pb.WorkerLoad],
        limits: DecodeLimits,
        ignored: Counter[str],
        fall_back: Callable[[str, str], None],
    ) -> None:
        self.worker = worker
        self._fall_back = fall_back
        self._loop = asyncio.get_running_loop()
        self._side = DecodeSide(
            worker.boot_id, identity.layout_fingerprint, identity.block_size, identity.block_bytes, limits, ignored
        )
        self._block_bytes = identity.block_bytes
        self._transports = list(transports)
        self._landing = landing
        self._load = load
        self._monitor = LivenessMonitor(self._loop.time())
        self._outgoing: asyncio.Queue[pb.PrefillUp] = asyncio.Queue()
        self._fetches: dict[int, _Fetch] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # keeps them referenced
        self._failure = TransferFailure(FailureKind.STREAM_LOST)
        self._is_over = False

    @property
    def transport(self) -> str:
        """The best of those that have worked so far."""
        return self._transports[0].name

    @property
    def num_transfers(self) -> int:
        return self._side.num_transfers

    async def fetch(self, order: PrefillOrder, reserve: ReserveBlocks) -> Fetched:
        """See PrefillClient.fetch."""
        if self._is_over:
            raise TransferFailed(self._failure)
        transfer_id, actions = self._side.start(order, self._loop.time())
        fetch = _Fetch(order, reserve, self._loop.create_future())
        self._fetches[transfer_id] = fetch
        self._perform(actions)
        try:
            commit = await asyncio.shield(fetch.done)
        except asyncio.CancelledError:
            self._perform(self._side.cancel(transfer_id, self._loop.time()))
            await _until_done(fetch.done)
            raise
        return Fetched(commit, self.worker.worker_id, fetch.transport, fetch.num_bytes, fetch.pull_s)

    async def run(self, call: Any) -> None:
        """Read, write and watch until one of them ends; then every transfer on the stream fails."""
        tasks = [self._read(call), self._write(call), self._watch()]
        running = [asyncio.ensure_future(task) for task in tasks]
        try:
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._is_over = True
            for task in running:
                task.cancel()
            for outcome in await asyncio.gather(*running, return_exceptions=True):
                if isinstance(outcome, rpc.RPC_ERRORS):
                    log.info("a control stream ended: %s", rpc.status(outcome))
                elif isinstance(outcome, Exception):
                    log.error("a control stream failed", exc_info=outcome)
            self._perform(self._side.stream_lost(self._failure, self._loop.time()))

    async def aclose(self) -> None:
        """Wait for the pulls to let go, then close their transports."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for transport in self._transports:
            await transport.aclose()

    # ------------------------------------------------------------ the stream

    async def _read(self, call: Any) -> None:
        async for message in call:
            now = self._loop.time()
            if message.WhichOneof("kind") == "heartbeat":
                load = message.heartbeat.load
                self._monitor.heartbeat(load.step_counter, load.predicted_step_s, now)
            else:
                self._monitor.heard(now)
                self._perform(self._side.handle(message, now))

    async def _write(self, call: Any) -> None:
        while True:
            await call.write(await self._outgoing.get())

    async def _watch(self) -> None:
        """Heartbeats, deadlines, liveness; returns, and so ends the stream, when P is silent or makes no step."""
        heartbeat_at = self._loop.time()
        while True:
            now = self._loop.time()
            if now >= heartbeat_at:
                heartbeat_at = now + HEARTBEAT_INTERVAL_S
                heartbeat = pb.Heartbeat(load=self._load(), num_pending=self._side.num_transfers)
                self._outgoing.put_nowait(pb.PrefillUp(heartbeat=heartbeat))
            self._monitor.pending(self._side.num_waiting_for_steps, now)
            self._perform(self._side.tick(now))
            verdict = self._monitor.verdict(now)
            if verdict is not Verdict.ALIVE:
                kind = FailureKind.SILENT if verdict is Verdict.SILENT else FailureKind.STALLED
                self._failure = TransferFailure(kind, f"prefill worker {self.worker.worker_id}")
                return
            await asyncio.sleep(TICK_S)

    # ------------------------------------------------------------ actions

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Send():
                    self._outgoing.put_nowait(action.message)
                case Reserve():
                    fetch = self._fetches[action.transfer_id]
                    fetch.reserving = self._task(self._reserve(action, fetch))
                case Pull():
                    self._want(action, self._fetches[action.transfer_id])
                case StopPulling():
                    self._stop_pulling(action.transfer_id, self._fetches[action.transfer_id])
                case Commit():
                    self._end(action.transfer_id, action, None)
                case Fail():
                    self._end(action.transfer_id, None, action.failure)
                case _:
                    assert_never(action)

    def _task(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _reserve(self, action: Reserve, fetch: _Fetch) -> None:
        try:
            destinations = await fetch.reserve()
            assert len(destinations) == action.num_blocks, (len(destinations), action.num_blocks)
            await self._landing.settle()
        except Exception as error:  # whatever the caller's reserve raises goes back to it out of `fetch`
            fetch.reserve_error = error
            failure = TransferFailure(FailureKind.INTERNAL, "no blocks were reserved")
            self._perform(self._side.reservation_refused(action.transfer_id, failure, self._loop.time()))
            return
        fetch.destinations = destinations
        self._perform(self._side.reserved(action.transfer_id, self._loop.time()))

    def _end(self, transfer_id: int, commit: Commit | None, failure: TransferFailure | None) -> None:
        fetch = self._fetches.pop(transfer_id)
        for task in (fetch.reserving, fetch.pulling):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        if fetch.done.done():
            return
        if commit is not None:
            fetch.done.set_result(commit)
        else:
            assert failure is not None
            fetch.done.set_exception(fetch.reserve_error or TransferFailed(failure))
            fetch.done.exception()  # whoever was cancelled does not look at it

    # ------------------------------------------------------------ pulling

    def _want(self, action: Pull, fetch: _Fetch) -> None:
        fetch.wanted.put_nowait(action.blocks)
        if fetch.pulling is None:
            fetch.pulling = self._task(self._pull(action, fetch))

    def _stop_pulling(self, transfer_id: int, fetch: _Fetch) -> None:
        """Ends in `pull_stopped`, once nothing writes into the destinations any more."""
        pulling = fetch.pulling
        if pulling is None or pulling.done():
            self._perform(self._side.pull_stopped(transfer_id, None, self._loop.time()))
            return
        pulling.add_done_callback(
            lambda _: self._perform(self._side.pull_stopped(transfer_id, None, self._loop.time()))
        )
        pulling.cancel()

    async def _pull(self, first: Pull, fetch: _Fetch) -> None:
        """Pull what P publishes, batch by batch, until the transfer ends (by cancelling this)."""
        puller: BlockPuller | None = None
        try:
            puller = await self._open_puller(first, fetch)
            while True:
                blocks = await _all_waiting(fetch.wanted)
                size = self._landing.max_blocks or len(blocks)
                for begin in range(0, len(blocks), size):
                    await self._pull_part(puller, first.transfer_id, fetch, blocks[begin : begin + size])
        except PullError as error:
            failure = TransferFailure(FailureKind.PULL, f"{type(error).__name__}: {error}"[:200])
            self._loop.call_soon(self._pull_failed, first.transfer_id, failure)
        except Exception:  # the task's boundary: a bug here fails the transfer, which nobody else would end
            log.exception("a pull failed")
            failure = TransferFailure(FailureKind.INTERNAL, "the pull failed")
            self._loop.call_soon(self._pull_failed, first.transfer_id, failure)
        finally:
            if puller is not None:
                await puller.aclose()

    async def _pull_part(
        self, puller: BlockPuller, transfer_id: int, fetch: _Fetch, blocks: Sequence[SourceBlock]
    ) -> None:
        destinations = [fetch.destinations[block.index - fetch.order.num_blocks_held] for block in blocks]
        async with self._landing.lend(destinations) as lent:
            started = self._loop.time()
            pairs = zip(lent, destinations, strict=True)
            places = {block.index: pair for block, pair in zip(blocks, pairs, strict=True)}
            await puller.pull(blocks, lent, self._on_read(transfer_id, fetch, places))
            fetch.pull_s += self._loop.time() - started

    def _pull_failed(self, transfer_id: int, failure: TransferFailure) -> None:
        self._perform(self._side.pull_stopped(transfer_id, failure, self._loop.time()))

    async def _open_puller(self, action: Pull, fetch: _Fetch) -> BlockPuller:
        """By the first transport that works; one that breaks before the ticket is joined is not tried again."""
        for transport in list(self._transports):
            try:
                puller = await transport.open(action.ticket, action.boot_id)
            except TransportLost as error:
                self._fall_back(transport.name, str(error))
                if len(self._transports) > 1:
                    self._transports.remove(transport)
                    await transport.aclose()
                continue
            fetch.transport = transport.name
            return puller
        raise TransportLost("no transport works")

    def _on_read(
        self, transfer_id: int, fetch: _Fetch, places: Mapping[int, tuple[Destination, Destination]]
    ) -> OnRead:
        """Digest what arrived, and bring it where it belongs, on the transport's thread: the bytes are in its cache.

        `places`: what was lent and the destination, by index of the block.
        """

        def on_read(read: BlockRead) -> None:
            fetch.arrived.append(ArrivedBlock(read, self._landing.land(*places[read.index])))
            if not fetch.is_told:  # else the loop still has to look, and takes this block along
                fetch.is_told = True
                self._loop.call_soon_threadsafe(self._take_arrived, transfer_id, fetch)

        return on_read

    def _take_arrived(self, transfer_id: int, fetch: _Fetch) -> None:
        """All that arrived since the last look: one acknowledgement for as many as came."""
        fetch.is_told = False  # before the look: what arrives from here on tells again
        arrived = [fetch.arrived.popleft() for _ in range(len(fetch.arrived))]
        if arrived:
            fetch.num_bytes += sum(block.read.num_bytes for block in arrived)
            self._perform(self._side.blocks_read(transfer_id, arrived, self._loop.time()))


async def _all_waiting(wanted: asyncio.Queue[tuple[SourceBlock, ...]]) -> list[SourceBlock]:
    blocks = list(await wanted.get())
    while not wanted.empty():
        blocks += wanted.get_nowait()
    return blocks


async def _until_done(future: asyncio.Future[Commit]) -> None:
    """Wait to the end even if cancelled again: our caller may reuse its blocks only then. Bounded by the transport."""
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            continue


def _failed(kind: FailureKind, message: str) -> TransferFailed:
    return TransferFailed(TransferFailure(kind, message))
