"""Guards of the repository's shape: what must not exist, what must, and what must never be called."""

from __future__ import annotations

import ast
import operator
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "baton", "decode_service", "engine", "gateway", "kvtransfer", "modelfiles", "operator", "prefill_service",
    "registry", "servicekit", "workerkit",
)  # fmt: skip
SOURCE_FOLDERS = (*PACKAGES, "tests", "bench", "scripts")
BANNED_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"}
BANNED_CALLS = {"eval", "exec"}
BANNED_ATTRIBUTES = {("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("torch", "load")}
# Files that docs may name although they are made, not kept.
MADE = (".venv", ".cache", "dist/")


def python_files() -> list[Path]:
    return sorted(path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*.py"))


def test_operator_is_the_standard_librarys() -> None:
    """An `operator/__init__.py` breaks `import collections` for every process started from the root."""
    assert not (ROOT / "operator" / "__init__.py").exists()
    assert Path(operator.__file__).parent == Path(sysconfig.get_paths()["stdlib"])
    code = "import collections, operator; print(operator.__file__)"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert Path(said.stdout.strip()).parent == Path(sysconfig.get_paths()["stdlib"])


def test_no_package_below_tests() -> None:
    """`tests/kvtransfer/__init__.py` would shadow our own package."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_test_files_have_different_names() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("module", ["baton", "gateway", "prefill_service", "decode_service"])
def test_every_process_has_help_when_started_from_the_root(module: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("BATON_")}
    said = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert "usage" in said.stdout.lower()


def named_files(text: str) -> Iterator[str]:
    """Paths of this repository that a document names: in `code`, or as the target of a link."""
    for name in re.findall(r"`([\w./-]+)`|\]\(([\w./-]+)(?:#[\w-]*)?\)", text):
        path = (name[0] or name[1]).rstrip("/")
        first = path.split("/")[0]
        if "/" in path and first and ((ROOT / first).is_dir() or first in (".", "..")) and not path.startswith(MADE):
            yield path


@pytest.mark.parametrize(
    "document", [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))]
)
def test_files_that_documents_name_exist(document: str) -> None:
    folder = (ROOT / document).parent
    missing = [
        name
        for name in named_files((ROOT / document).read_text())
        if not (ROOT / name).exists() and not (folder / name).exists()
    ]
    assert missing == []


def banned(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each import or call that would run what a file or a peer says."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, a.name) for a in names if a.name.split(".")[0] in BANNED_MODULES)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in BANNED_MODULES:
                yield node.lineno, module
            case ast.ImportFrom(module=str(module), names=names):
                yield from ((node.lineno, f"{module}.{a.name}") for a in names if (module, a.name) in BANNED_ATTRIBUTES)
            case ast.Call(func=ast.Name(id=name)) if name in BANNED_CALLS:
                yield node.lineno, name
            case ast.Attribute(value=ast.Name(id=module), attr=name) if (module, name) in BANNED_ATTRIBUTES:
                yield node.lineno, f"{module}.{name}"
            case _:
                pass


def test_nothing_runs_what_a_file_or_a_peer_says() -> None:
    """No pickle, marshal, shelve, eval, exec, yaml.load or torch.load anywhere."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in python_files()
        for line, name in banned(ast.parse(path.read_text(), str(path)))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "eval('1')", "exec(x)", "import yaml; yaml.load(f)",
        "torch.load(p)", "from torch import load", "import marshal", "import shelve as s",
    ],
)  # fmt: skip
def test_the_guard_sees_each_banned_call(source: str) -> None:
    assert list(banned(ast.parse(source)))


def test_the_guard_lets_methods_of_such_names_pass() -> None:
    assert not list(banned(ast.parse("model.eval(); json.load(f); yaml.safe_load(f)")))


def test_no_registry_host_is_named_in_the_build() -> None:
    """Ordinary clients know where they fetch from; a mirror must keep working."""
    pattern = re.compile(r"pypi\.org|pythonhosted|huggingface\.co|hf\.co|registry\.npmjs|proxy\.golang", re.IGNORECASE)
    build = [ROOT / "Makefile", ROOT / ".ci" / "run", ROOT / "pyproject.toml", *(ROOT / "scripts").iterdir()]
    sources = [path for path in python_files() if ROOT / "tests" not in path.parents]
    assert [path for path in (*build, *sources) if pattern.search(path.read_text())] == []


def test_every_dependency_is_locked_to_a_version_that_it_allows() -> None:
    """`make` installs the versions of scripts/constraints.txt; what is missing there floats until it breaks us."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [
        *project["dependencies"],
        *(each for extra in ("worker", "operator", "nixl", "dev") for each in extras[extra]),
    ]
    lines = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    locked = {each.name: each.specifier for each in map(Requirement, lines)}
    for wanted in map(Requirement, asked):
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        version = next(iter(locked[name])).version
        assert version in wanted.specifier, f"{name}: locked to {version}, pyproject.toml wants {wanted.specifier}"


def test_nothing_between_a_step_and_its_tokens_waits_for_the_device() -> None:
    """Reading a tensor on the host stops it until the device has come so far, and a graph cannot record it."""
    waits = {"item", "tolist", "cpu", "numpy", "synchronize", "nonzero"}
    files = [*(ROOT / "engine" / "kernels").glob("*/launch.py")]
    files += [ROOT / "engine" / "models" / name for name in ("decoder.py", "triton_ops.py")]
    files += [ROOT / "engine" / name for name in ("step_tensors.py",)]
    assert len(files) > 8
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} calls .{node.func.attr}()"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in waits
    ]
    assert found == []
