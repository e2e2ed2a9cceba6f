"""The engine as an asyncio loop sees it: calls that are awaited, steps that arrive. Nothing here waits on a step.

loop --call/post--> engine thread --one list of events per step--> loop
"""

from __future__ import annotations

import logging
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


class EngineClient:
    """Made on the loop. `on_step` and `on_crash` run on the loop; a crash is told once."""
