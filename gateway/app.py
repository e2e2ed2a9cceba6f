"""The HTTP surface: paths, auth, limits, and the two ways of answering (a stream or a whole body).

Edge (request id, key, errors, counts) -> Router -> endpoint -> serve.py
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from gateway import dialect, responses
from gateway.dialect import ChatBody, CompletionBody, DetokenizeBody, ModelLimits, ProbeBody, TokenizeBody
from gateway.errors import (
    BodyTooLarge,
    BodyTooSlow,
    GatewayError,
    InternalError,
    InvalidRequest,
    NotFound,
    Unauthorized,
    Unavailable,
)
from gateway.generation import Generation, GenerationRequest
from gateway.http_protocol import ABORT
from gateway.keys import ApiKeys, cache_salt
from gateway.metrics import GatewayMetrics
from gateway.probe import Prober
from gateway.responses import CollectSink, Outbox, ResponseFormat, StreamSink, Style
from gateway.serve import Services, serve
from gateway.status import status_of
from gateway.text import TextService
from kvtransfer.protocol import baton_pb2 as pb
from servicekit.health import HealthState, health_routes
from servicekit.logs import request_scope

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MAX_BODY_BYTES = 1 << 20
BODY_TIMEOUT_S = 30.0
KEEP_ALIVE_S = 10.0
CLIENT_STALL_S = 30.0
GONE_STATUS = 499
OPEN_PATHS = frozenset(["/health", "/ping", "/livez", "/readyz", "/startupz", "/metrics", "/version"])
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_DISAGGREGATION = {
    "auto": pb.DISAGGREGATION_AUTO,
    "always": pb.DISAGGREGATION_ALWAYS,
    "never": pb.DISAGGREGATION_NEVER,
}
_TRUE = ("1", "true", "yes", "on")


class ClientGone(Exception):
    """The client closed its connection: there is nobody to answer."""


@dataclass(slots=True, eq=False)
class LiveResponse:
    """One response being written. `sending_since` is set while a write waits for the client to read."""

    abort: Callable[[], None] = lambda: None
    sending_since: float = 0.0


@dataclass(slots=True)
class Gateway:
    """Everything the endpoints share."""

    services: Services
    text: TextService
    limits: ModelLimits
    model_id: str
    health: HealthState
    keys: ApiKeys = field(default_factory=ApiKeys)
    secret: str = ""
    fingerprint: str = ""
    version: str = "0.1.0"
    disaggregation: pb.Disaggregation = pb.DISAGGREGATION_AUTO
    ttft_objective_s: float = 0.0
    request_timeout_s: float = 600.0
    created: int = field(default_factory=lambda: int(time.time()))
    live: set[LiveResponse] = field(default_factory=set[LiveResponse])

    @property
    def metrics(self) -> GatewayMetrics:
        return self.services.metrics

    def cut_stalled_clients(self, now: float) -> None:
        """Drop clients that have not read for 30 s; called each second. Workers are drained all the while."""
        for response in list(self.live):
            if response.sending_since and now - response.sending_since > CLIENT_STALL_S:
                self.metrics.disconnects.labels("not_reading").inc()
                response.abort()


def build_app(gateway: Gateway, *, is_internal: bool = False) -> Edge:
    """The whole application. The internal one asks for the service's secret and may force worker and path."""
    chat = GenerateEndpoint(gateway, Style.CHAT, is_internal)
    completions = GenerateEndpoint(gateway, Style.COMPLETION, is_internal)
    simple = SimpleEndpoints(gateway)
    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", simple.models),
        Route("/v1/models/{model_id:path}", simple.model),
        Route("/tokenize", simple.tokenize, methods=["POST"]),
        Route("/detokenize", simple.detokenize, methods=["POST"]),
        Route("/health", simple.is_healthy),
        Route("/ping", simple.is_healthy, methods=["GET", "POST"]),
        Route("/version", simple.version),
        *health_routes(gateway.health, gateway.metrics.render),
    ]
    if is_internal:
        internal = InternalEndpoints(gateway)
        routes += [
            Route("/internal/workers", internal.workers),
            Route("/internal/status", internal.status),
            Route("/internal/probe", internal.probe, methods=["POST"]),
        ]
    return Edge(Router(routes, default=_not_found), gateway, is_internal)


