"""The view: what the page may say, and how numbers read to people. Knows nothing of HTTP.

The page is public. It shows the fields named here and no others, so that an address, a key or a path in
the coordinator's state cannot reach it by accident; and every value is checked, so that no name or number
from a node can break the JSON or the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from protocol.types import Rollback

NODES_SHOWN: Final = 80  # with the events, the rollbacks and the sample: a frame of the live stream stays under 64 KiB
EVENTS_SHOWN: Final = 40
ROLLBACKS_SHOWN: Final = 10
SAMPLE_CHARACTERS: Final = 2_000
NUMBER_MAX: Final = 10**18  # exact enough in a browser, and no node moves more
RECENT_MS: Final = 3_600_000  # rounds per hour are those of the last hour

Field = Callable[[object], Any]


def _number(value: object) -> int | float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= NUMBER_MAX else None  # not so for NaN and the infinities


def _flag(value: object) -> bool:
    return value is True


def _text(characters: int) -> Field:
    def clean(value: object) -> str:
        if not isinstance(value, str):
            return ""
        return value[:characters].encode("utf-8", "replace").decode()  # a lone surrogate is no UTF-8

    return clean


def _object(fields: Mapping[str, Field]) -> Field:
    def clean(value: object) -> dict[str, Any]:
        given = value if isinstance(value, Mapping) else {}
        return {key: field(given.get(key)) for key, field in fields.items()}

    return clean


def _list(field: Field, *, most: int) -> Field:
    def clean(value: object) -> list[Any]:
        given = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()
        return [field(item) for item in given[:most]]

    return clean


_RUN: Final = {
    "name": _text(40),
    "title": _text(120),
    "state": _text(240),
    "round": _number,
    "rounds_goal": _number,
    "tokens": _number,
    "started_ms": _number,
    "parameters": _number,
    "codec": _text(16),
}
_LOSS: Final = {"heldout": _number, "heldout_first": _number, "train": _number}
_NODE: Final = {
    "name": _text(40),
    "node": _text(16),
    "activity": _text(40),
    "round": _number,
    "tokens_per_second": _number,
    "busy_share": _number,
    "credit_tokens": _number,
    "last_seen_s": _number,
    "rostered": _flag,
    "held": _text(40),  # what is held against it; the events say it in full
}
_BYTES: Final = {"per_round": _number, "total": _number, "per_parameter_per_round": _number}
_EVENT: Final = {"ms": _number, "text": _text(240)}
_ROLLBACK: Final = {"number": _number, "from": _number, "to": _number, "reason": _text(200), "ms": _number}
_VIEW: Final = _object(
    {
        "run": _object(_RUN),
        "loss": _object(_LOSS),
        "nodes": _list(_object(_NODE), most=NODES_SHOWN),
        "bytes": _object(_BYTES),
        "events": _list(_object(_EVENT), most=EVENTS_SHOWN),
        "rollbacks": _list(_object(_ROLLBACK), most=ROLLBACKS_SHOWN),  # the newest first
        "sample": _text(SAMPLE_CHARACTERS),
        "head": _text(64),
    }
)
_ROW: Final = _object(dict.fromkeys(("round", "tokens", "heldout", "train", "ms", "nodes", "bytes"), _number))


def public(view: Mapping[str, Any]) -> dict[str, Any]:
    """The view as the page and the API show it: every field present, none but those named here."""
    shown: dict[str, Any] = _VIEW(view)
    shown["run"]["title"] = shown["run"]["title"] or shown["run"]["name"]
    shown["nodes_total"] = len(view.get("nodes") or ())
    shown["nodes_rostered"] = sum(1 for node in view.get("nodes") or () if node.get("rostered") is True)
    return shown


def rollback(followed: Rollback) -> dict[str, Any]:
    """One of the view's rollbacks: the rounds after `to`, up to `from`, were undone."""
    return {
        "number": followed.number,
        "from": followed.undone.round,
        "to": followed.to.round,
        "reason": followed.reason,
        "ms": followed.issued_ms,
    }


