"""What runs in the next step, and who waits for memory? Iteration-level continuous batching; no torch, no I/O.

One plan, in this order:
  1. decodes, one token each; if memory is short, the running sequence that loses least is preempted by recompute
  2. remote prefills whose prefill worker is ready get the blocks they wait for, oldest first
  3. prompts already begun: local ones, then those for transfers that have credit, by deadline
  4. waiting requests, in order of arrival, while admission says that all will fit until they end

Nobody overtakes a request that waits for memory, so none starves. A preempted sequence keeps its place by arrival.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from engine.admission import ConstantLength, HistoryLength, LengthEstimator, MaximumLength, future_peak
from engine.batch import Batch, Chunk
from engine.config import EngineConfig, LengthEstimate
from engine.group import Group, Phase, ScheduledSequence
from engine.messages import EngineCounters
from engine.policy import make_policy
from engine.sequence_memory import SequenceMemory

# Steps until a refused request is looked at again when nobody ended meanwhile: estimates drift, memory does not grow
# by itself.
RETRY_STEPS = 8
# Prompts that may be reserved while their decode worker has not granted credit: enough to hide a round trip.
MAX_UNCREDITED_PROMPTS = 8


@dataclass(slots=True)
class Plan:
    """One step: what runs, and which requests the step moved on."""

    budget: int
    decodes: list[ScheduledSequence] = field(default_factory=list[ScheduledSequence])
    prompts: list[tuple[ScheduledSequence, int]] = field(default_factory=list[tuple[ScheduledSequence, int]])
    copies: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    admitted: list[ScheduledSequence] = field(default_factory=list[ScheduledSequence])
    reserved: list[Group] = field(default_factory=list[Group])
    promised: list[Group] = field(default_factory=list[Group])
    started: list[Group] = field(default_factory=list[Group])

    def batch(self) -> Batch:
        """What the runner is to compute: decodes first."""
        chunks = [Chunk(sequence, sequence.num_computed_tokens, 1, (sequence,)) for sequence in self.decodes]
        for sequence, end in self.prompts:
            start = sequence.num_computed_tokens
            chunks.append(Chunk(sequence, start, end - start, samplers_at(sequence, end)))
        return Batch(tuple(self.copies), tuple(chunks))


def samplers_at(sequence: ScheduledSequence, end: int) -> tuple[ScheduledSequence, ...]:
    """Who draws a token once positions up to `end` are computed: those whose known tokens end there."""
    if end < sequence.target or not sequence.group.request.choices:
        return ()
    return tuple(each for each in (sequence, *sequence.forks) if len(each.token_ids) == end)


def make_estimator(config: EngineConfig) -> LengthEstimator:
    """The length estimate that the configuration names."""
    match config.length_estimate:
        case LengthEstimate.MAXIMUM:
            return MaximumLength()
        case LengthEstimate.CONSTANT:
            return ConstantLength(config.constant_estimate)
        case LengthEstimate.HISTORY:
            return HistoryLength(ConstantLength(config.constant_estimate))


class Scheduler:
    """Holds the queues and the running sequences; plans steps and gives out memory."""

    def __init__(self, config: EngineConfig, memory: SequenceMemory, counters: EngineCounters) -> None:
        self.decoding: dict[int, ScheduledSequence] = {}
        self.prefilling: dict[int, ScheduledSequence] = {}  # local prompts and logs that are begun
        self.remote: dict[int, Group] = {}  # promised, reserving or filling, by key
        self.transfers: dict[int, Group] = {}  # prompts being prefilled for others, by key
        self.pinned: dict[int, list[int]] = {}  # blocks that a transfer owns, by key; may outlive the request
        self.estimator = make_estimator(config)
        self._config = config
        self._memory = memory
        self._pool = memory.pool
        self._counters = counters
        self._policy = make_policy(config)
        self._waiting: dict[int, ScheduledSequence] = {}
        self._local_queue: list[tuple[int, int, int]] = []
        self._promise_queue: list[tuple[int, int, int]] = []
        self._prompt_queue: list[tuple[float, int, int]] = []
        self._prompts: dict[int, Group] = {}
        self._reserving: dict[int, Group] = {}
        self._refused_for = 0

    # ---------------------------------------------------------------- queues

    def enqueue(self, sequence: ScheduledSequence) -> None:
        """Queue the leader of a new request, or a preempted sequence, at its place by arrival."""
        group = sequence.group
        queue = self._promise_queue if group.phase is Phase.PROMISE_QUEUED else self._local_queue
        heapq.heappush(queue, (group.arrival, sequence.choice, sequence.sequence_id))
        self._waiting[sequence.sequence_id] = sequence
        self.note_change()

    def enqueue_prompt(self, group: Group) -> None:
        """Queue a prompt for a transfer. By deadline with ageing: who waits gains `prefill_ageing` seconds per second.

        All gain at the same rate, so the order never changes and a heap keeps it.
        """
        urgency = group.due + self._config.prefill_ageing * group.arrived_at
        heapq.heappush(self._prompt_queue, (urgency, group.arrival, group.key))
        self._prompts[group.key] = group

    def join(self, sequence: ScheduledSequence) -> None:
        """Let a sequence run on: it decodes, or still has a log to compute."""
        self.prefilling.pop(sequence.sequence_id, None)
        running = self.decoding if sequence.is_decoding else self.prefilling
        running[sequence.sequence_id] = sequence

    def recompute_last(self, leader: ScheduledSequence) -> None:
        """Let a sequence run whose prompt's KV is there but for the last position, to draw from it."""
        self.prefilling[leader.sequence_id] = leader

    def hand_over(self, leader: ScheduledSequence) -> None:
        """The leader goes before its prompt is computed: its first fork takes its place, memory and all."""
        heir, *rest = leader.forks
        heir.forks, leader.forks = rest, []
        for name in ("block_table", "num_computed_tokens", "num_filled_blocks", "num_slots", "links"):
            setattr(heir, name, getattr(leader, name))
        leader.block_table = []
        for running in (self.prefilling, self._waiting):
            if running.pop(leader.sequence_id, None) is not None:
                running[heir.sequence_id] = heir
        if heir.sequence_id in self._waiting:
            self.enqueue(heir)

    def remove(self, sequence: ScheduledSequence) -> None:
        """Take a sequence out of every queue and give its blocks back."""
        self._waiting.pop(sequence.sequence_id, None)
        self.decoding.pop(sequence.sequence_id, None)
        self.prefilling.pop(sequence.sequence_id, None)
        self._memory.drop(sequence)
        self.note_change()

    def remove_group(self, group: Group) -> None:
        """Forget a request whose sequences are removed."""
        for groups in (self.remote, self.transfers, self._prompts, self._reserving):
            groups.pop(group.key, None)
        self.note_change()

    def note_change(self) -> None:
        """Memory came back or the queue changed: look at refused requests again."""
        self._refused_for = 0

    # ---------------------------------------------------------------- what waits and runs

    @property
    def has_work(self) -> bool:
        """A step could do something."""
        return bool(
            self.decoding or self.prefilling or self._waiting or self._prompts or self.transfers or self._reserving
        )

    @property
    def num_running(self) -> int:
        return len(self.decoding) + len(self.prefilling) + len(self.transfers)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._prompts)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens yet to be computed before everyone here decodes."""
        begun = (*self._waiting.values(), *self.prefilling.values())
        leaders = [group.leader for group in (*self._prompts.values(), *self.transfers.values())]
        return sum(sequence.target - sequence.num_computed_tokens for sequence in (*begun, *leaders))

    @property
    def num_filling(self) -> int:
        return sum(group.phase is Phase.FILLING for group in self.remote.values())

    @property
    def num_held_tokens(self) -> int:
        """Tokens in blocks that transfers own: reserved, published or arriving, and not yet released."""
        return sum(map(len, self.pinned.values())) * self._memory.block_size

    # ---------------------------------------------------------------- the plan

    def plan(self) -> Plan:
        """Decide one step and give out the memory it needs."""
        plan = Plan(self._config.max_num_batched_tokens)
        if self.decoding:
            self._plan_decodes(plan)
        if self._reserving:
            self._plan_reservations(plan)
        for sequence in tuple(self.prefilling.values()):
            self._plan_prompt(plan, sequence, sequence.target)
        if self._prompts:
            self._start_prompts(plan)
        for group in sorted(self.transfers.values(), key=self._urgency):
            self._plan_prompt(plan, group.leader, self._credited_end(group))
        if self._waiting:
            self._admit(plan)
        if self.prefilling and not plan.decodes and not plan.prompts:
            self._preempt_one()  # logs of forks wait for each other's blocks
        return plan

    def _plan_decodes(self, plan: Plan) -> None:
        pool, memory = self._pool, self._memory
        while True:
            growing = [
                each
                for each in self.decoding.values()
                if each.num_computed_tokens == each.num_slots or each.is_tail_shared
            ]
            num_needed = len(growing)  # an upper bound, exact but for a shared block whose other owners are gone
            if num_needed <= pool.num_available or not self._preempt_one():
                break
        stalled: set[int] = set()
        for sequence in growing:
            end = sequence.num_computed_tokens + 1
            if memory.num_needed(sequence, end) <= pool.num_available:
                self._grow(plan, sequence, end)
            else:
                stalled.add(sequence.sequence_id)
        if stalled:
            self._counters.stalled_steps += 1
            plan.decodes = [each for each in self.decoding.values() if each.sequence_id not in stalled]
        else:
            plan.decodes = list(self.decoding.values())
        plan.budget -= len(plan.decodes)

    def _plan_prompt(self, plan: Plan, sequence: ScheduledSequence, allowed_end: int) -> None:
        start = sequence.num_computed_tokens
        budget = min(plan.budget, allowed_end - start)
        if budget <= 0:
            return
        end = self._policy.chunk_end(start, sequence.target, budget)
        # A prompt's blocks were all taken when it was admitted; only a fork's log can still lack some, and waits.
        if end <= start or self._memory.num_needed(sequence, end) > self._pool.num_available:
            return
        self._grow(plan, sequence, end)
        plan.prompts.append((sequence, end))
        plan.budget -= end - start

    def _grow(self, plan: Plan, sequence: ScheduledSequence, end: int) -> None:
        copy = self._memory.grow(sequence, end)
        if copy is not None:
            plan.copies.append(copy)
            self._counters.copied_blocks += 1

    # ---------------------------------------------------------------- preemption

    def _preempt_one(self) -> bool:
        """Drop the running sequence that loses least; False if none may go.

        The last one only makes room for transfers that wait for blocks, else it waits for those that hold them to end.
        """
        running = [*self.decoding.values(), *self.prefilling.values()]
        if not running or (len(running) == 1 and not self._reserving):
            return False
        victim = min(running, key=lambda each: (self._memory.num_lost_tokens(each), -each.group.arrival, -each.choice))
        victim.max_computed_tokens = max(victim.max_computed_tokens, victim.num_computed_tokens)
        self.remove(victim)
        victim.group.stats.num_preemptions += 1
        self._counters.preemptions += 1
        self.enqueue(victim)
        self._refused_for = RETRY_STEPS  # else it would come straight back into the memory it was dropped for
        return True

    # ---------------------------------------------------------------- remote prefill, decode side

    def try_reserve(self, group: Group) -> bool:
        """Give a promised prompt all its blocks, or let it wait for them behind those that wait already."""
        leader, num_prompt_tokens = group.leader, group.leader.num_prompt_tokens
        is_first = not self._reserving or next(iter(self._reserving)) == group.key
        if not is_first or self._memory.num_needed(leader, num_prompt_tokens) > self._pool.num_available:
            self._reserving[group.key] = group
            return False
        self._reserving.pop(group.key, None)
        self._memory.grow(leader, num_prompt_tokens)
        self._pin(group)
        return True

    def _pin(self, group: Group) -> None:
        self.pinned[group.key] = group.leader.block_table[group.num_held_blocks :]
        self._pool.pin(self.pinned[group.key])

    def unpin(self, key: int) -> None:
        """The transfer of `key` lets go of its blocks."""
        self._pool.unpin(self.pinned.pop(key, []))
        self.note_change()

    def _plan_reservations(self, plan: Plan) -> None:
        for group in tuple(self._reserving.values()):
            if not self.try_reserve(group):
                # Promises fit beside each other, so what is missing is held by running sequences that outgrew their
                # estimate; decodes of this step have their blocks already, so one is dropped at the start of a later
                # step.
                break
            plan.reserved.append(group)

    # ---------------------------------------------------------------- prompts for transfers

    def _urgency(self, group: Group) -> tuple[float, int]:
        return group.due + self._config.prefill_ageing * group.arrived_at, group.arrival

    def _credited_end(self, group: Group) -> int:
        """How far credit lets a prompt go: it must cover the blocks that a chunk completes, at the end the tail too."""
        covered = group.num_held_blocks + group.credit
        if covered >= self._memory.blocks_for(group.leader.num_prompt_tokens):
            return group.leader.num_prompt_tokens
        return covered * self._memory.block_size

    def _start_prompts(self, plan: Plan) -> None:
        """Reserve whole prompts in order of urgency, a little ahead of what the next steps compute."""
        while self._prompt_queue:
            group = self._prompts.get(self._prompt_queue[0][2])
            if group is None or group.arrival != self._prompt_queue[0][1]:
                heapq.heappop(self._prompt_queue)
                continue
            if not self._may_start(group):
                return
            heapq.heappop(self._prompt_queue)
            del self._prompts[group.key]
            self._start_prompt(group)
            plan.started.append(group)

    def _may_start(self, group: Group) -> bool:
        begun = self.transfers.values()
        if sum(each.credit == 0 for each in begun) >= MAX_UNCREDITED_PROMPTS:
            return False
        credited = sum(each.leader.num_prompt_tokens - each.leader.num_computed_tokens for each in begun if each.credit)
        if credited >= 2 * self._config.max_num_batched_tokens:
            return False
        held, num_prompt_tokens = self.num_held_tokens, group.leader.num_prompt_tokens
        if held and held + num_prompt_tokens > self._config.max_held_tokens:
            return False
        matched = self._memory.match(group.leader, num_prompt_tokens)
        num_blocks = self._memory.blocks_for(num_prompt_tokens)
        if self._memory.num_missing(matched, num_blocks) > self._pool.num_available:
            return False
        return (not self.decoding and not self.prefilling and not self.remote) or self._peak(
            num_blocks, matched
        ) <= self._capacity

    def _start_prompt(self, group: Group) -> None:
        leader = group.leader
        self._memory.take_prefix(leader, self._memory.match(leader, leader.num_prompt_tokens))
        self._memory.grow(leader, leader.num_prompt_tokens)
        self._pin(group)
        self.transfers[group.key] = group

    # ---------------------------------------------------------------- admission

    def _admit(self, plan: Plan) -> None:
        if self._refused_for > 0:
            self._refused_for -= 1
            return
        while (sequence := self._next_waiting(plan)) is not None:
            is_promise = sequence.group.phase is Phase.PROMISE_QUEUED  # then the log is not part of it
            target = sequence.num_prompt_tokens if is_promise else sequence.target
            matched = self._memory.match(sequence, target)
            if not self._fits(sequence, matched):
                self._refused_for = RETRY_STEPS
                return
            del self._waiting[sequence.sequence_id]
            self._memory.take_prefix(sequence, matched)
            if is_promise:
                self._promise(sequence.group, len(matched))
                plan.promised.append(sequence.group)
            else:
                self._memory.grow(sequence, sequence.target)
                self.prefilling[sequence.sequence_id] = sequence
                plan.admitted.append(sequence)
                self._plan_prompt(plan, sequence, sequence.target)

    def _next_waiting(self, plan: Plan) -> ScheduledSequence | None:
        """The oldest that waits; a promise costs no tokens and passes local ones that wait for budget only."""
        local, promise = self._head(self._local_queue), self._head(self._promise_queue)
        if local is not None and plan.budget <= 0:
            local = None
        if local is None or promise is None:
            return local or promise
        return local if local.group.arrival < promise.group.arrival else promise

    def _head(self, queue: list[tuple[int, int, int]]) -> ScheduledSequence | None:
        while queue:
            sequence = self._waiting.get(queue[0][2])
            is_promise = sequence is not None and sequence.group.phase is Phase.PROMISE_QUEUED
            if sequence is not None and is_promise == (queue is self._promise_queue):
                return sequence
            heapq.heappop(queue)  # cancelled, admitted, or queued anew elsewhere
        return None

    def _promise(self, group: Group, num_held_blocks: int) -> None:
        group.num_held_blocks = num_held_blocks
        group.fixed_blocks = self._final_blocks(group.sequences.values())
        self.remote[group.key] = group

    @property
    def _capacity(self) -> int:
        return self._pool.num_blocks

    @property
    def _num_seats_taken(self) -> int:
        forks = sum(len(sequence.forks) for sequence in self.prefilling.values())
        return (
            len(self.decoding)
            + len(self.prefilling)
            + forks
            + sum(len(each.sequences) for each in self.remote.values())
        )

    def _fits(self, sequence: ScheduledSequence, matched: list[int]) -> bool:
        joining = [sequence, *sequence.forks]
        if self._num_seats_taken + len(joining) > self._config.max_num_seqs:
            return False
        is_promise = sequence.group.phase is Phase.PROMISE_QUEUED
        num_blocks = self._memory.blocks_for(sequence.target)
        if not is_promise and self._memory.num_missing(matched, num_blocks) > self._pool.num_available:
            return False
        if not self.decoding and not self.prefilling and not self.remote and not self.transfers and not self.pinned:
            return True  # alone: validation made sure that it can end
        if is_promise:
            return self._peak(self._final_blocks(joining), matched) <= self._capacity
        return self._peak(0, (), joining, matched) <= self._capacity

    def _remaining(self, sequences: list[ScheduledSequence]) -> np.ndarray:
        """Steps each sequence is guessed to live after the one that draws its next token."""
        drawn = np.array([len(each.token_ids) - each.num_prompt_tokens for each in sequences], dtype=np.int64)
        maxima = np.array([each.max_output_tokens for each in sequences], dtype=np.int64)
        quantiles = np.array([each.length_quantile for each in sequences])
        return self.estimator.remaining(drawn, maxima, quantiles) - 1

    def _final_blocks(self, sequences: Iterable[ScheduledSequence]) -> int:
        """Blocks of a request at its guessed end, its choices sharing the prompt's full blocks."""
        members = list(sequences)
        shared = members[0].num_prompt_tokens // self._memory.block_size
        lengths = [
            len(each.token_ids) + int(left) for each, left in zip(members, self._remaining(members), strict=True)
        ]
        return sum(self._memory.blocks_for(length) - shared for length in lengths) + shared

    def _peak(
        self,
        extra_fixed: int,
        extra_table: Iterable[int],
        joining: list[ScheduledSequence] | None = None,
        matched: list[int] | None = None,
    ) -> int:
        """The future peak if `joining` (holding `matched`) ran too, or if `extra_fixed` blocks were held throughout."""
        fixed_tables = [group.leader.block_table for group in self.remote.values()]
        fixed = sum(group.fixed_blocks for group in self.remote.values()) + extra_fixed
        for group in self.transfers.values():
            fixed_tables.append(group.leader.block_table)
            fixed += len(group.leader.block_table)
        for blocks in self.pinned.values():
            fixed_tables.append(blocks)
            fixed += len(blocks)
        fixed_tables.append(list(extra_table))
        distinct = set[int]().union(*fixed_tables)
        fixed -= sum(map(len, fixed_tables)) - len(distinct)

        running = [*self.decoding.values()]
        tables = [each.block_table for each in running]
        for leader in self.prefilling.values():
            shared = leader.block_table[: leader.num_prompt_tokens // self._memory.block_size]
            running += [leader, *leader.forks]
            tables += [leader.block_table, *[shared] * len(leader.forks)]
        if joining:
            held = list(matched or ())
            # Blocks of the prompt that do not exist yet have negative names, the same for all choices.
            held += range(-1, len(held) - 1 - joining[0].num_prompt_tokens // self._memory.block_size, -1)
            running += joining
            tables += [held] * len(joining)
        if not running:
            return fixed
        num_tokens = np.array([len(each.token_ids) for each in running], dtype=np.int64)
        is_shared = self._pool.num_shared > 0 or bool(distinct) or bool(matched) or bool(joining and len(joining) > 1)
        shared_tables = tables if is_shared else None
        remaining = self._remaining(running)
        return future_peak(num_tokens, remaining, shared_tables, self._memory.block_size, fixed, [list(distinct)])
