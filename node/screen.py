"""What a running node shows its owner: one live screen, plain sentences, or JSON lines. Knows no daemon and no socket.

A status is the dictionary that the daemon reports (version 1); any field may be missing or null, and any text in it
may come from a stranger.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from protocol.console import duration_text, number_text, printable, size_text
from protocol.errors import Code

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Status = Mapping[str, Any]

NARROW_COLUMNS = 30  # below this a live screen is harder to read than lines
_IDLE = ("waiting", "paused")
_REACH = {
    "direct": "direct: the other nodes can call this one",
    "outbound-only": "outbound-only: this node calls the others, and that is enough; a port that your router forwards to it "
    "(listen, announce) would let it do a share of the averaging",
    "nobody": f"{Code.NOBODY_CALLABLE.code} · outbound-only, like every node of this run: no round can end until one has an "
    "open port. The researcher's coordinator says how, and this node waits",
}
_UNCALLABLE_HELPER = (
    "outbound-only: open the port that --listen names; where a router forwards another one, name that with --announce"
)
_UNLINKED = "the coordinator is not reached; rounds go on without it"


class Display(Protocol):
    """Where the news of a node goes. Once nobody can read it any more it is no longer open, and takes news in silence."""

    open: bool

    def update(self, status: Status) -> None: ...
    def notice(self, sentence: str) -> None: ...
    def close(self) -> None: ...


def display(*, as_json: bool, stream: TextIO | None = None) -> Display:
    """The best of the three for where the output goes. JSON goes to stdout, everything for people to stderr."""
    if as_json:
        return JsonLines(stream or sys.stdout)
    stream = stream or sys.stderr
    if stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        from rich.console import Console

        console = Console(file=stream, highlight=False, markup=False, emoji=False)
        if console.width >= NARROW_COLUMNS:
            return LiveScreen(console)
    return LogLines(stream)


class JsonLines:
    """One status per line, for scripts."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.open = True

    def update(self, status: Status) -> None:
        self.open = self.open and _write(self._stream, json_text(status))

    def notice(self, sentence: str) -> None:
        _write(sys.stderr, printable(sentence))

    def close(self) -> None:
        pass


class LogLines:
    """A sentence whenever something has changed, for logs and simple terminals."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._before: Status = {}
        self.open = True

    def update(self, status: Status) -> None:
        for sentence in changes(self._before, status):
            self.notice(sentence)
        self._before = dict(status)

    def notice(self, sentence: str) -> None:
        from datetime import UTC, datetime

        self.open = self.open and _write(self._stream, f"{datetime.now(UTC):%H:%M:%S}Z {printable(sentence)}")

    def close(self) -> None:
        pass


class LiveScreen:
    """A few lines that stay in place. Drawn by our own updates, without a thread."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._live = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._status: Status = {}
        self._notice = ""
        self.open = True
        self._guard(self._live.start)

    def update(self, status: Status) -> None:
        self._status = dict(status)
        self._draw()

    def notice(self, sentence: str) -> None:
        self._notice = printable(sentence)
        self._draw()

    def close(self) -> None:
        self._guard(self._live.stop)
        self.open = False

    def _draw(self) -> None:
        self._guard(lambda: self._live.update(self._render(), refresh=True))

    def _guard(self, action: Any) -> None:
        """A closed terminal ends the drawing, not the node."""
        if self.open:
            try:
                action()
            except (OSError, ValueError):
                self.open = False

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        status = self._status
        first, *more = status_lines(status)
        parts: list[RenderableType] = [Text(first, style="dim" if _idle(status) else "bold")]
        done, goal, what = _progress(status)
        if goal:
            width = min(50, max(10, self._live.console.width - 4))
            parts += [Text(what), ProgressBar(total=goal, completed=min(done, goal), width=width)]
        parts += [Text(line) for line in more if line != what]
        recent = [_outcome(each) for each in _list(status, "recent")[-3:]]
        parts += [Text(f"  {line}", style="dim") for line in recent]
        verbs = "status, finish" if status.get("trains") is False else "pause, status, finish"
        hint = f"Ctrl-C ends politely, twice stops now · barnraise {verbs} in another terminal"
        return Group(*parts, Text(self._notice or hint, style="dim"))


def json_text(status: Status) -> str:
    """Strict JSON: what is not finite becomes null."""
    finite = {
        key: None if isinstance(value, float) and _number(status, key) is None else value
        for key, value in status.items()
    }
    return json.dumps(finite, default=str)


