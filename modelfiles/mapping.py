"""Mapping a file into memory."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

# Linux's value; Python 3.11 does not export it. A private mapping larger than memory must not count as memory.
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0


def map_file(path: Path) -> mmap.mmap:
    """Map a non-empty file privately: pages are shared with every process that reads it, and copied if written.

    Writable because torch warns about arrays that it could not write to.
    """
    with open(path, "rb") as file:
        return mmap.mmap(
            file.fileno(),
            0,
            flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
