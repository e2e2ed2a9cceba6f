"""The engine: requests in, events out, one step at a time. Pure assembly; no torch, no I/O, one thread.

How a service uses it. Every call returns at once; what follows from it comes as events out of `step()`.

Local (colocated, or a decode worker that prefills itself):
    match(request) -> PrefixMatch; start_local(key); then TokenEvent*, RequestEnded

Decode worker, remote prefill:
    match(request)                      register it, see how much is cached here, decide local or remote
    promise_remote(key)                 -> RemotePromised(key, match) once admission has room: now ask a prefill worker
    try_reserve_remote(key)             when that says `starting`: the blocks to fill, or None and later RemoteReserved
    commit_remote(key, first_tokens)    KV is there and verified: TokenEvent*, RequestEnded
    abort_remote(key)                   from promised, reserving or filling; the transport has let go of the blocks.
                                        The request is matched again: promise_remote or start_local

Prefill worker:
    start_prefill(request, num_blocks_held, due)   -> PrefillStarting, BlocksFilled*, PrefillDone
    grant_credit(key, num_blocks)                  chunks run only while credit covers the blocks they complete
    release_transfer(key, ok, is_suspect)          the transfer lets go -> RequestEnded

Before any of these, on any thread: hashed(request) -> the request with its prompt hashed, so that a long one does not
stall the step in which it comes.

Anywhere: cancel(key) -> RequestEnded. It may come in any phase. Where a transfer still holds blocks (a decode worker's
filling request, a prefill worker's started one), they stay pinned until release_transfer(key, ok=False), so that
nothing is reused under a peer's hands. Every accepted request ends with exactly one RequestEnded; cancel,
grant_credit and release_transfer ignore keys that ended.

`match` and `start_prefill` raise RequestInvalid or EngineDraining and then know nothing of the request. The other calls
raise RequestUnknown for a key that ended (every caller has that race: the event is on its way) and PhaseConflict for a
wrong order.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random
import time
from collections.abc import Callable, Iterable, Mapping

from engine.batch import Runner
from engine.block_pool import BlockState
from engine.config import EngineConfig
from engine.errors import EngineDraining, PhaseConflict, RequestUnknown
from engine.group import PREFILL_PHASES, Group, Phase, ScheduledSequence
from engine.messages import (
    BlocksFilled,
    BlockSlot,
    ChoiceStart,
    EndReason,
    EngineCounters,
    EngineLoad,
    EngineRequest,
    Event,
    PrefillDone,
    PrefillStarting,
    PrefixMatch,
    RemotePromised,
    RemoteReserved,
    RequestEnded,
    RequestStats,
    StepResult,
    TokenEvent,
)
from engine.request import FinishReason, SampledToken
from engine.scheduler import Plan, Scheduler, samplers_at
from engine.sequence_memory import SequenceMemory
from engine.validation import validate_prefill, validate_request

# Weight of the newest step in the moving averages that `load` reports.
_SMOOTHING = 0.1
# Prompt tokens after which a measured prefill speed has mostly replaced the one before: a step of a few tokens beside
# many decodes says little.
_SPEED_TOKENS = 1024


class Engine:
    """Owns every request, sequence and KV block of one model replica. Not thread-safe: engine/loop.py is its thread."""

    def __init__(self, config: EngineConfig, runner: Runner, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.counters = EngineCounters()
        self._runner = runner
        self._clock = clock
        self._memory = SequenceMemory(
            config.num_blocks, config.block_size, config.cache_namespace, config.prefix_caching, config.num_host_blocks
        )
        self._scheduler = Scheduler(config, self._memory, self.counters)
        self._groups: dict[int, Group] = {}
        self._deadlines: list[tuple[float, int, int]] = []
        self._events: list[Event] = []
        self._arrivals = itertools.count()
        self._sequence_ids = itertools.count()
        self._quantiles = random.Random(config.estimate_seed)
        self._is_draining = False
        self._num_peer_waits = 0  # steps in which all that waits, waits for a peer: alive, with nothing to compute
        self._step_s = 0.0

    def hashed(self, request: EngineRequest) -> EngineRequest:
        """The same request with its prompt hashed for the prefix cache. The one call that any thread may make."""
        links = self._memory.hash_prompt(request.prompt_token_ids, request.cache_salt)
        return dataclasses.replace(request, links=tuple(links))

    # -------------------------------------------------------------- decode and colocated

    def match(self, request: EngineRequest) -> PrefixMatch:
        """Register the request and say how much of its prompt is cached here right now. Locks nothing yet.

        Raises: RequestInvalid, EngineDraining.
        """
        validate_request(request, self.config)
        group = self._register(request, request.choices, Phase.MATCHED)
        return self._match_of(len(self._memory.match(group.leader, group.leader.num_prompt_tokens)))

    def start_local(self, key: int) -> None:
        """Queue a matched request: prefill in chunks here, then decode."""
        group = self._expect(key, "start_local", Phase.MATCHED)
        group.move(Phase.QUEUED)
        self._scheduler.enqueue(group.leader)

    def promise_remote(self, key: int) -> None:
        """Queue a matched request for remote prefill; RemotePromised follows when its final size fits."""
        group = self._expect(key, "promise_remote", Phase.MATCHED)
        group.move(Phase.PROMISE_QUEUED)
        self._scheduler.enqueue(group.leader)

    def try_reserve_remote(self, key: int) -> tuple[BlockSlot, ...] | None:
        """Blocks [num_cached_blocks, all) of a promised prompt to fill; None: RemoteReserved follows."""
        group = self._expect(key, "try_reserve_remote", Phase.PROMISED)
        if self._scheduler.reserve_at_once(group):
            group.move(Phase.FILLING)
            return self._prompt_slots(group, group.num_held_blocks)
        group.move(Phase.RESERVING)
        return None

    def commit_remote(self, key: int, first_tokens: Mapping[int, SampledToken] | None = None) -> None:
        """The KV of the whole prompt is there and verified (T2), and the transfer has let go.

        `first_tokens` are by choice; if one of those with an empty log is missing, all of them are drawn here. Choices
        with a log fork from the prompt and compute their log.
        """
        group = self._expect(key, "commit_remote", Phase.FILLING)
        group.move(Phase.RUNNING)
        self._scheduler.unpin(key)
        self._scheduler.remote.pop(key)
        leader, given = group.leader, first_tokens or {}
        drawing = [each for each in group.sequences.values() if len(each.token_ids) == leader.num_prompt_tokens]
        is_complete = all(each.choice in given for each in drawing)
        leader.num_computed_tokens = leader.num_prompt_tokens - (0 if is_complete else 1)
        self._memory.note_filled(leader)
        if is_complete:
            self._spread(leader, [(each, given[each.choice]) for each in drawing])
        else:
            self._scheduler.recompute_last(leader)

    def abort_remote(self, key: int) -> None:
        """The remote prefill failed and the transport has let go: free its blocks; the request is matched again."""
        remote = (Phase.PROMISE_QUEUED, Phase.PROMISED, Phase.RESERVING, Phase.FILLING)
        group = self._expect(key, "abort_remote", *remote)
        group.move(Phase.MATCHED)
        self._scheduler.unpin(key)
        self._scheduler.remove(group.leader)
        self._scheduler.remove_group(group)
        group.num_held_blocks = group.fixed_blocks = 0

    def cancel(self, key: int, choices: tuple[int, ...] = ()) -> None:
        """End some choices, or all; RequestEnded(CANCELLED) follows when none is left. Unknown keys are ignored."""
        group = self._groups.get(key)
        if group is None:
            return
        left = [choice for choice in group.sequences if choices and choice not in choices]
        if not left:
            self._end(group, EndReason.CANCELLED, "cancelled by the caller")
            return
        for choice in choices:
            if choice in group.sequences:
                self._cancel_choice(group, choice)

    # -------------------------------------------------------------- prefill

    def start_prefill(self, request: EngineRequest, num_blocks_held: int, due: float) -> None:
        """Queue a prompt for a decode worker that has its first `num_blocks_held` blocks; `due` orders the queue.

        Raises: RequestInvalid, EngineDraining.
        """
        validate_prefill(request, num_blocks_held, self.config)
        group = self._register(request, request.choices or (ChoiceStart(0),), Phase.PREFILL_QUEUED)
        group.num_held_blocks, group.due = num_blocks_held, due
        self._scheduler.enqueue_prompt(group)

    def grant_credit(self, key: int, num_blocks: int) -> None:
        """The decode worker has room for `num_blocks` more. Ignored for a key that ended.

        Chunks end at multiples of the chunk size, so a decode worker that grants in small windows must leave room for
        the blocks of one chunk (under the FCFS policy, of the whole prompt: it never splits one).
        """
        group = self._groups.get(key)
        if group is not None:
            group.credit += num_blocks

    def release_transfer(self, key: int, ok: bool, is_suspect: bool = False) -> None:
        """The transfer lets go of every block of `key`. Not ok, or before PrefillDone, that also ends it (CANCELLED).

        Suspect: the peer read other bytes than were announced, so these blocks leave the prefix cache.
        On a decode worker: only for requests that ended while filling; live ones are committed or aborted.
        """
        if is_suspect:
            self._scheduler.distrust(key)
        group = self._groups.get(key)
        if group is not None:
            group.expect("release_transfer", *PREFILL_PHASES)
            if ok and group.phase is Phase.HANDING_OVER:
                self._end(group, EndReason.FINISHED, "")
            else:
                self._end(group, EndReason.CANCELLED, "the decode worker gave the transfer up")
        self._scheduler.unpin(key)

    # -------------------------------------------------------------- both

    def step(self) -> StepResult:
        """Schedule, run, and tell what happened. Cheap when there is nothing to do."""
        began = self._clock()
        self._expire(began)
        plan = self._scheduler.plan()
        self._announce(plan, began)
        num_prompt_tokens = 0
        if plan.decodes or plan.prompts or plan.is_swapping:
            batch = plan.batch()
            tokens = self._runner.execute(batch)
            if plan.is_swapping:
                self._take_swapped(plan)
            self._take_decoded(plan, tokens)
            num_prompt_tokens = self._take_prompts(plan, tokens)
            self._measure(self._clock() - began, len(plan.decodes), num_prompt_tokens)
        elif self._scheduler.remote or self._scheduler.transfers or self._scheduler.pinned:
            self._num_peer_waits += 1
        events, self._events = self._events, []
        return StepResult(events, len(plan.decodes), num_prompt_tokens, plan.is_swapping)

    @property
    def has_work(self) -> bool:
        """A step now could do something: work is queued or running, or events wait to be told."""
        return bool(self._events) or self._scheduler.has_work

    @property
    def num_requests(self) -> int:
        """Requests accepted and not ended."""
        return len(self._groups)

    def now(self) -> float:
        """The engine's clock, on which deadlines and `due` are given."""
        return self._clock()

    def next_deadline(self) -> float:
        """When the earliest live request expires (infinity: none); the loop must step by then even if idle."""
        while self._deadlines and not self._is_current(*self._deadlines[0][1:]):
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else float("inf")

    def load(self) -> EngineLoad:
        """A snapshot for heartbeats and metrics."""
        scheduler, pool = self._scheduler, self._memory.pool
        self.counters.evicted_blocks = pool.num_evicted
        num_filling = scheduler.num_filling
        return EngineLoad(
            # Work that waits for memory or seats which a hand-over holds is not stuck: the peers' deadlines end it.
            step_counter=self.counters.steps + self._num_peer_waits,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_waiting_tokens=scheduler.num_waiting_tokens,
            num_blocks_free=pool.num_available,
            num_blocks_total=pool.num_blocks,
            draining=self._is_draining,
            prefill_tokens_per_s=scheduler.prefill_tokens_per_s,
            predicted_step_s=self._step_s,
            num_promised=len(scheduler.remote) - num_filling,
            num_filling=num_filling,
            num_held_tokens=scheduler.num_held_tokens,
            num_blocks_in={state.name.lower(): pool.count(state) for state in BlockState},
            num_swapped=scheduler.num_swapped,
            num_host_blocks_free=self._memory.host.num_free,
            num_host_blocks_total=self._memory.host.num_blocks,
        )

    def forget_speeds(self) -> None:
        """What was measured so far says nothing of what follows: a first run compiles, starts threads, faults pages."""
        self._step_s = self._scheduler.prefill_tokens_per_s = 0.0

    def drain(self) -> None:
        """Take no new requests; finish what is here."""
        self._is_draining = True

    def check(self) -> None:
        """Assert every invariant of blocks and requests (T1, T8); for tests and idle moments."""
        self._memory.check(
            (each for group in self._groups.values() for each in group.sequences.values()),
            self._scheduler.pinned.values(),
        )

    # -------------------------------------------------------------- requests

    def _register(self, request: EngineRequest, choices: Iterable[ChoiceStart], phase: Phase) -> Group:
        if self._is_draining:
            raise EngineDraining("this worker drains and takes no new requests")
        if request.key in self._groups:
            raise PhaseConflict(request.key, "a second start", self._groups[request.key].phase.value)
        if request.key in self._scheduler.pinned:
            raise PhaseConflict(request.key, "a second start", "ended, but its transfer still holds blocks")
        now = self._clock()
        stats = RequestStats(num_prompt_tokens=len(request.prompt_token_ids))
        group = Group(request, next(self._arrivals), phase, now, stats)
        for start in choices:
            group.sequences[start.choice] = self._make_sequence(group, start)
        leader, *forks = group.sequences.values()
        leader.forks = forks
        self._groups[request.key] = group
        self.counters.prompt_tokens += stats.num_prompt_tokens
        if request.deadline != float("inf"):
            heapq.heappush(self._deadlines, (request.deadline, request.key, group.arrival))
        return group

    def _make_sequence(self, group: Group, start: ChoiceStart) -> ScheduledSequence:
        request, sampling = group.request, group.request.sampling
        num_prompt_tokens = len(request.prompt_token_ids)
        eos_token_ids = () if sampling.ignore_eos else self.config.eos_token_ids
        return ScheduledSequence(
            sequence_id=next(self._sequence_ids),
            request_key=request.key,
            choice=start.choice,
            sampling=sampling,
            token_ids=[*request.prompt_token_ids, *start.committed_token_ids],
            num_prompt_tokens=num_prompt_tokens,
            group=group,
            max_output_tokens=min(sampling.max_tokens, self.config.max_model_len - num_prompt_tokens),
            stop_token_ids=frozenset((*eos_token_ids, *sampling.stop_token_ids)),
            num_committed_tokens=len(start.committed_token_ids),
            length_quantile=self._quantiles.random(),
            links=list(request.links),
        )

    def _expect(self, key: int, call: str, *phases: Phase) -> Group:
        group = self._groups.get(key)
        if group is None:
            raise RequestUnknown(key)
        group.expect(call, *phases)
        return group

    def _match_of(self, num_blocks: int) -> PrefixMatch:
        return PrefixMatch(num_blocks, num_blocks * self.config.block_size)

    def _cancel_choice(self, group: Group, choice: int) -> None:
        sequence = group.sequences.pop(choice)
        group.stats.num_abort += 1
        if sequence.forks:
            self._scheduler.hand_over(sequence)
        elif sequence in group.leader.forks:
            group.leader.forks.remove(sequence)
        self._scheduler.remove(sequence)

    def _end(self, group: Group, reason: EndReason, message: str) -> None:
        """The one place where requests end. Blocks that a transfer holds stay pinned beyond it."""
        is_prefill = group.phase in PREFILL_PHASES  # one prompt, whoever draws from it
        if reason is not EndReason.FINISHED:
            group.stats.num_abort += 1 if is_prefill else len(group.sequences)
        elif is_prefill:
            group.stats.num_length += 1
        for sequence in group.sequences.values():
            group.stats.num_output_tokens += sequence.num_output_tokens - sequence.num_committed_tokens
            self._scheduler.remove(sequence)
            sequence.forks = []
        group.sequences.clear()  # no cycle is left for the garbage collector
        self._scheduler.remove_group(group)
        del self._groups[group.key]
        group.stats.total_s = self._clock() - group.arrived_at
        self._events.append(RequestEnded(group.key, reason, message, group.stats))

    def _expire(self, now: float) -> None:
        while self.next_deadline() <= now:
            group = self._groups[heapq.heappop(self._deadlines)[1]]
            waited = now - group.arrived_at
            self._end(group, EndReason.DEADLINE, f"deadline passed after {waited:.3f} s while {group.phase.value}")

    def _is_current(self, key: int, arrival: int) -> bool:
        group = self._groups.get(key)
        return group is not None and group.arrival == arrival

    # -------------------------------------------------------------- before the forward pass

    def _announce(self, plan: Plan, now: float) -> None:
        """Tell what the plan decided beyond the batch."""
        for sequence in plan.admitted:
            group = sequence.group
            if group.phase is Phase.QUEUED:
                group.move(Phase.RUNNING)
            self._note_start(group, now, sequence.num_computed_tokens)
        for group in plan.promised:
            group.move(Phase.PROMISED)
            match = self._match_of(group.num_held_blocks)
            self._note_start(group, now, match.num_cached_tokens)
            self._events.append(RemotePromised(group.key, match))
        for group in plan.reserved:
            group.move(Phase.FILLING)
            self._events.append(RemoteReserved(group.key, self._prompt_slots(group, group.num_held_blocks)))
        for group in plan.started:
            self._announce_prompt(group, now)

    def _note_start(self, group: Group, now: float, num_cached_tokens: int) -> None:
        if group.started_at is None:
            group.started_at = now
            group.stats.queue_s = now - group.arrived_at
            group.stats.num_cached_tokens = num_cached_tokens
            self.counters.cached_tokens += num_cached_tokens

    def _announce_prompt(self, group: Group, now: float) -> None:
        group.move(Phase.PREFILLING)
        leader, held = group.leader, group.num_held_blocks
        self._note_start(group, now, leader.num_computed_tokens)
        num_blocks = self._memory.blocks_for(leader.num_prompt_tokens) - held
        self._events.append(PrefillStarting(group.key, num_blocks, leader.num_computed_tokens))
        group.num_announced_blocks = held
        self._publish(group)

    def _publish(self, group: Group) -> None:
        """Announce the blocks that became complete since the last time."""
        first, end = group.num_announced_blocks, group.leader.num_filled_blocks
        if end > first:
            self._events.append(BlocksFilled(group.key, self._prompt_slots(group, first, end)))
            group.num_announced_blocks = end

    def _prompt_slots(self, group: Group, first: int, end: int | None = None) -> tuple[BlockSlot, ...]:
        leader, size, generation = group.leader, self.config.block_size, self._memory.pool.generation
        last = self._memory.blocks_for(leader.num_prompt_tokens) if end is None else end
        return tuple(
            BlockSlot(index, block, generation(block), min(size, leader.num_prompt_tokens - index * size))
            for index, block in enumerate(leader.block_table[first:last], first)
        )

    # -------------------------------------------------------------- after the forward pass

    def _take_swapped(self, plan: Plan) -> None:
        """Blocks that came from the host are complete now, and only now known to the prefix cache."""
        self.counters.swapped_out_blocks += len(plan.swap_outs)
        self.counters.swapped_in_blocks += len(plan.swap_ins)
        for sequence in plan.swapped_in:
            self._memory.note_filled(sequence)

    def _take_decoded(self, plan: Plan, tokens: list[SampledToken]) -> None:
        """Append a token to every decoding sequence. The hot loop: about a microsecond per sequence."""
        events, mask, ended = self._events, self.config.block_size - 1, list[tuple[ScheduledSequence, FinishReason]]()
        for sequence, token in zip(plan.decodes, tokens, strict=False):  # the prompts' tokens follow
            token_ids = sequence.token_ids
            sequence.num_computed_tokens = num_computed = len(token_ids)
            token_ids.append(token.token_id)
            index = num_computed - sequence.num_prompt_tokens
            finish = None
            if index + 1 >= sequence.max_output_tokens:
                finish = FinishReason.LENGTH
            if token.token_id in sequence.stop_token_ids and index + 1 >= sequence.sampling.min_tokens:
                finish = FinishReason.STOP
            events.append(TokenEvent(sequence.request_key, sequence.choice, index, token, finish))
            if not num_computed & mask:
                self._memory.note_filled(sequence)
            if finish is not None:
                ended.append((sequence, finish))
        for sequence, finish in ended:
            self._finish(sequence, finish)

    def _take_prompts(self, plan: Plan, tokens: list[SampledToken]) -> int:
        """Account for the prompt chunks that ran and start what they completed. Returns the tokens computed."""
        drawn, num_tokens = iter(tokens[len(plan.decodes) :]), 0
        for sequence, end in plan.prompts:
            start, group = sequence.num_computed_tokens, sequence.group
            num_tokens += end - start
            num_recomputed = max(min(end, sequence.max_computed_tokens) - start, 0)
            group.stats.num_recomputed_tokens += num_recomputed
            self.counters.recomputed_tokens += num_recomputed
            is_complete = end == sequence.target
            pairs = [(sampler, next(drawn)) for sampler in samplers_at(sequence, end)]
            sequence.num_computed_tokens = end
            self._memory.note_filled(sequence)
            if group.phase is Phase.PREFILLING:
                self._publish(group)
                if is_complete:
                    self._hand_over(group, pairs)
            elif is_complete:
                self._spread(sequence, pairs)
        return num_tokens

    def _spread(self, leader: ScheduledSequence, drawn: list[tuple[ScheduledSequence, SampledToken]]) -> None:
        """The prompt is computed: fork the other choices, give out first tokens, let all run on."""
        forks, leader.forks = leader.forks, []
        for fork in forks:
            self._memory.fork(leader, fork)
        group = leader.group
        if drawn and group.first_token_at is None:
            group.first_token_at = self._clock()
            started_at = group.arrived_at if group.started_at is None else group.started_at
            group.stats.prefill_s = group.first_token_at - started_at
        finishes = {sequence: self._append(sequence, token) for sequence, token in drawn}
        for sequence in (leader, *forks):
            finish = finishes.get(sequence)
            if finish is not None:
                self._finish(sequence, finish)
            else:
                self._scheduler.join(sequence)

    def _append(self, sequence: ScheduledSequence, token: SampledToken) -> FinishReason | None:
        sequence.token_ids.append(token.token_id)
        num_output, finish = sequence.num_output_tokens, None
        if num_output >= sequence.max_output_tokens:
            finish = FinishReason.LENGTH
        if token.token_id in sequence.stop_token_ids and num_output >= sequence.sampling.min_tokens:
            finish = FinishReason.STOP
        self._events.append(TokenEvent(sequence.request_key, sequence.choice, num_output - 1, token, finish))
        return finish

    def _finish(self, sequence: ScheduledSequence, finish: FinishReason) -> None:
        """A sequence ended by itself; the request ends with its last one."""
        group = sequence.group
        if finish is FinishReason.STOP:
            group.stats.num_stop += 1
        else:
            group.stats.num_length += 1
        self._scheduler.estimator.observe(sequence.num_output_tokens)
        self._scheduler.remove(sequence)
        del group.sequences[sequence.choice]
        group.stats.num_output_tokens += sequence.num_output_tokens - sequence.num_committed_tokens
        if not group.sequences:
            self._end(group, EndReason.FINISHED, "")

    def _hand_over(self, group: Group, drawn: list[tuple[ScheduledSequence, SampledToken]]) -> None:
        """The prompt is computed for a transfer: seal the tail, let the request owner go, keep the transfer's."""
        leader = group.leader
        num_in_tail = leader.num_prompt_tokens % self.config.block_size
        tail = self._prompt_slots(group, leader.num_filled_blocks)[0] if num_in_tail else None
        if tail is not None:
            self._runner.zero_slots(tail.block_id, num_in_tail)  # or they leak what another tenant left there
            self._memory.pool.fill(tail.block_id)
        group.move(Phase.HANDING_OVER)
        started_at = group.arrived_at if group.started_at is None else group.started_at
        group.stats.prefill_s = self._clock() - started_at
        first_tokens = {sampler.choice: token for sampler, token in drawn}
        self._scheduler.transfers.pop(group.key)
        self._scheduler.remove(leader)
        self._events.append(PrefillDone(group.key, tail, first_tokens, group.stats.queue_s, group.stats.prefill_s))

    def _measure(self, step_s: float, num_decode_tokens: int, num_prompt_tokens: int) -> None:
        counters = self.counters
        counters.steps += 1
        counters.decode_tokens += num_decode_tokens
        counters.prefill_tokens += num_prompt_tokens
        if not num_decode_tokens and not num_prompt_tokens:
            return  # blocks moved, and that says nothing of a forward pass
        self._step_s += (step_s - self._step_s) * (_SMOOTHING if self._step_s else 1.0)
        if num_prompt_tokens and step_s > 0:
            rate, known = num_prompt_tokens / step_s, self._scheduler.prefill_tokens_per_s
            weight = min(0.5, num_prompt_tokens / _SPEED_TOKENS) if known else 1.0
            self._scheduler.prefill_tokens_per_s = known + (rate - known) * weight
