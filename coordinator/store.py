"""The store: what a coordinator must never forget, in one SQLite file. Knows nothing of the network or of rounds' rules.

Every method is one transaction, durable when it returns. It is called from one thread; `backup` may be from another.

"The line" is the log as all rollbacks leave it. What a rollback undid stays beside it, marked with its number.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from sqlalchemy import (
    URL,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    RowMapping,
    String,
    Table,
    create_engine,
    delete,
    event,
    func,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DatabaseError, IntegrityError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry

from coordinator.core.leases import Cursor, Leases
from coordinator.core.strikes import Mark
from protocol import canonical
from protocol.blobs import full_disk_refused
from protocol.errors import Code, Refused
from protocol.log import record_hash
from protocol.types import (
    BaseCheckpoint,
    DataRange,
    Digest,
    Epoch,
    Lease,
    LogEntry,
    NodeId,
    PeerId,
    RoundNumber,
    Shard,
    SignedPass,
    SignedRollback,
    SignedRoster,
)

SCHEMA: Final = 4  # raised when an older program could misread a newer database
EVENTS_KEPT: Final = 10_000  # lines of history; older ones go
BUSY_SECONDS: Final = 5.0  # another command, such as `invite create`, holds the database for milliseconds
_SUM_BYTES: Final = 4  # a checksum before each value: SQLite has none, and sees no rot inside a row

_SCHEMA = MetaData()
_meta = Table("meta", _SCHEMA, Column("key", String, primary_key=True), Column("value", LargeBinary, nullable=False))
_invites = Table(
    "invites",
    _SCHEMA,
    Column("token_id", String, primary_key=True),
    Column("uses", Integer, nullable=False),
    Column("used", Integer, nullable=False, default=0),
    Column("expires_ms", Integer, nullable=False),
    Column("note", String, nullable=False, default=""),
    Column("revoked", Boolean, nullable=False, default=False),
)
_spent = Table(
    "spent",
    _SCHEMA,
    Column("token_id", String, ForeignKey("invites.token_id"), primary_key=True),
    Column("node", String, primary_key=True),
)
_nodes = Table(
    "nodes",
    _SCHEMA,
    Column("node", String, primary_key=True),
    Column("peer", String, nullable=False, unique=True),
    Column("name", String, nullable=False),
    Column("invite", String, ForeignKey("invites.token_id")),
    Column("pass", LargeBinary, nullable=False),
    Column("admitted_ms", Integer, nullable=False),
    Column("credit_tokens", Integer, nullable=False, default=0),
)
_marks = Table(
    "marks",
    _SCHEMA,
    Column("id", Integer, primary_key=True),
    Column("node", String, ForeignKey("nodes.node"), nullable=False),
    Column("bytes", LargeBinary, nullable=False),
)
_rosters = Table(
    "rosters", _SCHEMA, Column("epoch", Integer, primary_key=True), Column("bytes", LargeBinary, nullable=False)
)
_lives = Table(
    "lives",
    _SCHEMA,
    Column("node", String, ForeignKey("nodes.node"), primary_key=True),
    Column("life", Integer, nullable=False),
    Column("incarnation", LargeBinary, nullable=False),  # of the process that said it
    Column("silent", Integer),  # the newest epoch that it signs nothing under, for it has forgotten what it signed
)
_rollbacks = Table(
    "rollbacks",
    _SCHEMA,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("bytes", LargeBinary, nullable=False),
)
_ON_THE_LINE: Final = text("undone IS NULL")
_entries = Table(
    "entries",
    _SCHEMA,
    Column("id", Integer, primary_key=True),
    Column("round", Integer, nullable=False),
    Column("hash", String, nullable=False, unique=True),
    Column("undone", Integer, ForeignKey("rollbacks.number")),
    Column("bytes", LargeBinary, nullable=False),
    Index("entries_line", "round", unique=True, sqlite_where=_ON_THE_LINE),
)
_parts = Table(
    "parts",
    _SCHEMA,
    Column("digest", String, primary_key=True),
    Column("entry", Integer, ForeignKey("entries.id"), nullable=False),
)
_cursor = Table(
    "cursor",
    _SCHEMA,
    Column("id", Integer, primary_key=True),
    Column("bytes", LargeBinary, nullable=False),
    Column("serial", Integer, nullable=False),
)
_leases = Table(
    "leases", _SCHEMA, Column("lease_id", String, primary_key=True), Column("bytes", LargeBinary, nullable=False)
)
_returned = Table(
    "returned", _SCHEMA, Column("position", Integer, primary_key=True), Column("bytes", LargeBinary, nullable=False)
)
_shards = Table(
    "shards",
    _SCHEMA,
    Column("position", Integer, primary_key=True),
    Column("heldout", Boolean, nullable=False),
    Column("bytes", LargeBinary, nullable=False),
)
_bases = Table(
    "bases", _SCHEMA, Column("round", Integer, primary_key=True), Column("bytes", LargeBinary, nullable=False)
)
_evaluations = Table(
    "evaluations",
    _SCHEMA,
    Column("id", Integer, primary_key=True),
    Column("round", Integer, nullable=False),
    Column("undone", Integer, ForeignKey("rollbacks.number")),
    Column("tokens", Integer, nullable=False),
    Column("heldout", Float),
    Column("train", Float),
    Column("ms", Integer, nullable=False),
    Column("nodes", Integer, nullable=False),
    Column("bytes", Integer, nullable=False),
    Index("evaluations_line", "round", unique=True, sqlite_where=_ON_THE_LINE),
)
_orders = Table(
    "orders",
    _SCHEMA,
    Column("order_id", Integer, primary_key=True),
    Column("kind", String, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("state", String, nullable=False),
    Column("answer", String, nullable=False, default=""),
)
_events = Table(
    "events",
    _SCHEMA,
    Column("id", Integer, primary_key=True),
    Column("ms", Integer, nullable=False),
    Column("text", String, nullable=False),
)


@dataclass(frozen=True)
class StoredInvite:
    token_id: str
    uses: int
    used: int
    expires_ms: int
    note: str
    revoked: bool


@dataclass(frozen=True)
class StoredNode:
    """An admitted node. Its peer id never changes; its credit only grows, with the log."""

    node: NodeId
    peer: PeerId
    name: str
    invite: str | None  # token id
    signed_pass: SignedPass
    admitted_ms: int
    credit_tokens: int = 0


@dataclass(frozen=True)
class Evaluation:
    """The state before a round, measured."""

    round: RoundNumber
    tokens: int
    heldout: float | None
    train: float | None
    ms: int
    nodes: int
    bytes: int


class OrderState(StrEnum):
    OPEN = "open"
    DONE = "done"
    REFUSED = "refused"


@dataclass(frozen=True)
class Order:
    """What a command asks of the coordinator that runs, and what came of it."""

    order_id: int
    kind: str
    body: bytes
    state: OrderState
    answer: str


def backup_of(path: Path) -> Path:
    """Where a database's backup lies."""
    return path.with_name(f"{path.stem}.backup{path.suffix}")


