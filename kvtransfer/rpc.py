"""The few parts of grpc that we use, under names with types: its own hints are too incomplete for strict checking."""

from __future__ import annotations

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
    ServerInterceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    ServerInterceptor = grpc.aio.ServerInterceptor


def stream_handler(
    behaviour: Callable[..., Any], parse: Callable[[bytes], Any] | None, serialize: Callable[[Any], bytes] | None
) -> Handler:
    return _grpc.stream_stream_rpc_method_handler(behaviour, request_deserializer=parse, response_serializer=serialize)


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


def unary_call(
    channel: Any, method: str, serialize: Callable[[Any], bytes], parse: Callable[[bytes], Any]
) -> Callable[..., Any]:
    return channel.unary_unary(method, request_serializer=serialize, response_deserializer=parse)


def sync_channel(address: str, options: tuple[tuple[str, int], ...]) -> Any:
    return _grpc.insecure_channel(address, options=list(options))


def aio_channel(address: str, options: tuple[tuple[str, int], ...]) -> Any:
    return _aio.insecure_channel(address, options=list(options))
