"""The workers this gateway knows: finds them, says Hello, keeps one Generate stream per decode worker.

A hint (registry/table.py) only starts a connection. A worker leaves by its own silence alone, whatever the registry
says or does not say next (T10: no decision about a running request reads it).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway import rpc
from gateway.connection import DecodeConnection
from gateway.revisions import Preference
from gateway.router import PrefixRecord, WorkerState
from gateway.routing_file import RoutingFile
from kvtransfer.protocol import PROTOCOL_VERSION
from kvtransfer.protocol import baton_pb2 as pb
from registry.membership import Hint
from registry.table import Table

if TYPE_CHECKING:
    from gateway.generation import Generation
    from gateway.metrics import GatewayMetrics

log = logging.getLogger(__name__)

SCAN_S = 0.25
HELLO_EVERY_S = 1.0
HELLO_TIMEOUT_S = 3.0
MAX_FAILED_HELLOS = 3
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.1, 1.0
FORGET_S = 30.0
"""How long an address is tried that no registry names any more: longer than workers take to announce themselves."""

_ROLES = {"prefill": pb.ROLE_PREFILL, "decode": pb.ROLE_DECODE}
FAILURES_UNTIL_SUSPECT = 3
SUSPECT_MIN_S, SUSPECT_MAX_S = 2.0, 30.0


class Outliers:
    """Consecutive failures by worker id: three in a row make a suspect for a while, longer each time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: dict[str, int] = {}
        self._until: dict[str, float] = {}

    def failed(self, worker_id: str) -> None:
        count = self._failures[worker_id] = self._failures.get(worker_id, 0) + 1
        if count >= FAILURES_UNTIL_SUSPECT:
            pause = min(SUSPECT_MAX_S, SUSPECT_MIN_S * 2 ** (count - FAILURES_UNTIL_SUSPECT))
            self._until[worker_id] = self._clock() + pause

    def succeeded(self, worker_id: str) -> None:
        self._failures.pop(worker_id, None)
        self._until.pop(worker_id, None)

    def is_suspect(self, worker_id: str) -> bool:
        return self._until.get(worker_id, 0.0) > self._clock()


@dataclass(slots=True)
class PrefillPeer:
    """A prefill worker that answered Hello lately."""

    worker: pb.WorkerInfo
    load: pb.WorkerLoad
    address: str


