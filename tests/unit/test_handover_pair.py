"""Both state machines against each other over a hostile network and dying processes (hypothesis, stateful).

The world: P with 12 blocks and an engine that computes a prompt's KV as a function of its tokens; D with 24 blocks;
between them messages that are delivered, dropped, repeated, reordered or late; reads that are damaged; processes that
die and come back with the same memory and generations from 0 again. After every event the invariants T1-T4 and T8 hold;
when the faults stop, every transfer ends in bounded time (T7).
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtransfer.decode_side import (
    Action,
    ArrivedBlock,
    Commit,
    DecodeLimits,
    DecodeSide,
    Fail,
    PrefillOrder,
    Pull,
    Reserve,
    Send,
    StopPulling,
)
from kvtransfer.digest import block_digest
from kvtransfer.errors import FailureKind, PullError, TransferFailure
from kvtransfer.prefill_side import (
    CloseTicket,
    GrantBackend,
    HeldTokens,
    OpenTicket,
    PrefillAction,
    PrefillLimits,
    PrefillSide,
    Publish,
    ReadyBlock,
    ReleaseBackend,
    SendDown,
    StartBackend,
)
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.transport import BlockRead, BlockSource, SourceBlock

BLOCK_SIZE = 4
BLOCK_BYTES = 16
NUM_P_BLOCKS = 12
NUM_D_BLOCKS = 24
PICK = st.integers(0, 10_000)
LIMITS = DecodeLimits(max_outstanding_bytes=3 * BLOCK_BYTES, min_window_tokens=1)


def content(token_ids: Sequence[int], index: int) -> bytes:
    """The KV of a block: all tokens up to its end matter."""
    tokens = token_ids[: (index + 1) * BLOCK_SIZE]
    return hashlib.blake2b(repr((index, tuple(tokens))).encode(), digest_size=BLOCK_BYTES).digest()


@dataclass
class Prompt:
    """A prompt in P's engine."""

    key: int
    start: pb.StartPrefill
    blocks: list[tuple[int, int]] = field(default_factory=list)  # (block id, generation)
    num_filled: int = 0
    credit: int = 0
    is_done: bool = False


@dataclass
class Reading:
    """A read that D's transport has under way."""

    transfer_id: int
    block: SourceBlock
    destination: int


@dataclass
class Want:
    """What D's driver knows of a transfer."""

    order: PrefillOrder
    destinations: list[int] = field(default_factory=list)
    is_reserving: bool = False
    is_stopping: bool = False


