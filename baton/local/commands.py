"""What the command line asks of a running service: ps, scale, logs, down."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from io import BufferedReader
from pathlib import Path

from baton.local.control import Command, ControlError, ProcessView, Reply, Verb, send_command
from baton.local.errors import AlreadyRunning, NotRunning
from baton.local.logfiles import tail
from baton.local.rundir import RunDir, known_runs, state_dir, take_lock

COMMAND_TIMEOUT_S = 10.0
SCALE_TIMEOUT_S = 600.0
DOWN_TIMEOUT_S = 90.0  # two drains and the janitor


def show_processes(name: str | None, *, as_json: bool) -> None:
    reply = send_command(find_run(name), Command(Verb.PS), timeout_s=COMMAND_TIMEOUT_S)
    if as_json:
        print(json.dumps(asdict(reply), indent=2))
        return
    print(f"{reply.service} is {reply.state} at {reply.url}")
    print(render_table(reply.processes))


def scale_pool(name: str | None, pool: str, replicas: int, *, wait: bool) -> None:
    """Raises: ControlError if the supervisor refuses, or if the pool does not get there."""
    run = find_run(name)
    print(send_command(run, Command(Verb.SCALE, pool, replicas), timeout_s=COMMAND_TIMEOUT_S).message, flush=True)
    deadline = time.monotonic() + SCALE_TIMEOUT_S
    while wait and not _has_scaled(reply := _ask_ps(run), pool, replicas):
        crashing = [view for view in reply.processes if view.role == pool and view.state == "crash loop"]
        if crashing or time.monotonic() >= deadline:
            hint = f"\nsee `baton logs {crashing[0].worker_id}`" if crashing else ""
            raise ControlError(f"{pool} did not reach {replicas} ready workers:\n{render_table(reply.processes)}{hint}")
        time.sleep(0.1)


def show_logs(name: str | None, worker: str | None, *, follow: bool, num_lines: int) -> None:
    """Print the last lines of the logs, then (follow) what is added, until Ctrl-C."""
    run = find_run(name, also_ended=True)
    known = sorted(path.stem for path in run.logs.glob("*.log"))
    if worker is not None and worker not in known:
        raise NotRunning(f"service {run.name!r} has no log of {worker!r}; it has: {', '.join(known) or 'none'}")
    for worker_id in [worker] if worker else known:
        _print_lines(worker_id, tail(run.log_of(worker_id), num_lines), is_alone=worker is not None)
    if follow:
        _follow(run, worker)


def stop_service(name: str | None) -> None:
    """Ask for the stop and wait until nothing of the run is left. Raises: ControlError if that takes too long."""
    run = find_run(name)
    supervisor_pid = send_command(run, Command(Verb.DOWN), timeout_s=COMMAND_TIMEOUT_S).pid
    try:
        lock_fd = take_lock(run, patience_s=DOWN_TIMEOUT_S)
    except AlreadyRunning as error:
        raise ControlError(
            f"service {run.name!r} is still stopping after {DOWN_TIMEOUT_S:g} s; see {run.logs}"
        ) from error
    run.clean()
    os.close(lock_fd)
    _wait_for_end(supervisor_pid)
    print(f"{run.name} is down")


def find_run(name: str | None, *, also_ended: bool = False) -> RunDir:
    """The run that is meant: by name, or the only one there is.

    Raises: NotRunning, naming the candidates.
    """
    state = state_dir(os.environ)
    if name is not None:
        return RunDir(state / name)
    runs = known_runs(state)
    if not runs and also_ended:
        runs = [RunDir(path.parent) for path in sorted(state.glob("*/logs"))]
    if len(runs) == 1:
        return runs[0]
    if not runs:
        raise NotRunning("no service is up; start one with `baton up`")
    raise NotRunning(f"several services are up: choose with --name {'|'.join(run.name for run in runs)}")


def render_table(views: tuple[ProcessView, ...]) -> str:
    """Columns as wide as their content."""
    header = ("PROCESS", "STATE", "PID", "UPTIME", "RESTARTS", "THREADS", "KV", "TRANSPORT", "HTTP")
    rows = [header, *(_row(view) for view in views)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


# ---------------------------------------------------------------- parts


def _row(view: ProcessView) -> tuple[str, ...]:
    state = f"{view.state}: {view.phase} {view.percent:.0f}%" if view.phase else view.state
    return (
        view.worker_id,
        state,
        str(view.pid or "-"),
        f"{view.uptime_s:.0f} s" if view.pid else "-",
        str(view.num_restarts),
        str(view.threads or "-"),
        f"{view.kv_bytes / 2**20:,.0f} MiB" if view.kv_bytes else "-",
        ", ".join(view.transports) or "-",
        view.http or "-",
    )


def _ask_ps(run: RunDir) -> Reply:
    return send_command(run, Command(Verb.PS), timeout_s=COMMAND_TIMEOUT_S)


def _has_scaled(reply: Reply, pool: str, replicas: int) -> bool:
    members = [view for view in reply.processes if view.role == pool]
    return len(members) == replicas and all(view.state == "ready" for view in members)


def _wait_for_end(pid: int) -> None:
    """The supervisor closes last: its interpreter is a moment behind the janitor, which has cleaned up."""
    import psutil

    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            return
        time.sleep(0.02)


def _print_lines(worker_id: str, text: str, *, is_alone: bool) -> None:
    prefix = "" if is_alone else f"{worker_id:<10} | "
    for line in text.splitlines():
        print(f"{prefix}{line}", flush=True)


def _follow(run: RunDir, worker: str | None) -> None:
    """Print what is appended; a log that was cut, or begun anew by another run, is read from its beginning."""
    files: dict[Path, BufferedReader] = {}
    is_first_look = True
    while True:
        for path in sorted(run.logs.glob("*.log")):
            if worker is not None and path.stem != worker:
                continue
            if path in files and not os.path.samestat(os.fstat(files[path].fileno()), path.stat()):
                files.pop(path).close()
            if path not in files:
                files[path] = open(path, "rb")  # noqa: SIM115  kept open until Ctrl-C ends the command
                files[path].seek(0, os.SEEK_END if is_first_look else os.SEEK_SET)
            if files[path].tell() > path.stat().st_size:
                files[path].seek(0)
            _print_lines(path.stem, files[path].read().decode(errors="replace"), is_alone=worker is not None)
        is_first_look = False
        sys.stdout.flush()
        time.sleep(0.2)
