"""The engine's own thread: the only one that touches an Engine. Others submit calls and hear events.

    submit(fn) ──inbox──> [ run calls ─> step ─> on_events(list) ─> load snapshot ] ──> sleeps when idle

Results of submitted calls are set before the events of the step that follows are delivered. An EngineError belongs to
its caller; any other exception means that the engine's state cannot be trusted: it is reported once and the thread
ends.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from engine.engine import Engine
from engine.errors import EngineCrashed, EngineError
from engine.messages import EngineLoad, Event

T = TypeVar("T")

# How often a busy engine renews its load snapshot.
LOAD_PERIOD_S = 0.1
# How long to wait where every request waits for a peer (or for an estimate to drift); submissions wake at once.
BLOCKED_WAIT_S = 0.01


class EngineThread:
    """Runs one Engine. `on_events` and `on_crash` are called on the engine's thread and must return quickly."""

    def __init__(
        self,
        engine: Engine,
        on_events: Callable[[list[Event]], None],
        on_crash: Callable[[BaseException], None],
        name: str = "engine",
    ) -> None:
        self._engine = engine
        self._on_events = on_events
        self._on_crash = on_crash
        self._inbox: deque[Callable[[], None]] = deque()
        self._pending: set[Future[Any]] = set()
        self._wake = threading.Condition()
        self._is_stopping = False
        self._crash: BaseException | None = None
        self._load = engine.load()
        self._load_at = 0.0
        self._was_idle = True
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to run steps."""
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> bool:
        """End after the step at hand; calls not yet run fail with EngineCrashed. False if it did not end in time."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def submit(self, call: Callable[[Engine], T]) -> Future[T]:
        """Run `call(engine)` on the engine's thread before its next step. Thread-safe.

        Raises: EngineCrashed if the thread has ended.
        """
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(call(self._engine))
            except EngineError as error:
                future.set_exception(error)
            except BaseException as error:
                future.set_exception(EngineCrashed(f"the engine failed in a call: {error!r}"))
                raise

        with self._wake:
            if self._is_stopping or self._crash is not None:
                raise EngineCrashed("the engine thread has ended") from self._crash
            self._inbox.append(run)
            self._pending.add(future)
            self._wake.notify()
        future.add_done_callback(self._pending.discard)
        return future

    @property
    def load(self) -> EngineLoad:
        """The newest snapshot, at most LOAD_PERIOD_S old while the engine runs. Thread-safe."""
        return self._load

    # ---------------------------------------------------------------- on the thread

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._run_calls()
                self._step_or_wait()
        except BaseException as error:  # the loop boundary: whatever it was, tell once and end
            self._crash = error
            self._on_crash(error)
        finally:
            self._fail_pending()

    def _run_calls(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _step_or_wait(self) -> None:
        engine = self._engine
        if engine.has_work or engine.next_deadline() <= engine.now():
            if self._was_idle:
                self._renew_load(0.0)  # a first step that never ends must be seen with the work that it hangs on
            self._was_idle = False
            result = engine.step()
            if result.events:
                self._on_events(result.events)
            self._renew_load(LOAD_PERIOD_S)
            if not result.is_idle:
                return
            timeout_s = BLOCKED_WAIT_S
        else:
            timeout_s = engine.next_deadline() - engine.now()
        self._was_idle = True
        self._renew_load(0.0)
        with self._wake:
            if not self._inbox and not self._is_stopping:
                self._wake.wait(None if timeout_s == float("inf") else max(timeout_s, 0.0))

    def _renew_load(self, period_s: float) -> None:
        now = time.monotonic()
        if now - self._load_at >= period_s:
            self._load, self._load_at = self._engine.load(), now

    def _fail_pending(self) -> None:
        with self._wake:
            self._is_stopping = True
            left = [future for future in tuple(self._pending) if not future.done()]  # others discard meanwhile
        for future in left:
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineCrashed("the engine thread has ended"))