class Store:
    """One run's database. Opening it makes it, or goes on after whatever end the last process had."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = path
        self._check_not_lost()
        with full_disk_refused(path.parent):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # SQLite itself would let others read
        self._engine = _engine(path)
        try:
            self._prepare()
        except BaseException:
            self._engine.dispose()
            raise

    def close(self) -> None:
        self._engine.dispose()

    def get(self, key: str) -> bytes | None:
        with self._reading() as connection:
            value: bytes | None = connection.scalar(select(_meta.c.value).where(_meta.c.key == key))
            return value if value is None else _unsealed(value)

    def set(self, key: str, value: bytes) -> None:
        with self._writing() as connection:
            _put(connection, _meta, {"key": key, "value": _sealed(value)})

    # invites and nodes

    def add_invite(self, token_id: str, *, uses: int, expires_ms: int, note: str = "") -> None:
        row = {"token_id": token_id, "uses": uses, "expires_ms": expires_ms, "note": note}
        with self._writing() as connection:
            connection.execute(_invites.insert().values(row))

    def invites(self) -> tuple[StoredInvite, ...]:
        with self._reading() as connection:
            rows = connection.execute(select(_invites).order_by(_invites.c.expires_ms))
            return tuple(StoredInvite(**row) for row in rows.mappings())

    def revoke_invite(self, token_id: str) -> None:
        with self._writing() as connection:
            changed = connection.execute(
                update(_invites).where(_invites.c.token_id == token_id).values(revoked=True)
            ).rowcount
        if not changed:
            raise Refused(Code.INVITE_UNKNOWN, f"there is no invite {canonical.shown(token_id[:32])}")

    def spend_invite(self, token_id: str, node: NodeId, now_ms: int) -> None:
        """Take one use of the invite for this node; a node that took one before takes no other."""
        mine = (_spent.c.token_id == token_id) & (_spent.c.node == node)
        with self._writing() as connection:
            if connection.scalar(select(_spent.c.node).where(mine)) is not None:
                return
            row = connection.execute(select(_invites).where(_invites.c.token_id == token_id)).mappings().first()
            if row is None or row["revoked"]:
                raise Refused(Code.INVITE_UNKNOWN, "the coordinator does not know this invite, or took it back")
            if row["expires_ms"] <= now_ms:
                raise Refused(Code.INVITE_EXPIRED, f"the invite expired {(now_ms - row['expires_ms']) // 1000} s ago")
            free = (_invites.c.token_id == token_id) & (_invites.c.used < _invites.c.uses)
            if not connection.execute(update(_invites).where(free).values(used=_invites.c.used + 1)).rowcount:
                raise Refused(Code.INVITE_USED, f"the invite was good for {row['uses']} nodes, and has been used")
            connection.execute(_spent.insert().values(token_id=token_id, node=node))

    def save_node(self, node: StoredNode) -> None:
        """Admit a node, or renew its name and pass. Its credit stays as it is."""
        renewed = {"name": node.name, "pass": _packed(node.signed_pass)}
        row = {
            "node": node.node,
            "peer": node.peer,
            "invite": node.invite,
            "admitted_ms": node.admitted_ms,
            "credit_tokens": node.credit_tokens,
            **renewed,
        }
        same_peer = _nodes.c.peer == node.peer
        statement = insert(_nodes).values(row).on_conflict_do_update(["node"], set_=renewed, where=same_peer)
        try:
            with self._writing() as connection:
                saved = connection.execute(statement).rowcount
        except IntegrityError:
            raise Refused(Code.IDENTITY_TAKEN, f"peer {node.peer} belongs to another node") from None
        if not saved:
            raise Refused(Code.IDENTITY_TAKEN, f"node {node.node[:16]} was admitted with another peer id")

    def node(self, node: NodeId) -> StoredNode | None:
        with self._reading() as connection:
            row = connection.execute(select(_nodes).where(_nodes.c.node == node)).mappings().first()
            return _stored_node(row) if row else None

    def peer_owner(self, peer: PeerId) -> NodeId | None:
        with self._reading() as connection:
            owner: NodeId | None = connection.scalar(select(_nodes.c.node).where(_nodes.c.peer == peer))
            return owner

    def nodes(self) -> tuple[StoredNode, ...]:
        with self._reading() as connection:
            rows = connection.execute(select(_nodes).order_by(_nodes.c.admitted_ms, _nodes.c.node)).mappings()
            return tuple(_stored_node(row) for row in rows)

    def names(self) -> dict[NodeId, str]:
        with self._reading() as connection:
            return {NodeId(node): name for node, name in connection.execute(select(_nodes.c.node, _nodes.c.name))}

    def add_marks(self, marks: Sequence[Mark]) -> None:
        """The trail only grows: who was struck, banned or let in again, when, by whom and why."""
        with self._writing() as connection:
            connection.execute(_marks.insert(), [{"node": mark.node, "bytes": _packed(mark)} for mark in marks])

    def marks(self) -> tuple[Mark, ...]:
        return self._all(Mark, select(_marks.c.bytes).order_by(_marks.c.id))

    def begin_life(self, node: NodeId, life: int, newest_epoch: Epoch, incarnation: bytes) -> tuple[int, Epoch | None]:
        """A start of this node: the highest life known of it, and up to which epoch it signs nothing.

        A life that is not above the one stored is of a disk that was put back or copied: its promises under all
        rosters issued so far, `newest_epoch` the last, are forgotten. Not so from the process that said the one stored:
        it has only lost its connection."""
        with self._writing() as connection:
            mine = _lives.c.node == node
            known = connection.execute(select(_lives.c.life, _lives.c.silent, _lives.c.incarnation).where(mine)).first()
            if known is None and connection.scalar(select(_nodes.c.node).where(_nodes.c.node == node)) is None:
                raise Refused(Code.NOT_ADMITTED, f"there is no node {canonical.shown(node[:64])}")
            stored, silent, process = (0, None, b"") if known is None else known
            if incarnation == process:
                life = max(life, stored)
            elif life <= stored:
                life, silent = stored + 1, newest_epoch
            row = {"node": node, "life": life, "silent": silent, "incarnation": incarnation}
            _put(connection, _lives, row)
        return life, silent

    def silent(self) -> dict[NodeId, Epoch]:
        """The nodes that have ever forgotten what they signed, and up to which epoch they sign nothing."""
        with self._reading() as connection:
            rows = connection.execute(select(_lives.c.node, _lives.c.silent).where(_lives.c.silent.is_not(None)))
            return {NodeId(node): Epoch(epoch) for node, epoch in rows}

    # the log

    def save_roster(self, signed: SignedRoster) -> None:
        with self._writing() as connection:
            row = {"epoch": signed.roster.epoch, "bytes": _packed(signed)}
            connection.execute(_rosters.insert().values(row))

    def rosters(self) -> tuple[SignedRoster, ...]:
        return self._all(SignedRoster, select(_rosters.c.bytes).order_by(_rosters.c.epoch))

    def newest_roster(self) -> SignedRoster | None:
        found = self._all(SignedRoster, select(_rosters.c.bytes).order_by(_rosters.c.epoch.desc()).limit(1))
        return found[0] if found else None

    def append_entry(self, entry: LogEntry, tokens: Mapping[NodeId, int], leases: Leases | None = None) -> None:
        """The line grows by one record, its contributors' credit by what it says, and the leases lose its data."""
        record = entry.record
        row = {"round": record.round, "hash": record_hash(record), "bytes": _packed(entry)}
        with self._writing() as connection:
            count = _count(connection)
            assert record.round == count, f"record {record.round}, expected {count}"
            entry_id = connection.execute(_entries.insert().values(row)).lastrowid
            if record.parts:
                parts = [{"digest": part.digest, "entry": entry_id} for part in record.parts]
                connection.execute(insert(_parts).on_conflict_do_nothing(), parts)
            for node, more in tokens.items():
                grown = update(_nodes).values(credit_tokens=_nodes.c.credit_tokens + more)
                connection.execute(grown.where(_nodes.c.node == node))
            if leases is not None:
                _put_leases(connection, leases)

    def entries(self, start: int = 0, limit: int | None = None) -> tuple[LogEntry, ...]:
        """The line's records from round `start` on."""
        query = select(_entries.c.bytes).where(_ON_THE_LINE, _entries.c.round >= start).order_by(_entries.c.round)
        return self._all(LogEntry, query.limit(limit) if limit is not None else query)

    @property
    def entry_count(self) -> int:
        with self._reading() as connection:
            return _count(connection)

    def save_rollback(
        self, signed: SignedRollback, leases: Leases, passed: Sequence[SignedRollback] = ()
    ) -> tuple[Digest, ...]:
        """The line ends at an earlier round, and data that was consumed after it is in the leases again.

        Records, their credit and what was measured stay, marked with the rollback's number; the state at `to.round`
        and its measurement are of the line still. Base checkpoints beyond it go; returns their blobs, for the caller.
        `passed` are rollbacks before it that this log never came to follow, for this one goes back further."""
        rollback = signed.rollback
        number, stays = rollback.number, rollback.to.round
        rows = [{"number": each.rollback.number, "bytes": _packed(each)} for each in (*passed, signed)]
        with self._writing() as connection:
            newest = connection.scalar(select(func.max(_rollbacks.c.number))) or 0
            assert [row["number"] for row in rows] == list(range(newest + 1, number + 1)), f"{number} after {newest}"
            last = connection.scalar(select(_entries.c.hash).where(_ON_THE_LINE, _entries.c.round == stays - 1))
            assert last in (None, rollback.to.hash), f"rollback {number} to {rollback.to.hash}, the line has {last}"
            connection.execute(_rollbacks.insert(), rows)
            for table, first in ((_entries, stays), (_evaluations, stays + 1)):
                connection.execute(update(table).where(_ON_THE_LINE, table.c.round >= first).values(undone=number))
            beyond = _values(connection, BaseCheckpoint, select(_bases.c.bytes).where(_bases.c.round > stays))
            connection.execute(delete(_bases).where(_bases.c.round > stays))
            _put_leases(connection, leases)
        return tuple(base.blob.digest for base in beyond)

    def rollbacks(self) -> tuple[SignedRollback, ...]:
        return self._all(SignedRollback, select(_rollbacks.c.bytes).order_by(_rollbacks.c.number))

    def undone(self) -> tuple[tuple[int, LogEntry], ...]:
        """Every record that is not of the line any more, after the number of the rollback that undid it."""
        query = select(_entries.c.undone, _entries.c.bytes).where(_entries.c.undone.is_not(None))
        with self._reading() as connection:
            rows = connection.execute(query.order_by(_entries.c.undone, _entries.c.round))
            return tuple((number, _unpacked(LogEntry, data)) for number, data in rows)

    def has_part(self, digest: Digest) -> bool:
        """Whether a record of the log names this part, be it undone."""
        with self._reading() as connection:
            return connection.scalar(select(_parts.c.digest).where(_parts.c.digest == digest)) is not None

    # data

    def save_leases(self, leases: Leases) -> None:
        with self._writing() as connection:
            _put_leases(connection, leases)

    def load_leases(self, shards: tuple[Shard, ...]) -> Leases:
        with self._reading() as connection:
            row = connection.execute(select(_cursor.c.bytes, _cursor.c.serial)).first()
            held = _values(connection, Lease, select(_leases.c.bytes).order_by(_leases.c.lease_id))
            returned = _values(connection, DataRange, select(_returned.c.bytes).order_by(_returned.c.position))
            if row is None and (held or returned):
                raise _Rotten
            if row is None:
                return Leases(shards)
            cursor = _unpacked(Cursor, row.bytes)
        return Leases(shards, cursor, returned, {lease.lease_id: lease for lease in held}, row.serial)

    def save_shards(self, shards: Sequence[Shard], heldout: Shard | None) -> None:
        """Their order is the order of the data; it never changes once leases are granted."""
        rows = [{"position": i, "heldout": False, "bytes": _packed(s)} for i, s in enumerate(shards)]
        if heldout is not None:
            rows.append({"position": len(rows), "heldout": True, "bytes": _packed(heldout)})
        with self._writing() as connection:
            connection.execute(delete(_shards))
            if rows:
                connection.execute(_shards.insert(), rows)

    def shards(self) -> tuple[Shard, ...]:
        return self._all(Shard, select(_shards.c.bytes).where(~_shards.c.heldout).order_by(_shards.c.position))

    def heldout(self) -> Shard | None:
        return next(iter(self._all(Shard, select(_shards.c.bytes).where(_shards.c.heldout))), None)

    # what came of it

    def save_base(self, base: BaseCheckpoint) -> None:
        """Keep this checkpoint, unless a rollback has undone its state while it was written."""
        with self._writing() as connection:
            later = select(_rollbacks.c.bytes).where(_rollbacks.c.number > base.branch)
            undone = [each.rollback.to.round < base.round for each in _values(connection, SignedRollback, later)]
            if not any(undone):
                _put(connection, _bases, {"round": base.round, "bytes": _packed(base)})

    def drop_base(self, round_number: RoundNumber) -> None:
        """Its blob is not what it was."""
        with self._writing() as connection:
            connection.execute(delete(_bases).where(_bases.c.round == round_number))

    def bases(self) -> tuple[BaseCheckpoint, ...]:
        return self._all(BaseCheckpoint, select(_bases.c.bytes).order_by(_bases.c.round))

    def newest_base(self) -> BaseCheckpoint | None:
        newest = select(_bases.c.bytes).order_by(_bases.c.round.desc()).limit(1)
        return next(iter(self._all(BaseCheckpoint, newest)), None)

    def save_evaluation(self, evaluation: Evaluation) -> None:
        """Once per round of the line: a later measurement of the same state replaces the earlier."""
        row = dict(vars(evaluation))
        statement = insert(_evaluations).values(row)
        with self._writing() as connection:
            connection.execute(statement.on_conflict_do_update(["round"], index_where=_ON_THE_LINE, set_=row))

    def history(self, limit: int | None = None) -> tuple[Evaluation, ...]:
        """The line's newest evaluations, oldest first."""
        columns = [_evaluations.c[name] for name in Evaluation.__dataclass_fields__]
        newest = select(*columns).where(_ON_THE_LINE).order_by(_evaluations.c.round.desc()).limit(limit)
        with self._reading() as connection:
            return tuple(Evaluation(**row) for row in connection.execute(newest).mappings())[::-1]

    def say(self, ms: int, line: str) -> None:
        with self._writing() as connection:
            connection.execute(_events.insert().values(ms=ms, text=line))
            newest = select(func.max(_events.c.id)).scalar_subquery()
            connection.execute(delete(_events).where(_events.c.id <= newest - EVENTS_KEPT))

    def recent(self, limit: int) -> tuple[tuple[int, str], ...]:
        """The newest lines of history, oldest first."""
        newest = select(_events.c.ms, _events.c.text).order_by(_events.c.id.desc()).limit(limit)
        with self._reading() as connection:
            return tuple((row.ms, row.text) for row in connection.execute(newest))[::-1]

    # orders

    def add_order(self, kind: str, body: bytes) -> int:
        """Ask something of the coordinator that runs, or of the next one."""
        row = {"kind": kind, "body": _sealed(body), "state": OrderState.OPEN}
        with self._writing() as connection:
            return connection.execute(_orders.insert().values(row)).lastrowid

    def open_orders(self) -> tuple[Order, ...]:
        query = select(_orders).where(_orders.c.state == OrderState.OPEN).order_by(_orders.c.order_id)
        with self._reading() as connection:
            return tuple(_order(row) for row in connection.execute(query).mappings())

    def close_order(self, order_id: int, *, answer: str, done: bool) -> None:
        state = OrderState.DONE if done else OrderState.REFUSED
        mine = (_orders.c.order_id == order_id) & (_orders.c.state == OrderState.OPEN)
        with self._writing() as connection:
            closed = connection.execute(update(_orders).where(mine).values(state=state, answer=answer)).rowcount
        assert closed == 1, f"order {order_id} is not open"

    def order(self, order_id: int) -> Order:
        with self._reading() as connection:
            return _order(connection.execute(select(_orders).where(_orders.c.order_id == order_id)).mappings().one())

    # the file

    def backup(self, path: Path | None = None) -> None:
        """Put a whole copy of the database in the place of the last one; that one stays until this one is durable.

        To be called once a run is published and at each base checkpoint: a coordinator that begins again from it
        asks its nodes for the records, rosters and rollbacks since, and they still hold them from there on. Writers
        go on meanwhile, so it may run in another thread. Where the database is rotten, the last copy is left."""
        path = path or backup_of(self.path)
        new = path.with_name(f".new-{path.name}")
        with full_disk_refused(path.parent):
            new.unlink(missing_ok=True)
            try:
                os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                with closing(sqlite3.connect(self.path)) as source, closing(sqlite3.connect(new)) as copy:
                    source.backup(copy)
                    copy.execute("PRAGMA journal_mode=DELETE")  # one file is a whole database
                    self._check_whole(copy.execute("PRAGMA integrity_check(1)").fetchone()[0])
                with new.open("rb") as file:
                    os.fsync(file.fileno())
                new.replace(path)
            except sqlite3.DatabaseError as error:
                raise (self._refusal(error) or error) from None
            finally:
                new.unlink(missing_ok=True)

    def _check_not_lost(self) -> None:
        """Refuse to begin afresh where there was a run: SQLite takes an empty file for a new database."""
        with suppress(FileNotFoundError):
            if self.path.stat().st_size:
                return
        left = (backup_of(self.path), self.path.with_name(f"{self.path.name}-wal"))
        if any(path.exists() and path.stat().st_size for path in left):
            raise self._bad("is empty or gone")

    def _prepare(self) -> None:
        with self._reading() as connection:
            self._check_whole(connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar())
        with self._writing() as connection:
            if not inspect(connection).get_table_names():
                _SCHEMA.create_all(connection)
                _put(connection, _meta, {"key": "schema", "value": b"%d" % SCHEMA})
                return
            try:
                found = int(connection.scalar(select(_meta.c.value).where(_meta.c.key == "schema")))  # type: ignore[arg-type]
            except (OperationalError, TypeError, ValueError):
                raise Refused(Code.STORE_BAD, f"{self.path} is not a database of this program") from None
        if found == SCHEMA:
            return
        what = f"{self.path} has schema {found}, this program reads schema {SCHEMA}"
        older = "It is of a program before the first release. Begin another run with: barnraise-coordinator new NAME"
        raise Refused(Code.VERSION, what, fix=older if found < SCHEMA else None)

    def _check_whole(self, found: str | None) -> None:
        if found != "ok":
            raise self._bad(f"is damaged: {found}")

    def _bad(self, what: str) -> Refused:
        """A refusal that names the backup, if there is one."""
        backup, wal = backup_of(self.path), f"{self.path.name}-wal"
        fix = f"Move {self.path.name} and {wal} away, then copy {backup} to {self.path}." if backup.exists() else None
        return Refused(Code.STORE_BAD, f"{self.path} {what}", fix=fix)

    def _refusal(self, error: BaseException | None) -> Refused | None:
        """What SQLite reports, by name; none for what is our own mistake."""
        name = getattr(error, "sqlite_errorname", "")
        if name in ("SQLITE_FULL", "SQLITE_IOERR_WRITE"):  # the second is what a quota looks like
            fix = "Free some space on the disk that holds the run's folder. Nothing was changed."
            return Refused(Code.DISK_CAP, f"no room to write to {self.path}: {error}", fix=fix)
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            return self._bad(f"is not a whole SQLite database: {error}")
        if name.startswith(("SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN")):  # the last two: a remounted disk
            return Refused(Code.DISK_BAD, f"{self.path} cannot be read or written: {error}")
        return None

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._refusing(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._refusing(), self._engine.connect().execution_options(reads=True) as connection:
            yield connection

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except _Rotten:
            raise self._bad("holds a value that has changed on disk") from None
        except DatabaseError as error:
            refusal = self._refusal(error.orig)
            if refusal is None:
                raise
            raise refusal from None

    def _all(self, cls: type[Any], query: Any) -> tuple[Any, ...]:
        with self._reading() as connection:
            return _values(connection, cls, query)


def _engine(path: Path) -> Engine:
    url = URL.create("sqlite", database=str(path))  # not a text: a folder's name may have a ? in it
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # transactions begin where we say so, below
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            "trusted_schema=OFF",
            "cell_size_check=ON",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        reads = connection.get_execution_options().get("reads", False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")  # a reader that turns writer may deadlock

    return engine


def _put(connection: Connection, table: Table, row: Mapping[str, Any]) -> None:
    """Insert the row, or replace the one with its primary key."""
    keys = [column.name for column in table.primary_key]
    connection.execute(insert(table).values(row).on_conflict_do_update(keys, set_=dict(row)))


def _count(connection: Connection) -> int:
    newest: int | None = connection.scalar(select(func.max(_entries.c.round)).where(_ON_THE_LINE))
    return 0 if newest is None else newest + 1


def _put_leases(connection: Connection, leases: Leases) -> None:
    held = [{"lease_id": lease.lease_id, "bytes": _packed(lease)} for lease in leases.held.values()]
    returned = [{"position": i, "bytes": _packed(data)} for i, data in enumerate(leases.returned)]
    _put(connection, _cursor, {"id": 0, "bytes": _packed(leases.cursor), "serial": leases.serial})
    for table, rows in ((_leases, held), (_returned, returned)):
        connection.execute(delete(table))
        if rows:
            connection.execute(table.insert(), rows)


class _Rotten(Exception):
    """A value is not what was written. The file is; restore its backup."""


def _sealed(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_SUM_BYTES, "big") + data


def _unsealed(data: bytes) -> bytes:
    found, value = data[:_SUM_BYTES], data[_SUM_BYTES:]
    if zlib.crc32(value).to_bytes(_SUM_BYTES, "big") != found:
        raise _Rotten
    return value


def _packed(value: Any) -> bytes:
    return _sealed(canonical.to_bytes(value))


def _unpacked(cls: type[Any], data: bytes) -> Any:
    return canonical.from_bytes(cls, _unsealed(data))


def _values(connection: Connection, cls: type[Any], query: Any) -> tuple[Any, ...]:
    rows: Iterable[bytes] = connection.scalars(query)
    return tuple(_unpacked(cls, data) for data in rows)


def _order(row: RowMapping) -> Order:
    return Order(row["order_id"], row["kind"], _unsealed(row["body"]), OrderState(row["state"]), row["answer"])


def _stored_node(row: RowMapping) -> StoredNode:
    fields = {key: value for key, value in row.items() if key != "pass"}
    return StoredNode(**fields, signed_pass=_unpacked(SignedPass, row["pass"]))
