"""One step ahead: while the device draws a step's tokens, the step after it is enqueued already. Pure: no torch.

    execute(batch n)      launch n; launch n + 1 as predicted, fed with n's draws on the device; wait for n
    execute(batch n + 1)  rows that came as predicted are taken from the step in flight, the rest runs as a step of its
                          own; launch n + 2; wait for n + 1

What a predicted row writes. Its position's slot is in the sequence's own table already and lies behind the position
that the sequence writes in step n, so the block is the sequence's alone: a shared tail is copied before the first write
to it, and the prefix cache knows complete blocks only. If the row is not wanted after all, the slot is one that nobody
reads before writing it: whoever is given the block computes it later on the same queue. Who writes or reads blocks by
another way (a transfer, a swap) first waits for the queue (ModelRunner.settle).

When a row counts as predicted. The same sequence, still with the very table it had (a dropped sequence gets a new one)
and the same block in the written place, going on with the very token that step n drew. Anything else is computed anew.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.batch import Chunk
from engine.request import SampledToken

MAX_PAUSE_STEPS = 8


class Flight(Protocol):
    """A step that was given to the device."""

    def tokens(self) -> list[SampledToken]:
        """One per sampler, in order of chunks and samplers. Waits for this step, not for what was enqueued after it."""
        ...


Launch = Callable[[tuple[Chunk, ...], Sequence[int] | None], Flight]
"""Enqueue a step and return at once. With sources, each chunk is one token: that draw of the step launched before."""


@dataclass(frozen=True, slots=True)
class Row:
    """A chunk that the next batch is expected to have."""

    chunk: Chunk
    source: int  # its token is this draw of the step before
    table: array[int]
    block: int  # where its KV goes


def predict(chunks: Sequence[Chunk], draws: Sequence[int], block_size: int, max_model_len: int) -> tuple[Row, ...]:
    """The decodes that follow a step of `chunks`, whose draws are at `draws`; none where one of them is unknown.

    All or none: a step computed in two parts reads the weights twice. A chunk of a prompt says that more of it follows,
    or that its sequences start to decode; penalties need the drawn token on the host. Who ends by length is left out.
    """
    rows: list[Row] = []
    for chunk, draw in zip(chunks, draws, strict=True):
        sequence = chunk.sequence
        if not is_decode(chunk) or sequence.sampling.has_penalties:
            return ()
        position = chunk.start + 1
        num_drawn = position + 1 - sequence.num_prompt_tokens
        if num_drawn >= sequence.sampling.max_tokens or position + 1 >= max_model_len:
            continue
        index = position // block_size
        if index >= len(sequence.block_table):
            return ()
        following = Chunk(sequence, position, 1, (sequence,))
        rows.append(Row(following, draw, sequence.block_table, sequence.block_table[index]))
    return tuple(rows)


def is_decode(chunk: Chunk) -> bool:
    """Whether it computes a token that its sequence drew itself, and draws the next one."""
    sequence = chunk.sequence
    is_own = len(chunk.samplers) == 1 and chunk.samplers[0] is sequence
    return is_own and chunk.num_tokens == 1 and chunk.start >= sequence.num_prompt_tokens


class Backoff:
    """When to predict: a miss costs a second reading of the weights, so after each in a row it waits twice as long."""

    def __init__(self) -> None:
        self._num_misses = 0
        self._pause = 0

    def note(self, *, hit: bool) -> None:
        """Say how a prediction ended."""
        if hit:
            self._num_misses = 0
        else:
            self._pause = min(1 << self._num_misses, MAX_PAUSE_STEPS)
            self._num_misses = min(self._num_misses + 1, MAX_PAUSE_STEPS)

    def may_predict(self) -> bool:
        """Ask once per step that could be followed by a predicted one."""
        if self._pause:
            self._pause -= 1
            return False
        return True


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A predicted step in flight. `fed` are the tokens that the step before it drew."""

    rows: tuple[Row, ...]
    flight: Flight
    fed: list[SampledToken]

    def find(self, chunks: Sequence[Chunk], block_size: int) -> dict[int, int]:
        """Indices of those chunks that came as predicted, and each one's row."""
        places = {id(row.chunk.sequence): i for i, row in enumerate(self.rows)}
        found = {i: places.get(id(chunk.sequence), -1) for i, chunk in enumerate(chunks)}
        return {i: row for i, row in found.items() if row >= 0 and self._is(self.rows[row], chunks[i], block_size)}

    def _is(self, row: Row, chunk: Chunk, block_size: int) -> bool:
        sequence, start = chunk.sequence, row.chunk.start
        return (
            is_decode(chunk)
            and chunk.start == start
            and sequence.block_table is row.table
            and row.table[start // block_size] == row.block
            and sequence.token_ids[start] == self.fed[row.source].token_id
        )


class Lookahead:
    """Runs batches by `launch`, a step ahead where that can be."""

    def __init__(self, launch: Launch, block_size: int, max_model_len: int) -> None:
        self.num_hits = 0
        self.num_misses = 0
        self._launch = launch
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._backoff = Backoff()
        self._ahead: _Ahead | None = None

    def execute(self, chunks: tuple[Chunk, ...]) -> list[SampledToken]:
        """One token per sampler, in order of chunks and samplers."""
        ahead, self._ahead = self._ahead, None
        found = ahead.find(chunks, self._block_size) if ahead is not None else {}
        rest = tuple(chunk for i, chunk in enumerate(chunks) if i not in found)
        if ahead is not None:
            self._note(hit=not rest)
        if not found:
            return self._finish(chunks, self._launch(chunks, None), range(len(chunks)))
        assert ahead is not None
        if not rest:
            draws = [found[i] for i in range(len(chunks))]
            drawn = self._finish(chunks, ahead.flight, draws)
            return [drawn[draw] for draw in draws]
        others = self._launch(rest, None)
        drawn, following = ahead.flight.tokens(), iter(others.tokens())
        tokens: list[SampledToken] = []
        for i, chunk in enumerate(chunks):
            tokens += [drawn[found[i]]] if i in found else [next(following) for _ in chunk.samplers]
        return tokens

    def _finish(self, chunks: tuple[Chunk, ...], flight: Flight, draws: Sequence[int]) -> list[SampledToken]:
        """Go ahead of a step that is one flight, where decode i's draw is `draws[i]`; then wait for all its draws."""
        rows = predict(chunks, draws, self._block_size, self._max_model_len)
        following = None
        if rows and self._backoff.may_predict():
            following = self._launch(tuple(row.chunk for row in rows), [row.source for row in rows])
        drawn = flight.tokens()
        if following is not None:
            self._ahead = _Ahead(rows, following, drawn)
        return drawn

    def _note(self, *, hit: bool) -> None:
        self._backoff.note(hit=hit)
        self.num_hits += hit
        self.num_misses += not hit
