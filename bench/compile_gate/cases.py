"""Finds what ships: the `COMPILE_CASES` of every `engine/kernels/*/launch.py`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from engine.kernels.compile_case import CompileCase

KERNELS = Path(__file__).parents[2] / "engine" / "kernels"


@dataclass(frozen=True, slots=True)
class Job:
    """One case on one architecture."""

    op: str
    case: CompileCase
    arch: int

    @property
    def title(self) -> str:
        return f"{self.op}/{self.case.name} [{self.case.shape}] sm_{self.arch}"


def shipped_modules() -> list[str]:
    return sorted(f"engine.kernels.{path.parent.name}.launch" for path in KERNELS.glob("*/launch.py"))


def collect(modules: list[str]) -> list[Job]:
    """Every case of these modules on each of its architectures."""
    jobs = [Job(_op_of(name), case, arch) for name in modules for case in _cases_of(name) for arch in case.archs]
    titles = [job.title for job in jobs]
    if twice := sorted({title for title in titles if titles.count(title) > 1}):
        raise ValueError(f"listed twice: {twice}")
    return jobs


def modules_without_cases(modules: list[str]) -> list[str]:
    """What these launch would ship unseen."""
    return [name for name in modules if not _cases_of(name)]


def _cases_of(module: str) -> tuple[CompileCase, ...]:
    return getattr(importlib.import_module(module), "COMPILE_CASES", ())


def _op_of(module: str) -> str:
    parts = module.split(".")
    return parts[-2] if parts[-1] == "launch" else parts[-1]
