"""Logs as JSON lines (or text) on stderr, each with the request id it belongs to. Never prompts, tokens or secrets."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any, TextIO

request_id_var: ContextVar[str] = ContextVar("request_id", default="")

# Fields that hold what users say or what opens doors: replaced even if a caller passes them by mistake.
REDACTED_FIELDS = frozenset({
    "prompt", "prompts", "messages", "text", "content", "token_ids", "prompt_token_ids", "committed_token_ids",
    "secret", "authorization", "api_key",
})  # fmt: skip
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@contextlib.contextmanager
def request_scope(request_id: str) -> Generator[None]:
    """Every line logged inside carries this request id."""
    token = request_id_var.set(request_id)
    try:
        yield
    finally:
        request_id_var.reset(token)


def setup(level: str, log_format: str, process: str, stream: TextIO | None = None) -> None:
    """Send the root logger to one handler. `log_format` is "json" or "text"; `process` names this process."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(process) if log_format == "json" else TextFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").disabled = True


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The record's `extra` fields, with what must not be written replaced."""
    fields = {key: value for key, value in vars(record).items() if key not in _STANDARD_FIELDS}
    request_id = request_id_var.get()
    if request_id:
        fields.setdefault("request_id", request_id)
    return {key: "<redacted>" if key in REDACTED_FIELDS else value for key, value in fields.items()}


class JsonFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _iso_time(record.created),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        extras = "".join(f" {key}={value}" for key, value in fields_of(record).items())
        line = f"{_iso_time(record.created)} {record.levelname:<7} {self._process} {record.getMessage()}{extras}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _iso_time(created: float) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created))
    return f"{seconds}.{int(created % 1 * 1000):03d}Z"
