"""Regenerate the protocol's Python from baton.proto: `python -m kvtransfer.protocol.generate`.

The three generated files are checked in, so that neither users nor images need grpcio-tools. A unit test runs this into
a temporary folder and compares.
"""

from __future__ import annotations

import importlib
import importlib.resources
import sys
from pathlib import Path
from typing import Any

PROTOCOL_DIR = Path(__file__).resolve().parent
GENERATED = ("baton_pb2.py", "baton_pb2.pyi", "baton_pb2_grpc.py")


def generate(into: Path) -> None:
    """Write the generated files into the folder `into`.

    Raises: ImportError without grpcio-tools, RuntimeError if protoc refuses the file.
    """
    protoc: Any = importlib.import_module("grpc_tools.protoc")  # only in development; has no type hints
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    status: int = protoc.main(
        [
            "protoc",
            f"--proto_path={PROTOCOL_DIR}",
            f"--proto_path={well_known}",
            f"--python_out={into}",
            f"--pyi_out={into}",
            f"--grpc_python_out={into}",
            "baton.proto",
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc ended with status {status}")
    _import_from_package(into / "baton_pb2_grpc.py")
    _complete_types(into / "baton_pb2.pyi")


def _complete_types(path: Path) -> None:
    """protoc writes bare `Mapping` for a message given as a dict, which strict type checking refuses everywhere."""
    source = path.read_text()
    path.write_text(source.replace("_Mapping]", "_Mapping[str, object]]"))


def _import_from_package(path: Path) -> None:
    """protoc writes `import baton_pb2`, which would need this folder on sys.path."""
    source = path.read_text()
    plain = "import baton_pb2 as baton__pb2"
    assert source.count(plain) == 1, "grpc_tools changed how it imports the messages"
    path.write_text(source.replace(plain, "from kvtransfer.protocol import baton_pb2 as baton__pb2"))


if __name__ == "__main__":
    generate(PROTOCOL_DIR)
    print("\n".join(str(PROTOCOL_DIR / name) for name in GENERATED), file=sys.stderr)
