"""The engine as an asyncio loop sees it: calls that are awaited, steps that arrive. Nothing here waits for a step.

loop --submit/call/post--> engine thread --one StepEvents per step--> loop
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from engine.engine import Engine
from engine.errors import EngineCrashed, EngineError
from engine.loop import EngineThread
from engine.messages import EngineCounters, EngineLoad, Event

log = logging.getLogger(__name__)

T = TypeVar("T")


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

    def start(self, on_step: Callable[[StepEvents], None], on_failure: Callable[[], None]) -> None:
        """Begin to run steps. Both callbacks run on the loop; a failure is told once and is final."""
        self._on_step, self._on_failure = on_step, on_failure
        self._told = (self._engine.counters.decode_tokens, self._engine.counters.prefill_tokens)
        self._thread.start()

    async def stop(self, timeout_s: float = 5.0) -> bool:
        """End after the step at hand. False if that takes longer."""
        return await asyncio.to_thread(self._thread.stop, timeout_s)

    def submit(self, call: Callable[[Engine], T]) -> asyncio.Future[T]:
        """Run before the engine's next step, in order of submission. The result is an EngineError or the value."""
        answer: asyncio.Future[T] = self._loop.create_future()
        try:
            future = self._thread.submit(call)
        except EngineCrashed as error:
            answer.set_exception(error)
            return answer
        future.add_done_callback(lambda done: self._tell(_copy, done, answer))
        return answer

    async def call(self, call: Callable[[Engine], T]) -> T:
        return await self.submit(call)

    def post(self, call: Callable[[Engine], None]) -> None:
        """Nobody waits. An EngineError means that the request ended meanwhile, which everyone who posts must expect."""
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

    def _hear(self, step: StepEvents) -> None:
        """A step that was not heard to its end may have held the end of a request: nobody would tell it again."""
        try:
            self._on_step(step)
        except Exception:
            log.critical("a step's events were lost", exc_info=True)
            self._on_failure()


def _copy(done: Future[T], answer: asyncio.Future[T]) -> None:
    if answer.done():
        return
    error = done.exception()
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(done.result())


def _log_error(answer: asyncio.Future[None]) -> None:
    error = answer.exception()
    if error is not None and not isinstance(error, EngineError):
        log.error("a call to the engine failed", exc_info=error)
