"""Generate meshlocal/wire/pb from protos/, or with --check say which modules are stale."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "protos"
TARGET = ROOT / "meshlocal" / "wire" / "pb"
WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"
"""What protobuf itself defines, `google.protobuf.Any` for example."""


def generate() -> dict[str, bytes]:
    """Module file name → contents. Their names differ, so the folders flatten; imports of each other go by that."""
    sources = sorted(SOURCES.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as out:
        paths = [f"--proto_path={SOURCES}", f"--proto_path={WELL_KNOWN}"]
        arguments = ["protoc", *paths, f"--python_out={out}", f"--pyi_out={out}"]
        status = protoc.main([*arguments, *(str(source) for source in sources)])
        if status != 0:
            sys.exit(f"protoc failed with status {status}")
        return {path.name: _flattened(path.read_bytes()) for path in sorted(Path(out).rglob("*_pb2.py*"))}


def _flattened(module: bytes) -> bytes:
    return re.sub(
        rb"^from (?!google\.)[\w.]+ import (\w+_pb2) as", rb"from meshlocal.wire.pb import \1 as", module, flags=re.M
    )


def main() -> None:
    modules = generate()
    committed = {path.name: path.read_bytes() for path in TARGET.glob("*_pb2.py*")}
    if sys.argv[1:] == ["--check"]:
        stale = sorted(name for name in modules.keys() | committed.keys() if modules.get(name) != committed.get(name))
        if stale:
            sys.exit(f"stale in {TARGET.relative_to(ROOT)}: {', '.join(stale)}; run `make protos`")
        print(f"generated code is current: {len(modules)} files")
        return
    for name in committed.keys() - modules.keys():
        (TARGET / name).unlink()
    for name, contents in modules.items():
        (TARGET / name).write_bytes(contents)
    print(f"wrote {len(modules)} files to {TARGET.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
