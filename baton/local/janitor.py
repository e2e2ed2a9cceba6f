"""Clean up after a supervisor, however it ended: kill what it started, remove what must not outlive it.

`python -m baton.local.janitor` runs beside the supervisor and sleeps on a pipe that closes when the supervisor is gone.
It holds the run's lock too, so that a new run of the same name cannot start in the middle of the cleaning. The
processes have the same pipe and normally leave by themselves; the janitor is for those that cannot (a stuck one, a
compiler that they started).
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from baton.local.rundir import RunDir

RUN_ID_VARIABLE = "BATON_RUN_ID"
LEAVE_BY_THEMSELVES_S = 2.0
GIVE_UP_S = 8.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m baton.local.janitor", description=__doc__)
    parser.add_argument(
        "--parent-fd", type=int, required=True, help="pipe whose closing says that the supervisor is gone"
    )
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--run-id", required=True, help=f"value of {RUN_ID_VARIABLE} in the processes of the run")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while os.read(options.parent_fd, 1):
        pass
    end_processes(options.run_id)
    RunDir(options.run_dir).clean()


def end_processes(run_id: str) -> None:
    """Wait a moment for the run's processes, then kill those that are left."""
    deadline = time.monotonic() + LEAVE_BY_THEMSELVES_S
    while any(processes_of(run_id)):
        if time.monotonic() >= deadline:
            for pid in processes_of(run_id):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        if time.monotonic() >= deadline + GIVE_UP_S:
            return  # in an uninterruptible sleep of the kernel's: nobody can end it
        time.sleep(0.05)


def processes_of(run_id: str) -> Iterator[int]:
    """Process ids of the run, children of children included; never this process."""
    import psutil  # only now: until the end the janitor is one sleeping read

    for process in psutil.process_iter():
        try:
            is_of_run = process.pid != os.getpid() and process.environ().get(RUN_ID_VARIABLE) == run_id
            if is_of_run and process.status() != psutil.STATUS_ZOMBIE:
                yield process.pid
        except (psutil.Error, OSError):
            continue  # ended meanwhile, or another user's: not ours


if __name__ == "__main__":
    main()