class HandoverPair(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.boots = itertools.count(1)
        self.streams = itertools.count(1)
        self.keys = itertools.count(1)
        self.tickets = itertools.count(1)
        self.memory = bytearray(NUM_P_BLOCKS * BLOCK_BYTES)
        self.generations = [0] * NUM_P_BLOCKS
        self.d_memory = bytearray(NUM_D_BLOCKS * BLOCK_BYTES)
        self.num_commits = self.num_fails = 0
        self.old_up: list[pb.PrefillUp] = []
        self.old_down: list[pb.PrefillDown] = []
        self.up: list[pb.PrefillUp] = []
        self.down: list[pb.PrefillDown] = []
        self.start_p()
        self.start_d()
        self.connect()

    # ------------------------------------------------------------------ processes

    def start_p(self) -> None:
        self.source = BlockSource(memoryview(self.memory), BLOCK_BYTES, next(self.boots).to_bytes(16, "big"))
        self.generations = [0] * NUM_P_BLOCKS
        self.p_free = list(range(NUM_P_BLOCKS))
        self.prompts: dict[int, Prompt] = {}
        self.held = HeldTokens(10_000)

    def start_d(self) -> None:
        self.d_free = list(range(NUM_D_BLOCKS))
        self.wants: dict[int, Want] = {}
        self.readings: list[Reading] = []

    def connect(self) -> None:
        self.old_up, self.old_down = (self.old_up + self.up)[-20:], (self.old_down + self.down)[-20:]
        self.up, self.down = [], []
        self.p = PrefillSide(
            self.source.boot_id,
            "layout",
            BLOCK_SIZE,
            PrefillLimits(max_prompt_tokens=64),
            self.held,
            lambda: next(self.keys),
            lambda: next(self.tickets).to_bytes(16, "big"),
        )
        first_id = next(self.streams) * 7919 % 10_007 * 1000  # scattered like the real ones, but repeatable
        self.d = DecodeSide(self.source.boot_id, "layout", BLOCK_SIZE, BLOCK_BYTES, LIMITS, first_transfer_id=first_id)

    # ------------------------------------------------------------------ D's driver

    def do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Send():
                    self.up.append(action.message)
                case Reserve():
                    want = self.wants[action.transfer_id]
                    assert action.num_blocks == -(-len(want.order.token_ids) // BLOCK_SIZE) - action.first_index
                    want.is_reserving = True
                case Pull():
                    want = self.wants[action.transfer_id]
                    assert action.boot_id == self.source.boot_id
                    for block in action.blocks:
                        destination = want.destinations[block.index - want.order.num_blocks_held]
                        self.readings.append(Reading(action.transfer_id, block, destination))
                case StopPulling():
                    self.wants[action.transfer_id].is_stopping = True
                case Commit():
                    self.on_commit(action)
                case Fail():
                    self.forget(action.transfer_id)
                    self.num_fails += 1

    def on_commit(self, commit: Commit) -> None:
        """T2, T3: at the one place after which tokens may exist, all KV is exactly the prompt's."""
        want = self.wants[commit.transfer_id]
        for offset, block_id in enumerate(want.destinations):
            expected = content(want.order.token_ids, want.order.num_blocks_held + offset)
            assert self.d_block(block_id) == expected, "committed KV is not the prompt's"
        assert [t.token_id for t in commit.first_tokens] == [sum(want.order.token_ids)] * len(want.order.choices)
        self.num_commits += 1
        self.forget(commit.transfer_id)

    def forget(self, transfer_id: int) -> None:
        assert not any(reading.transfer_id == transfer_id for reading in self.readings), "ended while a read may write"
        self.d_free += self.wants.pop(transfer_id).destinations

    def d_block(self, block_id: int) -> memoryview:
        return memoryview(self.d_memory)[block_id * BLOCK_BYTES : (block_id + 1) * BLOCK_BYTES]

    # ------------------------------------------------------------------ P's driver and engine

    def do_p(self, actions: Sequence[PrefillAction]) -> None:
        for action in actions:
            match action:
                case SendDown():
                    self.down.append(action.message)
                case OpenTicket():
                    self.source.open(action.ticket)
                case Publish():
                    self.source.publish(action.ticket, action.blocks)
                case CloseTicket():
                    self.source.close(action.ticket)
                case StartBackend():
                    self.prompts[action.key] = Prompt(action.key, action.start)
                case GrantBackend():
                    self.prompts[action.key].credit += action.num_blocks
                case ReleaseBackend():
                    self.p_free += [block_id for block_id, _ in self.prompts.pop(action.key).blocks]

    def begin(self, prompt: Prompt) -> None:
        num_blocks = -(-len(prompt.start.token_ids) // BLOCK_SIZE) - prompt.start.num_blocks_held
        if len(self.p_free) < num_blocks:
            return
        for _ in range(num_blocks):
            block_id = self.p_free.pop()  # last freed first: reuse at once
            self.generations[block_id] += 1
            prompt.blocks.append((block_id, self.generations[block_id]))
        self.do_p(self.p.prefill_starting(prompt.key, num_blocks, 0, self.now))

    def fill(self, prompt: Prompt, num_blocks: int) -> None:
        """Compute some blocks; the last chunk also gives tail and first tokens."""
        start, num_tokens = prompt.start, len(prompt.start.token_ids)
        ready: list[ReadyBlock] = []
        for block_id, generation in prompt.blocks[prompt.num_filled : prompt.num_filled + num_blocks]:
            index = start.num_blocks_held + prompt.num_filled
            prompt.num_filled += 1
            self.source.block(block_id)[:] = content(start.token_ids, index)
            in_block = min(BLOCK_SIZE, num_tokens - index * BLOCK_SIZE)
            digest = block_digest(self.source.block(block_id))
            ready.append(ReadyBlock(index, block_id, generation, in_block, digest))
        tail = ready.pop() if ready and ready[-1].num_tokens < BLOCK_SIZE else None
        if ready:
            self.do_p(self.p.blocks_filled(prompt.key, ready, self.now))
        if prompt.num_filled == len(prompt.blocks) and prompt.key in self.prompts:
            prompt.is_done = True
            tokens = [pb.FirstToken(choice=c, token_id=sum(start.token_ids)) for c in start.choices]
            self.do_p(self.p.prefill_done(prompt.key, tail, tokens, 0.0, 0.0, self.now))

    def engine_step(self, prompt: Prompt, num_blocks: int, beyond_credit: bool) -> None:
        if prompt.is_done:
            return
        if not prompt.blocks:
            self.begin(prompt)
        else:
            room = prompt.credit - prompt.num_filled
            if room > 0:
                self.fill(prompt, num_blocks if beyond_credit else min(num_blocks, room))

    # ------------------------------------------------------------------ what can happen

    @precondition(lambda self: len(self.wants) < 4)
    @rule(
        num_tokens=st.integers(1, 22),
        token=st.integers(1, 3),
        held=st.integers(0, 2),
        num_choices=st.integers(0, 2),
        deadline_s=st.sampled_from([5.0, 30.0, 10_000.0]),
    )
    def ask(self, num_tokens: int, token: int, held: int, num_choices: int, deadline_s: float) -> None:
        tokens = [token] * num_tokens
        held = min(held, (num_tokens - 1) // BLOCK_SIZE)
        order = PrefillOrder(
            "r", tokens, held, pb.SamplingParams(), tuple(range(num_choices)), b"", deadline_s=deadline_s
        )
        transfer_id, actions = self.d.start(order, self.now)
        self.wants[transfer_id] = Want(order)
        self.do(actions)

    @precondition(lambda self: self.up)
    @rule(pick=PICK, fate=st.sampled_from(["deliver"] * 6 + ["reorder", "repeat", "drop"]))
    def network_up(self, pick: int, fate: str) -> None:
        message = self.taken(self.up, pick, fate)
        if fate != "drop":
            self.do_p(self.p.handle(message, self.now))

    @precondition(lambda self: self.down)
    @rule(pick=PICK, fate=st.sampled_from(["deliver"] * 6 + ["reorder", "repeat", "drop"]))
    def network_down(self, pick: int, fate: str) -> None:
        message = self.taken(self.down, pick, fate)
        if fate != "drop":
            self.do(self.d.handle(message, self.now))

    def taken(self, queue: list, pick: int, fate: str):
        position = pick % len(queue) if fate == "reorder" else 0
        return queue[position] if fate == "repeat" else queue.pop(position)

    @precondition(lambda self: self.old_down)
    @rule(pick=PICK)
    def message_of_an_earlier_stream_reaches_d(self, pick: int) -> None:
        message = self.old_down[pick % len(self.old_down)]
        assert self.d.handle(message, self.now) == [], "T4"

    @precondition(lambda self: any(m.WhichOneof("kind") != "start" for m in self.old_up))
    @rule(pick=PICK)
    def message_of_an_earlier_stream_reaches_p(self, pick: int) -> None:
        messages = [m for m in self.old_up if m.WhichOneof("kind") != "start"]
        message = messages[pick % len(messages)]
        assert self.p.handle(message, self.now) == [], "T4"

    @precondition(lambda self: self.prompts)
    @rule(pick=PICK, num_blocks=st.integers(1, 4), beyond_credit=st.booleans())
    def engine_works(self, pick: int, num_blocks: int, beyond_credit: bool) -> None:
        prompt = self.prompts[sorted(self.prompts)[pick % len(self.prompts)]]
        self.engine_step(prompt, num_blocks, beyond_credit)

    @precondition(lambda self: self.prompts)
    @rule(pick=PICK)
    def engine_gives_up(self, pick: int) -> None:
        key = sorted(self.prompts)[pick % len(self.prompts)]
        self.do_p(self.p.prefill_failed(key, pb.PREFILL_FAILURE_INTERNAL, "engine"))

    @precondition(lambda self: any(want.is_reserving for want in self.wants.values()))
    @rule(refuse=st.sampled_from([False] * 4 + [True]))
    def reserve(self, refuse: bool) -> None:
        transfer_id, want = next((i, w) for i, w in self.wants.items() if w.is_reserving)
        want.is_reserving = False
        num_blocks = -(-len(want.order.token_ids) // BLOCK_SIZE) - want.order.num_blocks_held
        if refuse or len(self.d_free) < num_blocks:
            failure = TransferFailure(FailureKind.INTERNAL, "no blocks")
            self.do(self.d.reservation_refused(transfer_id, failure, self.now))
            return
        want.destinations = [self.d_free.pop() for _ in range(num_blocks)]
        self.do(self.d.reserved(transfer_id, self.now))

    @precondition(lambda self: self.readings)
    @rule(damage=st.sampled_from(["none"] * 6 + ["flip", "cut", "generation", "boot", "lost"]), is_raw=st.booleans())
    def read(self, damage: str, is_raw: bool) -> None:
        """One read ends. `is_raw`: like shared memory, it sees memory that may have been reused meanwhile."""
        reading = self.readings[0]
        want = self.wants[reading.transfer_id]
        assert reading.destination in want.destinations, "T1: a read writes into a block that the transfer owns"
        assert reading.destination not in self.d_free
        try:
            if damage == "lost":
                raise PullError
            read = self.copy(reading, is_raw)
        except PullError:
            failure = TransferFailure(FailureKind.PULL)
            self.stop_reading(reading.transfer_id, failure)
            return
        destination = self.d_block(reading.destination)
        match damage:
            case "flip":
                destination[3] ^= 1
            case "cut":
                destination[-1] ^= 0xFF
                read = BlockRead(read.index, read.boot_id, read.generation, BLOCK_BYTES - 1)
            case "generation":
                read = BlockRead(read.index, read.boot_id, read.generation + 1, BLOCK_BYTES)
            case "boot":
                read = BlockRead(read.index, bytes(16), read.generation, BLOCK_BYTES)
        self.readings.pop(0)
        num_commits = self.num_commits
        self.do(self.d.blocks_read(reading.transfer_id, [ArrivedBlock(read, block_digest(destination))], self.now))
        assert damage == "none" or self.num_commits == num_commits, "a damaged read led to a commit"

    def copy(self, reading: Reading, is_raw: bool) -> BlockRead:
        block = reading.block
        block_id = block.block_id if is_raw else self.lookup(reading).block_id
        self.d_block(reading.destination)[:] = self.source.block(block_id)
        return BlockRead(block.index, self.source.boot_id, self.source.generation_table[block_id], BLOCK_BYTES)

    def lookup(self, reading: Reading) -> SourceBlock:
        for opened in self.source._tickets.values():
            known = opened.blocks.get(reading.block.index)
            if known == reading.block:
                return known
        raise PullError

    def stop_reading(self, transfer_id: int, failure: TransferFailure | None) -> None:
        self.readings = [reading for reading in self.readings if reading.transfer_id != transfer_id]
        self.do(self.d.pull_stopped(transfer_id, failure, self.now))

    @precondition(lambda self: any(want.is_stopping for want in self.wants.values()))
    @rule()
    def pull_lets_go(self) -> None:
        self.stop_reading(next(i for i, want in self.wants.items() if want.is_stopping), None)

    @precondition(lambda self: self.wants)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        self.do(self.d.cancel(sorted(self.wants)[pick % len(self.wants)], self.now))

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.do(self.d.tick(self.now))
        self.do_p(self.p.tick(self.now))

    @precondition(lambda self: self.wants or self.prompts)
    @rule(what=st.sampled_from(["stream", "p", "d"]))
    def disaster(self, what: str) -> None:
        """The stream breaks, or one of the processes dies and comes back."""
        if what == "d":
            self.start_d()
        else:
            self.d_loses_stream()
        if what == "p":
            self.start_p()
        else:
            self.do_p(self.p.stream_lost())
        self.connect()

    @rule()
    def all_goes_well(self) -> None:
        """Everything under way makes a step or two, so that walks get deep; reads are left to their own rules."""
        self.quiet_turn(is_reading=False)

    @rule()
    def all_goes_very_well(self) -> None:
        for _ in range(2):
            self.quiet_turn()

    def d_loses_stream(self) -> None:
        self.do(self.d.stream_lost(TransferFailure(FailureKind.STREAM_LOST), self.now))
        for transfer_id in [i for i, want in self.wants.items() if want.is_stopping]:
            self.stop_reading(transfer_id, None)
        assert not self.wants, "the stream is the lease"
        assert not self.readings

    # ------------------------------------------------------------------ what always holds

    @invariant()
    def every_block_has_one_place(self) -> None:
        """T1, T8."""
        owned = [block_id for prompt in self.prompts.values() for block_id, _ in prompt.blocks]
        assert sorted(self.p_free + owned) == list(range(NUM_P_BLOCKS))
        filling = [block_id for want in self.wants.values() for block_id in want.destinations]
        assert sorted(self.d_free + filling) == list(range(NUM_D_BLOCKS))

    @invariant()
    def both_ends_know_what_is_open(self) -> None:
        assert self.p.num_tickets == len(self.prompts) == self.source.num_open_tickets
        assert self.d.num_transfers == len(self.wants)
        assert (self.held.num_tokens == 0) or self.prompts

    @invariant()
    def a_free_block_is_not_published(self) -> None:
        published = {b.block_id for opened in self.source._tickets.values() for b in opened.blocks.values()}
        assert not published & set(self.p_free)

    @invariant()
    def every_state_has_a_deadline(self) -> None:
        """T7, the half that can be seen at once: what lives waits for a deadline, or for its own transport."""
        stopping = sum(want.is_stopping for want in self.wants.values())
        assert self.d.next_deadline() is not None or self.d.num_transfers == stopping
        assert self.p.next_deadline() is not None or self.p.num_tickets == 0

    def teardown(self) -> None:
        """T7: the faults stop, and all ends within the longest deadline, whatever state it was in."""
        for _ in range(400):
            self.quiet_turn()
            if not self.wants and not self.prompts:
                return
            self.now += 1.0
            self.do(self.d.tick(self.now))
            self.do_p(self.p.tick(self.now))
        raise AssertionError(f"{len(self.wants)} transfers and {len(self.prompts)} prompts never ended")

    def quiet_turn(self, is_reading: bool = True) -> None:
        while self.up:
            self.do_p(self.p.handle(self.up.pop(0), self.now))
        for prompt in list(self.prompts.values()):
            self.engine_step(prompt, 2, beyond_credit=False)
        while self.down:
            self.do(self.d.handle(self.down.pop(0), self.now))
        while any(want.is_reserving for want in self.wants.values()):
            self.reserve(refuse=False)
        while any(want.is_stopping for want in self.wants.values()):
            self.pull_lets_go()
        while is_reading and self.readings:
            self.read(damage="none", is_raw=False)
            while any(want.is_stopping for want in self.wants.values()):
                self.pull_lets_go()


HandoverPair.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestHandoverPair = HandoverPair.TestCase


@pytest.mark.parametrize("seed", range(150))
def test_long_walks_hold_the_invariants(seed: int) -> None:
    """Hypothesis shrinks well but walks short; these walks are long and weighted, so that damage meets commits."""
    walk = random.Random(seed)
    world = HandoverPair()
    for _ in range(200):
        one_event(world, walk)
        world.every_block_has_one_place()
        world.both_ends_know_what_is_open()
        world.a_free_block_is_not_published()
        world.every_state_has_a_deadline()
    world.teardown()
    assert world.num_commits + world.num_fails > 0


def one_event(world: HandoverPair, walk: random.Random) -> None:
    pick = walk.randrange(10_000)
    fate = walk.choice(["deliver"] * 20 + ["reorder", "repeat", "drop"])
    match walk.choices(range(12), [4, 10, 10, 10, 6, 10, 1, 1, 1, 1, 0.4, 1])[0]:
        case 0 if len(world.wants) < 4:
            held = walk.randrange(2)
            num_tokens = walk.randint(1 + held * BLOCK_SIZE, 22)
            world.ask(num_tokens, walk.randint(1, 3), held, walk.randrange(3), walk.choice([30.0, 10_000.0]))
        case 1 if world.up:
            world.network_up(pick, fate)
        case 2 if world.down:
            world.network_down(pick, fate)
        case 3 if world.prompts:
            world.engine_works(pick, walk.randint(1, 4), walk.random() < 0.3)
        case 4 if any(want.is_reserving for want in world.wants.values()):
            world.reserve(walk.random() < 0.05)
        case 5 if world.readings:
            damage = walk.choice(["none"] * 20 + ["flip", "flip", "cut", "generation", "boot", "lost"])
            world.read(damage, walk.random() < 0.5)
        case 6 if any(want.is_stopping for want in world.wants.values()):
            world.pull_lets_go()
        case 7 if world.wants:
            world.cancel(pick)
        case 8:
            world.time_passes(walk.choice([0.1, 1.0, 4.0, 11.0]))
        case 9 if world.old_down:
            world.message_of_an_earlier_stream_reaches_d(pick)
        case 10 if world.wants:
            world.disaster(walk.choice(["stream", "p", "d"]))
        case 11 if world.prompts and pick % 4 == 0:
            world.engine_gives_up(pick)
        case _:
            pass


def test_without_faults_every_prompt_commits() -> None:
    """The world above is able to succeed: else its invariants would hold for nothing."""
    world = HandoverPair()
    for num_tokens in (1, 4, 5, 17, 21):
        world.ask(num_tokens, 1, 0, 2, 300.0)
        while world.wants:
            world.quiet_turn()
    assert (world.num_commits, world.num_fails) == (5, 0)
    world.teardown()
