"""The store: what a coordinator must never forget, in one SQLite file. Knows nothing of the network or of rounds' rules.

Every method is one transaction, durable when it returns. It is called from one thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
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
    update,
)
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DatabaseError, IntegrityError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry

from coordinator.core.leases import Cursor, Leases
from protocol import canonical
from protocol.errors import Code, Refused
from protocol.log import record_hash
from protocol.types import (
    BaseCheckpoint,
    DataRange,
    Digest,
    Lease,
    LogEntry,
    NodeId,
    PeerId,
    RoundNumber,
    Shard,
    SignedPass,
    SignedRoster,
)

SCHEMA: Final = 1  # raised when an older program could misread a newer database
EVENTS_KEPT: Final = 10_000  # lines of history; older ones go
BUSY_SECONDS: Final = 5.0  # another command, such as `invite create`, holds the database for milliseconds

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
    Column("banned", Boolean, nullable=False, default=False),
)
_rosters = Table(
    "rosters", _SCHEMA, Column("epoch", Integer, primary_key=True), Column("bytes", LargeBinary, nullable=False)
)
_entries = Table(
    "entries",
    _SCHEMA,
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("hash", String, nullable=False, unique=True),
    Column("bytes", LargeBinary, nullable=False),
)
_parts = Table(
    "parts",
    _SCHEMA,
    Column("digest", String, primary_key=True),
    Column("round", Integer, ForeignKey("entries.round"), nullable=False),
    Column("size", Integer, nullable=False),
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
    Column("round", Integer, primary_key=True),
    Column("tokens", Integer, nullable=False),
    Column("heldout", Float),
    Column("train", Float),
    Column("ms", Integer, nullable=False),
    Column("nodes", Integer, nullable=False),
    Column("bytes", Integer, nullable=False),
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
    banned: bool = False


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


class Store:
    """One run's database. Opening it makes it, or goes on after whatever end the last process had."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # SQLite itself would let others read
        self.path = path
        self._engine = _engine(path)
        try:
            self._prepare()
        except BaseException as error:
            self._engine.dispose()
            if isinstance(error, DatabaseError) and not isinstance(error, OperationalError):
                raise Refused(Code.STORE_BAD, f"{path} is not a whole SQLite database: {error.orig}") from None
            raise

    def close(self) -> None:
        self._engine.dispose()

    def get(self, key: str) -> bytes | None:
        with self._reading() as connection:
            value: bytes | None = connection.scalar(select(_meta.c.value).where(_meta.c.key == key))
            return value

    def set(self, key: str, value: bytes) -> None:
        with self._writing() as connection:
            _put(connection, _meta, {"key": key, "value": value})

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
        """Admit a node, or renew its name and pass. Credit and ban stay as they are."""
        renewed = {"name": node.name, "pass": canonical.to_bytes(node.signed_pass)}
        row = {
            "node": node.node,
            "peer": node.peer,
            "invite": node.invite,
            "admitted_ms": node.admitted_ms,
            "credit_tokens": node.credit_tokens,
            "banned": node.banned,
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

    def ban(self, node: NodeId, *, banned: bool = True) -> None:
        with self._writing() as connection:
            known = connection.execute(update(_nodes).where(_nodes.c.node == node).values(banned=banned)).rowcount
        if not known:
            raise Refused(Code.NOT_ADMITTED, f"there is no node {canonical.shown(node[:64])}")

    # the log

    def save_roster(self, signed: SignedRoster) -> None:
        with self._writing() as connection:
            row = {"epoch": signed.roster.epoch, "bytes": canonical.to_bytes(signed)}
            connection.execute(_rosters.insert().values(row))

    def rosters(self) -> tuple[SignedRoster, ...]:
        return self._all(SignedRoster, select(_rosters.c.bytes).order_by(_rosters.c.epoch))

    def append_entry(self, entry: LogEntry, tokens: Mapping[NodeId, int]) -> None:
        """The log grows by one record, and its contributors' credit by what it says: both or neither."""
        row = {"round": entry.record.round, "hash": record_hash(entry.record), "bytes": canonical.to_bytes(entry)}
        parts = [{"digest": part.digest, "round": entry.record.round, "size": part.size} for part in entry.record.parts]
        with self._writing() as connection:
            count = _count(connection)
            assert entry.record.round == count, f"record {entry.record.round}, expected {count}"
            connection.execute(_entries.insert().values(row))
            if parts:
                connection.execute(insert(_parts).on_conflict_do_nothing(), parts)
            for node, more in tokens.items():
                grown = update(_nodes).values(credit_tokens=_nodes.c.credit_tokens + more)
                connection.execute(grown.where(_nodes.c.node == node))

    def entries(self, start: int = 0, limit: int | None = None) -> tuple[LogEntry, ...]:
        query = select(_entries.c.bytes).where(_entries.c.round >= start).order_by(_entries.c.round)
        return self._all(LogEntry, query.limit(limit) if limit is not None else query)

    @property
    def entry_count(self) -> int:
        with self._reading() as connection:
            return _count(connection)

    def has_part(self, digest: Digest) -> bool:
        """Whether a record of the log names this part."""
        with self._reading() as connection:
            return connection.scalar(select(_parts.c.digest).where(_parts.c.digest == digest)) is not None

    # data

    def save_leases(self, leases: Leases) -> None:
        held = [{"lease_id": lease.lease_id, "bytes": canonical.to_bytes(lease)} for lease in leases.held.values()]
        returned = [{"position": i, "bytes": canonical.to_bytes(data)} for i, data in enumerate(leases.returned)]
        with self._writing() as connection:
            _put(connection, _cursor, {"id": 0, "bytes": canonical.to_bytes(leases.cursor), "serial": leases.serial})
            for table, rows in ((_leases, held), (_returned, returned)):
                connection.execute(delete(table))
                if rows:
                    connection.execute(table.insert(), rows)

    def load_leases(self, shards: tuple[Shard, ...]) -> Leases:
        with self._reading() as connection:
            row = connection.execute(select(_cursor.c.bytes, _cursor.c.serial)).first()
            held = _values(connection, Lease, select(_leases.c.bytes).order_by(_leases.c.lease_id))
            returned = _values(connection, DataRange, select(_returned.c.bytes).order_by(_returned.c.position))
        if row is None:
            return Leases(shards)
        cursor = canonical.from_bytes(Cursor, row.bytes)
        return Leases(shards, cursor, returned, {lease.lease_id: lease for lease in held}, row.serial)

    def save_shards(self, shards: Sequence[Shard], heldout: Shard | None) -> None:
        """Their order is the order of the data; it never changes once leases are granted."""
        rows = [{"position": i, "heldout": False, "bytes": canonical.to_bytes(s)} for i, s in enumerate(shards)]
        if heldout is not None:
            rows.append({"position": len(rows), "heldout": True, "bytes": canonical.to_bytes(heldout)})
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
        with self._writing() as connection:
            _put(connection, _bases, {"round": base.round, "bytes": canonical.to_bytes(base)})

    def bases(self) -> tuple[BaseCheckpoint, ...]:
        return self._all(BaseCheckpoint, select(_bases.c.bytes).order_by(_bases.c.round))

    def newest_base(self) -> BaseCheckpoint | None:
        newest = select(_bases.c.bytes).order_by(_bases.c.round.desc()).limit(1)
        return next(iter(self._all(BaseCheckpoint, newest)), None)

    def save_evaluation(self, evaluation: Evaluation) -> None:
        with self._writing() as connection:
            _put(connection, _evaluations, dict(vars(evaluation)))

    def history(self, limit: int | None = None) -> tuple[Evaluation, ...]:
        """The newest evaluations, oldest first."""
        newest = select(_evaluations).order_by(_evaluations.c.round.desc()).limit(limit)
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

    def _prepare(self) -> None:
        with self._writing() as connection:
            if not inspect(connection).get_table_names():
                _SCHEMA.create_all(connection)
                _put(connection, _meta, {"key": "schema", "value": b"%d" % SCHEMA})
                return
            try:
                found = int(connection.scalar(select(_meta.c.value).where(_meta.c.key == "schema")))  # type: ignore[arg-type]
            except (OperationalError, TypeError, ValueError):
                raise Refused(Code.STORE_BAD, f"{self.path} is not a database of this program") from None
        if found != SCHEMA:
            raise Refused(Code.VERSION, f"{self.path} has schema {found}, this program reads schema {SCHEMA}")

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._engine.connect().execution_options(reads=True) as connection:
            yield connection

    def _all(self, cls: type[Any], query: Any) -> tuple[Any, ...]:
        with self._reading() as connection:
            return _values(connection, cls, query)


def _engine(path: Path) -> Engine:
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # transactions begin where we say so, below
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "trusted_schema=OFF"):
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
    newest: int | None = connection.scalar(select(func.max(_entries.c.round)))
    return 0 if newest is None else newest + 1


def _values(connection: Connection, cls: type[Any], query: Any) -> tuple[Any, ...]:
    rows: Iterable[bytes] = connection.scalars(query)
    return tuple(canonical.from_bytes(cls, data) for data in rows)


def _stored_node(row: RowMapping) -> StoredNode:
    fields = {key: value for key, value in row.items() if key != "pass"}
    return StoredNode(**fields, signed_pass=canonical.from_bytes(SignedPass, row["pass"]))
