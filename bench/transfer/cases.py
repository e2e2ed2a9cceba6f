"""What a run moves, and how much time and memory each part of it may take. Pure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

BLOCK_SIZE = 16
BLOCK_BYTES = {"135M": 737_280, "1B": 524_288, "8B": 2_097_152}
"""Of 16 tokens: SmolLM2-135M in float32; Llama 3.2 1B (16 layers, 8 KV heads of 64) and Llama 3.1 8B (32 layers, 8 KV
heads of 128) in 16 bits.
"""
COUNTS = (1, 8, 64, 256, 1024)
ROTATED_BYTES = 256 << 20
"""Of each end at least: several times a cache, so that the blocks of a round are in none."""

STEP_TOKENS, STEP_S = 192, 0.15
"""A prefill worker's default step, in half of SmolLM2's time for one: more than any way needs to move it."""
PROMPT_TOKENS = (512, 1536)

MOST_ROUNDS = {1: 30, 8: 30, 64: 9}
FEWEST_ROUNDS = 7
_WEIGHT_BYTES = 128 << 20
_MEMORY_LEFT = 0.75  # of what is available: others live here, too


@dataclass(frozen=True, slots=True)
class Shape:
    """The KV blocks of one model, and as many at each end as are moved at once."""

    name: str
    block_bytes: int
    num_blocks: int

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


def shape_for(name: str, counts: Sequence[int]) -> Shape:
    """An odd number of blocks: every second one of them, round and round, is all of them without two neighbours."""
    block_bytes = BLOCK_BYTES[name]
    return Shape(name, block_bytes, max(*counts, -(-ROTATED_BYTES // block_bytes)) | 1)


def fitting(name: str, counts: Sequence[int], available_bytes: int) -> tuple[list[int], str]:
    """The counts for which both ends find memory, and why the others do not; empty if all do."""
    fit = [count for count in counts if 2 * shape_for(name, [count]).num_bytes <= _MEMORY_LEFT * available_bytes]
    if len(fit) == len(counts):
        return fit, ""
    left = ", ".join(str(count) for count in counts if count not in fit)
    need = 2 * shape_for(name, [max(counts)]).num_bytes
    return fit, (
        f"{name}: {left} blocks are left out: both ends need {need >> 20} MiB, "
        f"three quarters of the available memory are {int(_MEMORY_LEFT * available_bytes) >> 20} MiB"
    )


def ids_of(first: int, count: int, stride: int, num_blocks: int) -> list[int]:
    return [(first + i * stride) % num_blocks for i in range(count)]


def most_rounds(count: int) -> int:
    return MOST_ROUNDS.get(count, FEWEST_ROUNDS)


class Pace:
    """How many rounds there is time for: of the time that is left, each part gets a share by its weight.

    What a part does not use is there for those after it. A part has one round in any case.
    """

    def __init__(self, seconds: float, weights: Sequence[float], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self._weights = list(weights)

    def rounds(self, most: int) -> Iterator[int]:
        """The rounds of the next part: another one only where it should end in time, taking as long as the last."""
        now = self._clock()
        share_s = max(0.0, self._end - now) * self._weights[0] / sum(self._weights)
        del self._weights[0]
        end = now + share_s
        for number in range(most):
            started = self._clock()
            yield number
            now = self._clock()
            if now + (now - started) > end:
                return


def weight(num_bytes: int) -> float:
    """Of a part that moves so much a round: small ones cost round trips, large ones bytes."""
    return 1.0 + num_bytes / _WEIGHT_BYTES
