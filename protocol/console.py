"""What both commands do alike: refusals into sentences and exit codes, sizes and times as people write them.

Imports nothing heavy, so that --help and status answer at once.
"""

from __future__ import annotations

import codecs
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from protocol.errors import Code, Exit, Refused

if TYPE_CHECKING:
    import typer

SIZE_FORMS: Final = "write 5GB, 5 GiB, 500MB or a number of bytes"
DURATION_FORMS: Final = "write 45s, 30m, 2h, 1h30m or 1d"

_BYTES_MAX: Final = (1 << 63) - 1  # what a file system can count
_SECONDS_MAX: Final = 366 * 86400  # a pause of over a year is an end
_SIZE: Final = re.compile(r"(\d{1,19}(?:\.\d{1,9})?)\s*([kmgtp]?)(i?)(b?)", re.IGNORECASE)
_DURATION: Final = re.compile(r"(?:(\d{1,6})d)?(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,8})s)?", re.IGNORECASE)
_PLUGIN: Final = re.compile(r"[a-z][a-z0-9-]{0,39}")  # never a path
_PLAIN: Final = {"·": "-", "…": "...", "●": "*", "○": "o", "✓": "+", "✗": "x", "×": "x", "—": "-", "→": "->"}
_PIPE_CLOSED: Final = 141  # what a shell reports of a program that SIGPIPE ended


def main(app: typer.Typer, *, program: str, short_help: str, arguments: Sequence[str] | None = None) -> int:
    """Run the command line; everything that can happen becomes an exit code and at most a few lines on stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _write_anywhere()
    if "BARNRAISE_PARENT" in os.environ:  # started by the demo, and not to outlive it
        from protocol.process import die_with_parent

        die_with_parent()
    if not words:
        complain(short_help)
        return Exit.USAGE.value
    debug = "--debug" in words
    try:
        return _run(app, program, words)
    except Refused as refused:
        if debug:
            _traceback()
        complain(f"{printable(str(refused))}\nFix: {printable(refused.fix)}")
        return refused.reason.exit.value
    except KeyboardInterrupt:
        complain("Stopped.")
        return Exit.INTERRUPTED.value
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_gone():
            return _PIPE_CLOSED
        if debug:
            _traceback()
        complain(_surprise(program, error))
        return Exit.INTERNAL.value


def cap_logs(folder: Path, bytes_max: int) -> None:
    """Let no log that is being written to grow past this: what it holds steps aside, as NAME.log.1.

    Its writers keep their descriptors, and append; a line that comes in between is lost."""
    for path in folder.glob("*.log"):
        with suppress(OSError):  # a full disk is no reason to end: the next minute comes
            if path.stat().st_size > bytes_max:
                shutil.copyfile(path, path.with_name(f"{path.name}.1"))
                os.truncate(path, 0)


@contextmanager
def crash_log(path: Path) -> Iterator[None]:
    """Keep the traceback of a surprise in this file, and let the sentence about it name the file."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        import traceback

        with suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8", errors="replace") as log:
                log.writelines(traceback.format_exception(error))
            error.add_note(f"The log is {path}")
        raise


