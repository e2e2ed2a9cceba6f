"""How far a fetch is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias


class Stage(StrEnum):
    WAIT = "wait"
    """Another process fetches the same model; its progress is shown."""
    DOWNLOAD = "download"
    UNPACK = "unpack"
    VERIFY = "verify"


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes done of a stage. `total_bytes` None: not known yet."""

    stage: Stage
    done_bytes: int
    total_bytes: int | None


OnProgress: TypeAlias = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """For callers that show nothing."""
