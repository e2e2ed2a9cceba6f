"""Counts in the disassembly of a cubin: which instructions there are, and which of them the main loop repeats."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_BRANCH_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_TENSOR = re.compile(r"(?:[BDHIOQ]MMA|[BHIQ]GMMA|UTC\w*MMA)\b")
_GLOBAL_LOAD = re.compile(r"(?:LDG|LDGSTS)\b")
_BULK_LOAD = re.compile(r"(?:UTMALDG|UBLKCP)\b")  # the copy engine's; always at least 16 bytes at a time
_WIDTH = re.compile(r"\.(?:[US](8|16)|(64|128|256))\b")


@dataclass(frozen=True, slots=True)
class Counts:
    """Instructions of one stretch of code, per warp."""

    total: int
    tensor: int
    """mma.sync, wgmma or tcgen05."""
    wide_loads: int
    """From global memory, at least 128 bits wide, or by the copy engine."""
    narrow_loads: int
    wide_load_bytes: int
    """What one thread reads by the wide loads, by all of them once."""
    narrow_load_bytes: int
    local: int
    """Accesses to local memory: spilled registers and stack."""
    special: int
    """exp2, reciprocal and other work of the special function unit."""


@dataclass(frozen=True, slots=True)
class Disassembly:
    kernel: Counts
    loop: Counts
    """The innermost loop that does the most tensor work, else reads the most; the whole kernel where none does."""
    tensor_name: str
    """The kind of its tensor instruction: HMMA (mma.sync), HGMMA (wgmma), UTCHMMA (tcgen05); "" without any."""


@dataclass(frozen=True, slots=True)
class _Line:
    name: str
    label: str
    """Where it branches to, or what is defined here, if its name is empty."""


def read_disassembly(text: str) -> Disassembly:
    """What `nvdisasm -c` printed."""
    lines = list(_lines_of(text))
    names = [line.name for line in lines if line.name]
    tensor = [name for name in names if _TENSOR.match(name)]
    return Disassembly(
        kernel=_count(names),
        loop=_count(_main_loop(lines) or names),
        tensor_name=tensor[0].split(".")[0] if tensor else "",
    )


def _lines_of(text: str) -> Iterable[_Line]:
    for line in text.splitlines():
        if label := _LABEL.match(line):
            yield _Line("", label[1])
        elif (found := _INSTRUCTION.match(line)) and found[1] != "NOP":
            target = _BRANCH_TARGET.search(found[2]) if found[1].startswith("BRA") else None
            yield _Line(found[1], target[1] if target else "")


def _main_loop(lines: Sequence[_Line]) -> list[str]:
    """Instructions between a label and the branch back to it; barriers that spin are loops without work."""
    labels = {line.label: i for i, line in enumerate(lines) if not line.name}
    spans = sorted(
        {(labels[line.label], i) for i, line in enumerate(lines) if line.name and labels.get(line.label, i) < i}
    )
    work = {(first, last): _work(lines[first:last]) for first, last in spans}
    working = [span for span in spans if work[span] > (0, 0)]
    innermost = [
        (first, last)
        for first, last in working
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in working)
    ]
    if not innermost:
        return []
    first, last = max(innermost, key=work.__getitem__)
    return [line.name for line in lines[first : last + 1] if line.name]


def _work(lines: Sequence[_Line]) -> tuple[int, int]:
    counts = _count([line.name for line in lines if line.name])
    return counts.tensor, counts.wide_load_bytes + counts.narrow_load_bytes


def _count(names: Sequence[str]) -> Counts:
    loads = [_load_bytes(name) for name in names if _GLOBAL_LOAD.match(name)]
    bulk = sum(1 for name in names if _BULK_LOAD.match(name))
    wide = [size for size in loads if size >= 16]
    narrow = [size for size in loads if size < 16]
    return Counts(
        total=len(names),
        tensor=sum(1 for name in names if _TENSOR.match(name)),
        wide_loads=len(wide) + bulk,
        narrow_loads=len(narrow),
        wide_load_bytes=sum(wide) + 16 * bulk,
        narrow_load_bytes=sum(narrow),
        local=sum(1 for name in names if name.split(".")[0] in ("LDL", "STL")),
        special=sum(1 for name in names if name.startswith("MUFU")),
    )


def _load_bytes(name: str) -> int:
    width = _WIDTH.search(name)
    return int(width[1] or width[2]) // 8 if width else 4
