"""The few parts of grpc.aio that the gateway uses, with types: its own hints do not reach strict checking."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio

from kvtransfer.protocol import baton_pb2 as pb

_grpc: Any = grpc
_aio: Any = grpc.aio

Channel = Any
"""grpc.aio.Channel"""

Call = Any
"""grpc.aio.StreamStreamCall"""

RpcError: type[Exception] = _aio.AioRpcError
END_OF_STREAM: Any = _aio.EOF

Metadata = tuple[tuple[str, str], ...]

MAX_MESSAGE_BYTES = 64 << 20
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


def open_channel(address: str) -> Channel:
    """A channel to use as an async context manager."""
    return _aio.insecure_channel(address, options=list(OPTIONS))


async def say_hello(
    channel: Channel, role: pb.Role, request: pb.HelloRequest, metadata: Metadata, timeout_s: float
) -> pb.HelloReply:
    """Hello to the service of this role. Raises: RpcError."""
    service = "PrefillWorker" if role == pb.ROLE_PREFILL else "DecodeWorker"
    call = channel.unary_unary(
        f"/baton.v1.{service}/Hello",
        request_serializer=pb.HelloRequest.SerializeToString,
        response_deserializer=pb.HelloReply.FromString,
    )
    return await call(request, timeout=timeout_s, metadata=metadata)


def open_generate(channel: Channel, metadata: Metadata) -> Call:
    """The one Generate stream to a decode worker."""
    call = channel.stream_stream(
        "/baton.v1.DecodeWorker/Generate",
        request_serializer=pb.GenerateUp.SerializeToString,
        response_deserializer=pb.GenerateDown.FromString,
    )
    return call(metadata=metadata)


def is_unimplemented(error: Any) -> bool:
    """The address speaks gRPC, but not this service."""
    return error.code() is _grpc.StatusCode.UNIMPLEMENTED


def describe(error: Any) -> str:
    """In words, for logs."""
    if isinstance(error, RpcError):
        failed: Any = error
        return f"{failed.code().name}: {failed.details()}"[:200]
    return f"{type(error).__name__}: {error}"[:200]
