"""Which kernels run where: from what was asked for and what is there, with a reason, or a refusal and what to do."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from engine.dispatch import Device, Dispatch, Kernels, ThisMachine, choose, enter
from engine.errors import ConfigInvalid
from engine.kv_memory import KVShape

GPU = "NVIDIA H200"


@dataclass
class FakeMachine:
    """Answers, and which questions were asked."""

    gpu_name: str = ""
    triton_version: str = "3.7.1"
    native_lack: str = ""
    asked: list[str] = field(default_factory=list[str])

    def gpu(self) -> str:
        self.asked.append("gpu")
        return self.gpu_name

    def triton(self) -> str:
        self.asked.append("triton")
        return self.triton_version

    def native_lacks(self) -> str:
        self.asked.append("native")
        return self.native_lack


BARE = {"triton_version": "", "native_lack": "no C++ compiler"}


@pytest.mark.parametrize(
    ("kernels", "device", "machine", "chosen"),
    [
        (None, None, {}, (Kernels.NATIVE, Device.CPU)),
        (None, None, BARE, (Kernels.REFERENCE, Device.CPU)),
        (None, None, {"gpu_name": GPU}, (Kernels.NATIVE, Device.CPU)),
        (None, Device.CPU, {"gpu_name": GPU}, (Kernels.NATIVE, Device.CPU)),
        (None, Device.CUDA, {"gpu_name": GPU}, (Kernels.TRITON, Device.CUDA)),
        (Kernels.TRITON, Device.CPU, {"gpu_name": GPU}, (Kernels.TRITON, Device.CPU)),
        (Kernels.NATIVE, None, {"gpu_name": GPU}, (Kernels.NATIVE, Device.CPU)),
        (Kernels.REFERENCE, None, {"gpu_name": GPU}, (Kernels.REFERENCE, Device.CPU)),
        (Kernels.REFERENCE, Device.CPU, BARE, (Kernels.REFERENCE, Device.CPU)),
    ],
)
def test_the_best_that_was_asked_for_and_is_there_is_chosen(
    kernels: Kernels | None, device: Device | None, machine: dict[str, str], chosen: tuple[Kernels, Device]
) -> None:
    found = choose(kernels, device, False, FakeMachine(**machine))
    assert (found.kernels, found.device) == chosen
    assert found.reason


@pytest.mark.parametrize(
    ("kernels", "device", "machine", "words"),
    [
        (None, Device.CUDA, {}, "this process sees no GPU"),
        (Kernels.TRITON, Device.CUDA, {}, "this process sees no GPU"),
        (None, Device.CUDA, {"gpu_name": GPU, "triton_version": ""}, r"extra gpu \(baton-serving\[gpu\]\)"),
        (Kernels.TRITON, Device.CPU, {"triton_version": ""}, r"extra gpu \(baton-serving\[gpu\]\)"),
        (Kernels.TRITON, None, {}, "--device cpu runs them in Triton's interpreter"),
        (Kernels.NATIVE, Device.CUDA, {"gpu_name": GPU}, "the native kernels run on the CPU alone"),
        (Kernels.REFERENCE, Device.CUDA, {"gpu_name": GPU}, "the reference kernels run on the CPU alone"),
        (Kernels.NATIVE, None, BARE, "no C\\+\\+ compiler"),
    ],
)
def test_what_cannot_be_had_is_refused_with_what_to_do(
    kernels: Kernels | None, device: Device | None, machine: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigInvalid, match=words):
        choose(kernels, device, False, FakeMachine(**machine))


def test_deterministic_mode_takes_native_and_triton_and_refuses_the_references() -> None:
    assert choose(None, None, True, FakeMachine()).kernels is Kernels.NATIVE
    assert choose(Kernels.TRITON, Device.CPU, True, FakeMachine()).kernels is Kernels.TRITON
    for kernels in (None, Kernels.REFERENCE):
        with pytest.raises(ConfigInvalid, match="results of the reference kernels depend on the batch"):
            choose(kernels, Device.CPU, True, FakeMachine(**BARE))


def test_nothing_is_looked_for_that_cannot_change_the_choice() -> None:
    """A GPU is asked for by an import of CUDA, the native kernels are compiled to see whether they can be had."""
    for kernels, device, asked in (
        (None, Device.CPU, ["native"]),
        (Kernels.REFERENCE, None, []),
        (Kernels.TRITON, Device.CPU, ["triton"]),
        (None, Device.CUDA, ["gpu", "triton"]),
    ):
        machine = FakeMachine(gpu_name=GPU)
        choose(kernels, device, False, machine)
        assert machine.asked == asked


def test_triton_on_the_cpu_means_its_interpreter_and_on_a_gpu_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    enter(Dispatch(Kernels.NATIVE, Device.CPU, ""))
    enter(Dispatch(Kernels.TRITON, Device.CUDA, ""))
    import os

    assert "TRITON_INTERPRET" not in os.environ
    assert os.environ["TRITON_DEFAULT_FP_FUSION"] == "1"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    enter(Dispatch(Kernels.TRITON, Device.CPU, ""))
    assert os.environ["TRITON_INTERPRET"] == "1"
    with pytest.raises(ConfigInvalid, match="TRITON_INTERPRET is set"):
        enter(Dispatch(Kernels.TRITON, Device.CUDA, ""))


def test_a_worker_sizes_its_kv_by_the_gpu_and_keeps_it_there(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a machine without one goes: up to the allocation."""
    from engine import device_kv, worker

    asked = list[object]()

    def refuse(shape: KVShape, num_blocks: int, device: object) -> None:
        asked.append((num_blocks, str(device), shape.dtype))
        raise MemoryError

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(worker, "ThisMachine", lambda: FakeMachine(gpu_name=GPU))
    monkeypatch.setattr(device_kv, "read_device_memory", lambda device: device_kv.DeviceMemory(8 << 30, 80 << 30))
    monkeypatch.setattr(device_kv, "DeviceKVMemory", refuse)
    spec = worker.ReplicaSpec(model=tiny_llama, device=Device.CUDA, max_num_seqs=2)
    with pytest.raises(MemoryError):
        worker.load_replica(spec, lambda phase, fraction: None)
    assert asked == [(2 * 2048 // 16, "cuda", "bfloat16")]


def test_a_machine_without_a_gpu_says_so(tiny_llama: Path) -> None:
    from engine import worker

    spec = worker.ReplicaSpec(model=tiny_llama, device=Device.CUDA)
    with pytest.raises(ConfigInvalid, match="this process sees no GPU"):
        worker.load_replica(spec, lambda phase, fraction: None)


def test_a_machine_without_a_compiler_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.kernels.native import library

    library.load_library.cache_clear()
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    assert "no C++ compiler" in ThisMachine().native_lacks()
    library.load_library.cache_clear()


def test_nothing_imports_triton_unless_its_kernels_are_chosen() -> None:
    """In a process of its own: tests of the kernels have imported it into this one."""
    code = (
        "import importlib, pathlib, sys\n"
        "for path in sorted(pathlib.Path('engine/kernels').glob('*/*.py')):\n"
        "    if path.stem in ('reference', 'native'): importlib.import_module('.'.join(path.with_suffix('').parts))\n"
        "import engine.runner, engine.worker, engine.dispatch, prefill_service.worker, decode_service.worker\n"
        "engine.dispatch.ThisMachine().triton()\n"
        "sys.exit('triton' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=100, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
