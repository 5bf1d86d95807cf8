"""What will be thrown at us, row by row: runs the tests that tests/badinputs.toml names, and prints what they show.

    make badinputs                       # or a few rows: ARGS="A07 F01"

Ends with 1 if a named test fails. A row that no test shows yet is counted and said, and fails nothing. "otherwise": its tests
pass, and they show something else than the row asks for, which we mean to keep; why is said. Floods, lines and homes behind
routers are among them: it takes longer than make test, a machine with nothing else to do, and root for some.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

TABLE = Path(__file__).with_suffix(".toml")
SHOWN = ("all", "otherwise", "some", "none", "not applicable")


@dataclass(frozen=True)
class Row:
    where: str
    input: str
    wanted: str
    shown: str
    tests: tuple[str, ...] = ()
    lacking: str = ""  # what no test shows; why it is answered otherwise than wanted, or does not apply


@dataclass(eq=False)  # pytest keeps its plugins in sets
class Outcomes:
    """A pytest plugin: what became of each test, whatever its parameters."""

    failed: set[str] = field(default_factory=set)
    passed: set[str] = field(default_factory=set)

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = report.nodeid.partition("[")[0]
        if report.failed:
            self.failed.add(test)
        elif report.when == "call" and report.passed:
            self.passed.add(test)


def rows() -> dict[str, Row]:
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {name: Row(**{**row, "tests": tuple(row.get("tests", ()))}) for name, row in table.items()}


def verdict(row: Row, outcomes: Outcomes) -> str:
    if any(test in outcomes.failed for test in row.tests):
        return "FAIL"
    if any(test not in outcomes.passed for test in row.tests):
        return "skipped"  # a machine without root, say
    words = {"all": "pass", "otherwise": "otherwise", "some": "partly", "none": "open", "not applicable": "n/a"}
    return words[row.shown]


def run(chosen: Iterable[Row]) -> tuple[Outcomes, int]:
    """And pytest's exit code: tests that it could not even collect fail no row, but they fail the run."""
    outcomes, code = Outcomes(), 0
    if tests := sorted({test for row in chosen for test in row.tests}):
        code = int(pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", *tests], plugins=[outcomes]))
    return outcomes, code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="ids; all without")
    given, table = parser.parse_args(), rows()
    if unknown := set(given.rows) - set(table):
        parser.error(f"no row {', '.join(sorted(unknown))}")
    chosen = {name: row for name, row in table.items() if not given.rows or name in given.rows}
    outcomes, code = run(chosen.values())
    verdicts = {name: verdict(row, outcomes) for name, row in chosen.items()}
    for name, row in chosen.items():
        print(f"{name}  {verdicts[name]:9}  {row.where}: {row.input}")
        if verdicts[name] == "FAIL":
            print(*(f"                {test}" for test in row.tests if test in outcomes.failed), sep="\n")
        elif row.lacking:
            print(f"                {row.lacking}")
    print("\n" + ", ".join(f"{count} {word}" for word, count in Counter(verdicts.values()).most_common()))
    sys.exit(code)


if __name__ == "__main__":
    main()
