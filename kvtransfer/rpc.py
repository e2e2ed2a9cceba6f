"""The few parts of grpc that we use, under names with types: its own hints are too incomplete for strict checking."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

_grpc: Any = grpc
_aio: Any = grpc.aio

Context = Any
"""grpc.aio.ServicerContext"""

Handler = Any
"""grpc.RpcMethodHandler"""

if TYPE_CHECKING:

    class ServerInterceptor:
        """grpc.aio.ServerInterceptor, which has no hints."""
else:
    ServerInterceptor = grpc.aio.ServerInterceptor


MAX_MESSAGE_BYTES = 4 << 20
"""Largest message of any of our streams: a control message with a 500,000-token prompt, or a piece and its header."""

CONTROL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),  # data and control never share a connection
)

GENERATE_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
"""For the server of Generate. A replay carries the logs of all choices; one message over the limit would end the
stream, and with it every other request of that gateway. The gateway sends as much (gateway/rpc.py)."""

DATA_OPTIONS: tuple[tuple[str, int], ...] = (
    *CONTROL_OPTIONS,
    # grpc.experimental.ChannelOptions. The pulling thread reads its call itself: without it, a thread of gRPC's hands
    # it each message, for a fifth more of D's processor time (docs/log.md, "gRPC: one call per batch").
    ("SingleThreadedUnaryStream", 1),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 64 << 20),  # the window holds all the credit
    ("grpc.http2.max_frame_size", 1 << 20),
    ("grpc.http2.write_buffer_size", MAX_MESSAGE_BYTES),
    ("grpc.experimental.tcp_read_chunk_size", MAX_MESSAGE_BYTES),
    ("grpc.experimental.tcp_min_read_chunk_size", MAX_MESSAGE_BYTES),
    ("grpc.experimental.tcp_max_read_chunk_size", 4 * MAX_MESSAGE_BYTES),
)
"""For a channel that pulls blocks, and for the server that answers it.

Measured together and one by one: docs/log.md, "gRPC: pieces and options".
"""

RPC_ERRORS: tuple[type[BaseException], ...] = (
    _aio.AioRpcError,
    _aio.UsageError,
    _aio.InternalError,
    _aio.BaseError,
    asyncio.InvalidStateError,  # "RPC already finished": a write behind the peer's end
)
"""A call that was ended by the peer, the network or the closing of its channel."""


def stream_handler(
    behaviour: Callable[..., Any], parse: Callable[[bytes], Any] | None, serialize: Callable[[Any], bytes] | None
) -> Handler:
    return _grpc.stream_stream_rpc_method_handler(behaviour, request_deserializer=parse, response_serializer=serialize)


def server_stream_handler(
    behaviour: Callable[..., Any], parse: Callable[[bytes], Any] | None, serialize: Callable[[Any], bytes] | None
) -> Handler:
    return _grpc.unary_stream_rpc_method_handler(behaviour, request_deserializer=parse, response_serializer=serialize)


def unary_handler(
    behaviour: Callable[..., Any], parse: Callable[[bytes], Any] | None, serialize: Callable[[Any], bytes] | None
) -> Handler:
    return _grpc.unary_unary_rpc_method_handler(behaviour, request_deserializer=parse, response_serializer=serialize)


def service_handler(service: str, methods: dict[str, Handler]) -> Any:
    return _grpc.method_handlers_generic_handler(service, methods)


def stream_call(
    channel: Any, method: str, serialize: Callable[[Any], bytes], parse: Callable[[bytes], Any]
) -> Callable[..., Any]:
    return channel.stream_stream(method, request_serializer=serialize, response_deserializer=parse)


def server_stream_call(
    channel: Any, method: str, serialize: Callable[[Any], bytes], parse: Callable[[bytes], Any]
) -> Callable[..., Any]:
    return channel.unary_stream(method, request_serializer=serialize, response_deserializer=parse)


def unary_call(
    channel: Any, method: str, serialize: Callable[[Any], bytes], parse: Callable[[bytes], Any]
) -> Callable[..., Any]:
    return channel.unary_unary(method, request_serializer=serialize, response_deserializer=parse)


def sync_channel(address: str, options: tuple[tuple[str, int], ...]) -> Any:
    return _grpc.insecure_channel(address, options=list(options))


def aio_channel(address: str, options: tuple[tuple[str, int], ...]) -> Any:
    return _aio.insecure_channel(address, options=list(options))


def status(error: Any) -> str:
    """Code and details of a failed call, for logs."""
    if isinstance(error, grpc.RpcError) and hasattr(error, "code"):
        return f"{error.code().name}: {error.details()}"[:200]
    return str(error)[:200]
