"""When a prompt is due: the key by which the prefill queue orders. Pure.

A prompt with an objective that it can meet alone is due at its objective. Any other is given time in proportion to its
own prefill: a chat is not kept waiting by long prompts that came before it, and a long prompt is overtaken only by
those that arrive within its allowance, so nobody starves.
"""

from __future__ import annotations

BASE_S = 2.0
"""Allowance of the shortest prompt, next to which prompts with objectives are ordered."""

SLACK = 10.0
"""Times its own prefill that a prompt without a feasible objective may take. At 3, bursts of long prompts made chats
wait 12 s (p99), at 10 0.75 s, for 8 % more of the long ones' p99 (simulated, docs/log.md)."""

UNKNOWN_TOKENS_PER_S = 1000.0
"""Before the first measurement (the warm-up makes one); only proportions matter."""


def due_in_s(num_tokens: int, prefill_tokens_per_s: float, ttft_left_s: float) -> float:
    """Seconds from now. `ttft_left_s` is what is left of the objective, 0: none.

    What this worker has cached is not known yet, so all tokens count.
    """
    own_s = num_tokens / (prefill_tokens_per_s or UNKNOWN_TOKENS_PER_S)
    if own_s <= ttft_left_s:
        return ttft_left_s
    return BASE_S + SLACK * own_s
