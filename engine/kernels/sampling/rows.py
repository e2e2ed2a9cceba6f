"""What the samplers are told about one row of logits, and what they answer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from engine.token_counts import TokenCounts


@dataclass(frozen=True, slots=True)
class SampleRow:
    """Parameters of one draw. `seen`: the tokens of prompt and output, needed only with penalties; `banned`: ids that
    may not be drawn (min_tokens). `min_p` 0 is off. The draw is keyed by (seed, choice, position).
    """

    logits_row: int
    seed: int
    choice: int
    position: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    num_logprobs: int = -1
    seen: TokenCounts | None = None
    banned: tuple[int, ...] = ()

    @property
    def min_p_margin(self) -> float:
        """How far below the greatest logit min-p still keeps one: weight >= min_p * greatest weight, said of logits.

        Rounded to float32 here, once, and compared with `greatest + margin` in float32 by every sampler, so that all
        keep the same tokens to the last one.
        """
        return float(np.float32(self.temperature * math.log(self.min_p))) if self.min_p > 0 else -math.inf


@dataclass(frozen=True, slots=True)
class Draws:
    """One token per row; logprobs are of the raw distribution and only filled where asked for."""

    tokens: np.ndarray  # [rows] int32
    logprobs: np.ndarray  # [rows] float32
    top_ids: np.ndarray  # [rows, max num_logprobs] int32
    top_logprobs: np.ndarray  # [rows, max num_logprobs] float32


def empty_draws(rows: list[SampleRow]) -> Draws:
    """Room for the answers to `rows`."""
    most = max((row.num_logprobs for row in rows), default=0)
    shape = (len(rows), max(most, 0))
    return Draws(
        np.zeros(len(rows), np.int32),
        np.zeros(len(rows), np.float32),
        np.zeros(shape, np.int32),
        np.zeros(shape, np.float32),
    )
