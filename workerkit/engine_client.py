"""The engine as an asyncio loop sees it: calls that are awaited, steps that arrive. Nothing here waits for a step.

loop --submit/call/post--> engine thread --one StepEvents per step--> loop
loop --begin--> (hashing thread) --> engine thread
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from engine.engine import Engine
from engine.errors import EngineCrashed, EngineError
from engine.loop import EngineThread
from engine.messages import EngineCounters, EngineLoad, EngineRequest, Event

log = logging.getLogger(__name__)

T = TypeVar("T")


# Longer prompts are hashed beside the engine's thread: 256 blocks of 16 take it about a millisecond.
HASHED_AT_ONCE_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class StepEvents:
    """What happened since the events before: all of one step, in order, and the tokens computed meanwhile."""

    events: list[Event]
    num_decode_tokens: int
    num_prefill_tokens: int


class EngineClient:
    """Made and used on one loop. A cancelled caller does not take back its call: calls free memory, too."""

    def __init__(self, engine: Engine) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine = engine
        self._thread = EngineThread(engine, self._on_events, self._on_crash)
        self._on_step: Callable[[StepEvents], None] = lambda step: None
        self._on_failure: Callable[[], None] = lambda: None
        self._told = (0, 0)
        # One thread, however many long prompts come: each more would take the interpreter from the engine's own.
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="hash-prompts")
        self._behind: dict[int, list[Callable[[], None]]] = {}  # by key being hashed: what runs right behind its begin

    def start(self, on_step: Callable[[StepEvents], None], on_failure: Callable[[], None]) -> None:
        """Begin to run steps. Both callbacks run on the loop; a failure is told once and is final."""
        self._on_step, self._on_failure = on_step, on_failure
        self._told = (self._engine.counters.decode_tokens, self._engine.counters.prefill_tokens)
        self._thread.start()

    async def stop(self, timeout_s: float = 5.0) -> bool:
        """End after the step at hand. False if that takes longer."""
        self._hashing.shutdown(wait=False, cancel_futures=True)
        return await asyncio.to_thread(self._thread.stop, timeout_s)

    def submit(self, call: Callable[[Engine], T]) -> asyncio.Future[T]:
        """Run before the engine's next step, in order of submission. The result is an EngineError or the value."""
        answer: asyncio.Future[T] = self._loop.create_future()
        self._submit(call, answer)
        return answer

    def begin(self, request: EngineRequest, call: Callable[[Engine, EngineRequest], T]) -> asyncio.Future[T]:
        """Submit the call that makes `request` known, with its prompt hashed.

        A long prompt is hashed first, on a thread of its own: it would stall the step of everyone else.
        """
        if len(request.prompt_token_ids) <= HASHED_AT_ONCE_TOKENS:
            return self.submit(lambda engine: call(engine, request))
        answer: asyncio.Future[T] = self._loop.create_future()
        self._behind[request.key] = []
        hashing = self._hashing.submit(self._engine.hashed, request)
        hashing.add_done_callback(lambda done: self._tell(self._begin_hashed, request.key, done, call, answer))
        return answer

    async def call(self, call: Callable[[Engine], T]) -> T:
        return await self.submit(call)

    def post(self, key: int, call: Callable[[Engine], None]) -> None:
        """Submit a call about the request `key`, behind its `begin`; nobody waits.

        An EngineError means that the request ended meanwhile, which everyone who posts must expect.
        """
        if key in self._behind:
            self._behind[key].append(lambda: self.post(key, call))
        else:
            self.submit(call).add_done_callback(_log_error)

    @property
    def load(self) -> EngineLoad:
        return self._thread.load

    @property
    def counters(self) -> EngineCounters:
        """Totals; read without a lock: each is one machine word that only grows."""
        return self._engine.counters

    # ------------------------------------------------------------ on the engine's thread

    def _on_events(self, events: list[Event]) -> None:
        decode, prefill = self._engine.counters.decode_tokens, self._engine.counters.prefill_tokens
        step = StepEvents(events, decode - self._told[0], prefill - self._told[1])
        self._told = (decode, prefill)
        self._tell(self._hear, step)

    def _on_crash(self, error: BaseException) -> None:
        log.critical("the engine failed", exc_info=error)
        self._tell(self._on_failure)

    def _tell(self, callback: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            log.debug("the loop has ended")

    # ------------------------------------------------------------ on the loop

    def _submit(self, call: Callable[[Engine], T], answer: asyncio.Future[T]) -> None:
        try:
            future = self._thread.submit(call)
        except EngineCrashed as error:
            _settle(answer, error)
            return
        future.add_done_callback(lambda done: self._tell(_copy, done, answer))

    def _begin_hashed(
        self,
        key: int,
        done: Future[EngineRequest],
        call: Callable[[Engine, EngineRequest], T],
        answer: asyncio.Future[T],
    ) -> None:
        if done.cancelled():
            _settle(answer, EngineCrashed("the engine thread has ended"))
        elif (error := done.exception()) is not None:
            _settle(answer, error)
        else:
            hashed = done.result()
            self._submit(lambda engine: call(engine, hashed), answer)
        for later in self._behind.pop(key):
            later()

    def _hear(self, step: StepEvents) -> None:
        """A step that was not heard to its end may have held the end of a request: nobody would tell it again."""
        try:
            self._on_step(step)
        except Exception:
            log.critical("a step's events were lost", exc_info=True)
            self._on_failure()


def _copy(done: Future[T], answer: asyncio.Future[T]) -> None:
    error = done.exception()
    if error is not None:
        _settle(answer, error)
    elif not answer.done():
        answer.set_result(done.result())


def _settle(answer: asyncio.Future[T], error: BaseException) -> None:
    if not answer.done():
        answer.set_exception(error)


def _log_error(answer: asyncio.Future[None]) -> None:
    error = answer.exception()
    if error is not None and not isinstance(error, EngineError):
        log.error("a call to the engine failed", exc_info=error)
