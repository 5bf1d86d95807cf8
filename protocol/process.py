"""A child process with an owner: framed messages over a socket pair, and death with its parent.

Both sides keep heavy or dangerous work (torch, hivemind) in children. A child is started from a clean
interpreter (never forked), sits in its parent's process group, and is killed by the kernel when its
parent dies, however the parent dies.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from protocol import sandbox as sandboxes
from protocol.canonical import adapter
from protocol.sandbox import Sandbox

T = TypeVar("T")
HEADER_BYTES_MAX = 16 << 20  # a control frame is small; the bound only stops a runaway
DIGITS_MAX = 20  # of an integer: 64 bits; what is longer would be no finite float either
PAYLOAD_BYTES_MAX = 1 << 34  # an encoded vector of 10^10 parameters fits
MALFORMED = (LookupError, TypeError, ValueError, RecursionError)  # what reading a frame ends as that does not hold it
_FRAME = struct.Struct("<IQ")  # bytes of JSON, bytes of payload
_PR_SET_PDEATHSIG = 1
_CHANNEL = "BARNRAISE_CHANNEL_FD"


@dataclass(frozen=True)
class Frame:
    """One message between a process and its child: a JSON object and, rarely, raw bytes."""

    body: Mapping[str, Any]
    payload: bytes = b""


def value_of(kind: type[T], said: object) -> T:
    """What a frame says, as a value of ours: all fields and no more, each of its type, every number finite. Else MALFORMED."""
    value: T = adapter(kind).validate_json(json.dumps(said, allow_nan=False), strict=True, extra="forbid")
    return value


class ChannelClosed(ConnectionError):
    """The other process has ended or closed its channel."""


class Channel:
    """One end of the socket pair between parent and child."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._sending = asyncio.Lock()

    @classmethod
    async def over(cls, end: socket.socket) -> Channel:
        end.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=end)
        return cls(reader, writer)

    async def send(self, body: Mapping[str, Any], payload: bytes | memoryview = b"") -> None:
        header = json.dumps(body, separators=(",", ":")).encode()
        async with self._sending:
            try:
                self._writer.write(_FRAME.pack(len(header), len(payload)) + header)
                if payload:
                    self._writer.write(payload)
                await self._writer.drain()
            except OSError as error:
                raise ChannelClosed(str(error)) from error

    async def receive(self) -> Frame:
        """The next frame. A process that sends anything else is done with: its channel is closed, so that it ends."""
        try:
            header_bytes, payload_bytes = _FRAME.unpack(await self._reader.readexactly(_FRAME.size))
            if header_bytes > HEADER_BYTES_MAX or payload_bytes > PAYLOAD_BYTES_MAX:
                raise ValueError(f"{header_bytes} and {payload_bytes} bytes")
            body = json.loads(await self._reader.readexactly(header_bytes), parse_int=_integer)
            if not isinstance(body, dict):
                raise ValueError(f"a {type(body).__name__}")
            payload = await self._reader.readexactly(payload_bytes) if payload_bytes else b""
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ChannelClosed("the other process has gone") from error
        except (ValueError, RecursionError) as error:
            self.close()
            raise ChannelClosed(f"the other process sent what is no frame: {error}") from error
        return Frame(body, payload)

    def close(self) -> None:
        with suppress(OSError):
            self._writer.close()


def _integer(digits: str) -> int:
    if len(digits) > DIGITS_MAX:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


class Child:
    """A running child module and the channel to it. Whoever starts it must `stop` it."""

    def __init__(self, process: asyncio.subprocess.Process, channel: Channel) -> None:
        self._process = process
        self.channel = channel

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    @classmethod
    async def start(
        cls,
        module: str,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        log: Any = None,
        pass_fds: Sequence[int] = (),
        sandbox: Sandbox | None = None,
    ) -> Child:
        """Run `python -m module arguments`; its output goes to `log`, an open file (default: ours).

        `pass_fds` stay open in the child under the same numbers. In a sandbox it shuts itself in before anything else.
        """
        ours, theirs = socket.socketpair()
        inside = {} if sandbox is None else sandboxes.described(sandbox)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                *(() if sandbox is None else (sandboxes.__name__,)),
                module,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(), *pass_fds),
                env={
                    **(os.environ | (env or {}) | inside),
                    _CHANNEL: str(theirs.fileno()),
                    "BARNRAISE_PARENT": str(os.getpid()),
                },
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(process, await Channel.over(ours))

    async def wait(self) -> int:
        return await self._process.wait()

    async def stop(self, *, grace_seconds: float) -> None:
        """Close the channel, which a child takes as the order to end; kill it after the grace."""
        self.channel.close()
        try:
            await asyncio.wait_for(self._process.wait(), grace_seconds)
        except TimeoutError:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends (Linux; elsewhere the closed channel ends it)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    expected = os.environ.get("BARNRAISE_PARENT")
    if expected is not None and os.getppid() != int(expected):
        os._exit(1)  # the parent died before the kernel knew of our wish


async def parent_channel() -> Channel:
    """In a child: the channel to the parent. Ctrl-C is the parent's business, so it is ignored here."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return await Channel.over(socket.socket(fileno=int(os.environ.pop(_CHANNEL))))