def complain(text: str) -> None:
    """Say it on stderr, if anybody still listens."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def printable(text: str) -> str:
    """Text that cannot move the cursor, ring the bell or start a line of its own."""
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """What was probably meant."""
    import difflib

    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def suggestion(word: str, known: Iterable[str]) -> str:
    """The second half of a sentence about an unknown word."""
    close = nearest(word, known)
    return f"; did you mean {close}?" if close else ""


def parse_size(text: str) -> int:
    """Bytes. GB is 10^9 and GiB is 2^30; a bare G is GB."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise Refused(Code.USAGE, f"{printable(text[:60])!r} is not a size; {SIZE_FORMS}")
    base = 1024 if match[3] else 1000
    whole, _, part = match[1].partition(".")
    unit: int = base ** " kmgtp".index(match[2].lower() or " ")
    size = int(whole) * unit + (int(part) * unit // 10 ** len(part) if part else 0)
    if not 0 < size <= _BYTES_MAX:
        raise Refused(Code.USAGE, f"a size is between 1 byte and {_BYTES_MAX:,} bytes, not {printable(text[:60])!r}")
    return size


def parse_duration(text: str) -> float:
    """Seconds."""
    match = _DURATION.fullmatch(text.replace(" ", ""))
    if match is None or not match[0]:
        raise Refused(Code.USAGE, f"{printable(text[:60])!r} is not a time span; {DURATION_FORMS}")
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not 0 < total <= _SECONDS_MAX:
        raise Refused(Code.USAGE, f"a time span is between 1s and 366d, not {printable(text[:60])!r}")
    return float(total)


def size_text(size: float) -> str:
    """1.2 GB: three digits are enough for a status line."""
    return _scaled(size, ("bytes", "kB", "MB", "GB", "TB", "PB"))


def number_text(number: float) -> str:
    """4,080 up to a million, then 9.2 M."""
    return f"{number:,.0f}" if abs(number) < 999_999.5 else _scaled(number / 1e6, ("M", "B", "T"))


def duration_text(seconds: float) -> str:
    """The two largest units: 2 h 5 min."""
    whole = max(0, round(seconds))
    for unit, name, below, below_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            rest = whole % unit // below
            return f"{whole // unit} {name}" + (f" {rest} {below_name}" if rest else "")
    return f"{whole} s"


def _run(app: typer.Typer, program: str, words: list[str]) -> int:
    import typer
    import typer.main

    # the class has been typer's own, and click's before that; this name of it holds in both
    command_line_error: type[Exception] = typer.BadParameter.__mro__[2]
    command: Any = typer.main.get_command(app)
    at = next((index for index, word in enumerate(words) if not word.startswith("-")), None)
    if at is not None and words[at] not in getattr(command, "commands", (words[at],)):  # one command has no others
        _plugin(program, words[at], words[at + 1 :], command.commands)
    if "--debug" in words:
        words.remove("--debug")
    try:
        result = command.main(args=words, prog_name=program, standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except command_line_error as error:
        raise _usage(error, program) from None
    sys.stdout.flush()
    return result if isinstance(result, int) else 0


def _plugin(program: str, word: str, rest: list[str], own: Iterable[str]) -> None:
    """As with git: `barnraise X` is `barnraise-X` where X is not our own."""
    if _PLUGIN.fullmatch(word):
        name = f"{program}-{word}"
        beside = str(Path(sys.argv[0]).absolute().parent)  # a virtual environment need not be on the PATH
        found = shutil.which(name, path=beside) or shutil.which(name)
        if found is not None:
            os.execv(found, [name, *rest])  # noqa: S606  # no shell, and the name holds letters and digits only
    what = f"unknown command {printable(word[:60])}{suggestion(word, own)}"
    raise Refused(Code.USAGE, what, fix=f"See: {program} --help")


def _usage(error: Any, program: str) -> Refused:
    """A mistyped command line, in our words where ours are clearer."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else program
    what = error.format_message().replace("\n", " ").strip()
    option = getattr(error, "option_name", None)
    if option is not None and type(error).__name__ == "NoSuchOption":
        known = ["--help", "--debug"]
        for parameter in context.command.params if context is not None else ():
            known += [*parameter.opts, *parameter.secondary_opts]
        long = [name for name in known if name.startswith("--")]
        what = f"unknown option {printable(option[:60])}{suggestion(option, long)}"
    return Refused(Code.USAGE, what, fix=f"See: {path} --help")


def _surprise(program: str, error: Exception) -> str:
    words = printable(str(error))[:300]
    lines = [f"{Code.BUG.code} · {program} met something it does not know: {type(error).__name__}: {words}"]
    lines += [printable(note) for note in getattr(error, "__notes__", ())]
    return "\n".join([*lines, f"Fix: {Code.BUG.fix}"])


def _traceback() -> None:
    import traceback

    with suppress(OSError):
        traceback.print_exc()


def _reader_gone() -> bool:
    """Whether it was our own output that could not be written. What is left of it is thrown away."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _write_anywhere() -> None:
    """A terminal that knows only ASCII gets the nearest ASCII; nothing we print can fail to encode."""
    codecs.register_error("barnraise", _nearest_ascii)
    for stream in (sys.stdout, sys.stderr):
        _relax(stream)


def _relax(stream: TextIO | None) -> None:
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="barnraise")


def _nearest_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(character, "?") for character in error.object[error.start : error.end]), error.end


def _scaled(number: float, units: tuple[str, ...]) -> str:
    scaled, unit = float(number), 0
    while abs(scaled) >= 999.5 and unit < len(units) - 1:
        scaled, unit = scaled / 1000, unit + 1
    whole = abs(scaled) >= 999.5 or (unit == 0 and units[0] == "bytes")
    return f"{scaled:,.0f} {units[unit]}" if whole else f"{scaled:.3g} {units[unit]}"
