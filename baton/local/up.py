"""`baton up`: in the foreground, or detached."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from baton.local.control import Command, Verb, send_command
from baton.local.errors import ControlError, NotRunning, StartFailed
from baton.local.logfiles import begin_anew
from baton.local.machine import read_machine
from baton.local.model import describe_model
from baton.local.reporter import make_reporter
from baton.local.rundir import RunDir, state_dir, take_lock
from baton.local.service_file import Overrides, load_service
from baton.local.supervisor import Supervisor
from baton_operator.resources import fields_unused

LOCK_PATIENCE_S = 15.0  # a run that was killed a moment ago is cleaned up first; its janitor takes up to 10 s
SUPERVISOR_LOG = "supervisor"


def start_in_foreground(file: Path | None, overrides: Overrides) -> None:
    """Start the service and stay until it is stopped. Raises: LocalError."""
    started_at = time.monotonic()
    service = load_service(file, overrides)
    run = RunDir(state_dir(os.environ) / service.metadata.name)
    lock_fd = _take_lock(run)
    reporter = make_reporter(started_at)
    try:
        run.prepare()
        unused = fields_unused(service, mode="local")
        if unused:
            reporter.say(f"only for a cluster, not used here: {', '.join(unused)}")
        model = describe_model(service, say=reporter.say)
        supervisor = Supervisor(service, read_machine(), model, run, reporter, lock_fd=lock_fd, started_at=started_at)
        asyncio.run(supervisor.run())
    finally:
        reporter.close()
        if run.is_locked_by(lock_fd):
            run.clean()  # the run ended before there was a janitor, which otherwise has done it
        os.close(lock_fd)


def start_detached(file: Path | None, overrides: Overrides) -> None:
    """Start the service in a session of its own, print what it says, return once it answers.

    Raises: StartFailed if it ended instead.
    """
    service = load_service(file, overrides)  # a mistake in the file is said here, not in a log
    run = RunDir(state_dir(os.environ) / service.metadata.name)
    os.close(_take_lock(run))
    run.logs.mkdir(parents=True, exist_ok=True, mode=0o700)
    begin_anew(run.logs)
    log_path = run.log_of(SUPERVISOR_LOG)
    arguments = [*(["--file", str(file)] if file else []), *overrides.arguments()]
    with open(log_path, "wb", opener=_open_private) as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "baton", "up", *arguments],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    with open(log_path, "rb") as said:
        try:
            while supervisor.poll() is None and not _is_ready(run):
                _print_new(said.read())
                time.sleep(0.1)
        except KeyboardInterrupt:  # the supervisor has a session of its own, so the terminal's Ctrl-C is not for it
            supervisor.send_signal(signal.SIGINT)
            supervisor.wait()
            raise
        finally:
            _print_new(said.read())
    if supervisor.poll() is not None:
        raise StartFailed(f"the service ended with exit code {supervisor.returncode}; its log is {log_path}")


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _take_lock(run: RunDir) -> int:
    """Wait for the janitor of a run that has died, but not for a run that answers. Raises: AlreadyRunning."""
    try:
        send_command(run, Command(Verb.PS), timeout_s=5.0)
    except NotRunning:
        return take_lock(run, patience_s=LOCK_PATIENCE_S)
    except ControlError:
        pass  # it listens, if only just: stopping, perhaps
    return take_lock(run, patience_s=0.0)


def _is_ready(run: RunDir) -> bool:
    try:
        return send_command(run, Command(Verb.PS), timeout_s=5.0).state == "ready"
    except (NotRunning, ControlError):
        return False


def _print_new(text: bytes) -> None:
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
