"""Pull calls: published blocks over any network that gRPC crosses.

P serves them on the same grpc.aio server as its control stream. D makes them on a synchronous channel of its own (its
own TCP connection, so that KV never delays a control message), one per batch of blocks. Each is read by a thread of
ours, which polls the call itself and also takes the digest: no other thread and no event loop stands between socket
and block.

Piece size and channel options (rpc.DATA_OPTIONS) were chosen by measurement: docs/log.md, "gRPC: pieces and options".
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np

from kvtransfer import frames, rpc
from kvtransfer.auth import Secret
from kvtransfer.errors import BlockNotPublished, PullError, TicketRefused, TransportLost
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.transport import (
    BlockPuller,
    BlockRead,
    BlockSource,
    Destination,
    OnRead,
    SourceBlock,
    host_memory,
    on_thread,
)

_METHOD = "/baton.v1.PrefillWorker/Pull"
_PATH_BYTES = 16

JOIN_S = 5.0
"""A join is one round trip; who does not answer it is not there, and the next transport is tried."""

PULL_S = 300.0
"""Longest call, at both ends. A bound on what is forgotten: the transfer's own deadlines end a slow pull before."""

TARGET_PIECE_BYTES = 384 << 10
"""Measured (docs/log.md, "gRPC: pieces and options"): smaller ones cost more per message, larger ones more per byte,
unequal ones most (1 MiB and the rest of a 1.4 MiB block: three times P's processor time)."""


