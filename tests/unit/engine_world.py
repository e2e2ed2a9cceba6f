"""A decode and a prefill engine on fake runners. The world is the service between them and checks all it hears."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.config import EngineConfig
from engine.engine import Engine
from engine.fake_runner import FakeRunner, expected_output
from engine.messages import (
    BlocksFilled,
    BlockSlot,
    ChoiceStart,
    EndReason,
    EngineRequest,
    PrefillDone,
    PrefillStarting,
    RemotePromised,
    RemoteReserved,
    RequestEnded,
    TokenEvent,
)
from engine.request import FinishReason, SamplingParams
from tests.unit.late_runner import LateRunner

VOCAB_SIZE = 16


def make_config(**changes: object) -> EngineConfig:
    """A tiny engine: 4 tokens a block, 8 a chunk."""
    values: dict[str, object] = {
        "num_blocks": 64,
        "block_size": 4,
        "max_model_len": 64,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 24,
        "chunk_size": 8,
        "eos_token_ids": (0,),
        "constant_estimate": 4,
    }
    return EngineConfig(**{**values, **changes})  # pyright: ignore[reportArgumentType]


class FakeClock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_engine(clock: FakeClock | None = None, **changes: object) -> tuple[Engine, FakeRunner]:
    """An engine and its fake runner; if blocks are reserved ahead, one that looks ahead."""
    config = make_config(**changes)
    sizes = config.num_blocks, config.block_size, VOCAB_SIZE, config.num_host_blocks
    runner = LateRunner(*sizes, config.max_model_len) if config.reserve_ahead else FakeRunner(*sizes)
    return Engine(config, runner, clock or FakeClock()), runner


@dataclass
class Transfer:
    """The service's view of one remote prefill."""

    num_held: int
    num_blocks: int | None = None  # known once P starts
    destinations: dict[int, BlockSlot] | None = None  # known once D reserved
    published: list[BlockSlot] = field(default_factory=list)
    moved: set[int] = field(default_factory=set)
    credit: int = 0
    done: PrefillDone | None = None


@dataclass
class Client:
    """What a request's client was promised and has heard."""

    request: EngineRequest
    is_remote: bool
    expected: dict[int, list[int]]
    logs: dict[int, list[int]]
    finished: set[int] = field(default_factory=set)
    cancelled: set[int] = field(default_factory=set)
    ended: RequestEnded | None = None
    transfer: Transfer | None = None


