"""A fake runner whose device lags behind the host as far as it may: it works only when somebody waits for it.

It looks a step ahead as ModelRunner does. Whatever the host forgot to wait for, reads or writes memory too early here.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.batch import Batch, Chunk
from engine.fake_runner import FakeRunner
from engine.lookahead import Lookahead
from engine.request import SampledToken
from engine.request import Sequence as Tokens


class LateRunner(FakeRunner):
    """A FakeRunner behind a queue."""

    def __init__(
        self, num_blocks: int, block_size: int, vocab_size: int, num_host_blocks: int, max_model_len: int
    ) -> None:
        super().__init__(num_blocks, block_size, vocab_size, num_host_blocks)
        self.lookahead = Lookahead(self._launch, block_size, max_model_len)
        self._work: deque[Callable[[], None]] = deque()
        self._num_given = self._num_done = 0
        self._drawn: list[SampledToken] = []  # by the step that was done last

    def execute(self, batch: Batch) -> list[SampledToken]:
        if batch.swap_outs or batch.swap_ins:
            self.settle()
            super().execute(Batch((), (), batch.swap_outs, batch.swap_ins))
        for copy in batch.copies:
            self._give(lambda copy=copy: super(LateRunner, self).execute(Batch((copy,), ())))
        return self.lookahead.execute(batch.chunks)

    def zero_slots(self, block_id: int, first_slot: int) -> None:
        self.settle()
        super().zero_slots(block_id, first_slot)

    def settle(self) -> None:
        """Wait for all that was given."""
        self.wait_for(self._num_given)

    def wait_for(self, number: int) -> None:
        while self._num_done < number:
            self._work.popleft()()
            self._num_done += 1

    def _give(self, work: Callable[[], None]) -> int:
        self._work.append(work)
        self._num_given += 1
        return self._num_given

    def _launch(self, chunks: tuple[Chunk, ...], sources: Sequence[int] | None) -> LateFlight:
        for chunk in chunks:
            assert sources is not None or chunk.start == chunk.sequence.num_computed_tokens
        taken = [taken_now(chunk) for chunk in chunks]
        drawn: list[SampledToken] = []

        def work() -> None:
            for i, source in enumerate(sources or ()):
                assert len(taken[i].sequence.token_ids) == taken[i].start, "the token was known already"
                taken[i].sequence.token_ids.append(self._drawn[source].token_id)
            drawn.extend(super(LateRunner, self).execute(Batch((), tuple(taken))))
            self._drawn = drawn

        return LateFlight(self, self._give(work), drawn)


@dataclass(frozen=True)
class LateFlight:
    """A step that nobody has looked at yet."""

    runner: LateRunner
    number: int
    drawn: list[SampledToken]

    def tokens(self) -> list[SampledToken]:
        self.runner.wait_for(self.number)
        return self.drawn


def taken_now(chunk: Chunk) -> Chunk:
    """The chunk as it is when it is packed: what the engine does to its sequences later cannot change it."""
    copies = {each.sequence_id: copy_of(each, chunk.start) for each in (chunk.sequence, *chunk.samplers)}
    samplers = tuple(copies[each.sequence_id] for each in chunk.samplers)
    return Chunk(copies[chunk.sequence.sequence_id], chunk.start, chunk.num_tokens, samplers)


def copy_of(sequence: Tokens, start: int) -> Tokens:
    return Tokens(
        sequence.sequence_id,
        sequence.request_key,
        sequence.choice,
        sequence.sampling,
        list(sequence.token_ids),
        sequence.num_prompt_tokens,
        array("i", sequence.block_table),
        start,
    )