def build_starting_app(health: HealthState, render_metrics: Callable[[], bytes]) -> Router:
    """What answers before the tokenizer is loaded: probes and metrics; else 503 and when to come back."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        error = Unavailable(f"this gateway is starting ({health.percent:g} %); send the request again")
        await send_json(send, error.status, error.body(), error_headers(error))

    return Router(health_routes(health, render_metrics), default=refuse)


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    raise NotFound(f"path: {scope['path']} does not exist here; see /v1/models, /v1/chat/completions, /v1/completions")


# ---------------------------------------------------------------- the edge


class Edge:
    """Around every request: its id, its key, its errors as bodies, its count."""

    def __init__(self, app: Router, gateway: Gateway, is_internal: bool) -> None:
        self._app = app
        self._gateway = gateway
        self._is_internal = is_internal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = scope["baton.headers"] = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        request_id = scope["baton.request_id"] = _request_id(headers)
        scope["app"] = self  # starlette then raises for a wrong method instead of answering in plain text
        has_started = False

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            nonlocal has_started
            if not has_started and message["type"] == "http.response.start":
                has_started = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                self._count(scope, message["status"])
            await send(message)

        with request_scope(request_id):
            try:
                scope["baton.tenant"] = self._authorise(scope["path"], headers)
                await self._app(scope, receive, send_with_id)
            except ClientGone:
                self._gateway.metrics.disconnects.labels("closed").inc()
                self._count(scope, GONE_STATUS)
            except HTTPException as error:
                await send_json(
                    send_with_id, error.status_code, _http_error_body(scope, error), dict(error.headers or {})
                )
            except GatewayError as error:
                assert not has_started
                await send_json(send_with_id, error.status, error.body(), error_headers(error))
            except Exception:  # the process's boundary: a bug is a 500, never a dead connection without a word
                log.exception("request failed")
                if has_started:
                    raise
                error = InternalError()
                await send_json(send_with_id, error.status, error.body(), error_headers(error))

    def _authorise(self, path: str, headers: Mapping[str, str]) -> str:
        """The tenant. Probes of the internal port prove the service's secret instead of a key."""
        if self._is_internal:
            if not self._gateway.secret or not hmac.compare_digest(
                headers.get("baton-secret", "").encode(), self._gateway.secret.encode()
            ):
                raise Unauthorized("baton-secret: the service's secret is needed on this port")
            return "internal"
        return "" if path in OPEN_PATHS else self._gateway.keys.tenant(headers.get("authorization", ""))

    def _count(self, scope: Scope, status: int) -> None:
        route = scope.get("route")  # the pattern, never the path: a client must not make new label values
        name = route.path if isinstance(route, Route) else "other"
        self._gateway.metrics.http.labels(name, str(status)).inc()


def _request_id(headers: Mapping[str, str]) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _http_error_body(scope: Scope, error: HTTPException) -> dict[str, Any]:
    message = f"{scope['method']} {scope['path']}: {error.detail}"
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": error.status_code}}


def error_headers(error: GatewayError) -> dict[str, str]:
    """What tells the client's library whether and when to come back."""
    if not error.is_retryable:
        return {"x-should-retry": "false"}
    return {
        "retry-after": str(max(1, round(error.retry_after_s))),
        "retry-after-ms": str(round(error.retry_after_s * 1000)),
        "x-should-retry": "true",
    }


async def send_json(send: Send, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
    data = orjson.dumps(body)
    lines = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    lines += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": data})


async def read_json(scope: Scope, receive: Receive) -> Any:
    """The request body, bounded in bytes and time. Raises: BodyTooLarge, InvalidRequest, ClientGone."""
    declared = scope["baton.headers"].get("content-length", "0")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise BodyTooLarge(f"body: {declared} bytes exceed the limit of {MAX_BODY_BYTES}; send a shorter prompt")
    parts: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                parts.append(message.get("body", b""))
                num_bytes += len(parts[-1])
                if num_bytes > MAX_BODY_BYTES:
                    raise BodyTooLarge(f"body: more than {MAX_BODY_BYTES} bytes; send a shorter prompt")
                more = message.get("more_body", False)
    except TimeoutError as error:
        raise BodyTooSlow(f"body: not complete after {BODY_TIMEOUT_S:g} s; send it faster") from error
    try:
        return orjson.loads(b"".join(parts))
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"body: not valid JSON: {error}") from error


# ---------------------------------------------------------------- completions and chat completions