class World:
    """Two engines and every client's memory of what it heard. Any broken promise is an assertion failure."""

    def __init__(self, decode: dict[str, object] | None = None, prefill: dict[str, object] | None = None) -> None:
        self.clock = FakeClock()
        self.decode, self.decode_runner = make_engine(self.clock, **(decode or {}))
        self.prefill, self.prefill_runner = make_engine(self.clock, **(prefill or {}))
        self.clients: dict[int, Client] = {}
        self.at_prefill: set[int] = set()  # keys of P not yet ended
        self.num_moved_blocks = 0
        self._keys = iter(range(1, 1_000_000))

    # -------------------------------------------------------------- what the test does

    def add(
        self,
        prompt: Iterable[int],
        sampling: SamplingParams,
        choices: dict[int, int] | None = None,
        remote: bool = False,
        salt: bytes = b"",
        deadline: float = float("inf"),
    ) -> Client:
        """Start a request. `choices` says how many tokens each choice's log already holds (cut short of its end)."""
        prompt = tuple(prompt)
        limit = self.decode.config.max_model_len
        eos = self.decode.config.eos_token_ids
        expected = {c: expected_output(prompt, sampling, c, VOCAB_SIZE, eos, limit) for c in choices or {0: 0}}
        logs = {c: expected[c][: min(cut, len(expected[c]) - 1)] for c, cut in (choices or {0: 0}).items()}
        starts = tuple(ChoiceStart(choice, tuple(log)) for choice, log in logs.items())
        request = EngineRequest(next(self._keys), "r", prompt, sampling, starts, salt, deadline)
        client = Client(request, remote, expected, logs)
        self.clients[request.key] = client
        self.decode.match(request)
        self._start(client)
        return client

    def cancel(self, client: Client, choices: tuple[int, ...] = ()) -> None:
        """The client goes, wholly or in part."""
        client.cancelled |= set(choices or client.expected) & set(client.expected)
        self.decode.cancel(client.request.key, choices)

    def abort(self, client: Client, remote_again: bool = False) -> None:
        """The transfer breaks."""
        key = client.request.key
        if client.transfer is None or not self.is_live(client):
            return
        self.prefill.release_transfer(key, ok=False)
        self.decode.abort_remote(key)
        client.transfer, client.is_remote = None, remote_again
        self._start(client)

    def is_live(self, client: Client) -> bool:
        """D still knows it; its end may be on the way to us."""
        return client.request.key in self.decode._groups

    def grant(self, client: Client, num_blocks: int) -> None:
        """D grants credit, never more than it reserved."""
        transfer = client.transfer
        if transfer is not None and transfer.destinations is not None:
            num_blocks = min(num_blocks, len(transfer.destinations) - transfer.credit)
            transfer.credit += num_blocks
            self.prefill.grant_credit(client.request.key, num_blocks)

    def move(self, client: Client, limit: int = 1_000_000) -> None:
        """Pull published blocks; commit when all are there."""
        transfer = client.transfer
        if transfer is None or transfer.destinations is None or not self.is_live(client):
            return
        for runner in (self.prefill_runner, self.decode_runner):
            if isinstance(runner, LateRunner):
                runner.settle()  # as whoever touches blocks by another way than the runner's queue
        for slot in [each for each in transfer.published if each.index not in transfer.moved][:limit]:
            assert self.prefill._memory.pool.generation(slot.block_id) == slot.generation, "a pinned block was reused"
            destination = transfer.destinations[slot.index]
            assert self.decode._memory.pool.generation(destination.block_id) == destination.generation
            assert slot.num_tokens == destination.num_tokens
            source = self.prefill_runner.slots[slot.block_id]
            assert not source[slot.num_tokens :].any(), "unused slots of a tail block leak"
            self.decode_runner.slots[destination.block_id] = source
            transfer.moved.add(slot.index)
            self.num_moved_blocks += 1
        if transfer.done is not None and len(transfer.moved) == len(transfer.destinations):
            client.transfer = None
            self.prefill.release_transfer(client.request.key, ok=True)
            self.decode.commit_remote(client.request.key, transfer.done.first_tokens)

    def step_decode(self) -> None:
        """One step of D, and everything it says."""
        for event in self.decode.step().events:
            match event:
                case TokenEvent():
                    self._hear_token(event)
                case RequestEnded():
                    self._hear_end(event)
                case RemotePromised():
                    self._hear_promise(event)
                case RemoteReserved():
                    self._hear_reserved(self.clients[event.key], event.blocks)
                case _:
                    raise AssertionError(event)
        self.decode.check()

    def step_prefill(self) -> None:
        """One step of P, and everything it says."""
        for event in self.prefill.step().events:
            assert event.key in self.at_prefill, "P speaks of a request that ended"
            transfer = self.clients[event.key].transfer
            match event:
                case RequestEnded():
                    self.at_prefill.remove(event.key)
                case PrefillStarting() if transfer is not None and self.is_live(self.clients[event.key]):
                    transfer.num_blocks = event.num_blocks
                    slots = self.decode.try_reserve_remote(event.key)
                    if slots is not None:
                        self._hear_reserved(self.clients[event.key], slots)
                case BlocksFilled() if transfer is not None:
                    self._hear_published(transfer, event.blocks)
                case PrefillDone() if transfer is not None:
                    transfer.done = event
                    if event.tail is not None:
                        self._hear_published(transfer, (event.tail,))
                    assert len(transfer.published) == transfer.num_blocks
                case _:
                    assert transfer is None or not self.is_live(self.clients[event.key])
        self.prefill.check()

    def settle(self, max_steps: int = 3000) -> None:
        """Serve everyone to the end."""
        for _ in range(max_steps):
            if all(client.ended for client in self.clients.values()) and not self.at_prefill:
                break
            self.step_decode()
            self.step_prefill()
            for client in self.clients.values():
                self.grant(client, 1_000_000)
                self.move(client)
        else:
            left = [c.request.key for c in self.clients.values() if not c.ended]
            raise AssertionError(f"no end in sight for {left}")
        self._check_idle()

    # -------------------------------------------------------------- what the test hears

    def _start(self, client: Client) -> None:
        if client.is_remote:
            self.decode.promise_remote(client.request.key)
        else:
            self.decode.start_local(client.request.key)

    def _hear_token(self, event: TokenEvent) -> None:
        client = self.clients[event.key]
        assert client.ended is None, "a token after the end"
        log, expected = client.logs[event.choice], client.expected[event.choice]
        assert event.index == len(log), "indices have a gap"
        assert event.token.token_id == expected[event.index], f"wrong token {event.index} of choice {event.choice}"
        log.append(event.token.token_id)
        assert (event.finish is not None) == (len(log) == len(expected))
        if event.finish is not None:
            client.finished.add(event.choice)
            is_full = len(log) == min(client.request.sampling.max_tokens, 10**9)
            assert event.finish is FinishReason.STOP or is_full or self._is_at_model_len(client, log)

    def _is_at_model_len(self, client: Client, log: list[int]) -> bool:
        return len(client.request.prompt_token_ids) + len(log) == self.decode.config.max_model_len

    def _hear_end(self, event: RequestEnded) -> None:
        client = self.clients[event.key]
        assert client.ended is None, "a second end"
        client.ended = event
        if event.reason is EndReason.FINISHED:
            assert client.finished | client.cancelled == set(client.expected)
            assert all(client.logs[choice] == client.expected[choice] for choice in client.finished)
        if client.transfer is not None:
            client.transfer = None
            self.prefill.release_transfer(event.key, ok=False)
            self.decode.release_transfer(event.key, ok=False)

    def _hear_promise(self, event: RemotePromised) -> None:
        client = self.clients[event.key]
        request = client.request
        if client.ended is not None or not client.is_remote:
            return
        client.transfer = Transfer(event.match.num_cached_blocks)
        wanted = tuple(ChoiceStart(choice) for choice, log in client.logs.items() if not log)
        asked = EngineRequest(request.key, "p", request.prompt_token_ids, request.sampling, wanted, request.cache_salt)
        if request.key in self.at_prefill:  # the attempt before is still being told of its end
            self.step_prefill()
        self.prefill.start_prefill(asked, event.match.num_cached_blocks, due=self.clock.now + 1.0)
        self.at_prefill.add(request.key)

    def _hear_reserved(self, client: Client, slots: tuple[BlockSlot, ...]) -> None:
        assert client.transfer is not None
        client.transfer.destinations = {slot.index: slot for slot in slots}
        assert len(slots) == client.transfer.num_blocks

    def _hear_published(self, transfer: Transfer, slots: tuple[BlockSlot, ...]) -> None:
        first = transfer.num_held + len(transfer.published)
        assert [slot.index for slot in slots] == list(range(first, first + len(slots))), "published out of order"
        transfer.published.extend(slots)

    def _check_idle(self) -> None:
        for engine in (self.decode, self.prefill):
            engine.step()
            engine.check()
            assert not engine.has_work
            assert engine.num_requests == 0
            load = engine.load()
            assert load.num_blocks_free == load.num_blocks_total, "an idle engine holds blocks"
            assert (load.num_running, load.num_waiting, load.num_promised, load.num_filling) == (0, 0, 0, 0)
            assert load.num_host_blocks_free == load.num_host_blocks_total, "an idle engine holds host blocks"
            assert load.num_swapped == 0
