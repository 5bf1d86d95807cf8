"""How the bench shows what it measured: a table with the command that repeats it, the same as JSON in results/, a picture."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "results"


@dataclass(frozen=True)
class Row:
    """One measured value. A goal is the most that it may be; without one the row only says what is."""

    what: str
    value: float
    unit: str = ""
    at_most: float | None = None
    digits: int = 3  # after the point
    note: str = ""

    @property
    def missed(self) -> bool:
        return self.at_most is not None and not self.value <= self.at_most


def show(
    part: str,
    rows: Iterable[Row],
    *notes: str,
    curves: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    axes: tuple[str, str] = ("", ""),
) -> None:
    """Print the table and write results/PART.json and PART.png. A missed goal is said aloud; it fails nothing.

    The picture is of the rows, or of the curves if there are any."""
    rows = tuple(rows)
    print(f"\n{part}, on {os.cpu_count()} cores. Repeat: make bench PART={part}\n")
    width = max(len(row.what) for row in rows)
    for row in rows:
        goal = "" if row.at_most is None else f"goal <= {row.at_most:,g}"
        met = "" if row.at_most is None else "MISSED" if row.missed else "met"
        value = f"{row.value:,.{row.digits}f} {row.unit}"
        print(f"  {row.what:{width}}  {value:>24}  {goal:14}  {met:6}  {row.note}".rstrip())
    missed = [row.what for row in rows if row.missed]
    print("".join(f"\n  {note}" for note in notes))
    goals = sum(row.at_most is not None for row in rows)
    print(f"\n  {'; '.join(missed)}: GOAL MISSED" if missed else f"\n  {goals} goals, none missed." if goals else "")
    sys.stdout.flush()
    RESULTS.mkdir(exist_ok=True)
    result = {
        "part": part,
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "rows": [asdict(row) | {"missed": row.missed} for row in rows],
        "notes": notes,
    }
    (RESULTS / f"{part}.json").write_text(json.dumps(result, indent=1) + "\n")
    from tests.bench import picture  # needs matplotlib, which only `make bench` installs

    if curves:
        picture.lines(RESULTS / f"{part}.png", curves, *axes)
    else:
        picture.bars(RESULTS / f"{part}.png", rows)