class GenerateEndpoint:
    """POST /v1/chat/completions or /v1/completions."""

    def __init__(self, gateway: Gateway, style: Style, is_internal: bool) -> None:
        self._gateway = gateway
        self._style = style
        self._is_internal = is_internal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received_at = time.monotonic()
        if self._gateway.health.state.value == "draining":
            raise Unavailable("this gateway is shutting down; send the request again", retry_after_s=1.0)
        kind = ChatBody if self._style is Style.CHAT else CompletionBody
        body, ignored = dialect.parse(kind, await read_json(scope, receive))
        check_model(self._gateway, body.model)
        requests = await self._requests(body, scope, received_at)
        answer = _Answer(self._gateway, body, requests, self._shape(body, scope), _ignored_header(ignored))
        await (answer.stream if body.stream else answer.whole)(scope, receive, send)

    async def _requests(
        self, body: ChatBody | CompletionBody, scope: Scope, received_at: float
    ) -> list[GenerationRequest]:
        """One generation per prompt."""
        prompts = await self._prompts(body)
        return [self._request(body, scope, received_at, token_ids) for token_ids in prompts]

    async def _prompts(self, body: ChatBody | CompletionBody) -> list[tuple[int, ...]]:
        text, limits = self._gateway.text, self._gateway.limits
        if isinstance(body, ChatBody):
            token_ids = await text.encode_chat(
                body.messages,
                body.chat_template_kwargs,
                add_special_tokens=body.add_special_tokens,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
            )
            return [dialect.checked_prompt(body, token_ids, limits)]
        encoded = [
            await text.encode(prompt, body.add_special_tokens) if isinstance(prompt, str) else prompt
            for prompt in body.prompts
        ]
        return [dialect.checked_prompt(body, token_ids, limits) for token_ids in encoded]

    def _request(
        self, body: ChatBody | CompletionBody, scope: Scope, received_at: float, token_ids: tuple[int, ...]
    ) -> GenerationRequest:
        gateway = self._gateway
        headers: Mapping[str, str] = scope["baton.headers"]
        length = dialect.asked_length(body, len(token_ids))
        sampling, stop_rules, text_rules = dialect.sampling_of(body, length, gateway.limits)
        return GenerationRequest(
            request_id=scope["baton.request_id"],
            prompt_token_ids=token_ids,
            length=length,
            sampling=sampling,
            num_choices=body.n,
            stop_rules=stop_rules,
            text_rules=text_rules,
            tenant=scope["baton.tenant"],
            cache_salt=cache_salt(scope["baton.tenant"], body.cache_salt),
            disaggregation=self._disaggregation(headers),
            timeout_s=gateway.request_timeout_s,
            ttft_objective_s=_objective_s(headers) or gateway.ttft_objective_s,
            received_at=received_at,
            only_worker=headers.get("x-baton-worker") if self._is_internal else None,
        )

    def _disaggregation(self, headers: Mapping[str, str]) -> pb.Disaggregation:
        """The service's setting; only the internal port may ask for another."""
        forced = headers.get("x-baton-disaggregation") if self._is_internal else None
        if forced is None:
            return self._gateway.disaggregation
        if forced not in _DISAGGREGATION:
            raise InvalidRequest(f"x-baton-disaggregation: {forced!r} is not one of {', '.join(_DISAGGREGATION)}")
        return _DISAGGREGATION[forced]

    def _shape(self, body: ChatBody | CompletionBody, scope: Scope) -> ResponseFormat:
        options = body.stream_options
        with_metrics = body.metrics or scope["baton.headers"].get("x-baton-metrics", "").lower() in _TRUE
        return ResponseFormat(
            style=self._style,
            response_id=self._style.value + (body.request_id or scope["baton.request_id"]),
            created=int(time.time()),
            model=self._gateway.model_id,
            fingerprint=self._gateway.fingerprint,
            num_choices=body.n,
            include_usage=(options is not None and options.include_usage) or with_metrics,
            continuous_usage=options is not None and options.include_usage and options.continuous_usage_stats,
            num_logprobs=body.num_logprobs,
            return_token_ids=body.return_token_ids,
            with_metrics=with_metrics,
        )


def _objective_s(headers: Mapping[str, str]) -> float:
    """`x-slo-ttft-ms`: the client's own objective, as inference-perf sends it. It only orders the prefill queue."""
    with contextlib.suppress(ValueError):
        return max(0.0, min(600.0, float(headers.get("x-slo-ttft-ms", "0")) / 1000))
    return 0.0


def _ignored_header(names: Sequence[str]) -> dict[str, str]:
    shown = [name for name in names if _REQUEST_ID.fullmatch(name)][:64]
    return {"x-baton-ignored-fields": ",".join(shown)} if shown else {}


