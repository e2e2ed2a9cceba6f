"""How much memory will be held, at most, until all that is here has ended? Admission's view of who holds blocks."""

from __future__ import annotations

from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, field

import numpy as np

from engine.admission import Integers, LengthEstimator, future_peak
from engine.group import Group, ScheduledSequence
from engine.sequence_memory import SequenceMemory


@dataclass(slots=True)
class Holders:
    """Everyone who owns blocks, or was promised some."""

    decoding: dict[int, ScheduledSequence] = field(default_factory=dict[int, ScheduledSequence])
    prefilling: dict[int, ScheduledSequence] = field(default_factory=dict[int, ScheduledSequence])
    remote: dict[int, Group] = field(default_factory=dict[int, Group])
    transfers: dict[int, Group] = field(default_factory=dict[int, Group])
    pinned: dict[int, list[int]] = field(default_factory=dict[int, list[int]])

    @property
    def is_anyone(self) -> bool:
        return bool(self.decoding or self.prefilling or self.remote or self.transfers or self.pinned)

    @property
    def num_seats_taken(self) -> int:
        """Sequences that run or will without asking again: forks of a prompt, choices of a remote prefill."""
        forks = sum(len(sequence.forks) for sequence in self.prefilling.values())
        remote = sum(len(group.sequences) for group in self.remote.values())
        return len(self.decoding) + len(self.prefilling) + forks + remote


class Forecast:
    """Applies the future-peak formula to the holders and one candidate."""

    def __init__(self, holders: Holders, memory: SequenceMemory, estimator: LengthEstimator) -> None:
        self._holders = holders
        self._memory = memory
        self._estimator = estimator

    def final_blocks(self, choices: AnySequence[ScheduledSequence]) -> int:
        """Blocks of a request at its guessed end, its choices sharing the prompt's full blocks."""
        shared = choices[0].num_prompt_tokens // self._memory.block_size
        lengths = [len(each.token_ids) + left for each, left in zip(choices, self._lives(choices), strict=True)]
        return sum(self._memory.blocks_for(int(length)) - shared for length in lengths) + shared

    def peak_with_fixed(self, num_blocks: int, matched: list[int]) -> int:
        """The future peak if `num_blocks` more, beginning with `matched`, were held throughout."""
        return self._peak([], [], num_blocks, matched)

    def peak_with_running(self, choices: list[ScheduledSequence], matched: list[int]) -> int:
        """The future peak if these choices of one prompt, which begins with `matched`, ran too."""
        # Blocks of the prompt that do not exist yet have negative names, the same for all choices.
        num_new = choices[0].num_prompt_tokens // self._memory.block_size - len(matched)
        table = [*matched, *range(-1, -1 - num_new, -1)]
        return self._peak(choices, [table] * len(choices), 0, [])

    def _peak(
        self, joining: list[ScheduledSequence], tables: list[list[int]], num_fixed: int, fixed_table: list[int]
    ) -> int:
        fixed_tables, fixed_blocks = self._fixed()
        fixed_tables.append(fixed_table)
        distinct = set[int]().union(*fixed_tables)
        fixed_blocks += num_fixed - (sum(map(len, fixed_tables)) - len(distinct))
        running, held = list(joining), list[AnySequence[int]](tables)
        for each in self._holders.decoding.values():
            running.append(each)
            held.append(each.block_table)
        for leader in self._holders.prefilling.values():
            prompt = leader.block_table[: leader.num_prompt_tokens // self._memory.block_size]
            running += [leader, *leader.forks]
            held += [leader.block_table, *[prompt] * len(leader.forks)]
        if not running:
            return fixed_blocks
        num_tokens = np.array([len(each.token_ids) for each in running], dtype=np.int64)
        is_shared = bool(joining or distinct) or self._memory.pool.num_shared > 0 or len(set(map(id, held))) < len(held)
        shared_tables = held if is_shared else None
        lives = self._lives(running)
        return future_peak(num_tokens, lives, shared_tables, self._memory.block_size, fixed_blocks, [list(distinct)])

    def _fixed(self) -> tuple[list[AnySequence[int]], int]:
        """Tables of those who are counted at their final size throughout, and that size, shared blocks repeated."""
        tables: list[AnySequence[int]] = [group.leader.block_table for group in self._holders.remote.values()]
        num_blocks = sum(group.fixed_blocks for group in self._holders.remote.values())
        whole: list[AnySequence[int]] = [group.leader.block_table for group in self._holders.transfers.values()]
        whole += self._holders.pinned.values()
        return tables + whole, num_blocks + sum(map(len, whole))

    def _lives(self, sequences: AnySequence[ScheduledSequence]) -> Integers:
        """Steps each sequence is guessed to live after the one that draws its next token."""
        drawn = np.array([len(each.token_ids) - each.num_prompt_tokens for each in sequences], dtype=np.int64)
        maxima = np.array([each.max_output_tokens for each in sequences], dtype=np.int64)
        quantiles = np.array([each.length_quantile for each in sequences])
        return self._estimator.remaining(drawn, maxima, quantiles) - 1
