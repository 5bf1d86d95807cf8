"""`barnraise demo`: from nothing to a sentence, on this machine and nothing else, in two to four minutes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import typer

from coordinator.local import FOLLOW_SECONDS, NAMES, Swarm, call
from coordinator.screen import Screen
from protocol.console import main as run_command
from protocol.errors import Code, Refused

SCRATCH = "barnraise-demo-"  # and the process that it belongs to


def schedule(rounds: int) -> list[list[int]]:
    """Growing rounds: early ones are short, because the model moves fast then."""
    first, second, third = rounds * 3 // 10, rounds * 3 // 10, rounds * 2 // 10
    shares = ((first, 2), (second, 4), (third, 8), (rounds - first - second - third, 12))
    return [[count, steps] for count, steps in shares if count > 0]


@asynccontextmanager
async def _scratch(keep: Path | None) -> AsyncIterator[Path]:
    """A folder that is gone afterwards, or the one that the user wants to keep."""
    if keep is not None:
        keep = keep.resolve()
        if keep.exists() and any(keep.iterdir()):
            raise Refused(Code.RUN_EXISTS, f"{keep} is not empty", fix="Choose an empty folder with --keep.")
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):  # by a demo that was killed
        if not psutil.pid_exists(int(left.name.removeprefix(SCRATCH).partition("-")[0])):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-") as folder:
        yield Path(folder)


async def demo(
    *, nodes: int, rounds: int, keep: Path | None, export_to: Path, as_json: bool, browser: bool, kill_at: int | None
) -> dict[str, Any]:
    """Train with a coordinator and so many nodes; the summary that --json prints."""
    began = time.monotonic()
    async with AsyncExitStack() as owned:
        folder = await owned.enter_async_context(_scratch(keep))
        swarm = Swarm(folder, NAMES[:nodes])
        owned.push_async_callback(swarm.stop)
        screen = owned.enter_context(Screen(swarm, quiet=as_json))
        screen.say("reading the standard library's sources")
        await swarm.prepare(rounds=schedule(rounds))
        screen.say("starting a coordinator")
        await swarm.start()
        if browser:
            _open_browser(swarm.page)
        screen.say("starting the nodes")
        screen.say("training")
        deeds = await _train(swarm, screen, kill_at)
        screen.say("exporting the model")
        words = ("export", str(export_to), "--run", str(swarm.run))
        await call("barnraise-coordinator", *words, log=swarm.log("export"))
        summary = _summary(swarm, export_to, seconds=time.monotonic() - began)
        for deed in deeds:
            deed.cancel()
        screen.finish(summary, str(swarm.view.get("sample", "")))
    return summary


async def _train(swarm: Swarm, screen: Screen, kill_at: int | None) -> list[asyncio.Task[None]]:
    """Watch until the last round is measured; kill nodes when asked to."""
    deeds: list[asyncio.Task[None]] = []
    while swarm.view.get("run", {}).get("state") != "finished":
        await asyncio.sleep(FOLLOW_SECONDS)
        await swarm.look()
        screen.refresh()
        for name, command in swarm.nodes.items():
            if command.process.returncode not in (None, 0) and name not in swarm.killed:
                raise Refused(Code.CHILD_DIED, f"the node {name} ended by itself", fix=f"See {command.log}")
        if swarm.coordinator is not None and swarm.coordinator.process.returncode is not None:
            raise Refused(Code.CHILD_DIED, "the coordinator ended by itself", fix=f"See {swarm.coordinator.log}")
        now = swarm.view.get("run", {}).get("round") or 0
        planned = kill_at is not None and now >= kill_at and not swarm.kills
        if screen.kill_asked() or planned:
            alive = [name for name in swarm.names if name not in swarm.killed]
            if len(alive) > 1:
                name = random.choice(alive)  # noqa: S311  # any of them
                screen.say(f"killed {name} with kill -9; it comes back")
                deeds.append(asyncio.create_task(swarm.kill_node(name)))
        for deed in deeds:
            if deed.done():
                deed.result()
    return deeds


def _summary(swarm: Swarm, export_to: Path, *, seconds: float) -> dict[str, Any]:
    view = swarm.view
    heads = {name: command.status.get("head") or {} for name, command in swarm.nodes.items()}
    return {
        "nodes": len(swarm.names),
        "rounds_committed": view["run"]["round"],
        "heldout_loss_first": view["loss"]["heldout_first"],
        "heldout_loss_last": view["loss"]["heldout"],
        "tokens": view["run"]["tokens"],
        "wall_seconds": round(seconds, 1),
        "bytes_sent_per_param_per_round": view["bytes"]["per_parameter_per_round"],
        "busy_share": [node["busy_share"] for node in view["nodes"]],
        "replicas": {name: {"round": h.get("round"), "state": h.get("state")} for name, h in heads.items()},
        "export_dir": str(export_to),
        "sample": view["sample"],
        "killed_and_recovered": swarm.recoveries,
    }


def _open_browser(page: str) -> None:
    import webbrowser

    with suppress(webbrowser.Error):
        webbrowser.open(page)


app = typer.Typer(add_completion=False)


@app.command(help="Train a small model with a coordinator and several nodes on this machine: no arguments needed.")
def command(
    nodes: int = typer.Option(3, min=1, max=len(NAMES), help="Pretend volunteers."),
    rounds: int = typer.Option(36, min=4, max=10_000, help="Rounds to train."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object as the last line, and no screen."),
    no_browser: bool = typer.Option(False, "--no-browser", help="Do not open the dashboard."),
    keep: Path | None = typer.Option(None, help="Keep the run, the homes and the logs in this empty folder."),
    export: Path = typer.Option(Path("barnraise-demo"), help="Where the finished model goes."),
    kill_at: int | None = typer.Option(None, help="Kill one node with kill -9 at this round."),
) -> None:
    browser = not (no_browser or as_json) and sys.stdout.isatty() and bool(os.environ.get("DISPLAY"))
    summary = asyncio.run(
        demo(
            nodes=nodes,
            rounds=rounds,
            keep=keep,
            export_to=export.resolve(),
            as_json=as_json,
            browser=browser,
            kill_at=kill_at,
        )
    )
    if as_json:
        print(json.dumps(summary))


def main() -> None:
    words = sys.argv[1:] or ["--nodes", "3"]  # the demo needs no arguments
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    sys.exit(run_command(app, program="barnraise-demo", short_help="", arguments=words))


if __name__ == "__main__":
    main()
