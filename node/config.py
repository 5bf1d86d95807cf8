"""What the owner decided (flag > environment > config.toml > default), and the folder where a node keeps its files."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import shutil
import stat
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from node.core.schedule import MINUTES_A_DAY, Hours, Policy
from protocol import p2pd
from protocol.console import parse_size, printable, suggestion
from protocol.errors import Code, Refused
from protocol.limits import NAME_CHARACTERS_MAX
from protocol.sandbox import Mode

if TYPE_CHECKING:
    from protocol.address import Address

THREADS_MAX: Final = 4096
BATCH_MAX: Final = 65536
CELSIUS_MIN: Final = 40  # many machines at rest are no colder
CELSIUS_MAX: Final = 110  # beyond, processors switch themselves off
MEGABITS_UP_MIN: Final = 1.0  # with less, the archive is filled more slowly than a coordinator waits for
LISTEN_DEFAULT: Final = "[::]:0"  # IPv6 and IPv4: peers may have one of them only; port 0 is any free one
MARKER: Final = ".barnraise"  # only a folder with this file in it is ever written to or removed from

_MARKER_TEXT: Final = "This folder belongs to a barnraise node. `barnraise leave --purge` empties it.\n"
_CONFIG_BYTES_MAX: Final = 1 << 20
_INTEGER_BITS_MAX: Final = 63  # TOML promises no more, and Python cannot print what hex digits can write
LOG_BYTES_MAX: Final = 10 << 20  # then it becomes NAME.log.1, and the one before that goes
_DEVICE: Final = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?")
_UNPRIVILEGED: Final = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")


@dataclass(frozen=True)
class Settings:
    """Limits the owner set; they win over anything a coordinator asks."""

    home: Path
    name: str | None = None
    device: str = "auto"
    threads: int | None = None
    batch: int | None = None  # sequences in one forward pass
    max_disk_bytes: int | None = None
    listen: str = LISTEN_DEFAULT  # IP:port of the peer-to-peer socket
    announce: str | None = None  # IP:port at which others reach it, where a router or a cloud has another
    sandbox: Mode = Mode.AUTO  # of the trainer
    allow_root: bool = False
    max_up: float | None = None  # Mbit/s, to peers and to the coordinator
    max_memory_bytes: int | None = None  # of the model's state and the trainer
    max_vram_bytes: int | None = None  # of an NVIDIA device
    hours: tuple[Hours, ...] = ()  # when it may train; none: always
    on_battery: bool = False
    on_metered: bool = False
    max_celsius: float | None = None
    rest_beside: tuple[str, ...] = ()  # names of programs: while one of them runs, it does not train
    training: bool = True  # else it votes, and averages for those who train

    @property
    def policy(self) -> Policy:
        return Policy(self.hours, self.on_battery, self.on_metered, self.max_celsius, self.rest_beside)

    @property
    def runtime(self) -> Path:
        return Home(self.home).runtime

    @property
    def socket(self) -> Path:
        return Home(self.home).control

    @property
    def listen_multiaddrs(self) -> tuple[str, ...]:
        return _address(self.listen).multiaddrs

    @property
    def announce_multiaddrs(self) -> tuple[str, ...]:
        return (_address(self.announce).multiaddr,) if self.announce is not None else ()

    def log_file(self, name: str) -> BinaryIO:
        """Open for appending; the caller closes it. The daemon caps it while it grows."""
        return (Home(self.home).logs / f"{name}.log").open("ab")


class Stopper:
    """How often the owner asked to stop: once is a polite end, twice is now."""

    def __init__(self) -> None:
        self.asked = 0
        self.polite = asyncio.Event()
        self.now = asyncio.Event()

    def ask(self) -> None:
        self.asked = min(2, self.asked + 1)
        self.polite.set()
        if self.asked == 2:
            self.now.set()


@dataclass(frozen=True)
class Home:
    """The folder of one node, by the names of what lies in it."""

    path: Path

    @property
    def config(self) -> Path:
        """Written by the owner, never by us."""
        return self.path / "config.toml"

    @property
    def membership(self) -> Path:
        return self.path / "membership.json"

    @property
    def key(self) -> Path:
        """The node's identity: the one file that cannot be made again."""
        return self.path / "node.key"

    @property
    def transport_key(self) -> Path:
        return self.path / "transport.key"

    @property
    def blobs(self) -> Path:
        return self.path / "blobs"

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    @property
    def runtime(self) -> Path:
        """Sockets and scratch files of the running node; swept at its start."""
        return self.path / "runtime"

    @property
    def scratch(self) -> Path:
        """The one folder that the trainer writes to; beside the sockets and the key, never around them."""
        return self.runtime / "trainer"

    @property
    def control(self) -> Path:
        return self.runtime / "control.sock"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def ours(self) -> bool:
        return (self.path / MARKER).is_file()

    def prepare(self) -> None:
        """Make the folder, or take an empty one, or find it ours. Anything else is left untouched and refused."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.path.stat().st_uid != os.geteuid():
                raise Refused(Code.HOME_FOREIGN, f"{self.path} belongs to another user")
            if not self.ours:
                first = next(self.path.iterdir(), None)
                if first is not None:
                    what = f"{self.path} holds other files ({printable(first.name[:40])}) and is not a node's folder"
                    raise Refused(Code.HOME_FOREIGN, what)
                (self.path / MARKER).write_text(_MARKER_TEXT)
            self.path.chmod(0o700)
            for folder in (self.blobs, self.journal, self.runtime, self.logs):
                folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise Refused(Code.HOME_FOREIGN, f"{self.path} cannot be used: {error.strerror}") from None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the one running node of this home. The kernel gives it back however that node ends."""
        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = printable(os.pread(handle, 20, 0).decode("ascii", "replace").strip())
                what = f"another node uses {self.path}" + (f" (process {holder})" if holder else "")
                raise Refused(Code.HOME_BUSY, what) from None
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(handle)

    def sweep(self) -> None:
        """Throw away what a node that was killed left behind. Only for the holder of the lock."""
        p2pd.sweep(self.runtime)  # follows the link that is in there
        for entry in self.runtime.iterdir():
            _remove(entry)
        for folder, pattern in ((self.path, ".new-*"), (self.blobs, "**/.new-*"), (self.journal, "**/.new-*")):
            for new in folder.glob(pattern):  # a file that never took its place
                _remove(new)

    def remember(self, invite: str) -> None:
        """Keep the invite's text, so that the next start needs no argument."""
        from protocol.blobs import atomic_write

        atomic_write(self.membership, json.dumps({"version": 1, "invite": invite}).encode() + b"\n")

    def remembered(self) -> str | None:
        """The text of the invite this node joined with."""
        try:
            value = json.loads(self.membership.read_bytes())["invite"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            what = f"{self.membership} cannot be read"
            raise Refused(Code.NOT_ADMITTED, what, fix="Join again: barnraise join INVITE") from None
        return str(value)

    def forget(self) -> None:
        self.membership.unlink(missing_ok=True)

    def purge(self, *, keep_keys: bool) -> tuple[int, tuple[str, ...]]:
        """Remove what a node made and nothing else. Answers the bytes freed and the names that stay."""
        if not self.ours:
            return 0, ()
        keys = (self.key, self.transport_key)
        freed = 0
        p2pd.sweep(self.runtime)
        for made in (self.blobs, self.journal, self.runtime, self.logs, self.membership, *(() if keep_keys else keys)):
            freed += _remove(made)
        freed += _remove(self.path / "lock")
        left = tuple(sorted(entry.name for entry in self.path.iterdir() if entry.name != MARKER))
        if not left:
            freed += _remove(self.path / MARKER)
            with suppress(OSError):  # a mount point, or a folder in one of root's
                self.path.rmdir()
        return freed, left


def home_of(flag: str | None, environment: Mapping[str, str] = os.environ) -> Home:
    """The folder named by --home, BARNRAISE_HOME or this system's custom. Touches nothing."""
    named = flag if flag is not None else environment.get("BARNRAISE_HOME") or None
    if named is None:
        import platformdirs

        named = platformdirs.user_data_dir("barnraise")
        if not Path(named).is_absolute():
            raise Refused(Code.USAGE, "this user has no home folder", fix="Name a folder with --home.")
    if not named.strip():
        raise Refused(Code.USAGE, "the name of the home folder is empty", fix="Name a folder with --home.")
    try:
        return Home(Path(os.path.expanduser(named)).resolve())  # noqa: PTH111  # Path's own raises when HOME is unset
    except (OSError, RuntimeError, ValueError) as error:
        raise Refused(Code.HOME_FOREIGN, f"{printable(named[:120])} cannot be used: {error}") from None


def settings(home: Home, flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Settings:
    """What holds now. `flags` has None for a flag that was not given."""
    chosen: dict[str, Any] = {}
    file = _read_config(home.config)
    for key, parse in _PARSERS.items():
        variable, flag = f"BARNRAISE_{key.upper()}", f"--{key.replace('_', '-')}"
        if flags.get(key) is not None:
            value, code, source = flags[key], Code.USAGE, flag
        elif environment.get(variable, "").strip():
            value, code, source = environment[variable], Code.SPEC_VALUE, variable
        elif key in file:
            value, code, source = file[key], Code.SPEC_VALUE, f"{home.config}: {key}"
        else:
            continue
        try:
            chosen[_FIELDS.get(key, key)] = parse(value)
        except Refused as refused:
            fix = "Choose a value in the range named." if refused.fix == Code.USAGE.fix else refused.fix
            raise Refused(code, f"{source}: {refused.what}", fix=fix) from None
    return Settings(home.path, **chosen)


def _read_config(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        if path.stat().st_size > _CONFIG_BYTES_MAX:
            raise Refused(
                Code.SPEC_SYNTAX, f"{path} has more than {_CONFIG_BYTES_MAX:,} bytes", fix="Shorten the file."
            )
        file = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:  # a TOML error names line and column
        raise Refused(Code.SPEC_SYNTAX, f"{path}: {error}", fix="Mend the file at the place named.") from None
    except OSError as error:
        raise Refused(Code.HOME_FOREIGN, f"{path} cannot be read: {error.strerror}") from None
    for key, value in file.items():
        if key not in _PARSERS:
            what = f"{path}: unknown key {printable(key[:60])}{suggestion(key, _PARSERS)}"
            raise Refused(Code.SPEC_UNKNOWN_KEY, what)
        if isinstance(value, dict | list) or (isinstance(value, int) and value.bit_length() > _INTEGER_BITS_MAX):
            raise Refused(Code.SPEC_VALUE, f"{path}: {key} is neither text nor a number of 64 bits")
    return file


def _name(value: object) -> str:
    """Shown to strangers beside those of others."""
    text = unicodedata.normalize("NFC", _string(value)).strip()
    if not 0 < len(text) <= NAME_CHARACTERS_MAX or not text.isprintable():
        raise _wrong(value, f"1 to {NAME_CHARACTERS_MAX} visible characters")
    return text


def _device(value: object) -> str:
    text = _string(value).strip().lower()
    if not _DEVICE.fullmatch(text):
        raise _wrong(value, "auto, cpu, cuda, cuda:N or mps")
    return text


def _mode(value: object) -> Mode:
    try:
        return Mode(_string(value).strip().lower())
    except ValueError:
        raise _wrong(value, "auto, required or off") from None


def _hours(value: object) -> tuple[Hours, ...]:
    found = []
    for part in _string(value).split(","):
        times = _HOURS.fullmatch(part.strip())
        minutes = [60 * int(times[at]) + int(times[at + 1]) for at in (1, 3)] if times else [0, 0]
        if minutes[0] % MINUTES_A_DAY == minutes[1] % MINUTES_A_DAY or max(minutes) > MINUTES_A_DAY:
            raise _wrong(value, "hours such as 22:00-07:00, or several with commas between them")
        found.append(Hours(*(minute % MINUTES_A_DAY for minute in minutes)))
    return tuple(found)


def _truth(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if _string(value).strip().lower() not in _TRUTHS:
        raise _wrong(value, "true or false")
    return _TRUTHS[_string(value).strip().lower()]


def _whole(most: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        text = str(value).strip() if isinstance(value, int | str) and not isinstance(value, bool) else ""
        if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= most:
            raise _wrong(value, f"a whole number from 1 to {most:,}")
        return int(text)

    return parse


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise _wrong(value, "a size such as 5GB, 5 GiB or a number of bytes")
    return parse_size(str(value))


def _megabits(value: object) -> float:
    text = str(value).strip() if isinstance(value, int | float | str) and not isinstance(value, bool) else ""
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) or float(text) < MEGABITS_UP_MIN:
        raise _wrong(value, f"a number of Mbit/s from {MEGABITS_UP_MIN} up, such as 5")
    return float(text)


def _celsius(value: object) -> float:
    text = str(value).strip() if isinstance(value, int | float | str) and not isinstance(value, bool) else ""
    if not re.fullmatch(r"[0-9]{2,3}(\.[0-9]{1,3})?", text) or not CELSIUS_MIN <= float(text) <= CELSIUS_MAX:
        raise _wrong(value, f"degrees Celsius from {CELSIUS_MIN} to {CELSIUS_MAX}, such as 85")
    return float(text)


def _programs(value: object) -> tuple[str, ...]:
    names = tuple(name.strip().lower().removesuffix(".exe") for name in _string(value).split(","))
    if not all(names) or any("/" in name or "\\" in name for name in names):
        raise _wrong(value, "names of programs without a path, such as blender, or several with commas between them")
    return names


def _listen(value: object) -> str:
    found = _parsed(value)
    if found is None or not _is_ip(found.host):
        raise _wrong(value, "IP:port with a port from 0 (any free one) to 65535, such as 0.0.0.0:49400")
    lowest = _lowest_port()
    if 0 < found.port < lowest:
        raise Refused(Code.USAGE, f"port {found.port} needs rights that this user lacks", fix=f"Use {lowest} or above.")
    return str(found)


def _announce(value: object) -> str:
    found = _parsed(value)
    if found is None or not _is_ip(found.host) or found.unspecified:
        raise _wrong(value, "an IP:port that others can connect to, such as 203.0.113.7:49400")
    return str(found)


def _address(checked: str) -> Address:
    found = _parsed(checked)
    assert found is not None
    return found


def _parsed(value: object) -> Address | None:
    from protocol import address

    return address.parse(_string(value).strip())


def _is_ip(host: str) -> bool:
    import ipaddress

    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _lowest_port() -> int:
    """The first port that this user may listen on."""
    if os.geteuid() == 0:
        return 1
    try:
        return int(_UNPRIVILEGED.read_text())
    except (OSError, ValueError):
        return 1024


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise _wrong(value, "text in quotes")
    return value


def _wrong(value: object, wanted: str) -> Refused:
    return Refused(Code.USAGE, f"{printable(str(value)[:60])!r} is not {wanted}")


_HOURS: Final = re.compile(r"([0-2]?[0-9]):([0-5][0-9])\s*-\s*([0-2]?[0-9]):([0-5][0-9])", re.ASCII)
_TRUTHS: Final = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_FIELDS: Final = {each: f"{each}_bytes" for each in ("max_disk", "max_memory", "max_vram")}
_PARSERS: Final[Mapping[str, Callable[[object], Any]]] = {
    "name": _name,
    "device": _device,
    "threads": _whole(THREADS_MAX),
    "batch": _whole(BATCH_MAX),
    "max_disk": _size,
    "listen": _listen,
    "announce": _announce,
    "sandbox": _mode,
    "allow_root": _truth,
    "max_up": _megabits,
    "max_memory": _size,
    "max_vram": _size,
    "hours": _hours,
    "on_battery": _truth,
    "on_metered": _truth,
    "max_celsius": _celsius,
    "rest_beside": _programs,
    "training": _truth,
}


def _remove(path: Path) -> int:
    """Delete a file or a whole folder of ours, never what a link points to; answers the bytes."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return 0
    if not stat.S_ISDIR(info.st_mode):
        path.unlink()
        return info.st_size
    size = sum(entry.lstat().st_size for entry in path.rglob("*") if not entry.is_dir())
    shutil.rmtree(path)
    return size
