"""How the researcher's command writes: rows, tables, numbers, and JSON for a script."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence


def to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def rows_text(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{title:<11}{text}" for title, text in rows)


def table_text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows))


def when_text(ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ms / 1000))


def loss_text(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
