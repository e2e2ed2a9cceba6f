"""A device that lags behind the host as far as it may: it works only when somebody waits for it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.cuda_device import Graph, Mark, Work


class LateQueue:
    """A DeviceQueue on the CPU. Host memory is poisoned, so that what nobody wrote yet is seen."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.description = "late"
        self.num_replays = 0
        self._work: deque[Work] = deque()
        self._num_given = self._num_done = 0

    def run(self, work: Work) -> None:
        self._work.append(work)
        self._num_given += 1

    def host_memory(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), 0x7F, dtype=torch.uint8)

    def mark(self) -> Mark:
        return LateMark(self, self._num_given)

    def capture(self, work: Work) -> Graph:
        return LateGraph(self, work)

    def wait_for(self, number: int) -> None:
        while self._num_done < number:
            self._work.popleft()()
            self._num_done += 1


@dataclass(frozen=True)
class LateMark:
    queue: LateQueue
    number: int

    def wait(self) -> None:
        self.queue.wait_for(self.number)


@dataclass(frozen=True)
class LateGraph:
    queue: LateQueue
    work: Work

    def replay(self) -> None:
        self.queue.num_replays += 1
        self.queue.run(self.work)
