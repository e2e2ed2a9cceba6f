"""The engine's thread: calls in, events out, crashes told once."""

from __future__ import annotations

import queue
import threading

import pytest

from engine.engine import Engine
from engine.errors import EngineCrashed, RequestInvalid
from engine.fake_runner import expected_output
from engine.loop import EngineThread
from engine.messages import EngineRequest, Event, RequestEnded, TokenEvent
from engine.request import SamplingParams
from tests.unit.engine_world import VOCAB_SIZE, make_engine

SAMPLING = SamplingParams(max_tokens=6, ignore_eos=True)


class Running:
    """A started thread with what it said."""

    def __init__(self, engine: Engine) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.crashes: queue.Queue[BaseException] = queue.Queue()
        self.thread = EngineThread(engine, lambda events: [self.events.put(each) for each in events], self.crashes.put)
        self.thread.start()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.thread.stop(5.0)


def start(engine: Engine, key: int, max_tokens: int = 6) -> None:
    engine.match(EngineRequest(key, "r", (1, 2, 3), SamplingParams(max_tokens=max_tokens, ignore_eos=True)))
    engine.start_local(key)


def test_a_submitted_request_is_served_and_the_thread_sleeps_again():
    with Running(make_engine()[0]) as running:
        for key in (1, 2):
            running.thread.submit(lambda engine, key=key: start(engine, key)).result(5.0)
            tokens = []
            while not isinstance(event := running.events.get(timeout=5.0), RequestEnded):
                assert isinstance(event, TokenEvent)
                tokens.append(event.token.token_id)
            assert tokens == expected_output((1, 2, 3), SAMPLING, vocab_size=VOCAB_SIZE)
        assert running.thread.submit(lambda engine: engine.counters.steps).result(5.0) == 12
        assert running.thread.submit(Engine.load).result(5.0).num_running == 0


def test_a_callers_mistake_is_the_callers_alone():
    with Running(make_engine()[0]) as running:
        future = running.thread.submit(lambda engine: engine.match(EngineRequest(1, "r", (), SAMPLING)))
        with pytest.raises(RequestInvalid):
            future.result(5.0)
        running.thread.submit(lambda engine: start(engine, 1)).result(5.0)
        assert isinstance(running.events.get(timeout=5.0), TokenEvent)


def test_a_deadline_wakes_a_sleeping_engine():
    engine = Engine(make_engine()[0].config, make_engine()[1])  # on the real clock
    with Running(engine) as running:
        running.thread.submit(
            lambda engine: engine.match(EngineRequest(1, "r", (1,), SAMPLING, deadline=engine.now() + 0.02))
        ).result(5.0)
        assert isinstance(running.events.get(timeout=5.0), RequestEnded)


class BrokenRunner:
    """Fails as a device would."""

    def execute(self, batch: object) -> list[object]:
        raise RuntimeError("device lost")

    def zero_slots(self, block_id: int, first_slot: int) -> None:
        """Never reached."""


def test_a_failed_step_is_reported_once_and_nothing_is_taken_afterwards():
    engine = Engine(make_engine()[0].config, BrokenRunner())  # pyright: ignore[reportArgumentType]
    with Running(engine) as running:
        running.thread.submit(lambda engine: start(engine, 1)).result(5.0)
        assert "device lost" in str(running.crashes.get(timeout=5.0))
        running.thread._thread.join(5.0)
        assert not running.thread._thread.is_alive()
        assert running.crashes.empty()
        with pytest.raises(EngineCrashed):
            running.thread.submit(lambda engine: engine.load())


def test_a_broken_invariant_in_a_call_is_fatal():
    def break_something(engine: Engine) -> None:
        raise AssertionError("a block is owned twice")

    with Running(make_engine()[0]) as running:
        with pytest.raises(EngineCrashed, match="owned twice"):
            running.thread.submit(break_something).result(5.0)
        assert isinstance(running.crashes.get(timeout=5.0), AssertionError)


def test_a_stopped_engine_takes_no_calls():
    running = Running(make_engine()[0])
    running.thread.submit(Engine.load).result(5.0)
    assert running.thread.stop(5.0)
    with pytest.raises(EngineCrashed, match="has ended"):
        running.thread.submit(Engine.load)
    assert running.crashes.empty()


class HangingRunner:
    """A device that accepts a batch and never answers, until the test lets it go."""

    def __init__(self) -> None:
        self.is_entered, self.may_leave = threading.Event(), threading.Event()

    def execute(self, batch: object) -> list[object]:
        self.is_entered.set()
        self.may_leave.wait(10.0)
        raise RuntimeError("let go")

    def zero_slots(self, block_id: int, first_slot: int) -> None:
        """Never reached."""


def test_a_first_step_that_hangs_shows_the_work_it_hangs_on():
    runner = HangingRunner()
    engine = Engine(make_engine()[0].config, runner)  # pyright: ignore[reportArgumentType]
    with Running(engine) as running:
        running.thread.submit(lambda engine: start(engine, 1)).result(5.0)
        assert runner.is_entered.wait(5.0)
        load = running.thread.load
        runner.may_leave.set()
    assert load.num_running + load.num_waiting > 0, "or nobody notices that the process stands still"
