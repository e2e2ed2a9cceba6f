"""What every part of the GPU benchmark measures with: a device or its rehearsal, a clock, a budget, a table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

# Larger than any L2 (H200: 50 MB, B200: 126 MB), so that writing it leaves nothing of the kernel's inputs there.
_FLUSH_BYTES = 512 << 20
_REPEATS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table. `theirs` is the same quantity by `theirs_name`; `goal` what we want of ours; 0: none."""

    part: str
    case: str
    unit: str
    ours: float
    theirs: float = 0.0
    theirs_name: str = ""
    goal: float = 0.0


@dataclass(slots=True)
class Bench:
    """A GPU, or the interpreter on the CPU, where sizes are tiny and times mean nothing."""

    device: torch.device
    seconds: float
    """Budget of the whole run."""
    bandwidth: float = 0.0
    """Bytes per second of a copy, read and written; measured first."""
    figures: list[Figure] = field(default_factory=list[Figure])
    _started: float = field(default_factory=time.monotonic)
    _flush: Tensor | None = None
    _part_end: float = 0.0

    @property
    def is_rehearsal(self) -> bool:
        return self.device.type == "cpu"

    def begin_part(self, seconds: float) -> None:
        """Its time begins now; the run's budget bounds it too."""
        self._part_end = min(time.monotonic() + seconds, self._started + self.seconds)

    def has_time(self, needed: float = 0.0) -> bool:
        """Whether the part may begin something that takes about `needed` seconds."""
        return self.is_rehearsal or time.monotonic() + needed < self._part_end

    def add(self, figure: Figure) -> None:
        if self.is_rehearsal:
            figure = replace(figure, goal=0.0)
        self.figures.append(figure)
        print(line_of(figure), flush=True)

    def seconds_of(self, work: Callable[[], object], repeats: int = _REPEATS, *, cold: bool = True) -> float:
        """Median seconds of one call, with the L2 cold unless said. The first calls compile and are not timed."""
        if self.is_rehearsal:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        for _ in range(2):
            work()
        samples: list[float] = []
        for _ in range(repeats):
            if cold:
                self._empty_l2()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) / 1e3)
            if samples[2:] and not self.has_time():
                break
        return statistics.median(samples)

    def graph_of(self, work: Callable[[], object]) -> Callable[[], object]:
        """`work` as a CUDA graph: what its launches cost the host is gone. In rehearsal itself."""
        if self.is_rehearsal:
            return work
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            work()  # compiles, and allocates what a capture may not
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def _empty_l2(self) -> None:
        if self._flush is None:
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        self._flush.zero_()


def line_of(figure: Figure) -> str:
    beside = f"{figure.ours / figure.theirs:6.2f} x {figure.theirs_name} ({figure.theirs:.4g})" if figure.theirs else ""
    goal = f"  goal {figure.goal:.4g}: {'met' if figure.ours >= figure.goal else 'missed'}" if figure.goal else ""
    return f"{figure.part:10} {figure.case:44} {figure.ours:10.4g} {figure.unit:12} {beside}{goal}"
