"""In which order do requests wait? By arrival for sequences, by deadline for prompts that others wait for."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from engine.group import Group, Phase, ScheduledSequence


class WaitingQueue:
    """Sequences that wait for memory, by arrival of their request: a preempted one comes back to its old place.

    Local ones and those that wait for a promise stand in two lines, because a promise costs no tokens of the step's
    budget.
    """

    def __init__(self) -> None:
        self._sequences: dict[int, ScheduledSequence] = {}
        self._local: list[tuple[int, int, int]] = []
        self._promise: list[tuple[int, int, int]] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, sequence: ScheduledSequence) -> bool:
        return sequence.sequence_id in self._sequences

    @property
    def sequences(self) -> Iterable[ScheduledSequence]:
        """All that wait, in no order."""
        return self._sequences.values()

    def push(self, sequence: ScheduledSequence) -> None:
        """Queue the leader of a new request, or a preempted sequence."""
        line = self._promise if sequence.group.phase is Phase.PROMISE_QUEUED else self._local
        heapq.heappush(line, (sequence.group.arrival, sequence.choice, sequence.sequence_id))
        self._sequences[sequence.sequence_id] = sequence

    def discard(self, sequence: ScheduledSequence) -> None:
        """Take it out if it is here. Its place in the line is skipped later."""
        self._sequences.pop(sequence.sequence_id, None)

    def oldest(self, has_budget: bool) -> ScheduledSequence | None:
        """The oldest that waits; without budget, the oldest that waits for a promise."""
        local = self._head(self._local, is_promise=False) if has_budget else None
        promise = self._head(self._promise, is_promise=True)
        if local is None or promise is None:
            return local or promise
        return local if local.group.arrival < promise.group.arrival else promise

    def _head(self, line: list[tuple[int, int, int]], is_promise: bool) -> ScheduledSequence | None:
        while line:
            sequence = self._sequences.get(line[0][2])
            if sequence is not None and is_promise == (sequence.group.phase is Phase.PROMISE_QUEUED):
                return sequence
            heapq.heappop(line)  # cancelled, admitted, or queued anew in the other line
        return None


class PromptQueue:
    """Prompts to be computed for transfers, by deadline with ageing: who waits gains `ageing` seconds per second.

    All gain at the same rate, so their order never changes and a heap keeps it.
    """

    def __init__(self, ageing: float) -> None:
        self._ageing = ageing
        self._groups: dict[int, Group] = {}
        self._line: list[tuple[float, int, int]] = []

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def groups(self) -> Iterable[Group]:
        """All that wait, in no order."""
        return self._groups.values()

    def urgency(self, group: Group) -> tuple[float, int]:
        """Smaller is more urgent."""
        return group.due + self._ageing * group.arrived_at, group.arrival

    def push(self, group: Group) -> None:
        """Queue a prompt."""
        heapq.heappush(self._line, (*self.urgency(group), group.key))
        self._groups[group.key] = group

    def discard(self, group: Group) -> None:
        """Take it out if it is here."""
        self._groups.pop(group.key, None)

    def most_urgent(self) -> Group | None:
        """The prompt to start next."""
        while self._line:
            _, arrival, key = self._line[0]
            group = self._groups.get(key)
            if group is not None and group.arrival == arrival:
                return group
            heapq.heappop(self._line)  # cancelled, or started
        return None
