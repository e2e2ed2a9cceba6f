"""Same host: D maps P's KV memory read-only and copies published blocks itself.

P listens on an abstract unix socket. Both ends prove the service's secret by HMAC over fresh nonces, bound to P's
boot id (the secret itself does not travel, so a process that squats on the name learns nothing):

    P -> D   nonce_p
    D -> P   nonce_d, HMAC(secret, "decode", nonce_p, nonce_d, boot_id)
    P -> D   HMAC(secret, "prefill", ...), num_blocks, block_bytes; descriptors (read-only): KV, generation table
    D -> P   ticket                  (then once per transfer)
    P -> D   1 joined, 0 refused

P talks only to processes of its own user, and of those that have proved nothing yet it keeps the newest few. D maps
only memory that is sealed against shrinking. The mapping is made once per P incarnation. The generation table lets D
see, after its copy, that a block was taken back meanwhile; content that still differs is caught by the digest like
everywhere else.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import functools
import logging
import mmap
import os
import secrets
import socket
import struct
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from kvtransfer.auth import Secret
from kvtransfer.errors import BlockNotPublished, TicketRefused, TransportLost
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.transport import (
    MAX_PIECE_BYTES,
    NOT_PUBLISHED,
    TICKET_BYTES,
    BlockPuller,
    BlockRead,
    BlockSource,
    Destination,
    OnRead,
    SourceBlock,
    host_memory,
    on_thread,
)

log = logging.getLogger(__name__)

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_NONCE_BYTES = 32
_MAC_BYTES = 32
_SIZES = struct.Struct("!QQ")
_PATIENCE_S = 2.0
_ACCEPT_PAUSE_S = 0.1
_MAX_CONNECTIONS = 256
_MAX_GREETINGS = 16
_PEER_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid
_NUM_COPY_THREADS = 2


def host_id() -> str:
    """Equal for two processes that can reach each other's abstract sockets: one kernel boot, one network namespace."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()}/{os.readlink('/proc/self/ns/net')}"


def is_available() -> bool:
    """Whether this platform can share memory this way at all."""
    return hasattr(os, "memfd_create") and os.path.exists("/proc/self/ns/net")


# ---------------------------------------------------------------- P


class ShmBlockServer:
    """P's end: hands out the memory and joins tickets. Runs on the asyncio loop."""

    def __init__(self, source: BlockSource, kv_fd: int, secret: Secret) -> None:
        """`kv_fd` is the memfd behind the source's memory, block 0 at offset 0. Borrowed, not closed."""
        self.name = f"baton-kv-{secrets.token_hex(16)}"
        self._source = source
        self._secret = secret
        self._kv_fd = kv_fd
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._greetings: dict[socket.socket, asyncio.Task[None]] = {}  # under way, oldest first

    async def start(self) -> str:
        """Listen; returns what goes into WorkerInfo.shared_memory_socket."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._listener.bind(f"\0{self.name}")
        self._listener.listen(16)
        self._start_task(self._accept(self._listener))
        return self.name

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()

    def _start_task(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError as error:  # out of descriptors, or the caller hung up: the next one may do better
                log.warning("no shared memory connection could be taken: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            if _user_of(connection) != os.geteuid() or len(self._tasks) > _MAX_CONNECTIONS:
                connection.close()
                continue
            if len(self._greetings) >= _MAX_GREETINGS:  # the newest may be the one that we wait for
                self._greetings.pop(next(iter(self._greetings))).cancel()
            serving = self._greetings[connection] = self._start_task(self._serve(connection))
            # Not in `_serve`: a task that is cancelled before its first step runs nothing.
            serving.add_done_callback(lambda _, connection=connection: self._hang_up(connection))

    async def _serve(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await self._greet(connection)
            self._greetings.pop(connection, None)
            while True:
                await self._join_next(connection)
        except (OSError, TimeoutError, EOFError) as error:
            log.debug("a shared memory connection ended: %s", type(error).__name__)

    def _hang_up(self, connection: socket.socket) -> None:
        self._greetings.pop(connection, None)
        connection.close()

    async def _greet(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        nonce_p = secrets.token_bytes(_NONCE_BYTES)
        await loop.sock_sendall(connection, nonce_p)
        answer = await _receive(connection, _NONCE_BYTES + _MAC_BYTES)
        nonce_d, mac = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
        if not secrets.compare_digest(mac, _mac(self._secret, b"decode", nonce_p, nonce_d, self._source.boot_id)):
            log.warning("a process on this host does not know the service's secret")
            raise EOFError
        proof = _mac(self._secret, b"prefill", nonce_p, nonce_d, self._source.boot_id)
        sizes = _SIZES.pack(self._source.num_blocks, self._source.block_bytes)
        with _read_only(self._kv_fd) as kv, _read_only(self._source.generation_table.fd) as generations:
            socket.send_fds(connection, [proof + sizes], [kv, generations])

    async def _join_next(self, connection: socket.socket) -> None:
        ticket = await _receive(connection, TICKET_BYTES)
        try:
            self._source.join(ticket, self._source.boot_id)  # the greeting proved the boot id
            answer = b"\1"
        except TicketRefused:
            answer = b"\0"
        await asyncio.get_running_loop().sock_sendall(connection, answer)


def _user_of(connection: socket.socket) -> int:
    """The user of the process at the other end, as the kernel knows it."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    _, uid, _ = _PEER_CREDENTIALS.unpack(packed)
    return uid


