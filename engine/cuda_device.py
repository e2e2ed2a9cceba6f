"""All that the engine asks of CUDA beside launching kernels: order, events, pinned memory, graphs. And its stand-in.

Work is given to a queue and done in that order, some time later. On a GPU the queue is the current stream of whoever
calls, which is the default stream in every thread here: tensors made by one step and freed are then reused in order.
The host's own stand-in does everything at once, and replays a "graph" by doing its work again on the same buffers:
that proves buckets, padding and buffers, but neither capture nor what is asynchronous. Tests have a queue that lags.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Work = Callable[[], object]


class Mark(Protocol):
    """A place in a queue."""

    def wait(self) -> None:
        """Until all that was given before it is done.

        Without a limit of its own: a device that hangs stops the worker's step counter, by which peers and probes end
        it (docs/dataflow.md).
        """
        ...


class Graph(Protocol):
    """Work on fixed buffers, to be done again at the price of one launch."""

    def replay(self) -> None:
        """Give it to the queue."""
        ...


class DeviceQueue(Protocol):
    """One device's work, in order."""

    device: torch.device
    description: str
    """Names what of it could change a bit."""

    def run(self, work: Work) -> None:
        """Give work: launches and copies that wait for nothing."""
        ...

    def host_memory(self, num_bytes: int) -> Tensor:
        """Bytes that asynchronous copies read or write. Freed by dropping the last reference, also while one does."""
        ...

    def mark(self) -> Mark:
        """Behind all that was given so far."""
        ...

    def capture(self, work: Work) -> Graph:
        """Make a graph of work; it may be run for that. What its tensors refer to must stay."""
        ...


def queue_of(device: torch.device) -> DeviceQueue:
    """The queue of the device that KV memory is on."""
    return CudaQueue(device) if device.type == "cuda" else HostQueue()


class HostQueue:
    """The CPU: everything is done when it is given."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.description = f"interpreter numpy {np.__version__}"

    def run(self, work: Work) -> None:
        work()

    def host_memory(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def mark(self) -> Mark:
        return _Done()

    def capture(self, work: Work) -> Graph:
        return _Again(work)


class _Done:
    def wait(self) -> None:
        """Nothing is outstanding."""


class _Again:
    def __init__(self, work: Work) -> None:
        self._work = work

    def replay(self) -> None:
        self._work()


class CudaQueue:
    """The current stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        major, minor = torch.cuda.get_device_capability(device)
        self.description = f"{torch.cuda.get_device_name(device)} sm_{major}{minor} cuda {torch.version.cuda}"
        # One for all graphs: they never run at the same time, so what one needs between its kernels serves all.
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, work: Work) -> None:
        work()

    def host_memory(self, num_bytes: int) -> Tensor:
        # torch keeps pinned memory, and hands a piece out again only when the copies that used it are done.
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Mark:
        event = torch.cuda.Event()
        event.record()
        return _Recorded(event)

    def capture(self, work: Work) -> Graph:
        work()  # compiles, and makes what a capture must not: libraries' workspaces
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph


class _Recorded:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()
