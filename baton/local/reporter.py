"""Tell the user what happens: moving bars on a terminal, one plain line for each change elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from baton.local.control import ProcessView
    from baton.local.probe import FirstToken

EXAMPLE_MAX_TOKENS = 128  # a small model may go round in circles up to the end of its context: minutes


@dataclass(frozen=True, slots=True)
class Ready:
    """What a started service tells its user."""

    url: str
    model_id: str
    seconds_to_ready: float
    seconds_to_first_token: float
    first_token: FirstToken | None  # None: no key at hand to ask for one
    needs_api_key: bool


class Reporter(Protocol):
    def say(self, text: str) -> None:
        """One line that stays."""
        ...

    def update(self, views: Sequence[ProcessView]) -> None:
        """Where every process stands; called many times a second."""
        ...

    def ready(self, ready: Ready) -> None: ...

    def close(self) -> None: ...


def make_reporter(started_at: float) -> Reporter:
    return RichReporter() if sys.stdout.isatty() else PlainReporter(started_at)


class PlainReporter:
    """Lines with the seconds since the start: for logs, CI and --detach."""

    def __init__(self, started_at: float) -> None:
        self._started_at = started_at
        self._last: dict[str, str] = {}

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started_at:6.2f} s] {text}", flush=True)

    def update(self, views: Sequence[ProcessView]) -> None:
        for view in views:
            words = f"{view.state}: {view.phase}" if view.phase else view.state
            if self._last.get(view.worker_id) != words:
                self._last[view.worker_id] = words
                self.say(f"{view.worker_id:<10} {words}")

    def ready(self, ready: Ready) -> None:
        print(banner(ready), flush=True)

    def close(self) -> None:
        """Nothing is open."""


class RichReporter:
    """A bar for each process until the service is ready."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self._console = Console(highlight=False)
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(),
            TimeElapsedColumn(), TextColumn("{task.fields[words]}"),
        )  # fmt: skip
        self._progress: Progress = Progress(*columns, console=self._console)
        self._tasks: dict[str, TaskID] = {}
        self._progress.start()

    def say(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False, soft_wrap=True)

    def update(self, views: Sequence[ProcessView]) -> None:
        for view in views:
            if view.worker_id not in self._tasks:
                self._tasks[view.worker_id] = self._progress.add_task(view.worker_id, total=100.0, words="")
            self._progress.update(self._tasks[view.worker_id], completed=view.percent, words=view.phase or view.state)

    def ready(self, ready: Ready) -> None:
        self.close()
        self._console.print(banner(ready), markup=False, soft_wrap=True)  # to be copied: no line breaks

    def close(self) -> None:
        self._progress.stop()


def own_command() -> str:
    """What to type for `baton` here: its name, or where it lies (`make up` activates nothing)."""
    if shutil.which("baton"):
        return "baton"
    script = Path(sys.executable).with_name("baton")
    if not script.exists():
        return f"{sys.executable} -m baton"
    return str(script.relative_to(Path.cwd())) if script.is_relative_to(Path.cwd()) else str(script)


def banner(ready: Ready) -> str:
    """What a newcomer can do now, to be copied."""
    header = ' -H "Authorization: Bearer $API_KEY"' if ready.needs_api_key else ""
    key = 'os.environ["API_KEY"]' if ready.needs_api_key else '"none"'
    first = "not measured: the keys file holds digests only"
    if ready.first_token is not None:
        request_ms = ready.first_token.seconds * 1e3
        first = f"{ready.seconds_to_first_token:.1f} s, the request's part {request_ms:.0f} ms"
    baton = own_command()
    message = '[{"role": "user", "content": "Hello!"}]'
    body = f'{{"model": "{ready.model_id}", "stream": true, "max_tokens": {EXAMPLE_MAX_TOKENS}, "messages": {message}}}'
    return f"""
{ready.model_id} answers at {ready.url}, ready after {ready.seconds_to_ready:.1f} s
time to first streamed token: {first}

  curl -N {ready.url}/v1/chat/completions -H 'Content-Type: application/json'{header} \\
    -d '{body}'

  python3 -c '{"import os; " if ready.needs_api_key else ""}from openai import OpenAI
client = OpenAI(base_url="{ready.url}/v1", api_key={key})
answer = client.chat.completions.create(model="{ready.model_id}", max_tokens={EXAMPLE_MAX_TOKENS}, messages={message})
print(answer.choices[0].message.content)'

  {baton} ps | {baton} scale decode 2 | {baton} logs
  {baton} down or, in the foreground, Ctrl-C stops everything
"""
