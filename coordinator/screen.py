"""The demo's one live screen: how the loss falls, what each node does, what a key would do. Only looks."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from coordinator.local import Swarm
from protocol.console import number_text, size_text

BARS: Final = "▁▂▃▄▅▆▇█"
PLAIN_SECONDS: Final = 5.0  # between two lines where there is no terminal


class Screen:
    """Live on a terminal; a line now and then elsewhere; nothing but errors when quiet. Everything goes to stderr."""

    def __init__(self, swarm: Swarm, *, quiet: bool) -> None:
        self._swarm = swarm
        self._quiet = quiet
        self._console = Console(stderr=True)
        self._started = time.monotonic()
        self._doing = ""
        self._spoke_at = 0.0
        self._live: Live | None = None
        self._terminal: Any = None

    def __enter__(self) -> Self:
        if not self._quiet and self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.__enter__()
            self._terminal = _read_keys()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _leave_keys(self._terminal)
        if self._live is not None:
            self._live.__exit__(kind, error, at)

    def say(self, doing: str) -> None:
        self._doing = doing
        if self._live is None and not self._quiet:
            self._console.print(f"{self._elapsed()}  {doing}", highlight=False)
        self.refresh()

    def refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._render())
        elif not self._quiet and self._swarm.view and time.monotonic() - self._spoke_at > PLAIN_SECONDS:
            self._spoke_at = time.monotonic()
            self._console.print(f"{self._elapsed()}  {_line(self._swarm.view)}", highlight=False, markup=False)

    def kill_asked(self) -> bool:
        """Whether k was pressed since the last look."""
        asked = False
        while self._terminal is not None and select.select([sys.stdin], [], [], 0)[0]:
            key = os.read(sys.stdin.fileno(), 1)
            if not key:
                return asked
            asked |= key in b"kK"
            if key in b"qQ\x03":
                raise KeyboardInterrupt
        return asked

    def finish(self, summary: Mapping[str, Any], sample: str) -> None:
        if self._quiet:
            return
        if self._live is not None:
            self._live.update(Text(""))
            self._live.stop()
        first, last = summary["heldout_loss_first"], summary["heldout_loss_last"]
        out = self._console
        out.print(f"[green]✓[/] Done in {_clock(summary['wall_seconds'])}.", highlight=False)
        out.print(
            f"  Held-out loss {first:.3f} → {last:.3f} nats per byte after {summary['rounds_committed']} rounds of "
            f"{summary['nodes']} nodes and {number_text(summary['tokens'])} tokens.",
            highlight=False,
        )
        states = {replica["state"] for replica in summary["replicas"].values()}
        same = "bit-identical on all nodes" if len(states) == 1 else "NOT the same on all nodes"
        out.print(f"  The model is {same}: {next(iter(states)) or '?'}", highlight=False)
        if summary["killed_and_recovered"]:
            out.print(f"  Nodes killed and back: {summary['killed_and_recovered']}", highlight=False)
        out.print("  It now writes:")
        out.print(Text("    " + sample.strip().replace("\n", "\n    "), style="cyan"))
        out.print(f"  Saved {summary['export_dir']}", highlight=False)
        out.print(f"  AutoModelForCausalLM.from_pretrained({summary['export_dir']!r}) loads it.", highlight=False)

    def _elapsed(self) -> str:
        return _clock(time.monotonic() - self._started)

    def _render(self) -> RenderableType:
        view, swarm = self._swarm.view, self._swarm
        head = Text.assemble(("barnraise demo", "bold"), f" · {len(swarm.names)} pretend volunteers and a coordinator")
        lines: list[RenderableType] = [head]
        if view:
            lines += [_loss(view, swarm.history), self._nodes(view), Text(f" dashboard {swarm.page}", style="dim")]
        keys = "k kill a node · q quit" if self._terminal is not None else "Ctrl-C quits"
        lines.append(Text(f" {self._elapsed()}  {self._doing}", style="yellow"))
        lines.append(Text(f" {keys}", style="dim"))
        return Group(*lines)

    def _nodes(self, view: Mapping[str, Any]) -> Table:
        table = Table.grid(padding=(0, 2))
        for node in view["nodes"]:
            dead = node["name"] in self._swarm.killed
            mark = (
                Text("✗", "red") if dead else Text("●", "green") if node["activity"] == "training" else Text("○", "dim")
            )
            table.add_row(
                Text(" ") + mark,
                node["name"],
                "killed; coming back" if dead else node["activity"],
                f"{number_text(node['tokens_per_second'] or 0)} tok/s",
                f"busy {100 * (node['busy_share'] or 0):.0f} %",
                f"accepted {number_text(node['credit_tokens'] or 0)} tokens",
            )
        return table


def _loss(view: Mapping[str, Any], history: list[dict[str, Any]]) -> Text:
    run, loss = view["run"], view["loss"]
    values = [row["heldout"] for row in history if row.get("heldout") is not None]
    text = Text(f" loss {_sparkline(values)} ", style="cyan")
    if loss["heldout"] is not None:
        text.append(f"{loss['heldout_first']:.2f} → {loss['heldout']:.3f}", style="bold")
    per_round = size_text(view["bytes"]["per_round"] or 0)
    text.append(
        f"   round {run['round']}/{run['rounds_goal']}   {number_text(run['tokens'])} tokens   {per_round}/round"
    )
    return text


def _line(view: Mapping[str, Any]) -> str:
    run, loss = view["run"], view["loss"]
    heldout = f"held-out loss {loss['heldout']:.3f}" if loss["heldout"] is not None else "no loss yet"
    return (
        f"round {run['round']}/{run['rounds_goal']} · {heldout} · {number_text(run['tokens'])} tokens · {run['state']}"
    )


def _sparkline(values: list[float], width: int = 32) -> str:
    if not values:
        return ""
    step = max(1, len(values) // width)
    shown = values[::step][-width:]
    low, high = min(shown), max(shown)
    return "".join(BARS[round((value - low) / ((high - low) or 1) * (len(BARS) - 1))] for value in shown)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _read_keys() -> Any:
    """Let single keys through, where there is a keyboard; what must be put back afterwards."""
    if not sys.stdin.isatty():
        return None
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    return before


def _leave_keys(before: Any) -> None:
    if before is not None:
        import termios

        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