def turns(rows: Sequence[Mapping[str, Any]], rollbacks: Sequence[Mapping[str, Any]], *, width: int) -> list[str]:
    """Where the SVG of `polyline` turns: the abscissa of each rollback, at the last row that it left."""
    tokens = [row["tokens"] for row in rows if row["tokens"] is not None]
    wide = (max(tokens) - min(tokens)) if tokens else 0
    known = [row for row in rows if row["round"] is not None and row["tokens"] is not None]
    places = []
    for each in rollbacks:
        left = [row["tokens"] for row in known if each["to"] is not None and row["round"] <= each["to"]]
        if left and wide:
            places.append(f"{(left[-1] - min(tokens)) / wide * width:.1f}")
    return places


def thinned(rows: Sequence[Mapping[str, Any]], *, limit: int) -> list[dict[str, Any]]:
    """At most `limit` rows over the whole run: the last of each stretch, with the last losses known in it."""
    assert limit > 0
    stretches = min(limit, len(rows))
    kept = []
    for index in range(stretches):
        stretch = rows[index * len(rows) // stretches : (index + 1) * len(rows) // stretches]
        row = _ROW(stretch[-1])
        for key in ("heldout", "train"):  # held-out loss is not measured in every round
            row[key] = next(
                (value for item in reversed(stretch) if (value := _number(item.get(key))) is not None), None
            )
        kept.append(row)
    return kept


def rounds_per_hour(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The pace over the last hour of thinned rows, or over the last two rows if they are further apart."""
    timed = [row for row in rows if row["ms"] is not None and row["round"] is not None]
    if len(timed) < 2:
        return None
    last = timed[-1]
    first = next(row for row in timed if row is timed[-2] or last["ms"] - row["ms"] <= RECENT_MS)
    elapsed_ms = last["ms"] - first["ms"]
    return (last["round"] - first["round"]) * 3_600_000 / elapsed_ms if elapsed_ms > 0 else None


def polyline(rows: Sequence[Mapping[str, Any]], key: str, *, width: int, height: int) -> str:
    """SVG points of a loss over tokens, for a browser that runs no script. Both losses share one scale."""
    losses = [row[name] for row in rows for name in ("heldout", "train") if row[name] is not None]
    points = [(row["tokens"], row[key]) for row in rows if row[key] is not None and row["tokens"] is not None]
    if len(points) < 2:
        return ""
    tokens = [row["tokens"] for row in rows if row["tokens"] is not None]
    wide = (max(tokens) - min(tokens)) or 1
    tall = (max(losses) - min(losses)) or 1
    return " ".join(
        f"{(x - min(tokens)) / wide * width:.1f},{(max(losses) - y) / tall * height:.1f}" for x, y in points
    )


def compact(value: float | None, unit: str = "") -> str:
    """1234567 as 1.23 M: three digits that mean something, and the unit."""
    if value is None:
        return "–"
    scale, prefix = next(
        ((scale, prefix) for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
         if abs(value) >= scale),
        (1, ""),
    )  # fmt: skip
    scaled = value / scale
    digits = 0 if scale == 1 and float(value).is_integer() else max(0, 2 - int(math.log10(max(abs(scaled), 1))))
    return f"{scaled:.{digits}f} {prefix}{unit}".rstrip()


def turned(rollback: Mapping[str, Any]) -> str:
    """What a rollback did, in one sentence."""
    if rollback["from"] == rollback["to"]:
        return f"Round {whole(rollback['to'])}: a new roster, nothing undone."
    return f"Back from round {whole(rollback['from'])} to {whole(rollback['to'])}."


def whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def decimal(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def pace(value: float | None) -> str:
    return decimal(value, 1) if value is not None and value < 10 else whole(value)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def ago(seconds: float | None) -> str:
    """How long ago: in the largest unit that leaves a number above one."""
    if seconds is None:
        return "–"
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return "now" if seconds < 2 else f"{seconds:.0f} s ago"


def iso(ms: float | None) -> str:
    """UTC, ISO 8601; empty for a time that no calendar has."""
    try:
        return "" if ms is None else datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return ""
