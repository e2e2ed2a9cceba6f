"""What the samplers compute, in numpy and double precision.

Order: mask -> penalties -> temperature -> min-p -> top-k -> top-p -> draw, as in vLLM. Ties break towards the lower
token id, so that k tokens are k tokens.
"""

from __future__ import annotations

import math

import numpy as np

from engine.kernels.sampling.rows import Draws, SampleRow, empty_draws

_MASK32 = 0xFFFFFFFF


def philox_block(key: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """One block of Philox4x32-10 (Salmon et al., 2011)."""
    x = counter
    k0, k1 = key & _MASK32, key >> 32 & _MASK32
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = (b >> 32 ^ x[1] ^ k0, b & _MASK32, a >> 32 ^ x[3] ^ k1, a & _MASK32)
        k0, k1 = k0 + 0x9E3779B9 & _MASK32, k1 + 0xBB67AE85 & _MASK32
    return x


def philox(key: int, c0: int, c1: int) -> int:
    """The first 64 bits for counter (c0, c1, 0, 0)."""
    x = philox_block(key, (c0, c1, 0, 0))
    return x[1] << 32 | x[0]


def uniform(seed: int, position: int, choice: int) -> float:
    """A number in [0, 1) for one draw."""
    return (philox(seed, position, choice) >> 11) * 2.0**-53


def gumbel(seed: int, position: int, choice: int, token_id: int) -> float:
    """Noise of one token: the greatest logit plus noise is drawn as the softmax says."""
    bits = philox_block(seed, (position, choice, token_id, 1))[0]
    return -math.log(-math.log1p(-(bits + 0.5) * 2.0**-32))


def sample(logits: np.ndarray, rows: list[SampleRow], *, use_gumbel: bool = False) -> Draws:
    """Draw one token per row from logits [n, vocab] float32, by inverting the distribution or by Gumbel's maximum."""
    draws = empty_draws(rows)
    for i, row in enumerate(rows):
        raw = logits[row.logits_row]
        draws.tokens[i] = draw(_edited(raw, row), row, use_gumbel)
        if row.num_logprobs >= 0:
            logprobs = raw.astype(np.float64) - _log_sum_exp(raw)
            draws.logprobs[i] = logprobs[draws.tokens[i]]
            top = _order(raw)[: row.num_logprobs]
            draws.top_ids[i, : len(top)] = top
            draws.top_logprobs[i, : len(top)] = logprobs[top]
    return draws


def draw(logits: np.ndarray, row: SampleRow, use_gumbel: bool = False) -> int:
    """Draw from logits that mask and penalties have been applied to."""
    if row.temperature == 0:
        return int(logits.argmax())
    scaled = (logits.astype(np.float64) - logits.max()) / row.temperature
    weights = np.where(logits < logits.max() + np.float32(row.min_p_margin), 0.0, np.exp(scaled))
    top_k = 0 < row.top_k < len(logits)
    order = _order(logits) if top_k or row.top_p < 1 else np.arange(len(logits))
    if top_k:
        order = order[: row.top_k]
    kept = weights[order]
    if row.top_p < 1:
        before = np.cumsum(kept) - kept
        kept = kept[before < row.top_p * kept.sum()]
    if use_gumbel:
        alive = np.sort(order[: len(kept)][kept > 0])
        noise = [gumbel(row.seed, row.position, row.choice, int(each)) for each in alive]
        return int(alive[np.argmax(scaled[alive] + noise)])
    sums = np.cumsum(kept)
    target = uniform(row.seed, row.position, row.choice) * sums[-1]
    return int(order[min(int(np.searchsorted(sums, target, side="right")), len(sums) - 1)])


def _edited(raw: np.ndarray, row: SampleRow) -> np.ndarray:
    logits = raw.astype(np.float32, copy=True)
    logits[list(row.banned)] = -np.inf
    if row.seen is None:
        return logits
    ids, counts = np.asarray(row.seen.ids), np.asarray(row.seen.num_output)
    seen = logits[ids].astype(np.float64)
    if row.repetition != 1.0:
        seen = np.where(seen > 0, seen / row.repetition, seen * row.repetition).astype(np.float32)
    logits[ids] = seen - row.frequency * counts - np.where(counts > 0, row.presence, 0.0)
    return logits


def _order(logits: np.ndarray) -> np.ndarray:
    return np.lexsort((np.arange(len(logits)), -logits.astype(np.float64)))


def _log_sum_exp(logits: np.ndarray) -> float:
    top = float(logits.max())
    return float(np.log(np.exp(logits.astype(np.float64) - top).sum())) + top
