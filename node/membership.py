"""How a node belongs to its run: let in by the coordinator, or, while that is away, by what it said last time."""

from __future__ import annotations

import platform
import random
from asyncio import sleep
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Final

import structlog

from node.core.backoff import wait_seconds
from node.link import Door, Link, Opened
from node.standing import Standing, begin_life, raise_life
from protocol import invite as invites
from protocol.errors import Code, Refused
from protocol.invite import Invite
from protocol.types import Lease, NodeId

STANDING: Final = "standing.json"
DOOR: Final = "door.json"
TRIES_BEFORE_ALONE: Final = 2  # a coordinator that is being restarted answers the second knock

log = structlog.get_logger()


class Membership:
    """One run's, in the run's folder of the journal. `online`: the coordinator has let this process in."""

    def __init__(self, node: NodeId, link: Link, invite: Invite, name: str, folder: Path) -> None:
        self._node = node
        self._link = link
        self._invite = invite
        self._name = name
        self._folder = folder
        self._standing: Standing | None = None
        self._opened: Opened | None = None
        self.online = False
        self.life = begin_life(folder) if folder.exists() else 1

    @property
    def opened(self) -> Opened:
        assert self._opened is not None
        return self._opened

    @property
    def leases(self) -> tuple[Lease, ...]:
        """What this node held when it last said so."""
        return self._standing.leases if self._standing is not None else ()

    async def begin(self, *, known: bool) -> None:
        """Be let in. A first join fails at once when nobody answers; a member goes on with what it knows."""
        where, link = self._folder / STANDING, self._link
        self._recall_door()
        self._standing = Standing.load(where, link.door, node=self._node, peer=link.peer)
        if self._standing is not None:
            link.expect(self._standing.manifest.manifest)
        failures = 0
        while self._opened is None:
            try:
                await self.enter()
            except Refused as refused:
                if not known or refused.reason is not Code.UNREACHABLE:
                    raise
                log.warning("the coordinator is away", why=refused.what)
                failures += 1
                if self._standing is not None and failures >= TRIES_BEFORE_ALONE:
                    self._opened = self._standing.opened(self.life)
                    return
                await sleep(wait_seconds(failures=failures - 1, luck=random.random()))  # noqa: S311  # only spreads the load

    async def enter(self) -> Opened:
        """Open the session; what the coordinator says of this node's past counts from here on."""
        invite = invites.encode(self._invite)
        opened = await self._link.open(life=self.life, invite=invite, name=self._name, software=_software())
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.life = max(self.life, opened.life)
        raise_life(self._folder, self.life)
        self._opened, self.online = opened, True
        with _unless_full("a start without the coordinator is not possible"):
            self._save(Standing.of(opened, self.leases))
        self._keep_door()
        return opened

    def _recall_door(self) -> None:
        """A certificate that the run has replaced is not believed after a restart either."""
        with suppress(FileNotFoundError, Refused):
            known = Door.load(self._folder / DOOR)
            if known.run == self._link.door.run:
                self._link.door = replace(self._link.door, endorsed=known.endorsed)

    def _keep_door(self) -> None:
        with _unless_full("a certificate that the run replaces may be believed again"):
            self._link.door.save(self._folder / DOOR)

    def renew(self) -> None:
        """A new life: a backup of this disk that is older than it will be noticed."""
        with _unless_full("a backup of this disk may go unnoticed"):
            self.life = begin_life(self._folder)

    def keep(self, leases: Iterable[Lease]) -> None:
        """Remember which data is ours, for a start without the coordinator."""
        if self._standing is not None:
            with _unless_full("a start without the coordinator may lack data"):
                self._save(self._standing.with_leases(leases))

    def _save(self, standing: Standing) -> None:
        self._standing = standing
        standing.save(self._folder / STANDING)


@contextmanager
def _unless_full(what: str) -> Iterator[None]:
    """For what a node can do without: a full disk is no reason to end it."""
    try:
        yield
    except Refused as refused:
        if refused.reason is not Code.DISK_CAP:
            raise
        log.warning("not saved", what=what, why=refused.what)


def _software() -> str:
    return f"barnraise {version('barnraise')}, python {platform.python_version()}, {platform.system()}"