class _Answer:
    """One HTTP response: its generations, run together, and the way back to the client."""

    def __init__(
        self,
        gateway: Gateway,
        body: ChatBody | CompletionBody,
        requests: Sequence[GenerationRequest],
        shape: ResponseFormat,
        headers: Mapping[str, str],
    ) -> None:
        self._gateway = gateway
        self._body = body
        self._requests = requests
        self._shape = shape
        self._headers = headers
        self._generations: list[Generation] = []

    async def whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        sinks = [
            CollectSink(
                self._shape, self._gateway.text.detokenizer, number * self._shape.num_choices, self._echo(request)
            )
            for number, request in enumerate(self._requests)
        ]
        self._generations = [
            self._generation(request, sink) for request, sink in zip(self._requests, sinks, strict=True)
        ]
        async with _watched(receive, self._run()) as work:
            await work
        body = responses.whole_body(self._shape, sinks, self._generations, self._metrics())
        await send_json(send, 200, body, self._headers)

    async def stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        outbox = Outbox()
        self._generations = [self._generation(r, self._stream_sink(n, r, outbox)) for n, r in enumerate(self._requests)]
        live = LiveResponse(scope.get(ABORT, lambda: None))
        self._gateway.live.add(live)
        keep_alive = _KeepAlive(outbox)
        try:
            async with _watched(receive, self._run_into(outbox)) as work:
                await outbox.wait()
                if outbox.is_closed:
                    await work  # raises what went wrong before the first byte, while a status can still say it
                await self._write(outbox, live, send)
                await work
        finally:
            keep_alive.stop()
            self._gateway.live.discard(live)

    async def _write(self, outbox: Outbox, live: LiveResponse, send: Send) -> None:
        """The hot loop: whatever became showable since the last write goes out as one piece."""
        await send({"type": "http.response.start", "status": 200, "headers": self._stream_headers()})
        monotonic = time.monotonic
        while True:
            data = outbox.take()
            if data:
                live.sending_since = monotonic()
                await send({"type": "http.response.body", "body": data, "more_body": True})
                live.sending_since = 0.0
            elif outbox.is_closed:
                break
            else:
                await outbox.wait()
        await send({"type": "http.response.body", "body": b""})

    async def _run_into(self, outbox: Outbox) -> None:
        """Run, then write the stream's end: usage and [DONE], or the error where bytes have gone out already."""
        try:
            await self._run()
        except GatewayError as error:
            if not outbox.has_written:
                raise
            outbox.write(responses.error_frame(error.body()))
        except Exception:  # the boundary of one response: the client has bytes already and must hear of the end
            log.exception("request failed")
            if not outbox.has_written:
                raise
            outbox.write(responses.error_frame(InternalError().body()))
        else:
            if self._shape.include_usage:
                usage = responses.usage_of(self._generations)
                outbox.write(responses.usage_frame(self._shape, usage, self._metrics()))
            outbox.write(responses.DONE)
        finally:
            outbox.close()

    async def _run(self) -> None:
        """All generations at once; the first failure ends the others."""
        if len(self._generations) == 1:
            return await serve(self._generations[0], self._gateway.services)
        tasks = [asyncio.create_task(serve(generation, self._gateway.services)) for generation in self._generations]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _generation(self, request: GenerationRequest, sink: StreamSink | CollectSink) -> Generation:
        return Generation(request, sink, self._gateway.text.detokenizer, self._gateway.metrics)

    def _stream_sink(self, number: int, request: GenerationRequest, outbox: Outbox) -> StreamSink:
        return StreamSink(
            self._shape,
            outbox,
            self._gateway.text.detokenizer,
            first_choice=number * self._shape.num_choices,
            echo=self._echo(request),
            usage_now=lambda: responses.usage_of(self._generations),
            prompt_token_ids=request.prompt_token_ids,
        )

    def _echo(self, request: GenerationRequest) -> str:
        is_wanted = isinstance(self._body, CompletionBody) and self._body.echo
        return self._gateway.text.decode(request.prompt_token_ids) if is_wanted else ""

    def _metrics(self) -> dict[str, Any] | None:
        return responses.metrics_of(self._generations[0]) if self._shape.with_metrics else None

    def _stream_headers(self) -> list[tuple[bytes, bytes]]:
        return [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
            *((name.encode(), value.encode()) for name, value in self._headers.items()),
        ]


