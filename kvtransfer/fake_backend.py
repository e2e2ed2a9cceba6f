"""A prefill engine without a model: the fake that tests and benchmarks put behind PrefillServer.

Blocks of a prompt come from a small pool with generations; filling is instant, one chunk per credit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvtransfer.prefill_events import BackendEvent, BlocksFilled, PrefillDone, PrefillStarting
from kvtransfer.protocol import baton_pb2 as pb


@dataclass(frozen=True, slots=True)
class FakeBlock:
    index: int
    block_id: int
    generation: int
    num_tokens: int


@dataclass(slots=True)
class _Prompt:
    start: pb.StartPrefill
    blocks: list[FakeBlock]
    num_filled: int = 0
    num_granted: int = 0


class FakePrefillBackend:
    """PrefillBackend over `num_blocks` blocks; `fill(block)` writes a block's bytes (default: leave them)."""

    def __init__(
        self, num_blocks: int, block_size: int, fill: Callable[[FakeBlock, pb.StartPrefill], None] | None = None
    ) -> None:
        self.free = list(range(num_blocks))
        self.released: list[tuple[int, bool]] = []
        self.suspects: list[int] = []
        self.is_paused = False
        self.deliver: Callable[[Sequence[BackendEvent]], None] = lambda events: None
        self._block_size = block_size
        self._fill = fill
        self._generations = [0] * num_blocks
        self._prompts: dict[int, _Prompt] = {}
        self._num_steps = 0

    def start_prefill(self, key: int, start: pb.StartPrefill) -> None:
        num_tokens = len(start.token_ids)
        indices = range(start.num_blocks_held, -(-num_tokens // self._block_size))
        self._prompts[key] = _Prompt(start, [self._allocate(index, num_tokens) for index in indices])
        if not self.is_paused:
            self.deliver([PrefillStarting(key, len(indices), 0)])

    def grant_credit(self, key: int, num_blocks: int) -> None:
        prompt = self._prompts[key]
        prompt.num_granted += num_blocks
        if not self.is_paused:
            self._run(key, prompt)

    def release(self, key: int, ok: bool, is_suspect: bool) -> None:
        self.released.append((key, ok))
        if is_suspect:
            self.suspects.append(key)
        self.free += [block.block_id for block in self._prompts.pop(key).blocks]

    def load(self) -> pb.WorkerLoad:
        self._num_steps += 1
        return pb.WorkerLoad(step_counter=self._num_steps, num_blocks_total=len(self._generations))

    def _run(self, key: int, prompt: _Prompt) -> None:
        chunk = prompt.blocks[prompt.num_filled : prompt.num_granted]
        prompt.num_filled += len(chunk)
        if self._fill is not None:
            for block in chunk:
                self._fill(block, prompt.start)
        full = [block for block in chunk if block.num_tokens == self._block_size]
        events: list[BackendEvent] = [BlocksFilled(key, full)] if full else []
        if prompt.num_filled == len(prompt.blocks):
            tail = chunk[-1] if len(full) < len(chunk) else None
            tokens = [pb.FirstToken(choice=choice, token_id=choice + 1) for choice in prompt.start.choices]
            events.append(PrefillDone(key, tail, tokens, 0.0, 0.0))
        self.deliver(events)

    def _allocate(self, index: int, num_tokens: int) -> FakeBlock:
        block_id = self.free.pop(0)
        self._generations[block_id] += 1
        in_block = min(self._block_size, num_tokens - index * self._block_size)
        return FakeBlock(index, block_id, self._generations[block_id], in_block)
