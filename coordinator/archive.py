"""The archive: base checkpoints and parts on disk, folded into the state of any round. Knows no network."""

from __future__ import annotations

from coordinator.store import Store
from protocol.blobs import BlobStore
from protocol.codec import codec
from protocol.errors import Code, Refused
from protocol.fold import Outer, fold, outer_of
from protocol.runspec import RunSpec
from protocol.state import State, read_base
from protocol.types import Digest, LogEntry, Manifest


def rebuild(store: Store, blobs: BlobStore, manifest: Manifest, round_number: int | None = None) -> State:
    """The state of this round, or the newest that the archive reaches: the parts of the last records may still come.

    A part that has rotted is thrown away, so that a member can send it again.
    """
    update = RunSpec.from_json(manifest.spec).update
    outer, packing = outer_of(update), codec(update.codec)
    known = store.entry_count
    if round_number is not None and not 0 <= round_number <= known:
        raise Refused(Code.RUN_MISSING, f"round {round_number}, the log has 0 to {known}", fix="Choose one of them.")
    state, digest = _nearest_base(store, blobs, manifest, outer, known if round_number is None else round_number)
    for entry in store.entries(state.round, None if round_number is None else round_number - state.round):
        parts = _parts(blobs, entry)
        if parts is None and round_number is None:
            break
        if parts is None:
            raise Refused(Code.BLOB_MISSING, f"a part of round {entry.record.round} is not in the archive")
        if entry.record.state != digest:
            what = f"record {entry.record.round} starts from state {entry.record.state[:12]}, the archive has {digest[:12]}"
            raise Refused(Code.STATE_MISMATCH, what, fix="Restore the run's folder from a backup.")
        fold(state, entry.record, parts, packing, outer)
        digest = state.digest()
    return state


def _nearest_base(
    store: Store, blobs: BlobStore, manifest: Manifest, outer: Outer, round_number: int
) -> tuple[State, Digest]:
    """The newest whole base checkpoint at or before the round; each one can be made again from those before it."""
    refusal = Refused(Code.BLOB_MISSING, "the archive has no base checkpoint", fix="Restore it from a backup.")
    for base in reversed(store.bases()):
        if base.round > round_number:
            continue
        try:
            blobs.size(base.blob.digest)  # refuses what is missing, or no file of its own
            path = blobs.path(base.blob.digest)
            momentum = outer.keeps_momentum
            state = read_base(path, parameters=manifest.parameters, momentum=momentum, digest=base.state)
        except Refused as refused:
            refusal = refused
            continue
        if state.round == base.round:
            return state, base.state
    raise refusal


def _parts(blobs: BlobStore, entry: LogEntry) -> dict[int, bytes] | None:
    """A record's parts by index; none if one is not here."""
    found: dict[int, bytes] = {}
    for part in entry.record.parts:
        try:
            found[part.index] = blobs.read(part.digest)
        except Refused as refused:
            if refused.reason is Code.BLOB_CORRUPT:
                blobs.delete(part.digest)
            return None
    return found
