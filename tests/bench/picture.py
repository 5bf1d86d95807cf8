"""The picture beside a table of the bench: bars of what is measured in one unit, or lines of what changed over time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from tests.bench.table import Row

matplotlib.use("Agg")  # to a file, with no screen
BAR_INCHES = 0.28
TITLE_CHARACTERS = 60

Curve = Sequence[tuple[float, float]]  # of one point: a system of which only the end is known


def bars(path: Path, rows: Iterable[Row]) -> None:
    """One field for each unit; a goal is a line across its bar."""
    units: dict[str, list[tuple[str, Row]]] = {}
    above = ""
    for row in rows:
        above = above if row.what.startswith("  ") else row.what
        name = f"{above.split(':')[0]}: {row.what.strip()}" if row.what.startswith("  ") else row.what
        units.setdefault(row.unit, []).append((name[:TITLE_CHARACTERS], row))
    heights = [1 + len(each) for each in units.values()]
    figure, fields = plt.subplots(
        len(units),
        1,
        squeeze=False,
        figsize=(10, BAR_INCHES * sum(heights) + 0.6 * len(units)),
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for (unit, named), (field,) in zip(units.items(), fields, strict=True):
        at = range(len(named))
        field.barh(at, [row.value for _, row in named], color="#4878a8")
        for index, (_, row) in enumerate(named):
            if row.at_most is not None:
                field.plot([row.at_most] * 2, [index - 0.45, index + 0.45], color="#b03030")
        field.set_yticks(at, [name for name, _ in named], fontsize=7)
        field.invert_yaxis()
        field.set_xlabel(unit or "without a unit", fontsize=8)
    _save(figure, path)


def lines(path: Path, curves: Mapping[str, Curve], across: str, up: str) -> None:
    figure, field = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for name, curve in curves.items():
        field.plot(*zip(*curve, strict=True), label=name, marker="o" if len(curve) == 1 else None, linewidth=1.5)
    field.set_xlabel(across)
    field.set_ylabel(up)
    field.grid(alpha=0.3)
    field.legend(fontsize=8)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
