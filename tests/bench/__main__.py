"""What Barnraise costs, measured: `python -m tests.bench [--part NAME ...]`, or `make bench PART=NAME`.

Each part runs in a process of its own, so that none inherits another's threads or network namespace; alone it is
`python -m tests.bench.NAME --help`. Goals are printed beside what was measured. Nothing fails because it was slow.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

PARTS = (
    "startup",
    "codec",
    "exactness",
    "wire",
    "quality",
    "alternatives",
    "robust",
    "round_scale",
    "slow_network",
    "memory",
    "trainer",
    "progress",
    "overhead",
    "utilisation",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    given, words = parser.parse_known_args()
    if words and len(given.part) != 1:
        parser.error(f"{' '.join(words)}: only one part at a time takes options of its own")
    broken = []
    for part in given.part:
        if subprocess.run([sys.executable, "-m", f"tests.bench.{part}", *words], check=False).returncode:
            broken.append(part)
            print(f"\n{part}: it ended with an error and measured nothing", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
