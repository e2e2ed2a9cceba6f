"""Faults on demand for chaos tests: `--failpoints kill-after-token=3,corrupt-published-block=1`.

Never active in a real service: the flag is refused unless the variable BATON_ALLOW_FAILPOINTS is 1. Each point is
counted from 1 and acts once, at its k-th visit.

    kill-after-prompt-queued=k    SIGKILL itself when the k-th prompt was queued, before its first chunk (P)
    kill-after-token=k            ... after the k-th token left the engine
    kill-after-chunk=k            ... after the k-th engine step that computed prompt tokens
    kill-after-block-published=k  ... after the k-th KV block was published (P)
    kill-after-block-pulled=k     ... after the k-th KV block was pulled (D)
    kill-after-prefill-done=k     ... after the k-th prompt was computed, as its manifest goes out (P)
    corrupt-published-block=k     flip one bit of the k-th block after its digest was taken (P)
    stale-published-block=k       announce the k-th block, then raise its generation as reuse does (P)
    truncate-pulled-block=k       lose the second half of the k-th block on its way (D)
    replay-ticket=k               pull the k-th hand-over with the ticket of the one before it (D)
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping

ALLOW_VARIABLE = "BATON_ALLOW_FAILPOINTS"
NAMES = (
    "kill-after-prompt-queued",
    "kill-after-token",
    "kill-after-chunk",
    "kill-after-block-published",
    "kill-after-block-pulled",
    "kill-after-prefill-done",
    "corrupt-published-block",
    "stale-published-block",
    "truncate-pulled-block",
    "replay-ticket",
)


class Failpoints:
    """Counts visits of named points. Without settings every call is a dictionary miss."""

    def __init__(self, due_at: Mapping[str, int] | None = None) -> None:
        self._due_at = dict(due_at or {})
        self._visits: dict[str, int] = dict.fromkeys(self._due_at, 0)

    @property
    def active(self) -> bool:
        return bool(self._due_at)

    def due(self, name: str, visits: int = 1) -> bool:
        """Note visits of a point; True if its k-th is among them."""
        if name not in self._due_at:
            return False
        before = self._visits[name]
        self._visits[name] = before + visits
        return before < self._due_at[name] <= before + visits

    def kill_if_due(self, name: str, visits: int = 1) -> None:
        """Die as `kill -9` would: no handler, no clean-up, no flush."""
        if self.due(name, visits):
            os.kill(os.getpid(), signal.SIGKILL)


def parse(settings: tuple[str, ...], environ: Mapping[str, str]) -> Failpoints:
    """Read `name=k` settings. Raises: ValueError naming the setting, or if failpoints are not allowed here."""
    if settings and environ.get(ALLOW_VARIABLE) != "1":
        raise ValueError(f"--failpoints is for chaos tests only: set {ALLOW_VARIABLE}=1 to allow it")
    due_at: dict[str, int] = {}
    for setting in settings:
        name, _, count = setting.partition("=")
        if name not in NAMES or not count.isdigit() or int(count) < 1:
            raise ValueError(f"--failpoints {setting}: expected name=k with k from 1 and a name of {', '.join(NAMES)}")
        due_at[name] = int(count)
    return Failpoints(due_at)