def piece_bytes(block_bytes: int) -> int:
    """Length of each piece of a block but the last: as even as whole cache lines allow."""
    num_pieces = -(-block_bytes // TARGET_PIECE_BYTES)
    even = -(-block_bytes // num_pieces)
    return -(-even // _CACHE_LINE_BYTES) * _CACHE_LINE_BYTES


_CACHE_LINE_BYTES = 64

_LARGE_BYTES = 31 << 20


def _keep_freed_memory() -> None:
    """Have glibc keep what messages free: by default it returns a page fault for each 4 KiB of every piece.

    It gives back what exceeds twice the largest block that was ever unmapped (mallopt(3), M_MMAP_THRESHOLD; blocks
    over 32 MiB do not count), so unmapping one large block is enough. Measured: a third of D's processor time.
    """
    bytes(_LARGE_BYTES)


def _identity(message: bytes) -> bytes:
    return message


# ---------------------------------------------------------------- P


class GrpcBlockServer:
    """P's end: the handler of Pull. `method_handler` goes into PrefillWorker's table in place of the generated one."""

    def __init__(self, source: BlockSource, pull_s: float = PULL_S) -> None:
        self._source = source
        self._pull_s = pull_s
        _keep_freed_memory()

    @property
    def method_handler(self) -> rpc.Handler:
        return rpc.server_stream_handler(self.pull, pb.PullBlocks.FromString, _identity)

    async def pull(self, request: pb.PullBlocks, context: rpc.Context) -> None:
        """Join, or send the blocks in the order in which they are asked for."""
        try:
            async with asyncio.timeout(self._pull_s):
                self._source.join(request.ticket, request.boot_id, request.path)
                for index in request.indices:
                    for piece in self._pieces(request.ticket, index):
                        await context.write(piece)
        except TicketRefused as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        except BlockNotPublished as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"nobody reads a pull for {self._pull_s:g} s")

    def _pieces(self, ticket: bytes, index: int) -> Iterator[bytes]:
        block_bytes, length = self._source.block_bytes, piece_bytes(self._source.block_bytes)
        for offset in range(0, block_bytes, length):
            yield self._source.read_frame(ticket, index, offset, min(length, block_bytes - offset))


# ---------------------------------------------------------------- D


class GrpcBlockTransport:
    """D's end: one data channel to one prefill worker."""

    name = "grpc"

    def __init__(
        self, address: str, secret: Secret, block_bytes: int, max_threads: int = 16, join_s: float = JOIN_S
    ) -> None:
        self._address = address
        self._secret = secret
        self._block_bytes = block_bytes
        self._join_s = join_s
        _keep_freed_memory()
        self._channel = rpc.sync_channel(address, rpc.DATA_OPTIONS)
        self._method = rpc.server_stream_call(self._channel, _METHOD, pb.PullBlocks.SerializeToString, _identity)
        self._threads = ThreadPoolExecutor(max_threads, thread_name_prefix="pull")

    async def warm_up(self) -> None:
        """The control stream has proved the way to P; the data connection is made by the first join."""

    async def open(self, ticket: bytes, boot_id: bytes) -> BlockPuller:
        method = functools.partial(self._method, metadata=self._secret.metadata)
        puller = _GrpcPuller(method, self._threads, self._block_bytes, ticket, boot_id)
        await puller.join(self._join_s)
        return puller

    async def aclose(self) -> None:
        self._channel.close()  # ends every call, so that the threads return
        self._threads.shutdown(wait=False)


class _GrpcPuller:
    def __init__(
        self,
        method: Callable[..., Any],
        threads: ThreadPoolExecutor,
        block_bytes: int,
        ticket: bytes,
        boot_id: bytes,
    ) -> None:
        self._method = method
        self._threads = threads
        self._block_bytes = block_bytes
        self._boot_id = boot_id
        self._request = pb.PullBlocks(ticket=ticket, boot_id=boot_id, path=secrets.token_bytes(_PATH_BYTES))
        self._lock = threading.Lock()  # between a call's begin on its thread and `_stop` on the loop
        self._call: Any = None
        self._is_stopped = False

    async def join(self, patience_s: float) -> None:
        await on_thread(self._threads, functools.partial(self._receive, (), (), _ignore, patience_s), self._stop)

    async def pull(self, blocks: Sequence[SourceBlock], destinations: Sequence[Destination], on_read: OnRead) -> None:
        work = functools.partial(self._receive, blocks, destinations, on_read, PULL_S)
        await on_thread(self._threads, work, self._stop)

    async def aclose(self) -> None:
        self._stop()

    def _stop(self) -> None:
        with self._lock:
            self._is_stopped = True
            if self._call is not None:
                self._call.cancel()

    def _receive(
        self, blocks: Sequence[SourceBlock], destinations: Sequence[Destination], on_read: OnRead, patience_s: float
    ) -> None:
        """On the transport's thread: one call from its begin to its end."""
        with self._calling([block.index for block in blocks], patience_s) as call:
            for block, destination in zip(blocks, destinations, strict=True):
                on_read(self._receive_block(call, block, np.frombuffer(host_memory(destination), np.uint8)))
            if next(call, None) is not None:
                raise TransportLost("the pull gave more than was asked for")

    @contextlib.contextmanager
    def _calling(self, indices: Sequence[int], patience_s: float) -> Generator[Any]:
        request = pb.PullBlocks()
        request.CopyFrom(self._request)
        request.indices.extend(indices)
        with self._lock:
            if self._is_stopped:
                raise TransportLost("the pull was stopped")
            try:
                self._call = self._method(request, timeout=patience_s)
            except ValueError as error:
                raise TransportLost("the transport is closed") from error
        try:
            yield self._call
        except grpc.RpcError as error:
            raise _translated(error) from error
        finally:
            _finish(self._call)

    def _receive_block(
        self, call: Any, block: SourceBlock, destination: np.ndarray[Any, np.dtype[np.uint8]]
    ) -> BlockRead:
        received, generation = 0, block.generation
        assert destination.nbytes == self._block_bytes
        while received < self._block_bytes:
            message = next(call, None)
            if message is None:
                raise TransportLost("the pull ended early")
            frame = frames.decode(message)
            length = frame.data.nbytes
            if frame.index != block.index or frame.offset != received or not 0 < length <= self._block_bytes - received:
                raise TransportLost(f"got block {frame.index} at {frame.offset}, not {block.index} at {received}")
            np.copyto(destination[received : received + length], np.frombuffer(frame.data, np.uint8))
            received += length
            if frame.generation != block.generation:
                generation = frame.generation  # any piece that was read from another generation spoils the block
        return BlockRead(block.index, self._boot_id, generation, received)


def _ignore(read: BlockRead) -> None:
    """A join reads nothing."""


def _finish(call: Any) -> None:
    """End the call and take its last events. gRPC keeps a call that nobody polls to its end as long as the channel,
    and its public methods stop polling at a cancel."""
    call.cancel()
    while call._state.due:
        call._consume_next_event()


def _translated(error: grpc.RpcError) -> PullError:
    code: grpc.StatusCode | None = error.code() if isinstance(error, grpc.Call) else None
    details = str(error.details() if isinstance(error, grpc.Call) else error)[:200]
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return TicketRefused(details)
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return BlockNotPublished(details)
    return TransportLost(f"{code.name if code else 'unknown'}: {details}")
