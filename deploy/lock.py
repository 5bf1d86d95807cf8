"""Writes the two lock files of the images: every package that they install, with the hashes that its index published.

    make lock

requirements.lock is all but torch.lock, which is torch and what only its CUDA builds need: an image for CPUs takes
torch from another index, whose files have other hashes.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
_TORCH = re.compile(r"(torch|triton|nvidia-|cuda-)")
_BUILDS = "hatchling\n"  # makes our own wheel: without it the build would fetch one that nobody has looked at


def main() -> None:
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "-", "--constraints", "constraints.txt"]
    command += ["--generate-hashes", "--universal", "--python-version", "3.11", "--no-annotate", "--no-header", "-q"]
    found = subprocess.run(command, cwd=ROOT, input=_BUILDS, capture_output=True, text=True, check=False)
    if found.returncode:
        sys.exit(found.stderr)
    packages = re.split(r"\n(?=[a-z])", found.stdout.strip())
    for name, of_torch in (("requirements.lock", False), ("torch.lock", True)):
        chosen = [each for each in packages if bool(_TORCH.match(each)) is of_torch]
        text = f"# {len(chosen)} packages; made by 'make lock' from pyproject.toml and constraints.txt.\n"
        (DEPLOY / name).write_text(text + "\n".join(chosen) + "\n")


if __name__ == "__main__":
    main()
