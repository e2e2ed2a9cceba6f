"""The Pull stream: published blocks over any network that gRPC crosses.

P serves it on the same grpc.aio server as its control stream. D reads it with a synchronous channel of its own (its own
TCP connection, so that KV never delays a control message) on a thread of its own, which also takes the digest.

Piece size and channel options (rpc.DATA_OPTIONS) were chosen by measurement: docs/log.md, "gRPC: pieces and options".
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

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
    OnRead,
    SourceBlock,
    until_let_go,
)

_METHOD = "/baton.v1.PrefillWorker/Pull"
_WANT_BLOCKS_PER_MESSAGE = 4096

TARGET_PIECE_BYTES = 384 << 10
"""Measured (docs/log.md, "gRPC: pieces and options"): smaller ones cost more per message, larger ones more per byte,
unequal ones most (1 MiB and the rest of a 1.4 MiB block: three times P's processor time)."""


def piece_bytes(block_bytes: int) -> int:
    """Length of each piece of a block but the last: as even as whole cache lines allow."""
    num_pieces = -(-block_bytes // TARGET_PIECE_BYTES)
    even = -(-block_bytes // num_pieces)
    return -(-even // _CACHE_LINE_BYTES) * _CACHE_LINE_BYTES


_CACHE_LINE_BYTES = 64


def _identity(message: bytes) -> bytes:
    return message


# ---------------------------------------------------------------- P


class GrpcBlockServer:
    """P's end: the handler of Pull. `method_handler` goes into PrefillWorker's table in place of the generated one."""

    def __init__(self, source: BlockSource) -> None:
        self._source = source

    @property
    def method_handler(self) -> rpc.Handler:
        return rpc.stream_handler(self.pull, pb.PullUp.FromString, _identity)

    async def pull(self, requests: AsyncIterator[pb.PullUp], context: rpc.Context) -> AsyncIterator[bytes]:
        """Join, then answer each wish in order."""
        joined: bytes | None = None
        try:
            async for request in requests:
                if request.WhichOneof("kind") == "join" and joined is None:
                    self._source.join(request.join.ticket, request.join.boot_id)
                    joined = request.join.ticket
                    await context.send_initial_metadata(())  # "joined"
                elif request.WhichOneof("kind") == "want" and joined is not None:
                    for index in request.want.indices:
                        for piece in self._pieces(joined, index):
                            yield piece
                else:
                    raise TicketRefused("a pull begins with one join")
        except TicketRefused as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        except BlockNotPublished as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

    def _pieces(self, ticket: bytes, index: int) -> Iterator[bytes]:
        block_bytes, length = self._source.block_bytes, piece_bytes(self._source.block_bytes)
        for offset in range(0, block_bytes, length):
            yield self._source.read_frame(ticket, index, offset, min(length, block_bytes - offset))


# ---------------------------------------------------------------- D

_T = TypeVar("_T")


class GrpcBlockTransport:
    """D's end: one data channel to one prefill worker."""

    name = "grpc"

    def __init__(self, address: str, secret: Secret, block_bytes: int, max_threads: int = 16) -> None:
        self._address = address
        self._secret = secret
        self._block_bytes = block_bytes
        self._channel = rpc.sync_channel(address, rpc.DATA_OPTIONS)
        self._call = rpc.stream_call(self._channel, _METHOD, pb.PullUp.SerializeToString, _identity)
        self._threads = ThreadPoolExecutor(max_threads, thread_name_prefix="pull")

    async def open(self, ticket: bytes, boot_id: bytes) -> BlockPuller:
        puller = _GrpcPuller(self._threads, self._block_bytes, boot_id)
        try:
            puller.start(self._call, self._secret, ticket)
        except ValueError as error:
            raise TransportLost("the transport is closed") from error
        try:
            await puller.joined()
        except BaseException:
            await puller.aclose()
            raise
        return puller

    async def aclose(self) -> None:
        self._channel.close()  # ends every call, so that the threads return
        self._threads.shutdown(wait=False)


class _Requests:
    """The request side of one Pull call: gRPC's own thread waits in `__next__` for what we put in."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._waiting: list[pb.PullUp] = []
        self._closed = False

    def put(self, request: pb.PullUp) -> None:
        with self._wake:
            self._waiting.append(request)
            self._wake.notify()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()

    def __iter__(self) -> _Requests:
        return self

    def __next__(self) -> pb.PullUp:
        with self._wake:
            self._wake.wait_for(lambda: self._waiting or self._closed)
            if self._waiting:
                return self._waiting.pop(0)
            raise StopIteration


class _GrpcPuller:
    def __init__(self, threads: ThreadPoolExecutor, block_bytes: int, boot_id: bytes) -> None:
        self._threads = threads
        self._block_bytes = block_bytes
        self._boot_id = boot_id
        self._requests = _Requests()
        self._call: Any = None

    def start(self, call: Callable[..., Any], secret: Secret, ticket: bytes) -> None:
        self._requests.put(pb.PullUp(join=pb.JoinTicket(ticket=ticket, boot_id=self._boot_id)))
        self._call = call(self._requests, metadata=secret.metadata)

    async def joined(self) -> None:
        await self._on_thread(self._wait_joined)

    async def pull(self, blocks: Sequence[SourceBlock], destinations: Sequence[memoryview], on_read: OnRead) -> None:
        assert len(blocks) == len(destinations)
        for first in range(0, len(blocks), _WANT_BLOCKS_PER_MESSAGE):
            part = blocks[first : first + _WANT_BLOCKS_PER_MESSAGE]
            self._requests.put(pb.PullUp(want=pb.WantBlocks(indices=[block.index for block in part])))
        await self._on_thread(functools.partial(self._receive, blocks, destinations, on_read))

    async def aclose(self) -> None:
        self._requests.close()
        self._call.cancel()

    async def _on_thread(self, work: Callable[[], _T]) -> _T:
        """Run on the transport's thread; when cancelled, end the call and wait until the thread has let go."""
        try:
            task = self._threads.submit(work)
        except RuntimeError as error:
            raise TransportLost("the transport is closed") from error
        running = asyncio.wrap_future(task)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            self._call.cancel()
            if not task.cancel():  # it runs, until the cancelled call wakes it
                await until_let_go(running)
            raise

    def _wait_joined(self) -> None:
        try:
            self._call.initial_metadata()
            if not self._call.is_active():
                next(self._call)  # raises the status
        except StopIteration:
            raise TransportLost("the pull ended before it began") from None
        except grpc.RpcError as error:
            raise _translated(error) from error

    def _receive(self, blocks: Sequence[SourceBlock], destinations: Sequence[memoryview], on_read: OnRead) -> None:
        try:
            for block, destination in zip(blocks, destinations, strict=True):
                on_read(self._receive_block(block, np.frombuffer(destination, np.uint8)))
        except grpc.RpcError as error:
            raise _translated(error) from error
        except StopIteration:
            raise TransportLost("the pull ended early") from None

    def _receive_block(self, block: SourceBlock, destination: np.ndarray[Any, np.dtype[np.uint8]]) -> BlockRead:
        received, generation = 0, block.generation
        assert destination.nbytes == self._block_bytes
        while received < self._block_bytes:
            frame = frames.decode(next(self._call))
            length = frame.data.nbytes
            if frame.index != block.index or frame.offset != received or not 0 < length <= self._block_bytes - received:
                raise TransportLost(f"got block {frame.index} at {frame.offset}, not {block.index} at {received}")
            np.copyto(destination[received : received + length], np.frombuffer(frame.data, np.uint8))
            received += length
            if frame.generation != block.generation:
                generation = frame.generation  # any piece that was read from another generation spoils the block
        return BlockRead(block.index, self._boot_id, generation, received)


def _translated(error: grpc.RpcError) -> PullError:
    code: grpc.StatusCode | None = error.code() if isinstance(error, grpc.Call) else None
    details = str(error.details() if isinstance(error, grpc.Call) else error)[:200]
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return TicketRefused(details)
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return BlockNotPublished(details)
    return TransportLost(f"{code.name if code else 'unknown'}: {details}")
