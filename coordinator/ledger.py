"""The ledger on disk: reads a run's books as they are at one moment, and checks them and the archive. Changes nothing.

It reads the database with words of its own: a mistake in the code that writes the rows would be made again by the same
code reading them. The coordinator may run meanwhile.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import quote

from coordinator.core.leases import Cursor, Leases
from coordinator.core.ledger import SHORT, Books, EntryRow, EvaluationRow, Finding, Log, Wrong, check
from coordinator.core.strikes import Mark, by_node
from coordinator.folder import RunFolder
from protocol import canonical, identity
from protocol.blobs import BlobStore
from protocol.errors import Code, Refused
from protocol.exchange import packing_of
from protocol.fold import fold, outer_of
from protocol.log import record_hash
from protocol.runspec import RunSpec
from protocol.state import State, read_base
from protocol.types import (
    BaseCheckpoint,
    DataRange,
    Digest,
    Lease,
    LogEntry,
    NodeId,
    Rollback,
    Shard,
    SignedManifest,
    SignedRollback,
    SignedRoster,
)

T = TypeVar("T")

SCHEMA: Final = 4  # of coordinator/store.py
LOOKS_MAX: Final = 3  # a checkpoint that goes while it is being read is no finding
_SUM_BYTES: Final = 4  # CRC-32 before each value
_BUSY_SECONDS: Final = 5.0


@dataclass(frozen=True)
class Verdict:
    """What was looked at, and the first row that is wrong."""

    finding: Finding | None
    records: int = 0
    undone: int = 0
    rollbacks: int = 0
    rosters: int = 0
    signatures: int = 0
    parts: int = 0
    nodes: int = 0
    tokens: int = 0  # in records that stay
    sequences: int = 0  # of data in them
    bases: int = 0
    evaluations: int = 0
    folded: int | None = None  # records, undone ones included; none without --deep
    waiting: int = 0  # records that cannot be folded yet, for parts of theirs are still to come


def verify(folder: RunFolder, *, deep: bool = False) -> Verdict:
    """Recompute the books of this run from its log; `deep` reads the archive again as well."""
    books = None
    for look in range(LOOKS_MAX):
        try:
            books = read(folder)
            log = check(books)
            return _verdict(books, log, _fold_again(books, log, folder.open_blobs()) if deep else None)
        except Wrong as wrong:
            moved = deep and books is not None and look + 1 < LOOKS_MAX and _moved(books, folder)
            if not moved:
                return Verdict(wrong.finding)
    raise AssertionError("the last look ends with a verdict")


def _moved(books: Books, folder: RunFolder) -> bool:
    """Whether what was read is not what the database has now."""
    try:
        now = read(folder)
    except Wrong:
        return False
    return (now.rollbacks, now.bases) != (books.rollbacks, books.bases)


def _verdict(books: Books, log: Log, folded: tuple[int, int] | None) -> Verdict:
    spans = (span for entry in log.line for each in entry.record.contributions for span in each.ranges)
    return Verdict(
        finding=None,
        records=len(log.line),
        undone=len(books.entries) - len(log.line),
        rollbacks=len(books.rollbacks),
        rosters=len(books.rosters),
        signatures=sum(len(row.entry.certificate.signatures) for row in books.entries)
        + len(books.rosters)
        + len(books.rollbacks),
        parts=len(books.parts),
        nodes=len(books.credit),
        tokens=log.tokens[-1],
        sequences=sum(span.stop - span.start for span in spans),
        bases=len(books.bases),
        evaluations=len(books.evaluations),
        folded=folded[0] if folded else None,
        waiting=folded[1] if folded else 0,
    )


# the database


def read(folder: RunFolder) -> Books:
    """All rows that follow from the log, in one snapshot. Raises Wrong with the first that cannot be read."""
    path = folder.database
    never = f"the run in {folder.path} was never started, so it has no log"
    if not path.exists():
        raise Refused(Code.RUN_MISSING, never, fix="Run: barnraise-coordinator start")
    try:
        uri = f"file:{quote(os.fsencode(path))}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)) as connection:
            connection.execute("BEGIN")
            meta = dict(connection.execute("SELECT key, value FROM meta"))
            if meta.get("schema") != b"%d" % SCHEMA:
                found = canonical.shown(repr(meta.get("schema")))
                raise Refused(Code.VERSION, f"{path} has schema {found}, this program reads schema {SCHEMA}")
            if "manifest" not in meta:
                raise Refused(Code.RUN_MISSING, never, fix="Run: barnraise-coordinator start")
            books = _books(connection, _value(SignedManifest, meta["manifest"], "meta", "manifest"))
    except sqlite3.Error as error:
        raise Refused(Code.STORE_BAD, f"{path} cannot be read: {canonical.shown(str(error))}") from None
    run = books.manifest.manifest.run
    if (folder.keys / "coordinator.key").exists() and folder.key().public != identity.coordinator_key(run):
        raise Wrong("meta", "manifest", says=f"run {canonical.shown(run)}", wanted="a run of this folder's key")
    return books


def _books(connection: sqlite3.Connection, manifest: SignedManifest) -> Books:
    def rows(query: str) -> list[tuple[Any, ...]]:
        return connection.execute(query).fetchall()

    def values(cls: type[T], table: str, column: str) -> dict[Any, T]:
        found = rows(f"SELECT {column}, bytes FROM {table} ORDER BY {column}")  # noqa: S608  # names of ours
        return {at: _value(cls, data, table, f"{column} {at}") for at, data in found}

    nodes = rows("SELECT node, name, credit_tokens FROM nodes ORDER BY node")
    shards = rows("SELECT position, bytes FROM shards WHERE NOT heldout ORDER BY position")
    cursor = next(iter(rows("SELECT bytes, serial FROM cursor")), None)
    parts = "SELECT parts.digest, entries.hash FROM parts LEFT JOIN entries ON entries.id = parts.entry"
    return Books(
        manifest=manifest,
        rosters=values(SignedRoster, "rosters", "epoch"),
        rollbacks=values(SignedRollback, "rollbacks", "number"),
        entries=tuple(
            EntryRow(
                _whole(number, "entries", f"round {number}"),
                str(hashed),
                _value(LogEntry, data, "entries", f"round {number}, {str(hashed)[:SHORT]}"),
                undone,
            )
            for number, hashed, undone, data in rows("SELECT round, hash, undone, bytes FROM entries ORDER BY id")
        ),
        parts={Digest(str(digest)): str(record or "") for digest, record in rows(parts)},
        credit={NodeId(str(node)): _whole(credit, "nodes", str(node)[:SHORT]) for node, _, credit in nodes},
        names={NodeId(str(node)): str(name) for node, name, _ in nodes},
        trails=by_node(values(Mark, "marks", "id").values()),
        shards=(stock := tuple(_value(Shard, data, "shards", f"position {at}") for at, data in shards)),
        leases=Leases(
            stock,
            _value(Cursor, cursor[0], "cursor", "id 0") if cursor else Cursor(),
            tuple(values(DataRange, "returned", "position").values()),
            {str(lease_id): lease for lease_id, lease in values(Lease, "leases", "lease_id").items()},
            _whole(cursor[1], "cursor", "id 0") if cursor else 0,
        ),
        bases=values(BaseCheckpoint, "bases", "round"),
        evaluations=tuple(
            EvaluationRow(
                _whole(number, "evaluations", f"round {number}"),
                _whole(tokens, "evaluations", f"round {number}"),
                undone,
            )
            for number, tokens, undone in rows("SELECT round, tokens, undone FROM evaluations ORDER BY id")
        ),
    )


def _value(cls: type[T], data: object, table: str, key: str) -> T:
    key = canonical.shown(key)
    if not isinstance(data, bytes) or data[:_SUM_BYTES] != zlib.crc32(data[_SUM_BYTES:]).to_bytes(_SUM_BYTES, "big"):
        raise Wrong(table, key, says="bytes that have changed on disk", wanted=f"a {cls.__name__}")
    try:
        return canonical.from_bytes(cls, data[_SUM_BYTES:])
    except Refused as refused:
        raise Wrong(table, key, says=refused.what, wanted=f"a {cls.__name__}") from None


def _whole(value: object, table: str, key: str) -> int:
    if not isinstance(value, int):
        raise Wrong(table, canonical.shown(key), says=canonical.shown(repr(value)), wanted="a whole number")
    return value


# the archive


def _fold_again(books: Books, log: Log, blobs: BlobStore) -> tuple[int, int]:
    """Read every blob again and fold every record; answers how many were folded, and how many still lack parts."""
    for number, base in sorted(books.bases.items()):
        _check_base(blobs, number, base)
    return _Folding(books, log, blobs).follow()


def _check_base(blobs: BlobStore, number: int, base: BaseCheckpoint) -> None:
    try:
        blobs.verify(base.blob.digest)
        size = blobs.size(base.blob.digest)
    except Refused as refused:
        raise Wrong("bases", f"round {number}", says=refused.what, wanted="a checkpoint on disk") from None
    if size != base.blob.size:
        says = f"a file of {base.blob.size:,} bytes"
        raise Wrong("bases", f"round {number}", says=says, wanted=f"{size:,} bytes")


class _Folding:
    """The replica, taken through the whole story of the log. It has none where parts are still to come."""

    def __init__(self, books: Books, log: Log, blobs: BlobStore) -> None:
        self._log = log
        self._blobs = blobs
        self._bases = {base.state: base for base in books.bases.values()}
        self._newest = books.bases.get(len(log.line))  # the only one that no record speaks of
        measured = (row.round for row in books.evaluations if row.undone_by is None)
        self._reached = max((*books.bases, *measured), default=0)  # the archive was folded as far as this
        self._manifest = books.manifest.manifest
        update = RunSpec.from_json(self._manifest.spec).update
        self._outer, self._packing = outer_of(update), packing_of(update)
        self._targets = {each.to.round for each in log.story if isinstance(each, Rollback)}
        self._kept: dict[int, State] = {}  # where rollbacks go back to
        self._state: State | None = None

    def follow(self) -> tuple[int, int]:
        folded = waiting = 0
        for each in self._log.story:
            if isinstance(each, Rollback):
                self._kept = {number: state for number, state in self._kept.items() if number <= each.to.round}
                kept = self._kept.get(each.to.round)
                self._state = None if kept is None else _copy(kept)
            elif self._fold(each):
                folded += 1
            else:
                waiting += 1
        newest = self._newest
        if newest is not None and self._state is not None and (found := self._state.digest()) != newest.state:
            says = f"state {canonical.shown(newest.state[:SHORT])}"
            raise Wrong("bases", f"round {newest.round}", says=says, wanted=f"state {found[:SHORT]}")
        return folded, waiting

    def _fold(self, entry: LogEntry) -> bool:
        """Fold one record into the state before it; False where one or the other is not here."""
        record, key = entry.record, f"round {entry.record.round}, {record_hash(entry.record)[:SHORT]}"
        if self._state is None and record.state in self._bases:
            self._state = self._read(self._bases[record.state])
            self._keep()
        if self._state is not None and (found := self._state.digest()) != record.state:
            raise Wrong("entries", key, says=f"state {record.state[:SHORT]}", wanted=f"state {found[:SHORT]}")
        parts = self._parts(entry)
        if parts is None or self._state is None:
            self._state = None
            return False
        try:
            fold(self._state, record, parts, self._packing, self._outer)
        except Refused as refused:
            raise Wrong("entries", key, says=refused.what, wanted="parts that can be folded") from None
        self._keep()
        return True

    def _keep(self) -> None:
        if self._state is not None and self._state.round in self._targets:
            self._kept[self._state.round] = _copy(self._state)

    def _read(self, base: BaseCheckpoint) -> State:
        path, momentum = self._blobs.path(base.blob.digest), self._outer.keeps_momentum
        try:
            return read_base(path, parameters=self._manifest.parameters, momentum=momentum, digest=base.state)
        except Refused as refused:
            raise Wrong("bases", f"round {base.round}", says=refused.what, wanted="a checkpoint on disk") from None

    def _parts(self, entry: LogEntry) -> dict[int, bytes] | None:
        """A record's parts by index; none while one is still to come."""
        found: dict[int, bytes] = {}
        stays = entry.record.round < len(self._log.line) and self._log.line[entry.record.round] == entry
        for part in entry.record.parts:
            try:
                found[part.index] = self._blobs.read(part.digest)
            except Refused as refused:
                missing = refused.reason is Code.BLOB_MISSING
                if missing and not (stays and entry.record.round < self._reached):
                    return None
                raise Wrong("parts", part.digest[:SHORT], says=refused.what, wanted="a part on disk") from None
        return found


def _copy(state: State) -> State:
    momentum = None if state.momentum is None else state.momentum.copy()
    return State(state.round, state.params.copy(), momentum, state.consumed)
