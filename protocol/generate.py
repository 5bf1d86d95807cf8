"""Regenerates protocol/v1 from its .proto file: `python -m protocol.generate`, from the repository's root.

The paths matter: hivemind registers bare file names (auth.proto, dht.proto, averaging.proto ...) in the
process-wide descriptor pool, so ours must be known as protocol/v1/barnraise.proto.
"""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "protocol/v1/barnraise.proto"
OUTPUTS = ("python_out", "grpc_python_out", "mypy_out", "mypy_grpc_out")


def generate(into: Path) -> None:
    """Write the four generated files below `into`, in the folders of their source."""
    scripts = Path(sys.executable).parent  # where protoc-gen-mypy lies; a virtual environment need not be on PATH
    os.environ["PATH"] = f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"
    common = str(files("grpc_tools") / "_proto")
    failed = protoc.main(["protoc", f"-I{ROOT}", f"-I{common}", *(f"--{out}={into}" for out in OUTPUTS), SOURCE])
    if failed:
        raise SystemExit(f"protoc ended with {failed}")


def stale() -> list[str]:
    """Committed files that are not what the .proto file generates now."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        generate(fresh)
        made = [path.relative_to(fresh) for path in sorted(fresh.rglob("*")) if path.is_file()]
        return [str(name) for name in made if not _same(ROOT / name, fresh / name)]


def _same(committed: Path, fresh: Path) -> bool:
    return committed.exists() and committed.read_bytes() == fresh.read_bytes()


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        old = stale()
        raise SystemExit(f"run make proto; stale: {', '.join(old)}" if old else 0)
    generate(ROOT)
