"""How the owner of a machine steers its node: a private socket in the home folder.

One request and one reply per connection, each a line of JSON. Only the node's own user (and root) is answered.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from protocol.console import printable
from protocol.errors import Code, Refused

REQUEST_BYTES_MAX: Final = 1 << 14  # a verb and a number or two
REPLY_BYTES_MAX: Final = 1 << 20  # a status takes some 2 kB
REQUEST_SECONDS_MAX: Final = 2.0  # the asker is on this machine and has nothing to think about
HANDLER_SECONDS_MAX: Final = 15.0  # leaving tells the coordinator, which may be far away
CONNECTIONS_MAX: Final = 16

_ADDRESS_BYTES_MAX: Final = 100  # the kernel takes 108 (Linux) or 104 (macOS) with a closing zero
_DESCRIPTORS: Final = Path("/proc/self/fd")
_UCRED: Final = struct.Struct("3i")  # pid, uid, gid

Handler = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]


class Control:
    """The daemon's end of the socket. `handler` takes a checked verb and its arguments, and may refuse."""

    def __init__(self, path: Path, handler: Handler) -> None:
        self._path = path
        self._handler = handler
        self._server: asyncio.AbstractServer | None = None
        self._connections = 0

    async def start(self) -> None:
        """The caller holds the lock of the home, so a socket that is already there is a dead node's."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path.parent.chmod(0o700)
        self._path.unlink(missing_ok=True)
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _address(self._path) as address:
                end.bind(address)
            self._path.chmod(0o600)  # nobody can connect before the server listens
            self._server = await asyncio.start_unix_server(self._serve, sock=end, limit=REQUEST_BYTES_MAX)
        except BaseException:
            end.close()
            raise

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections <= CONNECTIONS_MAX and _is_owner(writer.get_extra_info("socket")):
                reply = await self._reply(reader)
                if reply is not None:
                    writer.write(json.dumps(reply, separators=(",", ":")).encode() + b"\n")
                    async with asyncio.timeout(REQUEST_SECONDS_MAX):
                        await writer.drain()
        except (OSError, TimeoutError):
            writer.transport.abort()  # the asker went away, or does not read
        finally:
            self._connections -= 1
            writer.close()

    async def _reply(self, reader: asyncio.StreamReader) -> dict[str, Any] | None:
        """None when no whole request came."""
        try:
            async with asyncio.timeout(REQUEST_SECONDS_MAX):
                line = await reader.readuntil(b"\n")
        except asyncio.IncompleteReadError:
            return None
        except asyncio.LimitOverrunError:
            return _refusal(Refused(Code.LIMIT, f"a request of over {REQUEST_BYTES_MAX:,} bytes"))
        try:
            verb, arguments = _request(line)
            async with asyncio.timeout(HANDLER_SECONDS_MAX):
                return {"ok": True, "result": await self._handler(verb, arguments)}
        except Refused as refused:
            return _refusal(refused)
        except TimeoutError:
            return _refusal(Refused(Code.UNREACHABLE, f"the node needed over {HANDLER_SECONDS_MAX:.0f} s to answer"))


def ask(home: Path, verb: str, *, seconds_max: float = HANDLER_SECONDS_MAX + 5, **arguments: Any) -> dict[str, Any]:
    """One question to the node that runs in this home; its refusal is raised here."""
    path = home / "runtime" / "control.sock"
    request = json.dumps({"verb": verb, "arguments": arguments}).encode() + b"\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
        end.settimeout(seconds_max)
        try:
            with _address(path) as address:
                end.connect(address)
        except PermissionError:
            raise Refused(Code.NO_DAEMON, f"the node in {home} belongs to another user", fix="Ask its owner.") from None
        except OSError:
            raise Refused(Code.NO_DAEMON, f"no node is running in {home}") from None
        try:
            end.sendall(request)
            line = _read_line(end)
        except TimeoutError:
            what = f"the node in {home} did not answer within {seconds_max:.0f} s"
            raise Refused(
                Code.UNREACHABLE, what, fix="Try again; if it stays like this, end it and start it."
            ) from None
        except OSError:
            line = b""
    return _result(line, home)


def _result(line: bytes, home: Path) -> dict[str, Any]:
    try:
        reply = json.loads(line)
        if reply["ok"] is True:
            return dict(reply["result"])
        refused = Refused.from_wire(str(reply["error"]), str(reply["what"]))
        fix = str(reply.get("fix") or refused.fix)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        what = f"the node in {home} closed the connection without an answer"
        raise Refused(Code.NO_DAEMON, what, fix="It may just be ending. Try again.") from None
    raise Refused(refused.reason, refused.what, fix=fix)


def _read_line(end: socket.socket) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n") and len(line) <= REPLY_BYTES_MAX:
        data = end.recv(1 << 16)
        if not data:
            break
        line += data
    return bytes(line)


def _request(line: bytes) -> tuple[str, dict[str, Any]]:
    """A verb we know with exactly the arguments it takes."""
    try:
        request = json.loads(line)
        verb, arguments = request["verb"], request.get("arguments", {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Refused(Code.FIELD, "a request is one line of JSON with a verb") from None
    if not isinstance(verb, str) or verb not in _ARGUMENTS:
        raise Refused(Code.FIELD, f"unknown verb {printable(str(verb)[:40])!r}")
    if not isinstance(arguments, dict) or set(arguments) - set(_ARGUMENTS[verb]):
        raise Refused(Code.FIELD, f"{verb} takes {', '.join(_ARGUMENTS[verb]) or 'no arguments'}")
    for name, value in arguments.items():
        if not _ARGUMENTS[verb][name](value):
            raise Refused(Code.FIELD, f"{verb}: {name} cannot be {printable(repr(value)[:40])}")
    return verb, arguments


def _is_seconds(value: object) -> bool:
    """A positive, finite number of seconds; none means without an end."""
    if value is None:
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


_ARGUMENTS: Final[Mapping[str, Mapping[str, Callable[[object], bool]]]] = {
    "status": {},
    "pause": {"seconds": _is_seconds},
    "resume": {},
    "finish": {},
    "leave": {"purge": lambda value: isinstance(value, bool)},
}


def _refusal(refused: Refused) -> dict[str, Any]:
    return {"ok": False, "error": refused.reason.code, "what": refused.what, "fix": refused.fix}


def _is_owner(end: Any) -> bool:
    """The folder's mode already keeps others out; this holds even where someone loosened it."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:  # macOS
        return True
    _, user, _ = _UCRED.unpack(end.getsockopt(socket.SOL_SOCKET, option, _UCRED.size))
    return user in (os.geteuid(), 0)


@contextmanager
def _address(path: Path) -> Iterator[str]:
    """The path in a form short enough for the kernel, however deep the home lies."""
    if len(os.fsencode(path)) <= _ADDRESS_BYTES_MAX:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _DESCRIPTORS.exists():
            yield f"{_DESCRIPTORS}/{folder}/{path.name}"
            return
        here = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fchdir(folder)
            yield path.name
        finally:
            with suppress(OSError):
                os.fchdir(here)
            os.close(here)
    finally:
        os.close(folder)
