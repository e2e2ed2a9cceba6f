"""What runs in the next step, and who waits for memory? Iteration-level continuous batching; no torch, no I/O.

One plan, in this order:
  1. decodes, one token each; if memory is short, the running sequence that loses least is preempted: what it computed
     is swapped to host memory, or computed again (engine/swap.py)
  2. remote prefills whose prefill worker is ready get the blocks they wait for, oldest first
  3. prompts already begun: local ones, then those for transfers that have credit, by deadline
  4. waiting requests, in order of arrival, while admission says that all will fit until they end

Nobody overtakes a request that waits for memory, so none starves. A preempted sequence keeps its place by arrival. One
that was swapped out comes back in two steps: the first brings its blocks, beside whatever it computes for others.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.admission import ConstantLength, HistoryLength, LengthEstimator, MaximumLength
from engine.batch import Batch, Chunk
from engine.config import EngineConfig, LengthEstimate
from engine.forecast import Forecast, Holders
from engine.group import Group, Phase, ScheduledSequence
from engine.messages import EngineCounters
from engine.policy import make_policy
from engine.queues import PromptQueue, WaitingQueue
from engine.request import empty_table
from engine.sequence_memory import SequenceMemory
from engine.swap import is_swap_cheaper

# Steps until a refused request is looked at again when nobody ended meanwhile: estimates drift, memory does not grow
# by itself.
RETRY_STEPS = 8
# Steps for which a promised prompt waits for running sequences to end before they are preempted for it.
RESERVE_PATIENCE_STEPS = 32
# Prompts that may be reserved while nothing of them can be computed for want of credit: enough to hide a round trip.
MAX_UNCREDITED_PROMPTS = 8


@dataclass(slots=True)
class Plan:
    """One step: what runs, and which requests the step moved on."""

    budget: int
    decodes: list[ScheduledSequence] = field(default_factory=list[ScheduledSequence])
    prompts: list[tuple[ScheduledSequence, int]] = field(default_factory=list[tuple[ScheduledSequence, int]])
    copies: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    swap_outs: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    swap_ins: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    admitted: list[ScheduledSequence] = field(default_factory=list[ScheduledSequence])
    swapped_in: list[ScheduledSequence] = field(default_factory=list[ScheduledSequence])  # they run from the next step
    reserved: list[Group] = field(default_factory=list[Group])
    promised: list[Group] = field(default_factory=list[Group])
    started: list[Group] = field(default_factory=list[Group])

    @property
    def is_swapping(self) -> bool:
        """Blocks move, or a sequence that found all of them cached runs from the next step on."""
        return bool(self.swap_outs or self.swap_ins or self.swapped_in)

    def batch(self) -> Batch:
        """What the runner is to compute: decodes first."""
        chunks = [Chunk(sequence, sequence.num_computed_tokens, 1, (sequence,)) for sequence in self.decodes]
        for sequence, end in self.prompts:
            start = sequence.num_computed_tokens
            chunks.append(Chunk(sequence, start, end - start, samplers_at(sequence, end)))
        return Batch(tuple(self.copies), tuple(chunks), tuple(self.swap_outs), tuple(self.swap_ins))


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
        holders = Holders()
        self.decoding = holders.decoding
        self.prefilling = holders.prefilling  # local prompts and logs that are begun
        self.remote = holders.remote  # promised, reserving or filling, by key
        self.transfers = holders.transfers  # prompts being prefilled for others, by key
        self.pinned = holders.pinned  # blocks that a transfer owns, by key; may outlive the request
        self.estimator = make_estimator(config)
        self.prefill_tokens_per_s = 0.0  # as the engine measured it; 0 while unknown
        self._config = config
        self._memory = memory
        self._pool = memory.pool
        self._counters = counters
        self._policy = make_policy(config)
        self._holders = holders
        self._forecast = Forecast(holders, memory, self.estimator)
        self._waiting = WaitingQueue()
        self._prompts = PromptQueue(config.prefill_ageing)
        self._reserving: dict[int, Group] = {}
        self._num_reserve_refusals = 0
        self._refused_for = 0
        self._prompt_refused_for = 0

    # ---------------------------------------------------------------- queues

    def enqueue(self, sequence: ScheduledSequence) -> None:
        """Queue the leader of a new request, or a preempted sequence, at its place by arrival."""
        self._waiting.push(sequence)
        self.note_change()

    def enqueue_prompt(self, group: Group) -> None:
        """Queue a prompt for a transfer."""
        self._prompts.push(group)
        self._prompt_refused_for = 0  # it may be the most urgent

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
        for name in ("block_table", "num_computed_tokens", "num_filled_blocks", "num_slots", "links", "swapped"):
            setattr(heir, name, getattr(leader, name))
        leader.block_table, leader.swapped = empty_table(), None
        if self.prefilling.pop(leader.sequence_id, None) is not None:
            self.prefilling[heir.sequence_id] = heir
        if leader in self._waiting:
            self._waiting.discard(leader)
            self.enqueue(heir)

    def remove(self, sequence: ScheduledSequence) -> None:
        """Take a sequence out of every queue and give its blocks back."""
        self._leave(sequence)
        self._memory.drop(sequence)
        self.note_change()

    def _leave(self, sequence: ScheduledSequence) -> None:
        self._waiting.discard(sequence)
        self.decoding.pop(sequence.sequence_id, None)
        self.prefilling.pop(sequence.sequence_id, None)

    def remove_group(self, group: Group) -> None:
        """Forget a request whose sequences are removed."""
        for groups in (self.remote, self.transfers, self._reserving):
            groups.pop(group.key, None)
        self._prompts.discard(group)
        self.note_change()

    def note_change(self) -> None:
        """Memory came back or the queue changed: look at refused requests again."""
        self._refused_for = self._prompt_refused_for = 0

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
        begun = (*self._waiting.sequences, *self.prefilling.values())
        leaders = [group.leader for group in (*self._prompts.groups, *self.transfers.values())]
        return sum(sequence.num_tokens_to_target for sequence in (*begun, *leaders))

    @property
    def num_swapped(self) -> int:
        """Sequences that wait with their KV in host memory."""
        return sum(sequence.swapped is not None for sequence in self._waiting.sequences)

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
        self._memory.host.settle()
        if self._num_reserve_refusals > RESERVE_PATIENCE_STEPS:
            self._preempt_one()
        if self.decoding:
            self._plan_decodes(plan)
        self._plan_reservations(plan)
        for sequence in tuple(self.prefilling.values()):
            self._plan_prompt(plan, sequence, sequence.target)
        if self._prompts:
            self._start_prompts(plan)
        self._plan_transfers(plan)
        if self._waiting:
            self._admit(plan)
        if self.prefilling and not plan.decodes and not plan.prompts and not plan.swapped_in:
            self._preempt_one()  # logs of forks wait for each other's blocks
        if self._config.reserve_ahead and not self._reserving:
            self._reserve_ahead(plan)
        plan.swap_outs, plan.swap_ins = self._memory.take_copies()
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

    def _reserve_ahead(self, plan: Plan) -> None:
        """Give decodes the slot after this step's, where it takes a block that nobody else asked for in this step.

        They would take it in the next step, before anyone else, so it is missed by none.
        """
        for sequence in plan.decodes:
            end = sequence.num_computed_tokens + 2
            lives = end - sequence.num_prompt_tokens < sequence.max_output_tokens
            if end > sequence.num_slots and lives and self._pool.num_available:
                self._memory.grow(sequence, end)

    def _plan_prompt(self, plan: Plan, sequence: ScheduledSequence, allowed_end: int) -> None:
        start = sequence.num_computed_tokens
        budget = min(plan.budget, allowed_end - start)
        if budget <= 0:
            return
        end = self._policy.chunk_end(start, sequence.target, budget)
        # A prompt's blocks were all taken when it was admitted; only a fork's log can still lack some, and waits.
        is_impossible = not start < end <= allowed_end
        if is_impossible or self._memory.num_needed(sequence, end) > self._pool.num_available:
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
        """Take the running sequence that loses least off the device; False if none may go.

        The last one only makes room for transfers that wait for blocks, else it waits for those that hold them to end.
        """
        running = [*self.decoding.values(), *self.prefilling.values()]
        if not running or (len(running) == 1 and not self._reserving):
            return False
        victim = min(running, key=lambda each: (self._memory.num_lost_tokens(each), -each.group.arrival, -each.choice))
        victim.max_computed_tokens = max(victim.max_computed_tokens, victim.num_computed_tokens)
        self._leave(victim)
        if not self._swap_out(victim):
            self._memory.drop(victim)
        victim.group.stats.num_preemptions += 1
        self._counters.preemptions += 1
        self.enqueue(victim)
        self._refused_for = RETRY_STEPS  # else it would come straight back into the memory it was dropped for
        return True

    def _swap_out(self, victim: ScheduledSequence) -> bool:
        """Keep what the victim computed, if host memory has room and that is cheaper than computing it again."""
        if not self._config.num_host_blocks or not victim.num_computed_tokens:
            return False
        num_lost = self._memory.num_lost_tokens(victim)
        num_copied, copy_s = self._memory.blocks_for(num_lost), self._config.host_copy_s
        is_wanted = is_swap_cheaper(num_lost, num_copied, self.prefill_tokens_per_s, copy_s)
        if not is_wanted or not self._memory.swap_out(victim):
            return False
        self._counters.swap_outs += 1
        return True

    def distrust(self, key: int) -> None:
        """The blocks of a transfer are not what was announced: nobody finds them again, and who waits for their
        content in host memory or the cache computes it anew.
        """
        for block in self.pinned.get(key, ()):
            link = self._memory.cache.drop(block)
            for each in self._waiting.sequences if link is not None else ():
                if each.swapped is not None and link in each.swapped.cached.values():
                    self._memory.drop(each)

    # ---------------------------------------------------------------- remote prefill, decode side

    def reserve_at_once(self, group: Group) -> bool:
        """`try_reserve` between two steps, when no block can be given away that must first be copied to the host."""
        num_needed = self._memory.num_needed(group.leader, group.leader.num_prompt_tokens)
        if self._memory.must_save_first(num_needed):
            self._reserving[group.key] = group
            return False
        return self.try_reserve(group)

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
        self.pinned[group.key] = group.leader.block_table[group.num_held_blocks :].tolist()
        self._pool.pin(self.pinned[group.key])

    def unpin(self, key: int) -> None:
        """The transfer of `key` lets go of its blocks."""
        self._pool.unpin(self.pinned.pop(key, []))
        self.note_change()

    def _plan_reservations(self, plan: Plan) -> None:
        """Promises fit beside each other: what is missing is held by running sequences that outgrew their estimate.

        They may end soon; after a while they are preempted, one a step, before the prefill worker loses patience.
        """
        for group in tuple(self._reserving.values()):
            if not self.try_reserve(group):
                self._num_reserve_refusals += 1
                return
            plan.reserved.append(group)
        self._num_reserve_refusals = 0

    # ---------------------------------------------------------------- prompts for transfers

    def _credited_end(self, group: Group) -> int:
        """How far credit lets a prompt go: it must cover the blocks that a chunk completes, at the end the tail too."""
        covered = group.num_held_blocks + group.credit
        if covered >= self._memory.blocks_for(group.leader.num_prompt_tokens):
            return group.leader.num_prompt_tokens
        return covered * self._memory.block_size

    def _start_prompts(self, plan: Plan) -> None:
        """Reserve whole prompts in order of urgency, a little ahead of what the next steps compute."""
        if self._prompt_refused_for > 0:
            self._prompt_refused_for -= 1
            return
        while (group := self._prompts.most_urgent()) is not None and self._may_start(group):
            self._prompts.discard(group)
            self._start_prompt(group)
            plan.started.append(group)

    def _plan_transfers(self, plan: Plan) -> None:
        """The most urgent first: it overtakes a longer one in progress at that one's next chunk.

        A step that completes a prompt ends there once it is a chunk long: filling it up would keep the finished prompt
        waiting and gain no throughput.
        """
        for group in sorted(self.transfers.values(), key=self._prompts.urgency):
            self._plan_prompt(plan, group.leader, self._credited_end(group))
            is_completed = bool(plan.prompts) and plan.prompts[-1] == (group.leader, group.leader.target)
            if is_completed and self._config.max_num_batched_tokens - plan.budget >= self._config.chunk_size:
                return

    def _may_start(self, group: Group) -> bool:
        """Whether enough prompts are begun already, counting only those that run before this one."""
        begun = [each for each in self.transfers.values() if self._prompts.urgency(each) < self._prompts.urgency(group)]
        ready = [self._num_ready_tokens(each) for each in begun]
        if ready.count(0) >= MAX_UNCREDITED_PROMPTS or sum(ready) >= 2 * self._config.max_num_batched_tokens:
            return False
        held, num_prompt_tokens = self.num_held_tokens, group.leader.num_prompt_tokens
        if held and held + num_prompt_tokens > self._config.max_held_tokens:
            return False
        if self._has_memory_for(group):
            return True
        self._prompt_refused_for = RETRY_STEPS  # looking up a long prompt's blocks takes milliseconds
        return False

    def _has_memory_for(self, group: Group) -> bool:
        num_prompt_tokens = group.leader.num_prompt_tokens
        matched = self._memory.match(group.leader, num_prompt_tokens)
        num_blocks = self._memory.blocks_for(num_prompt_tokens)
        if self._memory.num_missing(matched, num_blocks) > self._pool.num_available:
            return False
        is_alone = not self.decoding and not self.prefilling and not self.remote
        return is_alone or self._forecast.peak_with_fixed(num_blocks, matched) <= self._pool.num_blocks

    def _num_ready_tokens(self, group: Group) -> int:
        """How many tokens of a begun prompt its credit lets the next steps compute: 0 while its peer is waited for."""
        start, allowed = group.leader.num_computed_tokens, self._credited_end(group)
        end = self._policy.chunk_end(start, group.leader.target, max(allowed - start, 0))
        return end - start if end <= allowed else 0

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
        while (sequence := self._waiting.oldest(has_budget=plan.budget > 0)) is not None:
            is_promise = sequence.group.phase is Phase.PROMISE_QUEUED  # then the log is not part of it
            target = sequence.num_prompt_tokens if is_promise else sequence.target
            matched = self._memory.match(sequence, target)
            if not self._fits(sequence, matched):
                self._refused_for = RETRY_STEPS
                return
            self._waiting.discard(sequence)
            if sequence.swapped is not None:
                self._swap_in(plan, sequence)
                continue
            self._memory.take_prefix(sequence, matched)
            if is_promise:
                self._promise(sequence.group, len(matched))
                plan.promised.append(sequence.group)
            else:
                self._memory.grow(sequence, sequence.target)
                self.prefilling[sequence.sequence_id] = sequence
                plan.admitted.append(sequence)
                self._plan_prompt(plan, sequence, sequence.target)

    def _swap_in(self, plan: Plan, sequence: ScheduledSequence) -> None:
        self._memory.swap_in(sequence)
        self._memory.grow(sequence, sequence.target)
        self.join(sequence)
        plan.swapped_in.append(sequence)
        self._counters.swap_ins += 1

    def _promise(self, group: Group, num_held_blocks: int) -> None:
        group.num_held_blocks = num_held_blocks
        group.fixed_blocks = self._forecast.final_blocks([*group.sequences.values()])
        self.remote[group.key] = group

    def _fits(self, sequence: ScheduledSequence, matched: list[int]) -> bool:
        choices = [sequence, *sequence.forks]
        if self._holders.num_seats_taken + len(choices) > self._config.max_num_seqs:
            return False
        is_promise = sequence.group.phase is Phase.PROMISE_QUEUED
        num_blocks = self._memory.blocks_for(sequence.target)
        if not is_promise and self._memory.num_missing(matched, num_blocks) > self._pool.num_available:
            return False
        if not self._holders.is_anyone:
            return True  # alone: validation made sure that it can end
        if is_promise:
            peak = self._forecast.peak_with_fixed(self._forecast.final_blocks(choices), matched)
        else:
            peak = self._forecast.peak_with_running(choices, matched)
        return peak <= self._pool.num_blocks