class _KeepAlive:
    """SSE comments while nothing can be said, so that proxies and clients do not give up on a request that is queued,
    or whose decode worker died and which waits for another.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(KEEP_ALIVE_S, self._tick)

    def stop(self) -> None:
        self._timer.cancel()

    def _tick(self) -> None:
        if self._outbox.is_closed:
            return
        if self._outbox.is_quiet:
            self._outbox.write(responses.KEEP_ALIVE)
        self._outbox.is_quiet = True
        self._timer = self._loop.call_later(KEEP_ALIVE_S, self._tick)


@contextlib.asynccontextmanager
async def _watched(receive: Receive, work: Coroutine[Any, Any, None]) -> AsyncGenerator[asyncio.Task[None], None]:
    """Run `work` as a task that is cancelled as soon as the client is gone. Raises: ClientGone in that case."""
    task: asyncio.Task[None] = asyncio.create_task(work)
    is_gone = False

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield task
    except asyncio.CancelledError:
        if is_gone:
            raise ClientGone from None
        raise
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.gather(watcher, task, return_exceptions=True)


# ---------------------------------------------------------------- the other paths


def check_model(gateway: Gateway, name: str | None) -> None:
    if name is not None and name != gateway.model_id:
        raise NotFound(f"model: {name!r} does not exist here; this server has {gateway.model_id!r}", param="model")


class SimpleEndpoints:
    """Paths that ask nothing of a worker."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        check_model(self._gateway, request.path_params["model_id"])
        return _json(self._card())

    async def tokenize(self, request: Request) -> Response:
        body, ignored = dialect.parse(TokenizeBody, await read_json(request.scope, request.receive))
        check_model(self._gateway, body.model)
        text = self._gateway.text
        if body.prompt is not None:
            token_ids = await text.encode(body.prompt, body.add_special_tokens is not False)
        else:
            token_ids = await text.encode_chat(
                body.messages or [],
                body.chat_template_kwargs,
                add_special_tokens=body.add_special_tokens is True,
                add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
                continue_final_message=body.continue_final_message,
            )
        strings = [text.tokenizer.id_to_token(token_id) for token_id in token_ids] if body.return_token_strs else None
        answer = {"count": len(token_ids), "max_model_len": self._gateway.limits.max_model_len, "tokens": token_ids}
        return _json(answer | {"token_strs": strings}, _ignored_header(ignored))

    async def detokenize(self, request: Request) -> Response:
        body, ignored = dialect.parse(DetokenizeBody, await read_json(request.scope, request.receive))
        check_model(self._gateway, body.model)
        dialect.check_in_vocabulary("tokens", body.tokens, self._gateway.limits)
        return _json({"prompt": self._gateway.text.decode(body.tokens)}, _ignored_header(ignored))

    async def is_healthy(self, request: Request) -> Response:
        """vLLM's /health: 200 and nothing else while requests can be answered."""
        return Response(status_code=200 if self._gateway.health.is_ready and self._has_workers() else 503)

    async def version(self, request: Request) -> Response:
        return _json({"version": self._gateway.version})

    def _card(self) -> dict[str, Any]:
        gateway = self._gateway
        return {
            "id": gateway.model_id,
            "object": "model",
            "created": gateway.created,
            "owned_by": "baton",
            "root": gateway.model_id,
            "parent": None,
            "max_model_len": gateway.limits.max_model_len,
            "permission": [],
            "status": "ready" if self._has_workers() else "loading",
        }

    def _has_workers(self) -> bool:
        return any(not state.is_draining for state in self._gateway.services.pool.decode_states())


class InternalEndpoints:
    """Paths of the internal port alone: the operator's and the tests' view."""

    def __init__(self, gateway: Gateway) -> None:
        self._pool = gateway.services.pool
        self._prober = Prober(self._pool, gateway.text, gateway.limits)

    async def workers(self, request: Request) -> Response:
        return _json(
            {
                "decode": [_worker_json(state) for state in self._pool.decode_states()],
                "prefill": [_worker_json(state) for state in self._pool.prefill_states()],
            }
        )

    async def status(self, request: Request) -> Response:
        return _json(status_of(self._pool))

    async def probe(self, request: Request) -> Response:
        """200 whether or not the revision answered; `ok` says which."""
        body, _ = dialect.parse(ProbeBody, await read_json(request.scope, request.receive))
        return _json((await self._prober.probe(body.revision)).body())


def _worker_json(state: Any) -> dict[str, Any]:
    return {
        "worker_id": state.worker_id,
        "revision": state.revision,
        "boot_id": state.boot_id.hex(),
        "is_draining": state.is_draining,
        "is_suspect": state.is_suspect,
        "num_running": state.num_running,
        "num_waiting": state.num_waiting,
        "num_inflight": state.num_inflight,
    }


def _json(body: Any, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), media_type="application/json", headers=headers)
