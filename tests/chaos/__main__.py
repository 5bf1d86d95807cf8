"""Faults against real processes: `python -m tests.chaos [--part NAME ...]`, or `make chaos PART=NAME ARGS=...`.

Each part runs in a process of its own. Root gives every node a network and a disk of its own; without it the parts
leave out what needs them, and say so. What was wrong at the end is printed and makes the exit code 1.
"""

import argparse
import subprocess
import sys

PARTS = ("faults", "storm", "goodput")
# Only when asked for: routers, bad lines, the same faults against others' software.
MORE = ("nat", "lines", "alternative")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=(*PARTS, *MORE), default=("faults", "storm"))
    given, rest = parser.parse_known_args()
    ended = [subprocess.run([sys.executable, "-m", f"tests.chaos.{part}", *rest], check=False) for part in given.part]
    return max(each.returncode != 0 for each in ended)


if __name__ == "__main__":
    sys.exit(main())