async def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    received = b""
    while len(received) < num_bytes:
        part = await asyncio.get_running_loop().sock_recv(connection, num_bytes - len(received))
        if not part:
            raise EOFError
        received += part
    return received


@contextlib.contextmanager
def _read_only(fd: int) -> Generator[int]:
    """The same memory through a descriptor that cannot be mapped for writing."""
    opened = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield opened
    finally:
        os.close(opened)


def _mac(secret: Secret, side: bytes, nonce_p: bytes, nonce_d: bytes, boot_id: bytes) -> bytes:
    return secret.sign(side, nonce_p, nonce_d, boot_id)


# ---------------------------------------------------------------- D


class ShmBlockTransport:
    """D's end: one mapping of one prefill worker's memory, made on first use."""

    name = "shm"

    def __init__(self, worker: pb.WorkerInfo, secret: Secret) -> None:
        self._worker = worker
        self._secret = secret
        self._link: _Link | None = None
        self._is_closed = False
        self._lock = threading.Lock()  # between a connect on the join thread and `aclose` on the loop
        self._joins = ThreadPoolExecutor(1, thread_name_prefix="shm-join")
        self._copies = ThreadPoolExecutor(_NUM_COPY_THREADS, thread_name_prefix="shm-copy")

    async def warm_up(self) -> None:
        """The mapping is made by the first join: one round trip on this host."""

    async def open(self, ticket: bytes, boot_id: bytes) -> BlockPuller:
        try:
            joining = self._joins.submit(self._join, ticket, boot_id)
        except RuntimeError as error:
            raise TransportLost("the transport is closed") from error
        return _ShmPuller(await asyncio.wrap_future(joining), self._copies)

    async def aclose(self) -> None:
        """The mapping goes when the copy that may be under way has ended."""
        self._joins.shutdown(wait=False)  # joins that still wait are refused, not cancelled: their callers were not
        self._copies.shutdown(wait=False)
        with self._lock:
            self._is_closed = True
            if self._link is not None:
                self._link.hang_up()

    def _join(self, ticket: bytes, boot_id: bytes) -> _Link:
        """On the join thread: connect if need be, then one round trip."""
        if self._is_closed:
            raise TransportLost("the transport is closed")
        if boot_id != self._worker.boot_id:
            raise TicketRefused("the ticket belongs to another incarnation of the worker")
        try:
            if self._link is None:
                self._keep(_connect(self._worker, self._secret))
            assert self._link is not None
            self._link.join(ticket)
            return self._link
        except (OSError, EOFError) as error:
            link, self._link = self._link, None  # its next answer might be the one that came too late
            if link is not None:
                link.hang_up()
            raise TransportLost(f"shared memory socket: {type(error).__name__} {error}") from error

    def _keep(self, link: _Link) -> None:
        with self._lock:
            if self._is_closed:
                link.hang_up()
                raise TransportLost("the transport is closed")
            self._link = link


class _Link:
    """A greeted connection and the two mappings; `mapped` is None once it has hung up."""

    def __init__(self, connection: socket.socket, boot_id: bytes, memory: _Bytes, generations: Any) -> None:
        self.boot_id = boot_id
        self.mapped: tuple[_Bytes, Any] | None = (memory, generations)  # [num_blocks, block_bytes]; [num_blocks] uint64
        self._connection = connection

    def join(self, ticket: bytes) -> None:
        self._connection.sendall(ticket)
        if _receive_now(self._connection, 1) != b"\1":
            raise TicketRefused("unknown, used or closed ticket")

    def hang_up(self) -> None:
        """Let go of connection and mappings at once: tracebacks and pullers may remember this object for long."""
        self._connection.close()
        self.mapped = None


