"""The archive: base checkpoints and parts on disk, folded into the state of any round. Knows no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog

from coordinator.store import Store
from protocol.blobs import BlobStore
from protocol.errors import Code, Refused
from protocol.exchange import packing_of
from protocol.fold import Outer, fold, outer_of
from protocol.log import check_link, genesis_head, head_after, line_head, next_head, turned
from protocol.runspec import RunSpec
from protocol.state import State, read_base, write_base
from protocol.types import BaseCheckpoint, Digest, Head, LogEntry, Manifest, Rollback, RoundNumber

QUARANTINE: Final = "quarantine"  # beside the blobs: what rotted tells what is wrong with a disk

_RESTORE: Final = "Restore the run's folder from a backup."

log = structlog.get_logger()


def rebuild(store: Store, blobs: BlobStore, manifest: Manifest, round_number: int | None = None) -> State:
    """The state of this round of the line, or the newest that the archive reaches: the last parts may still come, and a
    record that nobody can fold may have been certified.

    What has rotted is put into quarantine: a part, so that a member can send it again; a base checkpoint, so that
    nobody is sent it. Once the log has led to that checkpoint's round again, it is written anew.
    """
    update = RunSpec.from_json(manifest.spec).update
    outer, packing = outer_of(update), packing_of(update)
    known = store.entry_count
    if round_number is not None and not 0 <= round_number <= known:
        raise Refused(Code.RUN_MISSING, f"round {round_number}, the log has 0 to {known}", fix="Choose one of them.")
    rollbacks = [signed.rollback for signed in store.rollbacks()]
    goal = known if round_number is None else round_number
    state, digest, rotten = _nearest_base(store, blobs, manifest, outer, rollbacks, goal)
    head, branch = line_head(_records(store, manifest, state.round), rollbacks)
    for entry in store.entries(state.round, goal - state.round):
        record = entry.record
        parts = _parts(blobs, entry)
        if parts is None and round_number is None:
            break
        if parts is None:
            raise Refused(Code.BLOB_MISSING, f"a part of round {record.round} is not in the archive")
        try:
            check_link(record, head, manifest)
        except Refused as refused:
            raise Refused(Code.STATE_MISMATCH, refused.what, fix=_RESTORE) from None
        try:
            if record.state != digest:
                what = f"it starts from state {record.state[:12]}, the archive has {digest[:12]}"
                raise Refused(Code.STATE_MISMATCH, what)
            fold(state, record, parts, packing, outer)
        except Refused as refused:
            if round_number is None:
                break
            what = f"record {record.round} cannot be folded: {refused.what}"
            raise Refused(refused.reason, what, fix=f"Choose a round up to {record.round}.") from None
        digest = state.digest()
        head, branch = turned(next_head(record), branch, rollbacks)
        if state.round in rotten:
            _keep_again(store, blobs, state, head, branch)
    return state


def _nearest_base(
    store: Store, blobs: BlobStore, manifest: Manifest, outer: Outer, rollbacks: Sequence[Rollback], goal: int
) -> tuple[State, Digest, set[RoundNumber]]:
    """The newest whole base checkpoint at or before the round, and the rounds of the newer ones, which have rotted."""
    refusal = Refused(Code.BLOB_MISSING, "the archive has no base checkpoint", fix="Restore it from a backup.")
    rotten: set[RoundNumber] = set()
    for base in reversed([base for base in store.bases() if base.round <= goal]):
        try:
            _check_on_line(base, _records(store, manifest, base.round), rollbacks)
            blobs.verify(base.blob.digest)  # every byte: nodes are sent this file
            path = blobs.path(base.blob.digest)
            momentum = outer.keeps_momentum
            state = read_base(path, parameters=manifest.parameters, momentum=momentum, digest=base.state)
        except Refused as refused:
            refusal = refused
        else:
            if state.round == base.round:
                return state, base.state, rotten
            refusal = Refused(Code.CHECKPOINT_BAD, f"it holds round {state.round}")
        lies = _quarantine(blobs, base.blob.digest)
        log.warning(
            f"The base checkpoint of round {base.round} is rotten: {refusal.what}", round=base.round, moved=lies
        )
        rotten.add(base.round)
        if base.round > 0:  # the first has no parent to be made from: a copy may be put back in its place
            store.drop_base(base.round)
    raise Refused(refusal.reason, f"no base checkpoint is whole: {refusal.what}", fix=_RESTORE)


def _check_on_line(base: BaseCheckpoint, records: Head, rollbacks: Sequence[Rollback]) -> None:
    """Refuse a checkpoint of a state that the line does not have."""
    turns = [head_after(rollback).hash for rollback in rollbacks if rollback.to.round == base.round]
    if base.head not in (records.hash, *turns):
        raise Refused(Code.STATE_MISMATCH, f"it follows {base.head[:12]}, the log has {records.hash[:12]}")


def _records(store: Store, manifest: Manifest, round_number: int) -> Head:
    """So many records of the line, and the hash of the last of them."""
    if round_number == 0:
        return genesis_head(manifest)
    (entry,) = store.entries(round_number - 1, 1)
    return next_head(entry.record)


def _keep_again(store: Store, blobs: BlobStore, state: State, head: Head, branch: int) -> None:
    """The same state makes the same file, so whoever was downloading the old one can go on."""
    path = blobs.folder / f".new-base-{state.round}"
    try:
        digest = write_base(path, state)
        store.save_base(BaseCheckpoint(state.round, head.hash, digest, blobs.put_file(path), branch))
    finally:
        path.unlink(missing_ok=True)
    log.warning(f"The base checkpoint of round {state.round} is made again from the log", round=state.round)


def _parts(blobs: BlobStore, entry: LogEntry) -> dict[int, bytes] | None:
    """A record's parts by index; none if one is not here."""
    found: dict[int, bytes] = {}
    for part in entry.record.parts:
        try:
            found[part.index] = blobs.read(part.digest)
        except Refused as refused:
            if refused.reason is Code.BLOB_CORRUPT:
                lies = _quarantine(blobs, part.digest)
                number = entry.record.round
                log.warning(f"A part of round {number} is rotten: {refused.what}", round=number, moved=lies)
            return None
    return found


def _quarantine(blobs: BlobStore, digest: Digest) -> str | None:
    """Move a blob out of reach; it goes on counting towards the cap. Returns where it lies, if it was there at all."""
    path: Path = blobs.path(digest)
    aside = blobs.folder / QUARANTINE / digest
    aside.parent.mkdir(mode=0o700, exist_ok=True)
    try:
        path.replace(aside)
    except FileNotFoundError:
        return None
    return str(aside)
