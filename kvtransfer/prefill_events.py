"""What the engine tells P's end of the hand-over, in its own order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtransfer.protocol import baton_pb2 as pb


class FilledBlock(Protocol):
    """A block of the engine whose bytes will not change any more (engine.messages.BlockSlot is one)."""

    @property
    def index(self) -> int: ...
    @property
    def block_id(self) -> int: ...
    @property
    def generation(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class PrefillStarting:
    """The engine reserved the prompt's whole need; it will report `num_blocks` blocks from num_blocks_held on."""

    key: int
    num_blocks: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class BlocksFilled:
    """Full blocks, ascending, each once; those taken from P's own cache as well."""

    key: int
    blocks: Sequence[FilledBlock]


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """Every full block was reported. `tail` is the partial last block, unused slots zeroed."""

    key: int
    tail: FilledBlock | None
    first_tokens: Sequence[pb.FirstToken]
    queue_s: float
    prefill_s: float


@dataclass(frozen=True, slots=True)
class PrefillGivenUp:
    """The engine will not finish this prompt. It still gets its `release`."""

    key: int
    reason: pb.PrefillFailure
    message: str


BackendEvent = PrefillStarting | BlocksFilled | PrefillDone | PrefillGivenUp


def blocks_of(event: BackendEvent) -> Sequence[FilledBlock]:
    """The blocks that an event says are filled."""
    match event:
        case BlocksFilled():
            return event.blocks
        case PrefillDone() if event.tail is not None:
            return (event.tail,)
        case _:
            return ()
