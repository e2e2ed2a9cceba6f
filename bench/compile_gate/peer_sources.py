"""Imports kernels of other projects from their unpacked sources, without those projects' own dependencies.

Only the files that hold kernels are executed; whatever else they import from their package is a stand-in that answers
anything with itself, except where a number matters for the compiled code.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any


class StandIn:
    """Takes any attribute and any call. As a decorator it gives back what it decorates."""

    def __getattr__(self, name: str) -> StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **_: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else self


class Nvidia(StandIn):
    """The platform that we compile for."""

    def fp8_dtype(self) -> Any:
        import torch

        return torch.float8_e4m3fn

    def is_rocm(self) -> bool:
        return False

    def is_xpu(self) -> bool:
        return False

    def has_device_capability(self, _: int) -> bool:
        return True


def known_answers() -> dict[str, dict[str, Any]]:
    """By module, the names that must be what they are."""
    import triton
    import triton.language as tl

    return {
        "vllm.triton_utils": {"tl": tl, "triton": triton},
        "vllm.platforms": {"current_platform": Nvidia()},
        "vllm.model_executor.layers.quantization.utils.quant_utils": {"get_fp8_min_max": lambda: (-448.0, 448.0)},
    }


class _Stub(Loader):
    def __init__(self, answers: Mapping[str, Any]) -> None:
        self._answers = answers

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        nothing = StandIn()
        module.__dict__.update(self._answers)
        module.__dict__["__getattr__"] = lambda name: nothing.__getattr__(name)


class _Finder(MetaPathFinder):
    """Files for `real` modules below `root`, stand-ins for the rest of `package`."""

    def __init__(self, package: str, root: Path, real: Sequence[str]) -> None:
        self._package, self._root, self._real = package, root, frozenset(real)
        self._answers = known_answers()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        del path, target
        if fullname.split(".")[0] != self._package:
            return None
        if fullname in self._real:
            return spec_from_file_location(fullname, self._root.joinpath(*fullname.split(".")).with_suffix(".py"))
        return ModuleSpec(fullname, _Stub(self._answers.get(fullname, {})), is_package=True)


@contextmanager
def peer_package(package: str, root: Path, real: Sequence[str]) -> Iterator[None]:
    """Meanwhile `package` means the sources below `root` (root/package/...), `real` of its modules executed."""
    finder = _Finder(package, root, real)
    before = {name for name in sys.modules if name.split(".")[0] == package}
    if before:
        raise ImportError(f"{package} is imported already")
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]


def find_kernel(module: str, name: str) -> Any:
    """The `@triton.jit` function, out of an autotuner if it is in one. Raises: ImportError, AttributeError."""
    found = getattr(importlib.import_module(module), name)
    while type(found).__name__ in ("Autotuner", "Heuristics"):
        found = found.fn
    return found