def _connect(worker: pb.WorkerInfo, secret: Secret) -> _Link:
    """Raises: OSError, EOFError, TransportLost if the other end is not the worker that we mean."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_PATIENCE_S)
        connection.connect(f"\0{worker.shared_memory_socket}")
        nonce_p = _receive_now(connection, _NONCE_BYTES)
        nonce_d = secrets.token_bytes(_NONCE_BYTES)
        connection.sendall(nonce_d + _mac(secret, b"decode", nonce_p, nonce_d, worker.boot_id))
        answer, fds = _receive_descriptors(connection, _MAC_BYTES + _SIZES.size)
        try:
            proof, sizes = answer[:_MAC_BYTES], answer[_MAC_BYTES:]
            if not secrets.compare_digest(proof, _mac(secret, b"prefill", nonce_p, nonce_d, worker.boot_id)):
                raise TransportLost("the shared memory socket belongs to someone else")
            return _map(connection, worker, fds, *_SIZES.unpack(sizes))
        finally:
            for fd in fds:
                os.close(fd)
    except BaseException:
        connection.close()
        raise


def _map(connection: socket.socket, worker: pb.WorkerInfo, fds: Sequence[int], num_blocks: int, size: int) -> _Link:
    if (num_blocks, size) != (worker.num_blocks, worker.block_bytes) or len(fds) != 2:
        raise TransportLost(f"{num_blocks} blocks of {size} bytes, not what the worker said in Hello")
    memory = np.frombuffer(_mapped(fds[0], num_blocks * size), np.uint8).reshape(num_blocks, size)
    generations = np.frombuffer(_mapped(fds[1], num_blocks * 8), np.uint64)
    return _Link(connection, worker.boot_id, memory, generations)


def _mapped(fd: int, num_bytes: int) -> mmap.mmap:
    """Unmapped when the last array over it is gone."""
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise TransportLost("shared memory that is not sealed against shrinking")
    if os.fstat(fd).st_size < num_bytes:
        raise TransportLost(f"{os.fstat(fd).st_size} bytes of shared memory, expected {num_bytes}")  # else SIGBUS
    return mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)


def _receive_now(connection: socket.socket, num_bytes: int) -> bytes:
    received = b""
    while len(received) < num_bytes:
        part = connection.recv(num_bytes - len(received))
        if not part:
            raise EOFError("closed by the prefill worker")
        received += part
    return received


def _receive_descriptors(connection: socket.socket, num_bytes: int) -> tuple[bytes, list[int]]:
    data, ancillary, _, _ = connection.recvmsg(num_bytes, socket.CMSG_SPACE(2 * array.array("i").itemsize))
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if not data:
        raise EOFError("closed by the prefill worker: the secret or the boot id is another")
    return data + _receive_now(connection, num_bytes - len(data)), list(fds)


class _ShmPuller:
    def __init__(self, link: _Link, threads: ThreadPoolExecutor) -> None:
        self._link = link
        self._threads = threads
        self._stop = threading.Event()

    async def pull(self, blocks: Sequence[SourceBlock], destinations: Sequence[Destination], on_read: OnRead) -> None:
        work = functools.partial(self._copy_all, blocks, destinations, on_read)
        await on_thread(self._threads, work, self._stop.set)

    async def aclose(self) -> None:
        self._stop.set()

    def _copy_all(self, blocks: Sequence[SourceBlock], destinations: Sequence[Destination], on_read: OnRead) -> None:
        for block, destination in zip(blocks, destinations, strict=True):
            on_read(self._copy(block, np.frombuffer(host_memory(destination), np.uint8)))

    def _copy(self, block: SourceBlock, destination: _Bytes) -> BlockRead:
        """numpy copies without the GIL. A block that is another one before the copy is not copied at all."""
        mapped, boot_id = self._link.mapped, self._link.boot_id
        if mapped is None:
            raise TransportLost("the prefill worker is gone")
        memory, generations = mapped
        num_blocks, block_bytes = memory.shape
        assert destination.nbytes == block_bytes
        if block.block_id >= num_blocks or (generation := int(generations[block.block_id])) == NOT_PUBLISHED:
            raise BlockNotPublished(f"block {block.index} is not published")
        if generation != block.generation:
            return BlockRead(block.index, boot_id, generation, 0)
        source = memory[block.block_id]
        for offset in range(0, block_bytes, MAX_PIECE_BYTES):
            if self._stop.is_set():
                raise TransportLost("the pull was stopped")
            end = min(offset + MAX_PIECE_BYTES, block_bytes)
            np.copyto(destination[offset:end], source[offset:end])
        return BlockRead(block.index, boot_id, int(generations[block.block_id]), block_bytes)
