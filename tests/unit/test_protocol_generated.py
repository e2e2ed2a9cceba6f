"""The checked-in protocol modules are what protoc makes of baton.proto."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kvtransfer.protocol import baton_pb2, baton_pb2_grpc, generate


def test_generated_files_are_current(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    # In a process of its own: protoc's extension crashes where NIXL's libraries, of earlier tests, are loaded.
    code = "import sys, pathlib; from kvtransfer.protocol.generate import generate; generate(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, cwd=generate.PROTOCOL_DIR.parents[1])
    for name in generate.GENERATED:
        checked_in = (generate.PROTOCOL_DIR / name).read_text()
        assert (tmp_path / name).read_text() == checked_in, f"{name} is stale: python -m kvtransfer.protocol.generate"


def test_stubs_use_the_messages_of_the_package() -> None:
    assert baton_pb2_grpc.baton__pb2 is baton_pb2


def test_the_floors_of_the_requirements_are_the_runtimes_that_the_generated_code_accepts() -> None:
    with (generate.PROTOCOL_DIR.parents[1] / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    stated = " ".join((*project["dependencies"], *project["optional-dependencies"]["dev"]))
    floors = dict(re.findall(r"(grpcio|grpcio-tools|protobuf)>=([\d.]+)", stated))
    generated = (generate.PROTOCOL_DIR / "baton_pb2.py").read_text()
    protobuf = re.search(r"Domain\.PUBLIC,\s+(\d+),\s+(\d+),\s+(\d+)", generated)
    assert protobuf is not None
    grpcio = baton_pb2_grpc.GRPC_GENERATED_VERSION
    assert floors == {"grpcio": grpcio, "grpcio-tools": grpcio, "protobuf": ".".join(protobuf.groups())}
