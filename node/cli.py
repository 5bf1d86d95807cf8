"""`barnraise`, the volunteer's command. Turns words into settings and verbs, and outcomes into exit codes.

Only `join` and `start` load the node itself; every other word answers at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Final, NoReturn

import typer

from node.config import Home, Settings, Stopper, home_of
from node.config import settings as settings_of
from node.control import ask
from node.screen import Display, display, json_text, status_lines
from protocol import console, sandbox
from protocol.errors import Code, Exit, Refused

if TYPE_CHECKING:
    from protocol.invite import Invite

POLITE_SECONDS: Final = 10.0  # to hand back leases and end; what was trained is kept by the next start
ABRUPT_SECONDS: Final = 2.0  # for children to be gone; then this process goes, and the kernel takes them with it
LEAVE_SECONDS: Final = 20.0
WATCH_SECONDS: Final = 1.0

_SHORT_HELP: Final = """\
barnraise: help train a language model together with others, on this computer.

  barnraise join INVITE     take part; the researcher gives you the invite
  barnraise demo            try it: a whole swarm on this computer
  barnraise --help          everything else"""
_SAFETY: Final = "The run can send numbers and settings, never code."

app = typer.Typer(
    name="barnraise",
    help="Help train a language model together with others, on this computer.",
    epilog="Try it without an invite: barnraise demo",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: quicker, and readable in any terminal
)

HomeOption = Annotated[
    str | None, typer.Option("--home", metavar="FOLDER", help="Where the node keeps its files.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Text = str | None


def _option(name: str, metavar: str, help_: str) -> Any:
    return typer.Option(name, metavar=metavar, help=help_, show_default=False)


NameOption = Annotated[Text, _option("--name", "NAME", "How others see this node.")]
DeviceOption = Annotated[Text, _option("--device", "auto|cpu|cuda[:N]|mps", "What to train on. [auto]")]
ThreadsOption = Annotated[Text, _option("--threads", "N", "Most processor threads to use. [all]")]
BatchOption = Annotated[Text, _option("--batch", "N", "Sequences in one pass. [what fits]")]
DiskOption = Annotated[Text, _option("--max-disk", "SIZE", "Most disk space to use, such as 5GB.")]
UpOption = Annotated[Text, _option("--max-up", "MBIT", "Most to send, in Mbit/s. [what the line takes]")]
ListenOption = Annotated[Text, _option("--listen", "IP:PORT", "Where other nodes connect. [any free port]")]
AnnounceOption = Annotated[Text, _option("--announce", "IP:PORT", "What they connect to, if a router forwards that.")]
NoTrainingOption = Annotated[bool, typer.Option("--no-training", help="Average for others, and train nothing.")]
RootOption = Annotated[bool, typer.Option("--allow-root", help="Run as root all the same.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Start without asking.")]


SETTINGS: Final = ("name", "device", "threads", "batch", "max_disk", "max_up", "listen", "announce")  # join and start


def _print_version(asked: bool) -> None:
    if asked:
        import importlib.metadata

        try:
            version = importlib.metadata.version("barnraise")
        except importlib.metadata.PackageNotFoundError:
            version = "(run from its source, not installed)"
        print(f"barnraise {version}")
        raise typer.Exit


@app.callback()
def _before(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something breaks.")] = False,
) -> None:
    pass


@app.command()
def join(
    context: typer.Context,
    invite: Annotated[list[str] | None, typer.Argument(metavar="INVITE", show_default=False)] = None,
    home: HomeOption = None,
    name: NameOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    batch: BatchOption = None,
    max_disk: DiskOption = None,
    max_up: UpOption = None,
    listen: ListenOption = None,
    announce: AnnounceOption = None,
    no_training: NoTrainingOption = False,
    allow_root: RootOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
    allow_private: Annotated[bool, typer.Option("--allow-private", help="Accept link-local addresses.")] = False,
) -> int:
    """Join a run with the invite you were given, and train until you stop.

    Example: barnraise join barnraise:… --max-disk 5GB
    """
    if not invite:
        raise Refused(Code.USAGE, "join needs an invite", fix="Run: barnraise join INVITE, or barnraise start")
    found = _checked_invite(" ".join(invite), allow_private=allow_private)
    return _take_part(home_of(home), _flags(context), found, yes=yes, as_json=as_json)


@app.command()
def start(
    context: typer.Context,
    home: HomeOption = None,
    name: NameOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    batch: BatchOption = None,
    max_disk: DiskOption = None,
    max_up: UpOption = None,
    listen: ListenOption = None,
    announce: AnnounceOption = None,
    no_training: NoTrainingOption = False,
    allow_root: RootOption = False,
    as_json: JsonOption = False,
) -> int:
    """Go on with the run that this node joined before."""
    at = home_of(home)
    if at.remembered() is None:
        raise Refused(Code.NOT_ADMITTED, f"the node in {at.path} has not joined a run")
    return _take_part(at, _flags(context), None, yes=True, as_json=as_json)


@app.command()
def status(
    home: HomeOption = None,
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Stay, and show changes.")] = False,
) -> None:
    """What the node is doing, and why."""
    at = home_of(home)
    now = _ask(at, "status", seconds_max=5.0)
    if watch:
        _watch(at, now, as_json=as_json)
    else:
        print(json_text(now) if as_json else "\n".join(status_lines(now)))


@app.command()
def pause(
    home: HomeOption = None,
    span: Annotated[Text, _option("--for", "TIME", "How long, such as 2h or 30m. [until resume]")] = None,
) -> None:
    """Stop training for now; the node stays a member."""
    seconds = None if span is None else console.parse_duration(span)
    _ask(home_of(home), "pause", seconds=seconds)
    if seconds is None:
        print("Paused. Go on with: barnraise resume")
    else:
        until = time.strftime("%Y-%m-%d %H:%M", time.gmtime(time.time() + seconds))
        print(f"Paused for {console.duration_text(seconds)}, until {until} UTC. Go on earlier with: barnraise resume")


@app.command()
def resume(home: HomeOption = None) -> None:
    """Go on after a pause."""
    _ask(home_of(home), "resume")
    print("Going on.")


@app.command()
def finish(home: HomeOption = None) -> None:
    """Bring what was trained into a round, then stop."""
    _ask(home_of(home), "finish")
    print("Finishing the round, then stopping. See: barnraise status")


@app.command()
def leave(
    home: HomeOption = None,
    purge: Annotated[bool, typer.Option("--purge", help="Also delete the node's files, except its key.")] = False,
    forget_me: Annotated[bool, typer.Option("--forget-me", help="With --purge: delete the key too.")] = False,
) -> None:
    """Stop the node and give up its membership."""
    if forget_me and not purge:
        raise Refused(Code.USAGE, "--forget-me deletes the key, so it needs --purge", fix="Add --purge.")
    at = home_of(home)
    was_running = _asked_to_leave(at, purge=purge)
    if not was_running and not purge and not at.membership.exists():
        raise Refused(Code.NO_DAEMON, f"no node is running in {at.path}, and it has not joined a run")
    if at.path.is_dir():
        _clear(at, purge=purge, keep_keys=not forget_me)
    if not purge:
        print("Left the run. The files stay; delete them with: barnraise leave --purge")


def main() -> NoReturn:
    raise SystemExit(console.main(app, program="barnraise", short_help=_SHORT_HELP))


def _checked_invite(text: str, *, allow_private: bool) -> Invite:
    from protocol import invite

    found = invite.decode(text)
    invite.check(found, now_ms=time.time_ns() // 1_000_000, allow_private=allow_private)
    return found


def _flags(context: typer.Context) -> Mapping[str, Any]:
    """What was typed of the settings, under their names."""
    given = {name: context.params[name] for name in SETTINGS}
    training = "false" if context.params["no_training"] else None
    return given | {"training": training, "allow_root": context.params["allow_root"] or None}


def _take_part(home: Home, flags: Mapping[str, Any], invite: Invite | None, *, yes: bool, as_json: bool) -> int:
    settings = settings_of(home, flags)
    _check_user(settings)
    home.prepare()
    with home.lock(), console.crash_log(home.logs / "crash.log"):
        known = _known_invite(home)
        if invite is not None and known is not None and invite.run != known.run:
            what = f"the node in {home.path} is a member of the run {known.name}"
            raise Refused(Code.HOME_BUSY, what, fix="Use another --home, or first: barnraise leave")
        _announce(settings, invite or known)
        if not yes and not _agreed():
            console.complain("Nothing was started.")
            return Exit.OK.value
        home.sweep()
        shown = display(as_json=as_json)
        log = settings.log_file("node")
        try:
            _log_to(log)
            return asyncio.run(_supervise(settings, invite, shown))
        finally:
            shown.close()
            log.close()


def _log_to(file: BinaryIO) -> None:
    """Sentences with their values, one event a line; the terminal shows the status instead."""
    import structlog

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], bool_as_flag=False),
            lambda _logger, _method, line: str(line).encode("utf-8", "replace"),
        ],
        logger_factory=structlog.BytesLoggerFactory(file=file),
    )


def _known_invite(home: Home) -> Invite | None:
    """The invite this node joined with; it may have expired since, which does not matter to a member."""
    text = home.remembered()
    if text is None:
        return None
    from protocol import invite

    return invite.decode(text)


def _announce(settings: Settings, invite: Invite | None) -> None:
    """What will happen, before it does."""
    size = settings.max_disk_bytes
    disk = "" if size is None else f", at most {console.size_text(size)} ({size:,} bytes)"
    threads = "" if settings.threads is None else f", {settings.threads} threads at most"
    up = "" if settings.max_up is None else f", at most {settings.max_up:g} Mbit/s"
    rows = [
        ("Run", f"{invite.name}, from {invite.addresses[0]}" if invite is not None else ""),
        ("Files", f"{settings.home}{disk}"),
        *_does(settings, threads, up),
        ("Shows", "this machine's network address to the run's other nodes"),
        ("Safety", _SAFETY),
        ("", _confinement(settings) if settings.training else ""),
    ]
    console.complain("\n".join(f"{title:<8}{console.printable(text)}" for title, text in rows if text))
    if _is_root():
        console.complain("Warning: this runs as root and need not; an ordinary user is enough.")


def _does(settings: Settings, threads: str, up: str) -> list[tuple[str, str]]:
    if not settings.training:
        sends = "what it made of the others' updates" + _named(settings) + up
        return [("Trains", "nothing: it averages for the others, who have to be able to call it"), ("Sends", sends)]
    sends = "model updates, training speed, the kind of device" + _named(settings) + up
    return [("Trains", f"on device {settings.device}{threads}"), ("Sends", sends)]


def _confinement(settings: Settings) -> str:
    made = sandbox.plan(settings.sandbox, sandbox.kernel())
    return f"The trainer is {sandbox.NONE_TEXT if made is None else made.text}."


def _check_user(settings: Settings) -> None:
    """Whatever goes wrong in a process of root goes wrong for the whole machine."""
    if _is_root() and not settings.allow_root:
        raise Refused(Code.USAGE, "this would run as root", fix="Use an ordinary user, or add --allow-root.")


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _named(settings: Settings) -> str:
    return f", the name {settings.name}" if settings.name else ""


def _agreed() -> bool:
    """Asks only a person: without a terminal on both ends the command itself is the consent."""
    if not (sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    while True:
        sys.stderr.write("Start? [Y/n] ")
        sys.stderr.flush()
        answer = sys.stdin.readline()
        if not answer or answer.strip().lower() in ("n", "no"):
            return False
        if answer.strip().lower() in ("", "y", "yes"):
            return True


async def _supervise(settings: Settings, invite: Invite | None, shown: Display) -> int:
    """Run the daemon until it ends, or until the owner asked and its time is up."""
    from node import daemon

    stopper = Stopper()
    with _Signals(stopper):
        running = asyncio.create_task(daemon.run(settings, invite, on_status=shown.update, stopper=stopper))
        warned = asyncio.create_task(_hurry(stopper, shown))
        await asyncio.wait((running, warned), return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            await asyncio.wait((running,), timeout=ABRUPT_SECONDS)
        warned.cancel()
        if not running.done():
            shown.close()
            _end_now()
        code = await running
    return Exit.INTERRUPTED.value if stopper.asked else code


async def _hurry(stopper: Stopper, shown: Display) -> None:
    """Ends when the patience with a polite end is over."""
    await stopper.polite.wait()
    shown.notice(f"Ending within {POLITE_SECONDS:.0f} s; Ctrl-C again stops now.")
    try:
        await asyncio.wait_for(stopper.now.wait(), POLITE_SECONDS)
    except TimeoutError:
        stopper.ask()
    shown.notice("Stopping now.")


class _Signals:
    """Ctrl-C, SIGTERM and a closed terminal ask to stop. The second one works even while the loop is busy."""

    def __init__(self, stopper: Stopper) -> None:
        self._stopper = stopper
        self._loop = asyncio.get_running_loop()
        self._count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._take)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: object) -> None:
        self._count += 1
        if self._count > 2:
            _end_now()
        if self._count == 2:
            last = threading.Timer(ABRUPT_SECONDS + 1, _end_now)
            last.daemon = True
            last.start()
        self._loop.call_soon_threadsafe(self._stopper.ask)


def _end_now() -> NoReturn:
    """Without any farewell; the kernel ends our children with us."""
    if sys.stderr is not None and sys.stderr.isatty():
        console.complain("\x1b[?25h")  # the live screen hides the cursor
    os._exit(Exit.INTERRUPTED.value)


def _watch(home: Home, now: dict[str, Any], *, as_json: bool) -> None:
    shown = display(as_json=as_json, stream=sys.stdout)
    try:
        while shown.open:
            shown.update(now)
            time.sleep(WATCH_SECONDS)
            now = _ask(home, "status", seconds_max=5.0)
    finally:
        shown.close()


def _ask(home: Home, verb: str, **arguments: Any) -> dict[str, Any]:
    try:
        return ask(home.path, verb, **arguments)
    except Refused as refused:
        if refused.reason is Code.NO_DAEMON and refused.fix == Code.NO_DAEMON.fix and home.membership.exists():
            raise Refused(Code.NO_DAEMON, refused.what, fix="Start it with: barnraise start") from None
        raise


def _asked_to_leave(home: Home, *, purge: bool) -> bool:
    """Whether a node was running here; it has ended when this returns."""
    try:
        ask(home.path, "leave", purge=purge)
    except Refused as refused:
        if refused.reason is not Code.NO_DAEMON:
            raise
        return False
    if not _within(LEAVE_SECONDS, lambda: _free(home)):
        what = f"the node in {home.path} is still ending"
        raise Refused(Code.HOME_BUSY, what, fix="Wait a little, then run the same command again.")
    return True


def _clear(home: Home, *, purge: bool, keep_keys: bool) -> None:
    if not home.ours:
        raise Refused(
            Code.HOME_FOREIGN, f"{home.path} is not a node's folder; nothing was deleted", fix="Check --home."
        )
    with home.lock():
        home.forget()
        if not purge:
            return
        freed, left = home.purge(keep_keys=keep_keys)
    stays = f"; kept in {home.path}: {console.printable(', '.join(left))}" if left else ""
    print(f"Left the run and deleted its files: {console.size_text(freed)} freed{stays}")


def _free(home: Home) -> bool:
    try:
        with home.lock():
            return True
    except Refused:
        return False


def _within(seconds: float, done: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


if __name__ == "__main__":
    main()
