"""Which kernels run on which device. Decided once, at the start, from what was asked for and what is there.

            cpu                                       cuda
native      C++ kernels (the default on the CPU)      -
triton      in Triton's interpreter: a proof          compiled; never run on one yet
reference   plain torch, where nothing compiles       -

Nothing here imports torch or Triton before it must: a machine that lacks Triton never hears of it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Protocol

from engine.errors import ConfigInvalid


class Kernels(StrEnum):
    """Who computes."""

    NATIVE = "native"
    TRITON = "triton"
    REFERENCE = "reference"


class Device(StrEnum):
    """Where weights and KV are."""

    CPU = "cpu"
    CUDA = "cuda"


class Dtype(StrEnum):
    """Of the weights. Native kernels compute and keep KV in float32 with either; Triton kernels keep KV in this type,
    too, and accumulate in float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class KVPlace(Enum):
    """Where KV is, as those see it who move it between processes."""

    HOST = "host"  # memory that others may map and read
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class Dispatch:
    """The decision, and why, for the log."""

    kernels: Kernels
    device: Device
    reason: str

    @property
    def is_interpreted(self) -> bool:
        return self.kernels is Kernels.TRITON and self.device is Device.CPU


class Machine(Protocol):
    """What is there. Asked only for what the decision needs: each answer costs an import, or a compilation."""

    def gpu(self) -> str:
        """The GPU's name; empty if this process sees none."""
        ...

    def triton(self) -> str:
        """Triton's version; empty if it is not installed."""
        ...

    def native_lacks(self) -> str:
        """Why the native kernels cannot be had; empty if they can."""
        ...


def choose(kernels: Kernels | None, device: Device | None, deterministic: bool, machine: Machine) -> Dispatch:
    """Kernels and device of a worker; None: whichever is best here. Raises: ConfigInvalid."""
    if device is Device.CUDA:
        return _on_asked_gpu(kernels, machine)
    match kernels:
        case Kernels.TRITON:
            if device is None:
                rule = "no device is stated; --device cpu runs them in Triton's interpreter: a proof, not for speed"
                raise ConfigInvalid("kernels", kernels.value, rule)
            _need_triton("kernels", kernels.value, machine)
            return Dispatch(kernels, Device.CPU, "asked for")
        case Kernels.NATIVE:
            if lack := machine.native_lacks():
                raise ConfigInvalid("kernels", kernels.value, lack)
            return Dispatch(kernels, Device.CPU, "asked for")
        case Kernels.REFERENCE:
            _refuse_references(deterministic, "reference kernels were asked for")
            return Dispatch(kernels, Device.CPU, "asked for")
        case None:
            return _best_on_cpu(deterministic, machine)


_NO_TRITON = "Triton is not installed: install the extra gpu (baton-serving[gpu])"


def _on_asked_gpu(kernels: Kernels | None, machine: Machine) -> Dispatch:
    if kernels not in (None, Kernels.TRITON):
        raise ConfigInvalid("device", "cuda", f"the {kernels} kernels run on the CPU alone: use --kernels triton")
    if not machine.gpu():
        raise ConfigInvalid(
            "device", "cuda", "this process sees no GPU (nvidia-smi, CUDA_VISIBLE_DEVICES, torch's build)"
        )
    _need_triton("device", "cuda", machine)
    return Dispatch(Kernels.TRITON, Device.CUDA, "asked for")


def _best_on_cpu(deterministic: bool, machine: Machine) -> Dispatch:
    lack = machine.native_lacks()
    if not lack:
        return Dispatch(Kernels.NATIVE, Device.CPU, "the fastest on a CPU")
    _refuse_references(deterministic, lack)
    return Dispatch(Kernels.REFERENCE, Device.CPU, f"several times slower than native: {lack}")


def _need_triton(field: str, value: str, machine: Machine) -> None:
    if not machine.triton():
        raise ConfigInvalid(field, value, _NO_TRITON)


def _refuse_references(deterministic: bool, why: str) -> None:
    if deterministic:
        rule = f"results of the reference kernels depend on the batch, and nothing else can run: {why}"
        raise ConfigInvalid("deterministic", True, rule)


class ThisMachine:
    """The Machine that this process is on."""

    def gpu(self) -> str:
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else ""

    def triton(self) -> str:
        if importlib.util.find_spec("triton") is None:
            return ""
        return importlib.metadata.version("triton")

    def native_lacks(self) -> str:
        from engine.kernels.native.build import KernelsUnavailable
        from engine.kernels.native.library import load_library

        try:
            load_library()
        except KernelsUnavailable as error:
            return str(error)
        return ""


def set_up_compiler() -> None:
    """Settle what Triton's compiler would take from its own defaults, unless the environment says otherwise.

    Multiplications and additions are fused: Triton 3.10 will not by default, and bits and speed would change with it.
    """
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def enter(dispatch: Dispatch) -> None:
    """Make Triton interpret or compile. Before the first kernel is imported: a kernel is made for one of the two.

    Raises: ConfigInvalid where the environment says the opposite.
    """
    set_up_compiler()
    if dispatch.is_interpreted:
        os.environ["TRITON_INTERPRET"] = "1"
        from engine.kernels.interpreter import settle_dots

        settle_dots()
    elif dispatch.kernels is Kernels.TRITON and os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise ConfigInvalid("device", "cuda", "TRITON_INTERPRET is set, which would interpret every kernel: unset it")
