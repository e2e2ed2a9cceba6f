"""The file in which the operator says which revision serves: JSON {"servingRevision": "<revision>"}.

Kubernetes replaces it under us, late and whole. What cannot be read changes nothing: the last word stands.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from registry.entry import is_revision

log = logging.getLogger(__name__)

MAX_BYTES = 64 << 10


class RoutingFile:
    """`refresh` each second; `serving` is None until the file has said something."""

    def __init__(self, path: Path | None) -> None:
        self.serving: str | None = None
        self._path = path
        self._said = ""

    def refresh(self) -> None:
        if self._path is None:
            return
        try:
            revision = _read(self._path)
        except (OSError, ValueError) as error:
            self._say(f"{type(error).__name__}: {error}")
            return
        self._said = ""
        if revision != self.serving:
            log.info("serving revision", extra={"revision": revision, "before": self.serving})
            self.serving = revision

    def _say(self, reason: str) -> None:
        """Once for each reason, not each second."""
        if reason != self._said:
            self._said = reason
            extra = {"path": str(self._path), "reason": reason, "revision": self.serving}
            log.warning("routing file not usable; the last known revision stands", extra=extra)


def _read(path: Path) -> str:
    """Raises: OSError, ValueError."""
    with path.open("rb") as file:
        body: Any = json.loads(file.read(MAX_BYTES))
    revision: object = body.get("servingRevision") if isinstance(body, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]  # whatever stood there
    if not isinstance(revision, str) or not is_revision(revision):
        raise ValueError("servingRevision is missing or not a revision's name")
    return revision
