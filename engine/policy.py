"""How far does a prompt go in one step? Small policies behind one interface; all are iteration-level."""

from __future__ import annotations

from typing import Protocol

from engine.config import EngineConfig, PolicyName


class Policy(Protocol):
    """What the scheduler asks. Units: tokens."""

    def chunk_end(self, start: int, target: int, budget: int) -> int:
        """How far a prompt at `start` goes in this step with `budget` tokens left; `start` if it must wait."""
        ...


class ChunkedPolicy:
    """SARATHI / Dynamic SplitFuse: prompts go in chunks that end at absolute multiples of `chunk_size`.

    So the boundaries depend on the prompt alone and not on what else runs, up to how many units a step takes.
    """

    def __init__(self, chunk_size: int) -> None:
        self._chunk_size = chunk_size

    def chunk_end(self, start: int, target: int, budget: int) -> int:
        end = start + budget
        return target if end >= target else max(end - end % self._chunk_size, start)


class FcfsPolicy:
    """Orca: a prompt is never split; the one that begins while any budget is left runs whole."""

    def chunk_end(self, start: int, target: int, budget: int) -> int:
        return target if budget > 0 else start


def make_policy(config: EngineConfig) -> Policy:
    """The policy that the configuration names."""
    match config.policy:
        case PolicyName.CHUNKED:
            return ChunkedPolicy(config.chunk_size)
        case PolicyName.FCFS:
            return FcfsPolicy()