def status_lines(status: Status) -> list[str]:
    """The same truth for `status`, the live screen and the logs: what it does, and why; then numbers."""
    activity = _text(status, "activity") or "starting"
    first = [f"{'○' if _idle(status) else '●'} {activity}", _text(status, "name") or _text(status, "run")]
    round_number, speed, loss, peers = (_number(status, key) for key in ("round", "tokens_per_second", "loss", "peers"))
    first.append(f"round {round_number:,.0f}" if round_number is not None else "")
    first.append(f"{number_text(speed)} tokens/s" if speed else "")
    first.append(f"loss {loss:.3f}" if loss is not None else "")
    first.append(f"{peers:,.0f} {'peer' if peers == 1 else 'peers'}" if peers is not None else "")
    lines = [_joined(first)]
    if reason := _text(status, "reason"):
        lines.append(f"  {reason}")
    if status.get("download") is not None:
        lines.append(_progress(status)[2])
    lines += [f"  {line}" for line in (_joined(_numbers(status)), _joined(_machine(status))) if line]
    if confinement := _text(status, "sandbox"):
        lines.append(f"  {confinement}")
    if status.get("linked") is False and activity != "joining":
        lines.append(f"  {_UNLINKED}")
    reach = _REACH.get(_text(status, "reach"), "")
    if status.get("trains") is False and reach and reach is not _REACH["direct"]:
        reach = _UNCALLABLE_HELPER
    if reach:
        lines.append(f"  {reach}")
    if failed := _number(status, "attempts_failed"):
        last = f", the last one because {why}" if (why := _text(status, "last_failure")) else ""
        lines.append(
            f"  {failed:,.0f} {'attempt' if failed == 1 else 'attempts'} at a round failed{last}; nothing is lost"
        )
    if trouble := _text(status, "trouble"):
        lines.append(f"  ! {trouble}")
    return lines


def changes(before: Status, status: Status) -> list[str]:
    """Sentences about what is new since the status before; none when nothing that matters is."""
    sentences = []
    news = [_text(status, "activity"), _text(status, "reason")]
    if news != [_text(before, "activity"), _text(before, "reason")] and any(news):
        sentences.append(": ".join(word for word in news if word))
    if _text(status, "trouble") and _text(status, "trouble") != _text(before, "trouble"):
        sentences.append(f"trouble: {_text(status, 'trouble')}")
    if status.get("linked") is not None and status["linked"] != before.get("linked", False):
        sentences.append("the coordinator is reached" if status["linked"] else _UNLINKED)
    seen = {each.get("round") for each in _list(before, "recent")}
    sentences += [_outcome(each) for each in _list(status, "recent") if each.get("round") not in seen]
    round_number = _number(status, "round")
    if round_number is not None and round_number != _number(before, "round"):
        numbers = _joined(status_lines({**status, "reason": None, "trouble": None, "linked": None})[:2])
        sentences.append(numbers.lstrip("●○ "))
    return [sentence for sentence in sentences if sentence]


def _numbers(status: Status) -> list[str]:
    steps, goal = _number(status, "round_steps"), _number(status, "round_steps_goal")
    credit, sent, received = (_number(status, key) for key in ("credit_tokens", "bytes_sent", "bytes_received"))
    return [
        f"{steps:,.0f} of {goal:,.0f} steps" if steps is not None and goal else "",
        f"credit {number_text(credit)} tokens" if credit is not None else "",
        f"sent {size_text(sent)}" if sent is not None else "",
        f"received {size_text(received)}" if received is not None else "",
    ]


def _machine(status: Status) -> list[str]:
    batch, uptime, busy = (_number(status, key) for key in ("micro_batch", "uptime_seconds", "busy_share"))
    return [
        _text(status, "device"),
        f"batch {batch:,.0f}" if batch is not None else "",
        f"training {busy:.0%} of the time" if busy is not None else "",
        f"up {duration_text(uptime)}" if uptime is not None else "",
        f"node {_text(status, 'node')}" if _text(status, "node") else "",
    ]


def _progress(status: Status) -> tuple[float, float, str]:
    """How far the thing at hand is: (done, goal, what). A goal of 0 is no bar."""
    download = status.get("download")
    if isinstance(download, Mapping):
        done, size, pace = (_number(download, key) or 0.0 for key in ("done", "size", "bytes_per_second"))
        number = size_text if "bytes_per_second" in download else number_text
        at = f" at {size_text(pace)}/s" if pace else ""
        return done, size, f"  getting {_text(download, 'what')}: {number(done)} of {number(size)}{at}"
    goal = _number(status, "round_steps_goal") or 0.0
    return _number(status, "round_steps") or 0.0, goal, "  this round"


def _outcome(recent: Mapping[str, Any]) -> str:
    tokens, round_number = _number(recent, "tokens"), _number(recent, "round")
    of = f" · {number_text(tokens)} tokens" if tokens else ""
    return f"round {round_number:,.0f}: {_text(recent, 'outcome')}{of}" if round_number is not None else ""


def _idle(status: Status) -> bool:
    return _text(status, "activity") in _IDLE


def _joined(parts: list[str]) -> str:
    return " · ".join(part.strip() if at else part for at, part in enumerate(part for part in parts if part))


def _text(status: Mapping[str, Any], key: str) -> str:
    value = status.get(key)
    return printable(value)[:200] if isinstance(value, str) else ""


def _number(status: Mapping[str, Any], key: str) -> float | None:
    """None also for what is not finite: a loss may be NaN."""
    value = status.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        return None
    return float(value)


def _list(status: Status, key: str) -> list[Mapping[str, Any]]:
    value = status.get(key)
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list | tuple) else []


def _write(stream: TextIO, line: str) -> bool:
    """Whether it went out: the reader may have ended, or the terminal been closed."""
    try:
        stream.write(line + "\n")
        stream.flush()
    except (OSError, ValueError):
        return False
    return True