class WorkerPool:
    """All members, their streams, and a way to wait until something about them changes."""

    def __init__(
        self,
        table: Table,
        metrics: GatewayMetrics,
        *,
        caller_id: str,
        boot_id: bytes,
        model_id: str = "",
        secret: str = "",
        deterministic: bool = False,
        needs_prefill: bool = True,
        routing_file: RoutingFile | None = None,
    ) -> None:
        self.connections: dict[str, DecodeConnection] = {}  # by worker id
        self.prefill: dict[str, PrefillPeer] = {}
        self.outliers = Outliers()
        self.prefixes = PrefixRecord()
        self.metrics = metrics
        self.hello = pb.HelloRequest(protocol_version=PROTOCOL_VERSION, caller_id=caller_id, caller_boot_id=boot_id)
        self.metadata: rpc.Metadata = (("baton-secret", secret),) if secret else ()
        self.model_id = model_id
        self.deterministic = deterministic
        self.table = table
        self.routing_file = routing_file or RoutingFile(None)
        self.last_revision: str | None = None
        self._refused: dict[str, _Unusable] = {}  # by address: what answered lately and cannot be used
        self._needs_prefill = needs_prefill
        self._met: set[str] = set()  # addresses whose first Hello was answered or failed
        self._members: dict[str, asyncio.Task[None]] = {}
        self._waiters: set[asyncio.Future[None]] = set()
        self._scan: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.routing_file.refresh()
        self.table.start()
        self._scan = asyncio.create_task(self._keep_scanning(), name="discovery")

    async def stop(self) -> None:
        tasks = [task for task in (self._scan, *self._members.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.table.stop()

    # ------------------------------------------------------------ what the router sees

    def decode_states(self, generation: Generation | None = None) -> list[WorkerState]:
        """Decode workers with a live stream; a worker held by `generation` itself is not reserved for it."""
        return [
            self._state(connection.worker, connection.load, connection=connection, generation=generation)
            for connection in self.connections.values()
            if connection.is_live
        ]

    def prefill_states(self) -> list[WorkerState]:
        return [self._state(peer.worker, peer.load, address=peer.address) for peer in self.prefill.values()]

    @property
    def preference(self) -> Preference:
        """Between revisions, as things stand."""
        return Preference(self.routing_file.serving, self.last_revision, self._needs_prefill)

    @property
    def is_meeting_prefill(self) -> bool:
        """Prefill workers may be there that just have not been asked to the end: at most a Hello's time per address."""
        return self._needs_prefill and any(
            _ROLES.get(hint.role) != pb.ROLE_DECODE and address not in self._met
            for address, hint in self.table.hints().items()
        )

    def refusals(self, revision: str) -> list[str]:
        """Why workers of a revision that answer cannot be used, each in words."""
        found = [error for error in self._refused.values() if error.worker.revision == revision]
        return sorted({f"worker {error.worker.worker_id} {error}" for error in found})

    def note_revision(self, revision: str) -> None:
        """A request was routed there."""
        if revision != self.last_revision:
            log.info("requests go to revision", extra={"revision": revision, "before": self.last_revision})
            self.last_revision = revision

    @contextmanager
    def hold(self, worker_id: str, generation: Generation) -> Generator[DecodeConnection]:
        """Keep a worker for one generation: nothing else is routed to it until this ends."""
        connection = self.connections[worker_id]
        connection.reserved_by = generation
        try:
            yield connection
        finally:
            connection.reserved_by = None
            self.notify()

    def notify(self) -> None:
        """Something changed that may let a waiting request go on."""
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when something changed, or after `timeout_s`."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await asyncio.wait([waiter], timeout=max(0.0, timeout_s))
        finally:
            self._waiters.discard(waiter)

    def _state(
        self,
        worker: pb.WorkerInfo,
        load: pb.WorkerLoad,
        *,
        address: str = "",
        connection: DecodeConnection | None = None,
        generation: Generation | None = None,
    ) -> WorkerState:
        holder = connection.reserved_by if connection else None
        return WorkerState(
            worker_id=worker.worker_id,
            address=address,
            boot_id=worker.boot_id,
            revision=worker.revision,
            layout_fingerprint=worker.layout_fingerprint,
            numerics_fingerprint=worker.numerics_fingerprint,
            is_draining=load.draining,
            is_suspect=self.outliers.is_suspect(worker.worker_id),
            is_reserved=holder is not None and holder is not generation,
            num_running=load.num_running,
            num_waiting=load.num_waiting + load.num_promised + load.num_filling,
            num_waiting_tokens=load.num_waiting_tokens,
            num_inflight=len(connection.attempts) if connection else 0,
            num_inflight_tokens=connection.num_inflight_tokens if connection else 0,
            max_num_seqs=worker.max_num_seqs,
            free_share=load.num_blocks_free / load.num_blocks_total if load.num_blocks_total else 1.0,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            step_s=load.predicted_step_s,
            max_model_len=worker.max_model_len,
        )

    # ------------------------------------------------------------ members

    async def _keep_scanning(self) -> None:
        while True:
            try:
                self._follow_hints()
            except Exception:  # the loop's boundary: it ends with the gateway, or no worker would ever be found again
                log.exception("looking for workers failed; trying again")
                await asyncio.sleep(BACKOFF_MAX_S)
            await asyncio.sleep(SCAN_S)

    def _follow_hints(self) -> None:
        """Stay with every address that is named, and forget those that have ended and are named no more."""
        hints = self.table.hints()
        for address, hint in hints.items():
            member = self._members.get(address)
            if member is None or member.done():
                self._members[address] = asyncio.create_task(self._run_member(hint), name=f"worker {address}")
        for address in [a for a, task in self._members.items() if task.done() and a not in hints]:
            del self._members[address]
            self._met.discard(address)

    def _is_hinted(self, address: str) -> bool:
        return address in self.table.hints()

    async def _run_member(self, hint: Hint) -> None:
        """Stay with one address until it is neither hinted nor, for a while, alive."""
        backoff, said = BACKOFF_MIN_S, ""
        answered_at = time.monotonic()
        role = _ROLES.get(hint.role, pb.ROLE_UNSPECIFIED)
        async with rpc.open_channel(hint.address) as channel:
            while True:
                try:
                    try:
                        reply = await self._say_hello(channel, role)
                    finally:  # with an answer, `_use` has entered it before anything else runs
                        self._note_met(hint.address)
                    backoff, said = BACKOFF_MIN_S, ""
                    self._refused.pop(hint.address, None)
                    try:
                        await self._use(channel, hint, reply)
                    finally:
                        answered_at = time.monotonic()
                except (rpc.RpcError, _Unusable) as error:
                    level, said = (
                        (logging.DEBUG if said else logging.INFO),
                        _reason(error),
                    )  # once, then each try at debug
                    log.log(level, "worker not usable", extra={"address": hint.address, "reason": said})
                    if isinstance(error, _Unusable):
                        self._refused[hint.address] = error
                    else:
                        self._refused.pop(hint.address, None)
                except Exception:  # the loop's boundary: a bug with one worker must not lose the others
                    log.exception("worker connection failed", extra={"address": hint.address})
                if time.monotonic() - answered_at > FORGET_S and not self._is_hinted(hint.address):
                    self._refused.pop(hint.address, None)
                    return
                await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
                backoff = min(BACKOFF_MAX_S, backoff * 2)

    def _note_met(self, address: str) -> None:
        if address not in self._met:
            self._met.add(address)
            asyncio.get_running_loop().call_soon(self.notify)

    async def _say_hello(self, channel: rpc.Channel, role: pb.Role) -> pb.HelloReply:
        """Ask the service that the hint names, or both: who are you?"""
        other = pb.ROLE_DECODE if role == pb.ROLE_PREFILL else pb.ROLE_PREFILL
        try:
            return await self._hello(channel, role)
        except rpc.RpcError as error:
            if not rpc.is_unimplemented(error):
                raise
        return await self._hello(channel, other)

    async def _hello(self, channel: rpc.Channel, role: pb.Role) -> pb.HelloReply:
        return self._checked(await rpc.say_hello(channel, role, self.hello, self.metadata, HELLO_TIMEOUT_S))

    def _checked(self, reply: pb.HelloReply) -> pb.HelloReply:
        worker = reply.worker
        if reply.protocol_version != PROTOCOL_VERSION:
            raise _Unusable(worker, f"speaks protocol {reply.protocol_version}, this gateway {PROTOCOL_VERSION}")
        if self.model_id and worker.model_id and worker.model_id != self.model_id:
            raise _Unusable(worker, f"serves model {worker.model_id!r}, this gateway {self.model_id!r}")
        if self.deterministic and not worker.deterministic:
            raise _Unusable(worker, "is not deterministic, and this service must be")
        return reply

    async def _use(self, channel: rpc.Channel, hint: Hint, reply: pb.HelloReply) -> None:
        if reply.worker.role == pb.ROLE_DECODE:
            await self._use_decode(channel, reply)
        else:
            await self._use_prefill(channel, hint.address, reply)

    async def _use_decode(self, channel: rpc.Channel, reply: pb.HelloReply) -> None:
        worker = reply.worker
        other = self.connections.get(worker.worker_id)
        if other is not None and other.is_live and other.worker.boot_id == worker.boot_id:
            raise _Unusable(worker, "is connected already under another address")
        call = rpc.open_generate(channel, self.metadata)
        connection = DecodeConnection(call, worker, reply.load, self.metrics, self.notify)
        self.connections[worker.worker_id] = connection
        self.notify()
        log.info("decode worker connected", extra={"worker_id": worker.worker_id})
        try:
            await connection.run()
        finally:
            if self.connections.get(worker.worker_id) is connection:
                del self.connections[worker.worker_id]
                self.prefixes.forget(worker.worker_id)
            self.notify()

    async def _use_prefill(self, channel: rpc.Channel, address: str, reply: pb.HelloReply) -> None:
        """Refresh what is known each second; three failed Hellos in a row, or another boot, end it."""
        peer = PrefillPeer(reply.worker, reply.load, address)
        worker_id = peer.worker.worker_id
        self.prefill[worker_id] = peer
        self.notify()
        num_failed = 0
        try:
            while True:
                await asyncio.sleep(HELLO_EVERY_S)
                try:
                    reply = await self._hello(channel, pb.ROLE_PREFILL)
                except rpc.RpcError:
                    num_failed += 1
                    if num_failed >= MAX_FAILED_HELLOS or peer.load.draining:  # it said that it would go
                        raise
                    continue
                num_failed = 0
                if reply.worker.boot_id != peer.worker.boot_id:
                    return
                peer.load = reply.load
        finally:
            if self.prefill.get(worker_id) is peer:
                del self.prefill[worker_id]
                self.prefixes.forget(worker_id)


class _Unusable(Exception):
    """The worker answered, but cannot be used; said in words."""

    def __init__(self, worker: pb.WorkerInfo, why: str) -> None:
        super().__init__(why)
        self.worker = worker


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, _Unusable) else rpc.describe(error)
