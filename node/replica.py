"""This node's copy of the shared state: a base checkpoint and the log folded onto it. Blocking; knows no network."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from node.journal import Journal
from node.training import Vectors
from protocol.blobs import BlobStore
from protocol.errors import Code, Refused
from protocol.exchange import Packing
from protocol.fold import Outer, check_update, fold
from protocol.log import head_after, next_head, next_turn, record_hash
from protocol.state import State, read_base, write_base
from protocol.types import BaseCheckpoint, BlobRef, Digest, Head, LogEntry, Manifest, SignedRollback

_TAKEN_BACK = "Tell the researcher, who can take the run back; then start again with: barnraise start"
ENTRIES_KEPT = 64  # rounds behind our own checkpoint that peers may still ask for


class Replica:
    """The state in the vector that the trainer shares, and how far the log has been folded into it."""

    def __init__(
        self,
        manifest: Manifest,
        *,
        journal: Journal,
        blobs: BlobStore,
        vectors: Vectors,
        packing: Packing,
        outer: Outer,
    ) -> None:
        self._manifest = manifest
        self._journal = journal
        self._blobs = blobs
        self._vectors = vectors
        self._packing = packing
        self._outer = outer
        self._state: State | None = None
        self.head: Head | None = None
        self.branch = 0  # the number of the newest rollback that this copy has followed
        self.digest = Digest("")
        self.last: LogEntry | None = None

    @property
    def state(self) -> State:
        assert self._state is not None, "no checkpoint has been loaded"
        return self._state

    def open_own(self) -> bool:
        """Load the checkpoint that this node wrote itself, if there is a whole one, and fold its log onto it.

        Not if a rollback has undone it: the way back is then to an older one."""
        try:
            base = self._journal.base()
        except Refused:
            return False
        if base is None or not (path := self._base_path(base.state)).exists():
            return False
        due = next_turn(base.round, base.branch, (signed.rollback for signed in self._journal.rollbacks()))
        if due is not None and due.to.round < base.round:
            return False
        try:
            self.load(base, path)
        except Refused:  # rotten or torn: the coordinator has another
            return False
        self.replay()
        return True

    def load(self, base: BaseCheckpoint, path: Path) -> None:
        """Start from a base checkpoint, checked against the digest that it was announced with."""
        found = read_base(
            path, parameters=self._manifest.parameters, momentum=self._outer.keeps_momentum, digest=base.state
        )
        if found.round != base.round:
            raise Refused(Code.STATE_MISMATCH, f"base checkpoint of round {found.round}, expected {base.round}")
        np.copyto(self._vectors.shared, found.params)
        self._state = State(found.round, self._vectors.shared, found.momentum, found.consumed)
        self.head, self.branch = Head(base.round, base.head), base.branch
        self.digest = base.state
        self.last = None

    def replay(self) -> None:
        """Fold the entries that are on disk here, up to the first that lacks a part, and turn where the line turns."""
        rollbacks = self._journal.rollbacks()
        while self.head is not None:
            due = next_turn(self.head.round, self.branch, (signed.rollback for signed in rollbacks))
            if due is not None and due.to.round == self.head.round:
                self.turn(rollbacks[due.number - 1])
                undone = self._journal.entry(self.head.round)
                if undone is not None and undone.record.previous != self.head.hash:
                    self._journal.undo(rollbacks[due.number - 1])
                continue
            entry = self._journal.entry(self.head.round)
            if due is not None or entry is None or entry.record.previous != self.head.hash:
                return
            if not all(self._blobs.has(part.digest) for part in entry.record.parts):
                return
            try:
                self.fold(entry)
            except Refused as refused:
                if refused.reason is not Code.BLOB_CORRUPT:
                    raise
                return  # it is caught up with as if it had never been here

    def turn(self, signed: SignedRollback) -> None:
        """Go on from this very head on another branch."""
        rollback = signed.rollback
        assert self.head is not None and self.head.round == rollback.to.round
        if self.last is not None and record_hash(self.last.record) != rollback.to.hash:
            what = f"rollback {rollback.number} leaves record {rollback.to.hash[:12]}, here is another"
            raise Refused(Code.TWO_STORIES, what)
        self.head, self.branch = head_after(rollback), rollback.number

    def rewind(self, signed: SignedRollback) -> bool:
        """Go back to the state that the rollback leaves, from our own checkpoint; false if that is too new as well.

        Whatever of the way is lost here, a part or an entry, is left to be caught up with."""
        self._journal.undo(signed)
        return self.open_own()

    def fold(self, entry: LogEntry) -> Digest:
        """Make the entry durable, if it can be folded, then apply it. A crash in between is mended by the next replay."""
        record = entry.record
        if record.state != self.digest:
            what = f"record {record.round} starts from state {record.state[:12]}, this replica is at {self.digest[:12]}"
            raise Refused(Code.STATE_MISMATCH, what)
        parts = {part.index: self._read(part.digest) for part in record.parts}
        try:
            check_update(self.state, record, parts, self._packing)
        except Refused as refused:
            what = f"record {record.round} is certified and cannot be folded: {refused.what}"
            raise Refused(refused.reason, what, fix=_TAKEN_BACK) from None
        self._journal.append(entry)
        fold(self.state, record, parts, self._packing, self._outer)
        self.head, self.last = next_head(record), entry
        self.digest = self.state.digest()
        return self.digest

    def _read(self, digest: Digest) -> bytes:
        """A part; one that has rotted goes, so that it is fetched again."""
        try:
            return self._blobs.read(digest)
        except Refused:
            self._blobs.delete(digest)
            raise

    def save_base(self) -> None:
        """Write our own checkpoint, and drop what it makes needless. Until the journal names it, the one before stands."""
        assert self.head is not None
        path = self._base_path(self.digest)
        try:
            state = write_base(path, self.state)
            reference = BlobRef(Digest("0" * 64), path.stat().st_size)
            self._journal.save_base(BaseCheckpoint(self.head.round, self.head.hash, state, reference, self.branch))
        finally:
            self._drop_bases_but(self._journal.base())
        oldest = self.head.round - ENTRIES_KEPT
        number = oldest - 1
        while (entry := self._journal.entry(number)) is not None:
            for part in entry.record.parts:
                self._blobs.delete(part.digest)
            number -= 1
        self._journal.forget_before(oldest)

    def _base_path(self, state: Digest) -> Path:
        return self._journal.folder / f"base-{state[:16]}.safetensors"

    def _drop_bases_but(self, kept: BaseCheckpoint | None) -> None:
        """All but the one that the journal names."""
        for path in self._journal.folder.glob("base-*.safetensors"):
            if kept is None or path != self._base_path(kept.state):
                path.unlink(missing_ok=True)
