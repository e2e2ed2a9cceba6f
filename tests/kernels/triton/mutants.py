"""Kernels with one thing broken, to see that a check notices."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from triton.runtime.errors import InterpreterError


def assert_caught(
    launch: ModuleType, old: str, new: str, check: Callable[[], None], folder: Path, patch: pytest.MonkeyPatch
) -> None:
    """`check` holds, and no longer once `launch` uses kernels whose source says `new` instead of `old`.

    A `check` leaves room around what kernels write: a mutant may write past its end.
    """
    check()
    kernels = Path(str(launch.__file__)).with_name("triton.py")
    source = kernels.read_text()
    assert old in source, f"{kernels} no longer says {old!r}"
    path = folder / "mutated_kernels.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutated_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    mutated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutated)
    for name in vars(launch).keys() & vars(mutated).keys():
        if name.endswith("_kernel"):
            patch.setattr(launch, name, getattr(mutated, name))
    # What a mutant reads past an end may be a number whose square numpy warns of, and warnings are errors.
    with pytest.raises((AssertionError, InterpreterError)):
        check()
