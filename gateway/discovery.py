"""Where workers may be: files of the local mode's registry directory and a list of seeds. Hints, never the truth."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kvtransfer.protocol import baton_pb2 as pb

_ROLES = {"prefill": pb.ROLE_PREFILL, "decode": pb.ROLE_DECODE}


@dataclass(frozen=True, slots=True)
class Hint:
    """An address that may have a worker. The role is a guess where unspecified; `Hello` tells."""

    address: str
    role: pb.Role = pb.ROLE_UNSPECIFIED


class Discovery:
    """Reads the hints there are now. A file that is half written, foreign or gone is simply not a hint."""

    def __init__(self, registry_dir: Path | None, seeds: tuple[str, ...] = ()) -> None:
        self._directory = registry_dir
        self._seeds = tuple(Hint(seed) for seed in seeds)

    def hints(self) -> dict[str, Hint]:
        """By address; a registry file knows more than a seed and wins."""
        found = {seed.address: seed for seed in self._seeds}
        for path in self._files():
            hint = _read(path)
            if hint is not None:
                found[hint.address] = hint
        return found

    def _files(self) -> list[Path]:
        if self._directory is None:
            return []
        try:
            return sorted(self._directory.glob("*.json"))
        except OSError:
            return []


def _read(path: Path) -> Hint | None:
    try:
        entry = json.loads(path.read_bytes())
        return Hint(str(entry["address"]), _ROLES.get(entry["role"], pb.ROLE_UNSPECIFIED))
    except (OSError, ValueError, KeyError, TypeError):
        return None
