"""The gate: what stands in front of the door's gRPC server and counts connections. It sees bytes, and knows no call.

gRPC for Python takes any number of connections and can hang up on none. So its server listens at a socket in a folder
that is closed to others, and the gate carries bytes between it and those whom it lets through.
"""

from __future__ import annotations

import asyncio
import itertools
import resource
import socket
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Final

from coordinator.core import quotas
from coordinator.core.quotas import Network, block_of, take
from protocol.errors import Code, Refused

STRANGERS_MAX: Final = 1024  # connections without a session: what may come in their time, and the burst before
STRANGER_SECONDS: Final = 15.0  # for a session to be opened: a satellite needs three
OF_A_BLOCK_MAX: Final = 256  # connections of one network: a laboratory of 64 nodes, each coming back twice
FILES_KEPT: Final = 768  # descriptors for the page's 512 connections, databases, logs and children
FILES_OF_A_CONNECTION: Final = 3  # two here, one in gRPC
FILES_MAX: Final = 1 << 16  # that we ask of the system: 21,000 connections
LAST_BYTES_SECONDS: Final = 10.0
# On their way to a slow line, in the system and as often here. What is behind them can still be overtaken.
BYTES_AHEAD: Final = 16 << 10
BACKLOG: Final = 512
DOOR: Final = "door"  # the server's socket, in the folder of the passages' own


