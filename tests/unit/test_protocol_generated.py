"""The checked-in protocol modules are what protoc makes of baton.proto."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtransfer.protocol import baton_pb2, baton_pb2_grpc, generate


def test_generated_files_are_current(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    generate.generate(tmp_path)
    for name in generate.GENERATED:
        checked_in = (generate.PROTOCOL_DIR / name).read_text()
        assert (tmp_path / name).read_text() == checked_in, f"{name} is stale: python -m kvtransfer.protocol.generate"


def test_stubs_use_the_messages_of_the_package() -> None:
    assert baton_pb2_grpc.baton__pb2 is baton_pb2