class Gate:
    """Listens for the server whose socket lies in `folder`. Whoever starts it must `stop` it."""

    def __init__(self, folder: Path) -> None:
        self.refused: Counter[str] = Counter()
        self.folder = folder
        self._crowd = quotas.Crowd(quotas.CONNECTIONS_OF_A_BLOCK, quotas.CONNECTIONS)
        self._passages: set[Passage] = set()
        self._members: set[Passage] = set()
        self._at_door: dict[str, Passage] = {}  # by the name with which they come there
        self._of_block: Counter[Network] = Counter()
        self._connections_max = 0
        self.numbers = itertools.count(1)
        self._server: asyncio.Server | None = None

    async def listen(self, host: str, port: int) -> int:
        """Tells the port."""
        self._connections_max = (_files() - FILES_KEPT) // FILES_OF_A_CONNECTION
        loop = asyncio.get_running_loop()
        try:
            both = host == "::"  # whoever names all of IPv6 means all of IPv4 too
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            bound = socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
            self._server = await loop.create_server(lambda: _Outer(self), sock=bound, backlog=BACKLOG)
        except OSError as error:
            raise Refused(Code.PORT_IN_USE, f"{host}:{port} cannot be listened on: {error.strerror}") from None
        return int(self._server.sockets[0].getsockname()[1])

    def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for passage in tuple(self._passages):
            passage.close()

    # for the door

    @property
    def members(self) -> int:
        """How many are connected."""
        return len(self._members)

    def passage(self, name: str) -> Passage | None:
        """Of whoever comes to the door by this name; none if the connection has ended since."""
        return self._at_door.get(name)

    def welcome(self, passage: Passage) -> None:
        """A member came by it. Its network has a share of its own from now on."""
        self._members.add(passage)
        self._crowd.welcome(passage.host)

    def dismiss(self, passage: Passage) -> None:
        """It has no session any more."""
        self._members.discard(passage)
        self._expect_a_session(passage)

    def blame(self, passage: Passage) -> bool:
        """A call was refused. Whoever goes on asking is hung up on; tells whether it is."""
        rate = quotas.REFUSALS if passage in self._members else quotas.STRANGERS_REFUSALS
        passage.blame, wait_seconds = take(passage.blame, rate, now=time.monotonic())
        if wait_seconds:
            self.refused["calls"] += 1
            passage.close()
        return bool(wait_seconds)

    # for its passages

    def admit(self, host: str, outer: asyncio.Transport) -> Passage | None:
        reason = self._objection(host)
        if reason:
            self.refused[reason] += 1
            return None
        passage = Passage(self, host, outer)
        self._passages.add(passage)
        self._of_block[passage.block] += 1
        self._expect_a_session(passage)
        return passage

    def _objection(self, host: str) -> str:
        """Why nobody may come in from there now; empty if somebody may."""
        block = block_of(host)
        if len(self._passages) >= self._connections_max:
            return "connections"
        if len(self._passages) - len(self._members) >= min(STRANGERS_MAX, self._connections_max // 2):
            return "strangers"
        if block.is_global and self._of_block[block] >= OF_A_BLOCK_MAX:
            return "network"
        return "rate" if self._crowd.take(host, now=time.monotonic()) else ""

    def _expect_a_session(self, passage: Passage) -> None:
        asyncio.get_running_loop().call_later(STRANGER_SECONDS, self._end_a_stranger, passage)

    def _end_a_stranger(self, passage: Passage) -> None:
        if passage not in self._members:
            passage.close()

    def arrived(self, passage: Passage) -> None:
        self._at_door[passage.name] = passage

    def left(self, passage: Passage) -> None:
        self._passages.remove(passage)
        self._members.discard(passage)
        self._at_door.pop(passage.name, None)
        self._of_block[passage.block] -= 1
        if not self._of_block[passage.block]:
            del self._of_block[passage.block]


class Passage:
    """One connection. What comes in at one end goes out at the other, no faster than it is taken there."""

    def __init__(self, gate: Gate, host: str, outer: asyncio.Transport) -> None:
        self.host = host
        self.block = block_of(host)
        self.name = str(next(gate.numbers))  # no two have the same
        self.blame = 0.0  # when its bucket of refused calls is full again
        self._gate = gate
        self._outer = outer
        self._inner: asyncio.Transport | None = None
        self._room = asyncio.Event()
        self._room.set()

    async def room(self) -> None:
        """Returns while its line takes what it is given: whoever sends much asks before each piece, so that little waits
        ahead of a ping or an answer. gRPC itself takes as much as it is given, and the system some 200 KiB of that."""
        await self._room.wait()

    def filled(self) -> None:
        self._room.clear()

    def drained(self) -> None:
        self._room.set()

    async def to_the_door(self, end: _End) -> None:
        loop = asyncio.get_running_loop()
        own = self._gate.folder / self.name
        inner = socket.socket(socket.AF_UNIX)
        try:
            inner.setblocking(False)
            inner.bind(str(own))  # what the door is told of who comes
            own.unlink()
            await loop.sock_connect(inner, str(self._gate.folder / DOOR))
            self._inner, _ = await loop.create_connection(lambda: _End(end), sock=inner)
        except OSError:  # the door is closing
            inner.close()
            self._outer.abort()
            return
        self._gate.arrived(self)
        if self._outer.is_closing():
            self._inner.abort()
        self._outer.resume_reading()

    def close(self) -> None:
        self._outer.abort()
        if self._inner is not None:
            self._inner.abort()


class _End(asyncio.Protocol):
    """One end of a connection; `_other` is there once both are."""

    def __init__(self, other: _End | None = None) -> None:
        self.transport: asyncio.Transport
        self._other = other
        if other is not None:
            other._other = self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self._other is not None:
            self._other.transport.write(data)

    def pause_writing(self) -> None:
        if self._other is not None:
            self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._other is not None:
            self._other.transport.resume_reading()

    def connection_lost(self, _error: Exception | None) -> None:
        """What is on its way still arrives, if it is taken soon."""
        if self._other is not None:
            transport = self._other.transport
            transport.close()
            asyncio.get_running_loop().call_later(LAST_BYTES_SECONDS, transport.abort)


class _Outer(_End):
    """The end of whoever came."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate
        self._passage: Passage | None = None
        self._coming: asyncio.Task[None] | None = None  # a task that nobody holds may be collected

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")  # none of one that has gone already
        self._passage = self._gate.admit(peer[0], self.transport) if peer else None
        if self._passage is None:
            self.transport.abort()
            return
        self.transport.set_write_buffer_limits(high=BYTES_AHEAD)
        self.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, BYTES_AHEAD)
        # Python 3.11.2 begins to read after this method, whatever was paused in it; and reads nothing before the next.
        asyncio.get_running_loop().call_soon(self._come_in, self._passage)

    def _come_in(self, passage: Passage) -> None:
        self.transport.pause_reading()
        self._coming = asyncio.create_task(passage.to_the_door(self))

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._passage is not None:
            self._passage.filled()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._passage is not None:
            self._passage.drained()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self._passage is not None:
            self._gate.left(self._passage)


def _files() -> int:
    """How many files this process may have open: all that the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FILES_MAX and soft != resource.RLIM_INFINITY:
        with suppress(ValueError, OSError):  # macOS refuses some values that it names
            wanted = FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, FILES_MAX)
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return FILES_MAX if soft == resource.RLIM_INFINITY else min(soft, FILES_MAX)
